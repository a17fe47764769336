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

    // Rounds a row's numbers. Its blocks of 32 lie `stride` apart. `middle`: the code of the cache that stands for
    // zero.
    void set(int row, const float* x, int64_t stride, uint32_t middle = Bytes::kMiddle) {
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
        offsets_[row] = static_cast<int32_t>(static_cast<uint32_t>(-total) * middle);
    }

    // Products with 32 columns, out[rows][32]: blocks of codes as in the cache. While one is read, that `ahead` places
    // after it is prefetched. `finish(row, column, products)` gets them in vectors, without the scale of the row.
    template <class F>
    void multiply(const uint8_t* const* blocks, int ahead, F finish) const {
        alignas(64) int32_t totals[kTokenRows * kColumns];
        for (int first = 0; first < rows_; first += kRowsOfCodes) {
            const int count = std::min(kRowsOfCodes, rows_ - first);
            for (int r = 0; r < count * kDigits; ++r) {
                const Totals offset = splat_total(r % kDigits == 0 ? offsets_[first + r / kDigits] : 0);
                for (int i = 0; i < kColumns; i += kIntColumns) store_totals(totals + r * kColumns + i, offset);
            }
            add_products(blocks, blocks_, ahead, count * kDigits,
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
#if defined(__AVX512F__)
        Totals total = load_totals(totals);
        if constexpr (kDigits == 2) total = plus(total, _mm512_slli_epi32(load_totals(totals + kColumns), 8));
        return {to_floats(total)};
#else
        alignas(64) float numbers[kLanes];
        for (int i = 0; i < kLanes; ++i) {
            uint32_t total = static_cast<uint32_t>(totals[i]);
            if constexpr (kDigits == 2) total += static_cast<uint32_t>(totals[kColumns + i]) << 8;
            numbers[i] = static_cast<float>(static_cast<int32_t>(total));
        }
        return load(numbers);
#endif
    }

    // Returns the sum of the codes.
    static int32_t round_block(const float* x, float inverse, TokenCode* out) {
        constexpr float kRounder = 0x1.8p23f;  // as in dot_int8.cpp
#if defined(__AVX512F__)
        if constexpr (kDigits == 2) {
            const __m512i base = _mm512_set1_epi32(static_cast<int>(bits_of(kRounder)));
            __m512i total = _mm512_setzero_si512();
            for (int i = 0; i < kBlock; i += kLanes) {
                const Vec rounded = load(x + i) * splat(inverse) + splat(kRounder);
                const __m512i codes = _mm512_sub_epi32(_mm512_castps_si512(rounded.v), base);
                const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(codes, _mm512_set1_epi32(128)), 8);
                total = _mm512_add_epi32(total, codes);
                _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm512_cvtepi32_epi8(codes));
                _mm_storeu_si128(reinterpret_cast<__m128i*>(out + kBlock + i), _mm512_cvtepi32_epi8(high));
            }
            return _mm512_reduce_add_epi32(total);
        }
#endif
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

// How a cache in int8 stores a head of a token.
struct Int8Heads {
    static constexpr float kLargestCode = 127.0f;

    static size_t unit_bytes(int dim) { return static_cast<size_t>(kUnit) * (dim + sizeof(BFloat16)); }
    static BFloat16* scales_of(uint8_t* unit, int dim) { return reinterpret_cast<BFloat16*>(unit + kUnit * dim); }
    static const BFloat16* scales_of(const uint8_t* unit, int dim) {
        return reinterpret_cast<const BFloat16*>(unit + kUnit * dim);
    }

    // Offset of a code in a block.
    static int offset_of(int column, int k) {
        return column / kLanes * (kBlock * kLanes) + k / 4 * kLineBytes + column % kLanes * 4 + k % 4;
    }

    // The codes of a token's head, plus 128, and some more up to a whole vector; returns the scale.
    template <class T>
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
        constexpr float kRounder = 0x1.8p23f;  // what is added to it is in the low bits
        for (int i = 0; i < size; i += kLanes) {
            const Vec limit = splat(kLargestCode);
            const Vec quotient = load_first(x + i, size - i) / splat(is_usable ? divisor : 1.0f);
            const Vec rounded = is_usable ? nearest(min(limit, max(negate(limit), quotient))) : zero();
            store_low_bytes(codes + i, rounded + splat(kRounder + Bytes::kMiddle));
        }
        return scale;
    }

    // Writes a token's K, whose place is in the unit.
    template <class T>
    static void write_key(uint8_t* unit, int dim, int place, const T* k, int size) {
        uint8_t codes[kMaxHeadDim];
        scales_of(unit, dim)[place] = encode(k, size, codes);
        for (int i = 0; i < size; i += 4)
            std::memcpy(unit + i / kBlock * kBlockElements + offset_of(place, i % kBlock), codes + i,
                        std::min(4, size - i));
    }

    // Prefetches what `write_key` will write to.
    static void prefetch_key(const uint8_t* unit, int dim, int place) {
        for (int i = 0; i < dim; i += 4)
            prefetch(address_of(unit + i / kBlock * kBlockElements + offset_of(place, i % kBlock)));
        prefetch(address_of(scales_of(unit, dim)));
    }
};

