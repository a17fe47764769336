// A KV cache in 8 bits: the layout of kv_cache.h with a byte per number; see ops/reference/kv_codes.py.
//
// A block of 32 x 32 numbers holds 16 columns at a time, and of these two consecutive k side by side: so the right
// factors of all types are made of whole vectors. After the blocks of an int8 unit follow the scales of its 32 tokens.
// Codes are multiplied as they are, since small integers and 8-bit floats are exact in bfloat16. The scales of K are
// factors of the scores, and those of V of the weights.
#pragma once

#include <algorithm>
#include <cstring>

#include "heads.h"
#include "int8.h"
#include "kv_cache.h"
#include "vec_math.h"

namespace octavo {

constexpr int kLargestCode = 127;

// Offset of a code in a block.
inline int code_offset(int column, int k) {
    return column / kLanes * (kBlock * kLanes) + k / 2 * kColumns + k % 2 * kLanes + column % kLanes;
}

// Floats in 8 bits.
struct E4M3 {
    static constexpr float kLargest = 448.0f;
    static constexpr int kMantissa = 3;
    static constexpr int kLowestExponent = -6;
};

struct E5M2 {
    static constexpr float kLargest = 57344.0f;
    static constexpr int kMantissa = 2;
    static constexpr int kLowestExponent = -14;
};

// The nearest number of a type, ties to even; the largest beyond its range.
template <class F>
uint8_t encode_float8(float x) {
    const uint8_t sign = static_cast<uint8_t>(bits_of(x) >> 24 & 0x80);
    const float magnitude = std::min(float_of(bits_of(x) & 0x7fffffff), F::kLargest);
    if (x != x) return sign | 0x7f;
    constexpr int kDropped = 23 - F::kMantissa;
    if (magnitude < float_of((127 + F::kLowestExponent) << 23)) {  // subnormal: a multiple of the smallest number
        const float steps = magnitude * float_of((127 + F::kMantissa - F::kLowestExponent) << 23);
        return sign | static_cast<uint8_t>(bits_of(steps + 0x1p23f) & 0xff);
    }
    const uint32_t u = bits_of(magnitude);
    const uint32_t rounded = u + (1u << (kDropped - 1)) - 1 + (u >> kDropped & 1);
    return sign | static_cast<uint8_t>((rounded >> kDropped) - ((126 + F::kLowestExponent) << F::kMantissa));
}

inline Vec decode(const uint8_t* codes, int8_t) { return load_integers(reinterpret_cast<const int8_t*>(codes)); }

inline Vec decode(const uint8_t* codes, E5M2) {
    Float16 numbers[kLanes];
    for (int i = 0; i < kLanes; ++i) numbers[i].bits = static_cast<uint16_t>(codes[i] << 8);
    return load(numbers);
}

inline Vec decode(const uint8_t* codes, E4M3) {
    Float16 numbers[kLanes];
    for (int i = 0; i < kLanes; ++i)
        numbers[i].bits = static_cast<uint16_t>((codes[i] & 0x80) << 8 | (codes[i] & 0x7f) << 7);
    const Vec x = load(numbers) * splat(256.0f);
    return select(less(splat(E4M3::kLargest), absolute(x)), splat(float_of(0x7fc00000)), x);
}

// Stores the numbers of 16 columns for two consecutive k in a right factor.
inline void store_step(float* block, int half, int k, Vec even, Vec odd) {
    store(block + k * kStepElements + half * kLanes, even);
    store(block + (k + 1) * kStepElements + half * kLanes, odd);
}
#if defined(OCTAVO_DOT_BF16)
inline void store_step(BFloat16* block, int half, int k, Vec even, Vec odd) {  // their lower bits are zero
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even.v), 16);
    BFloat16* target = block + half * kHalfElements<BFloat16> + k / 2 * kStepElements;
    _mm512_storeu_si512(target, _mm512_or_si512(low, _mm512_castps_si512(odd.v)));
}
#endif

// Makes a right factor of a block of codes.
template <class Code, class Number>
void decode_block(const uint8_t* codes, Number* block, Fetch& fetch) {
    for (int half = 0; half < 2; ++half) {
        for (int k = 0; k < kBlock; k += 2, codes += 2 * kLanes) {
            if (k % 4 == 0) advance(fetch);
            store_step(block, half, k, decode(codes, Code()), decode(codes + kLanes, Code()));
        }
    }
}

template <class Type>
class CodedCache {
public:
    using T = Type;
    using Number = LeftOf<T>;
    using Stored = uint8_t;
    static constexpr bool kHasScales = true;

    CodedCache(const OctavoAttention& op, int block_size, Scratch& scratch)
        : num_kv_heads(op.num_kv_heads),
          head_dim(blocks_of(op.head_dim, kBlock) * kBlock),
          v_head_dim(blocks_of(op.v_head_dim, kBlock) * kBlock),
          block_size(block_size),
          keys_(static_cast<uint8_t*>(op.k_cache)),
          values_(static_cast<uint8_t*>(op.v_cache)),
          format_(op.cache),
          numbers_(scratch.take<Number>(std::max(head_dim / kBlock, kSplitUnits) * kBlockElements)),
          key_scales_(scratch.take<float>(kSplitUnits * kUnit)),
          value_scales_(scratch.take<float>(kSplitUnits * kUnit)) {}

