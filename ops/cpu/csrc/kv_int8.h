// A KV cache in int8 and products with it, which are sums of integers; see ops/reference/kv_codes.py.
//
// A unit is that of kv_cache.h with a byte per number, in the layout that int8 products read (quantized.h): in a block
// of 32 x 32, half of the columns after the other, [32 k / 4][16 columns][4 k], as codes plus 128. After the blocks
// follow the scales of the unit's 32 tokens.
//
// Queries and softmax weights are rounded to 16 bits, with a scale for each row: closer than bfloat16 is. So nothing
// that is read is converted, and sums are exact: their bits depend neither on the CPU nor on the other rows. The scales
// of K are factors of the scores, and those of V of the weights.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#include "dot_token.h"
#include "heads.h"
#include "kv_cache.h"
#include "vec_math.h"

namespace octavo {

// Left factors in 16 bits: as they are, or as two digits in 8 bits, if the CPU multiplies those.
constexpr int kDigits = sizeof(TokenCode) == 1 ? 2 : 1;
constexpr int kLargestLeft = 127 << 8;  // so that both digits are in int8
constexpr int kRowsOfCodes = std::max(1, kTokenRows / kDigits);

// Rows of a left factor in 16 bits. Up to kRowsOfCodes at a time lie side by side: [blocks][rows][digits][32].
class CodeRows {
public:
    CodeRows(int most_rows, int most_blocks, Scratch& scratch)
        : codes_(scratch.take<TokenCode>(static_cast<size_t>(most_rows) * most_blocks * kDigits * kBlock)),
          scales_(scratch.take<float>(most_rows)),
          offsets_(scratch.take<int32_t>(most_rows)) {}

    void resize(int rows, int blocks) {
        rows_ = rows;
        blocks_ = blocks;
    }

    // Rounds a row's numbers. Its blocks of 32 lie `stride` apart.
    void set(int row, const float* x, int64_t stride) {
        constexpr float kSmallest = 0x1p-100f;  // as in dot_int8.cpp
        Vec top = zero(), invalid = zero();
        for (int k = 0; k < blocks_; ++k) {
            for (int i = 0; i < kBlock; i += kLanes) {
                const Vec numbers = load(x + k * stride + i);
                top = max(top, absolute(numbers));
                invalid = invalid + numbers * zero();  // NaN for infinity, too
            }
        }
        const float most = largest(top), error = sum(invalid);
        const bool is_usable = error == 0.0f && most >= kSmallest;
        scales_[row] = is_usable ? most / kLargestLeft : error;
        const float inverse = is_usable ? kLargestLeft / most : 0.0f;
        const int first = row / kRowsOfCodes * kRowsOfCodes, count = std::min(kRowsOfCodes, rows_ - first);
        TokenCode* out = codes_ + (first * blocks_ + row - first) * kDigits * kBlock;
        int32_t total = 0;
        for (int k = 0; k < blocks_; ++k, out += count * kDigits * kBlock)
            total += is_usable ? round_block(x + k * stride, inverse, out) : clear_block(out);
        offsets_[row] = static_cast<int32_t>(static_cast<uint32_t>(-total) * Bytes::kMiddle);
    }

    // Products with 32 columns, out[rows][32]: blocks of codes as in the cache, each of which is prefetched
    // kBlocksAhead before. `finish(row, column, products)` gets them in vectors, without the scale of the row.
    template <class F>
    void multiply(const uint8_t* const* blocks, F finish) const {
        alignas(64) int32_t totals[kTokenRows * kColumns];
        for (int first = 0; first < rows_; first += kRowsOfCodes) {
            const int count = std::min(kRowsOfCodes, rows_ - first);
            for (int r = 0; r < count * kDigits; ++r) {
                const int32_t offset = r % kDigits == 0 ? offsets_[first + r / kDigits] : 0;
                std::fill_n(totals + r * kColumns, kColumns, offset);
            }
            add_products(blocks, blocks_, kBlocksAhead<uint8_t>, count * kDigits,
                         codes_ + static_cast<int64_t>(first) * blocks_ * kDigits * kBlock, totals);
            for (int r = 0; r < count; ++r)
                for (int i = 0; i < kColumns; i += kLanes)
                    finish(first + r, i, number_of(totals + r * kDigits * kColumns + i));
        }
    }

