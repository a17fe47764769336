// A KV cache with K in int8 and V in 4 bits; see ops/reference/kv_codes.py.
//
// K is that of kv_int8.h. V has a scale and a minimum for each 32 columns of a token: v = scale * code + minimum. A
// block of 32 x 32 codes has 512 bytes: the low halves of its bytes are the codes of the first 16 columns in the layout
// of int8 blocks, the high halves those of the others. After the blocks of a unit follow, for each 32 columns, the
// scales of its 32 tokens and then their minimums.
//
// The codes of some columns are unpacked once for all rows, into the L1 cache. Scales are factors of the weights, which
// are then rounded to 16 bits for these columns, and the sum of weights and minimums is a number for each row.
#pragma once

#include "kv_int8.h"

namespace octavo {

template <class Type>
class Int4Cache {
public:
    using T = Type;
    using Stored = uint8_t;
    using Rows = CodeRows;
    using Heads = Int8Heads;
    static constexpr bool kIsInteger = true;
    static constexpr bool kHasGroups = true;
    static constexpr int kValueElements = kBlockElements / 2;

    Int4Cache(const OctavoAttention& op, int block_size, Scratch& scratch)
        : num_kv_heads(op.num_kv_heads),
          head_dim(blocks_of(op.head_dim, kBlock) * kBlock),
          v_head_dim(blocks_of(op.v_head_dim, kBlock) * kBlock),
          block_size(block_size),
          keys_(static_cast<uint8_t*>(op.k_cache)),
          values_(static_cast<uint8_t*>(op.v_cache)),
          key_scales_(scratch.take<float>(kSplitUnits * kUnit)),
          units_(scratch.take<const uint8_t*>(kSplitUnits)),
          codes_(scratch.take<uint8_t>(kSplitUnits * kBlockElements)),
          blocks_(scratch.take<const uint8_t*>(kSplitUnits)),
          weights_(scratch.take<float>(kSplitUnits * kUnit)),
          shifts_(scratch.take<float>(kRows<T>)) {
        for (int i = 0; i < kSplitUnits; ++i) blocks_[i] = codes_ + i * kBlockElements;
    }

    uint8_t* keys_of(int64_t block, int head, int place) const {
        return keys_ + unit(block, head, place) * Heads::unit_bytes(head_dim);
    }
    uint8_t* values_of(int64_t block, int head, int place) const {
        return values_ + unit(block, head, place) * value_bytes();
    }

    // Writes a token's head.
    void write(int64_t block, int head, int place, const T* k, int k_size, const T* v, int v_size) const {
        uint8_t* keys = keys_of(block, head, place);
        uint8_t* values = values_of(block, head, place);
        if (place == 0) {  // nothing of an earlier owner remains
            std::memset(keys, 0, Heads::unit_bytes(head_dim) * (block_size / kUnit));
            std::memset(values, 0, value_bytes() * (block_size / kUnit));
        }
        place %= kUnit;
        Heads::write_key(keys, head_dim, place, k, k_size);
        for (int i = 0; i < v_size; i += kColumns) {
            uint8_t codes[kColumns] = {};
            BFloat16* scales = scales_of(values, i / kColumns);
            encode(v + i, std::min(kColumns, v_size - i), codes, scales[place], scales[kUnit + place]);
            uint8_t* target = values + i / kColumns * kValueElements;
            target += Heads::offset_of(0, place);
            for (int j = 0; j < kLanes; ++j) target[4 * j] = static_cast<uint8_t>(codes[j] | codes[kLanes + j] << 4);
        }
    }

    // Prefetches what `write` will write to.
    void prefetch_place(int64_t block, int head, int place) const {
        const uint8_t* values = values_of(block, head, place);
        place %= kUnit;
        Heads::prefetch_key(keys_of(block, head, place), head_dim, place);
        for (int i = 0; i < v_head_dim / kColumns; ++i) {
            prefetch(address_of(values + i * kValueElements + Heads::offset_of(0, place)));
            prefetch(address_of(scales_of(values, i)));
            prefetch(address_of(scales_of(values, i) + kUnit));
        }
    }

    // As of KVCache, for K alone and without the scales of the tokens.
    void multiply(const Rows& x, const uint8_t* const* blocks, float* sums) const {
        x.multiply(blocks, kBlocksAhead<Stored>, [&](int row, int column, Vec products) {
            store(sums + row * kColumns + column, products * splat(x.scale(row)));
        });
    }

    // Reads the scales of K in some units, of which the blocks are listed as `Attention` lists them.
    void read_scales(int units, const uint8_t* const* blocks) {
        const int key_blocks = head_dim / kBlock;
        for (int i = 0; i < units; ++i) {
            const BFloat16* of_keys = Heads::scales_of(blocks[i * key_blocks], head_dim);
            for (int j = 0; j < kUnit; j += kLanes) store(key_scales_ + i * kUnit + j, load(of_keys + j));
            units_[i] = blocks[units * key_blocks + i];
        }
    }
    // By token, from the first unit's on.
    const float* key_scales() const { return key_scales_; }