    uint8_t* keys_of(int64_t block, int head, int place) const { return unit_of(keys_, head_dim, block, head, place); }
    uint8_t* values_of(int64_t block, int head, int place) const {
        return unit_of(values_, v_head_dim, block, head, place);
    }

    void write(int64_t block, int head, int place, const T* k, int k_size, const T* v, int v_size) const {
        uint8_t codes[kMaxHeadDim];
        uint8_t* keys = keys_of(block, head, place);
        uint8_t* values = values_of(block, head, place);
        if (place == 0) {  // nothing of an earlier owner remains
            std::memset(keys, 0, unit_bytes(head_dim) * (block_size / kUnit));
            std::memset(values, 0, unit_bytes(v_head_dim) * (block_size / kUnit));
        }
        place %= kUnit;
        encode(k, k_size, codes, keys + kUnit * head_dim, place);
        for (int i = 0; i < k_size; ++i) keys[i / kBlock * kBlockElements + code_offset(place, i % kBlock)] = codes[i];
        encode(v, v_size, codes, values + kUnit * v_head_dim, place);
        for (int i = 0; i < v_size; ++i)
            values[i / kColumns * kBlockElements + code_offset(i % kColumns, place)] = codes[i];
    }

    void prefetch_place(int64_t, int, int) const {}  // few lines

    Right<Number> factor_of(const uint8_t* const* blocks, int count) {
        for (int i = 0; i < count; ++i) {
            Fetch fetch = {address_of(blocks[i + kBlocksAhead]), kCacheLineBytes};
            decode_codes(blocks[i], numbers_ + i * kBlockElements, fetch);
        }
        return {numbers_, kBlockElements};
    }

    // Reads the scales of some units, of which the blocks are listed as `Attention` lists them; whether there are any.
    bool read_scales(int units, const uint8_t* const* blocks) {
        if (format_ != kInt8Cache) return false;
        const int key_blocks = head_dim / kBlock;
        for (int i = 0; i < units; ++i) {
            const BFloat16* of_keys = scales_of(blocks[i * key_blocks], head_dim);
            const BFloat16* of_values = scales_of(blocks[units * key_blocks + i], v_head_dim);
            for (int j = 0; j < kUnit; j += kLanes) {
                store(key_scales_ + i * kUnit + j, load(of_keys + j));
                store(value_scales_ + i * kUnit + j, load(of_values + j));
            }
        }
        return true;
    }
    // By token, from the first unit's on.
    const float* key_scales() const { return key_scales_; }
    const float* value_scales() const { return value_scales_; }

    const int num_kv_heads;
    const int head_dim;    // padded
    const int v_head_dim;  // padded
    const int block_size;

private:
    size_t unit_bytes(int dim) const {
        return static_cast<size_t>(kUnit) * dim + (format_ == kInt8Cache ? kUnit * sizeof(BFloat16) : 0);
    }
    uint8_t* unit_of(uint8_t* cache, int dim, int64_t block, int head, int place) const {
        return cache + ((block * num_kv_heads + head) * (block_size / kUnit) + place / kUnit) * unit_bytes(dim);
    }
    static const BFloat16* scales_of(const uint8_t* unit, int dim) {
        return reinterpret_cast<const BFloat16*>(unit + kUnit * dim);
    }

    // A token's head as codes, and its scale.
    void encode(const T* x, int size, uint8_t* codes, uint8_t* scales, int place) const {
        if (format_ == kInt8Cache) return encode_int8(x, size, codes, reinterpret_cast<BFloat16*>(scales) + place);
        for (int i = 0; i < size; ++i)
            codes[i] =
                format_ == kE4M3Cache ? encode_float8<E4M3>(to_float(x[i])) : encode_float8<E5M2>(to_float(x[i]));
    }

    static void encode_int8(const T* x, int size, uint8_t* codes, BFloat16* scale) {
        Vec top = zero(), invalid = zero();
        for (int i = 0; i < size; i += kLanes) {
            const Vec numbers = load_first(x + i, size - i);
            top = max(top, absolute(numbers));
            invalid = invalid + numbers * zero();  // NaN for infinity, too
        }
        *scale = from_float<BFloat16>(largest(top) / kLargestCode + sum(invalid));
        const float divisor = to_float(*scale);
        const bool is_usable = divisor > 0.0f;
        for (int i = 0; i < size; i += kLanes) {
            float rounded[kLanes];
            const Vec limit = splat(kLargestCode);
            const Vec quotient = load_first(x + i, size - i) / splat(is_usable ? divisor : 1.0f);
            store(rounded, nearest(min(limit, max(negate(limit), quotient))));
            for (int j = 0; j < kLanes && i + j < size; ++j)
                codes[i + j] = is_usable ? static_cast<uint8_t>(static_cast<int8_t>(rounded[j])) : 0;
        }
    }

    void decode_codes(const uint8_t* codes, Number* block, Fetch& fetch) const {
        switch (format_) {
            case kInt8Cache:
                return decode_block<int8_t>(codes, block, fetch);
            case kE4M3Cache:
                return decode_block<E4M3>(codes, block, fetch);
            default:
                return decode_block<E5M2>(codes, block, fetch);
        }
    }

    uint8_t* keys_;
    uint8_t* values_;
    int32_t format_;
    Number* numbers_;  // of a unit of K, or of 32 columns of V in each unit of a split
    float* key_scales_;
    float* value_scales_;
};

}  // namespace octavo