    float scale(int row) const { return scales_[row]; }

private:
    // The low digit's totals, and 256 times those of the high one.
    static Vec number_of(const int32_t* totals) {
        alignas(64) float numbers[kLanes];
        for (int i = 0; i < kLanes; ++i) {
            uint32_t total = static_cast<uint32_t>(totals[i]);
            if constexpr (kDigits == 2) total += static_cast<uint32_t>(totals[kColumns + i]) << 8;
            numbers[i] = static_cast<float>(static_cast<int32_t>(total));
        }
        return load(numbers);
    }

    // Returns the sum of the codes.
    static int32_t round_block(const float* x, float inverse, TokenCode* out) {
        constexpr float kRounder = 0x1.8p23f;  // as in dot_int8.cpp
        int16_t codes[kBlock];
        int32_t total = 0;
        for (int i = 0; i < kBlock; ++i) {
            codes[i] = static_cast<int16_t>(bits_of(x[i] * inverse + kRounder));
            total += codes[i];
        }
        if constexpr (kDigits == 2) {
            for (int i = 0; i < kBlock; ++i) {
                out[i] = static_cast<TokenCode>(codes[i]);
                out[kBlock + i] = static_cast<TokenCode>((codes[i] + 128) >> 8);
            }
        } else {
            for (int i = 0; i < kBlock; ++i) out[i] = static_cast<TokenCode>(codes[place_of_code(i)]);
        }
        return total;
    }
    static int32_t clear_block(TokenCode* out) {
        std::fill_n(out, kDigits * kBlock, TokenCode{0});
        return 0;
    }

    TokenCode* codes_;
    float* scales_;
    int32_t* offsets_;  // minus the sum of the codes, times that of the codes of the cache
    int rows_ = 0;
    int blocks_ = 0;
};

template <class Type>
class Int8Cache {
public:
    using T = Type;
    using Stored = uint8_t;
    using Rows = CodeRows;
    static constexpr bool kIsInteger = true;

    Int8Cache(const OctavoAttention& op, int block_size, Scratch& scratch)
        : num_kv_heads(op.num_kv_heads),
          head_dim(blocks_of(op.head_dim, kBlock) * kBlock),
          v_head_dim(blocks_of(op.v_head_dim, kBlock) * kBlock),
          block_size(block_size),
          keys_(static_cast<uint8_t*>(op.k_cache)),
          values_(static_cast<uint8_t*>(op.v_cache)),
          key_scales_(scratch.take<float>(kSplitUnits * kUnit)),
          value_scales_(scratch.take<float>(kSplitUnits * kUnit)) {}

    uint8_t* keys_of(int64_t block, int head, int place) const { return unit_of(keys_, head_dim, block, head, place); }
    uint8_t* values_of(int64_t block, int head, int place) const {
        return unit_of(values_, v_head_dim, block, head, place);
    }

    // Writes a token's head.
    void write(int64_t block, int head, int place, const T* k, int k_size, const T* v, int v_size) const {
        uint8_t codes[kMaxHeadDim];
        uint8_t* keys = keys_of(block, head, place);
        uint8_t* values = values_of(block, head, place);
        if (place == 0) {  // nothing of an earlier owner remains
            std::memset(keys, 0, unit_bytes(head_dim) * (block_size / kUnit));
            std::memset(values, 0, unit_bytes(v_head_dim) * (block_size / kUnit));
        }
        place %= kUnit;
        scales_of(keys, head_dim)[place] = encode(k, k_size, codes);
        for (int i = 0; i < k_size; ++i) keys[i / kBlock * kBlockElements + offset_of(place, i % kBlock)] = codes[i];
        scales_of(values, v_head_dim)[place] = encode(v, v_size, codes);
        for (int i = 0; i < v_size; ++i)
            values[i / kColumns * kBlockElements + offset_of(i % kColumns, place)] = codes[i];
    }