    // sums[r][0..31] = row r of the weights, [units][rows][32], * 32 columns of V, whose blocks are listed. `x` is
    // room for the rows.
    void multiply_values(const float* weights, int rows, int units, int column, const uint8_t* const* blocks, Rows& x,
                         float* sums) {
        for (int i = 0; i < units; ++i)
            unpack(blocks[i], blocks[i + kBlocksAhead<Stored>], codes_ + i * kBlockElements);
        for (int r = 0; r < rows; ++r) {
            Vec shift = zero(), others = zero();
            for (int i = 0; i < units; ++i) {
                const float* row = weights + (i * rows + r) * kUnit;
                const BFloat16* scales = scales_of(units_[i], column / kColumns);
                const Vec first = load(row), second = load(row + kLanes);
                store(weights_ + i * kUnit, first * load(scales));
                store(weights_ + i * kUnit + kLanes, second * load(scales + kLanes));
                shift = fma(first, load(scales + kUnit), shift);
                others = fma(second, load(scales + kUnit + kLanes), others);
            }
            x.set(r, weights_, kUnit, 0);
            shifts_[r] = sum(shift + others);
        }
        x.multiply(blocks_, 0, [&](int row, int i, Vec products) {
            store(sums + row * kColumns + i, fma(products, splat(x.scale(row)), splat(shifts_[row])));
        });
    }

    const int num_kv_heads;
    const int head_dim;    // padded
    const int v_head_dim;  // padded
    const int block_size;

private:
    static constexpr float kLargestCode = 15.0f;

    int64_t unit(int64_t block, int head, int place) const {
        return (block * num_kv_heads + head) * (block_size / kUnit) + place / kUnit;
    }
    // Of a unit.
    size_t value_bytes() const {
        return static_cast<size_t>(v_head_dim / kColumns) * (kValueElements + 2 * kUnit * sizeof(BFloat16));
    }
    // The scales of 32 columns; minimums follow.
    BFloat16* scales_of(uint8_t* unit, int group) const {
        return reinterpret_cast<BFloat16*>(unit + v_head_dim / kColumns * kValueElements) + group * 2 * kUnit;
    }
    const BFloat16* scales_of(const uint8_t* unit, int group) const {
        return scales_of(const_cast<uint8_t*>(unit), group);
    }

    // Codes of up to 32 columns.
    static void encode(const T* x, int size, uint8_t* codes, BFloat16& scale, BFloat16& minimum) {
        Vec low = splat(std::numeric_limits<float>::infinity()), high = negate(low), invalid = zero();
        for (int i = 0; i < size; i += kLanes) {
            const Vec numbers = load_first(x + i, size - i);
            const Mask is_ours = less(lane_numbers(), splat(static_cast<float>(size - i)));
            low = min(low, select(is_ours, numbers, low));
            high = max(high, select(is_ours, numbers, high));
            invalid = invalid + numbers * zero();  // NaN for infinity, too
        }
        minimum = from_float<BFloat16>(sum(invalid) - largest(negate(low)));
        const float base = to_float(minimum);
        scale = from_float<BFloat16>(largest(high) / kLargestCode - base / kLargestCode);
        const float step = to_float(scale);
        const bool is_usable = step != 0.0f && step == step;  // a minimum may be rounded up beyond all numbers
        if (!is_usable) return;
        constexpr float kRounder = 0x1.8p23f;  // as in kv_int8.h
        for (int i = 0; i < size; i += kLanes) {
            const Vec quotient = (load_first(x + i, size - i) - splat(base)) / splat(step);
            store_low_bytes(codes + i, nearest(min(splat(kLargestCode), max(zero(), quotient))) + splat(kRounder));
        }
    }

    // A block in the layout of int8. What is read next is prefetched.
    static void unpack(const uint8_t* block, const uint8_t* next, uint8_t* codes) {
        for (int i = 0; i < kValueElements; i += kLineBytes) {
            prefetch(address_of(next + i));
            for (int j = i; j < i + kLineBytes; j += sizeof(Codes)) {
                const Codes both_halves = load_codes(block + j);
                store_codes(codes + j, bits_at<0, 4, 0>(both_halves));
                store_codes(codes + kValueElements + j, bits_at<4, 4, 0>(both_halves));
            }
        }
    }

    uint8_t* keys_;
    uint8_t* values_;
    float* key_scales_;
    const uint8_t** units_;   // V of each unit
    uint8_t* codes_;          // of 32 columns of V in each unit
    const uint8_t** blocks_;  // they
    float* weights_;          // of a row
    float* shifts_;           // by row
};

}  // namespace octavo