template <class Type>
class Int8Cache {
public:
    using T = Type;
    using Stored = uint8_t;
    using Rows = CodeRows;
    using Heads = Int8Heads;
    static constexpr bool kIsInteger = true;
    static constexpr bool kHasGroups = false;
    static constexpr int kValueElements = kBlockElements;

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
            std::memset(keys, 0, Heads::unit_bytes(head_dim) * (block_size / kUnit));
            std::memset(values, 0, Heads::unit_bytes(v_head_dim) * (block_size / kUnit));
        }
        place %= kUnit;
        Heads::write_key(keys, head_dim, place, k, k_size);
        Heads::scales_of(values, v_head_dim)[place] = Heads::encode(v, v_size, codes);
        for (int i = 0; i < v_size; i += kLanes) {
            uint8_t* target = values + i / kColumns * kBlockElements + Heads::offset_of(i % kColumns, place);
            for (int j = 0; j < kLanes && i + j < v_size; ++j) target[4 * j] = codes[i + j];
        }
    }

    // Prefetches what `write` will write to.
    void prefetch_place(int64_t block, int head, int place) const {
        const uint8_t* values = values_of(block, head, place);
        Heads::prefetch_key(keys_of(block, head, place), head_dim, place % kUnit);
        place %= kUnit;
        for (int i = 0; i < v_head_dim; i += kLanes)
            prefetch(address_of(values + i / kColumns * kBlockElements + Heads::offset_of(i % kColumns, place)));
        prefetch(address_of(Heads::scales_of(values, v_head_dim)));
    }

    // As of KVCache, without the scales of the tokens.
    void multiply(const Rows& x, const uint8_t* const* blocks, float* sums) const {
        x.multiply(blocks, kBlocksAhead<Stored>, [&](int row, int column, Vec products) {
            store(sums + row * kColumns + column, products * splat(x.scale(row)));
        });
    }

    // Reads the scales of some units, of which the blocks are listed as `Attention` lists them.
    void read_scales(int units, const uint8_t* const* blocks) {
        const int key_blocks = head_dim / kBlock;
        for (int i = 0; i < units; ++i) {
            const BFloat16* of_keys = Heads::scales_of(blocks[i * key_blocks], head_dim);
            const BFloat16* of_values = Heads::scales_of(blocks[units * key_blocks + i], v_head_dim);
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
    uint8_t* unit_of(uint8_t* cache, int dim, int64_t block, int head, int place) const {
        return cache + ((block * num_kv_heads + head) * (block_size / kUnit) + place / kUnit) * Heads::unit_bytes(dim);
    }

    uint8_t* keys_;
    uint8_t* values_;
    float* key_scales_;
    float* value_scales_;
};

}  // namespace octavo