    // Prefetches what `write` will write to.
    void prefetch_place(int64_t block, int head, int place) const {
        const uint8_t* keys = keys_of(block, head, place);
        const uint8_t* values = values_of(block, head, place);
        place %= kUnit;
        for (int i = 0; i < head_dim; i += 4)
            prefetch(address_of(keys + i / kBlock * kBlockElements + offset_of(place, i % kBlock)));
        for (int i = 0; i < v_head_dim; i += kLanes)
            prefetch(address_of(values + i / kColumns * kBlockElements + offset_of(i % kColumns, place)));
        prefetch(address_of(scales_of(keys, head_dim)));
        prefetch(address_of(scales_of(values, v_head_dim)));
    }

    // As of KVCache, without the scales of the tokens.
    void multiply(const Rows& x, const uint8_t* const* blocks, float* sums) const {
        x.multiply(blocks, [&](int row, int column, Vec products) {
            store(sums + row * kColumns + column, products * splat(x.scale(row)));
        });
    }

    // Reads the scales of some units, of which the blocks are listed as `Attention` lists them.
    void read_scales(int units, const uint8_t* const* blocks) {
        const int key_blocks = head_dim / kBlock;
        for (int i = 0; i < units; ++i) {
            const BFloat16* of_keys = scales_of(blocks[i * key_blocks], head_dim);
            const BFloat16* of_values = scales_of(blocks[units * key_blocks + i], v_head_dim);
            for (int j = 0; j < kUnit; j += kLanes) {
                store(key_scales_ + i * kUnit + j, load(of_keys + j));
                store(value_scales_ + i * kUnit + j, load(of_values + j));
            }
        }
    }
    // By token, from the first unit's on.
    const float* key_scales() const { return key_scales_; }
    const float* value_scales() const { return value_scales_; }

    const int num_kv_heads;
    const int head_dim;    // padded
    const int v_head_dim;  // padded
    const int block_size;

private:
    static constexpr float kLargestCode = 127.0f;

    static size_t unit_bytes(int dim) { return static_cast<size_t>(kUnit) * (dim + sizeof(BFloat16)); }
    uint8_t* unit_of(uint8_t* cache, int dim, int64_t block, int head, int place) const {
        return cache + ((block * num_kv_heads + head) * (block_size / kUnit) + place / kUnit) * unit_bytes(dim);
    }
    static BFloat16* scales_of(uint8_t* unit, int dim) { return reinterpret_cast<BFloat16*>(unit + kUnit * dim); }
    static const BFloat16* scales_of(const uint8_t* unit, int dim) {
        return reinterpret_cast<const BFloat16*>(unit + kUnit * dim);
    }

    // Offset of a code in a block.
    static int offset_of(int column, int k) {
        return column / kLanes * (kBlock * kLanes) + k / 4 * kLineBytes + column % kLanes * 4 + k % 4;
    }

    // The codes of a token's head, plus 128; returns the scale.
    static BFloat16 encode(const T* x, int size, uint8_t* codes) {
        Vec top = zero(), invalid = zero();
        for (int i = 0; i < size; i += kLanes) {
            const Vec numbers = load_first(x + i, size - i);
            top = max(top, absolute(numbers));
            invalid = invalid + numbers * zero();  // NaN for infinity, too
        }
        const BFloat16 scale = from_float<BFloat16>(largest(top) / kLargestCode + sum(invalid));
        const float divisor = to_float(scale);
        const bool is_usable = divisor > 0.0f;
        for (int i = 0; i < size; i += kLanes) {
            float rounded[kLanes];
            const Vec limit = splat(kLargestCode);
            const Vec quotient = load_first(x + i, size - i) / splat(is_usable ? divisor : 1.0f);
            store(rounded, nearest(min(limit, max(negate(limit), quotient))));
            for (int j = 0; j < kLanes && i + j < size; ++j)
                codes[i + j] = static_cast<uint8_t>(is_usable ? static_cast<int>(rounded[j]) + Bytes::kMiddle : 128);
        }
        return scale;
    }

    uint8_t* keys_;
    uint8_t* values_;
    float* key_scales_;
    float* value_scales_;
};

}  // namespace octavo
