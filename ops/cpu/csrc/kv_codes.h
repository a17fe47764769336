// A KV cache in 8-bit floats: the layout of kv_cache.h with a byte per number; see ops/reference/kv_codes.py.
//
// A block of 32 x 32 numbers holds 16 columns at a time, and of these two consecutive k side by side: so the right
// factors of all types are made of whole vectors. Such numbers are exact in bfloat16.
#pragma once

#include <algorithm>
#include <cstring>

#include "heads.h"
#include "kv_cache.h"
#include "small_floats.h"
#include "vec_math.h"

namespace octavo {

// Offset of a code in a block.
inline int code_offset(int column, int k) {
    return column / kLanes * (kBlock * kLanes) + k / 2 * kColumns + k % 2 * kLanes + column % kLanes;
}

// Floats in 8 bits.
struct Float8E4M3 {
    static constexpr float kLargest = 448.0f;
    static constexpr int kMantissa = 3;
    static constexpr int kLowestExponent = -6;
};

struct Float8E5M2 {
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

inline Vec decode(const uint8_t* codes, Float8E5M2) {
    Float16 numbers[kLanes];
    for (int i = 0; i < kLanes; ++i) numbers[i].bits = static_cast<uint16_t>(codes[i] << 8);
    return load(numbers);
}

inline Vec decode(const uint8_t* codes, Float8E4M3) { return load_e4m3(codes); }

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
    using Rows = NumberRows<Number>;
    using Stored = uint8_t;
    static constexpr bool kIsInteger = false;
    static constexpr bool kHasGroups = false;
    static constexpr int kValueElements = kBlockElements;  // of a block of V

    CodedCache(const OctavoAttention& op, int block_size, Scratch& scratch)
        : num_kv_heads(op.num_kv_heads),
          head_dim(blocks_of(op.head_dim, kBlock) * kBlock),
          v_head_dim(blocks_of(op.v_head_dim, kBlock) * kBlock),
          block_size(block_size),
          keys_(static_cast<uint8_t*>(op.k_cache)),
          values_(static_cast<uint8_t*>(op.v_cache)),
          format_(op.cache),
          k_scale_(op.k_scale),
          v_scale_(op.v_scale),
          numbers_(scratch.take<Number>(std::max(head_dim / kBlock, kSplitUnits) * kBlockElements)) {}

    uint8_t* keys_of(int64_t block, int head, int place) const { return unit_of(keys_, head_dim, block, head, place); }
    uint8_t* values_of(int64_t block, int head, int place) const {
        return unit_of(values_, v_head_dim, block, head, place);
    }

    void write(int64_t block, int head, int place, const T* k, int k_size, const T* v, int v_size) const {
        uint8_t codes[kMaxHeadDim];
        uint8_t* keys = keys_of(block, head, place);
        uint8_t* values = values_of(block, head, place);
        if (place == 0) {  // nothing of an earlier owner remains
            std::memset(keys, 0, static_cast<size_t>(block_size) * head_dim);
            std::memset(values, 0, static_cast<size_t>(block_size) * v_head_dim);
        }
        place %= kUnit;
        encode(k, k_size, k_scale_, codes);
        for (int i = 0; i < k_size; ++i) keys[i / kBlock * kBlockElements + code_offset(place, i % kBlock)] = codes[i];
        encode(v, v_size, v_scale_, codes);
        for (int i = 0; i < v_size; ++i)
            values[i / kColumns * kBlockElements + code_offset(i % kColumns, place)] = codes[i];
    }

    void prefetch_place(int64_t, int, int) const {}  // few lines

    // As of KVCache.
    void multiply(const Rows& x, const uint8_t* const* blocks, float* sums) {
        for (int i = 0; i < x.blocks(); ++i) {
            Fetch fetch = {address_of(blocks[i + kBlocksAhead<Stored>]), kCacheLineBytes};
            decode_codes(blocks[i], numbers_ + i * kBlockElements, fetch);
        }
        x.multiply({numbers_, kBlockElements}, sums);
    }

    const int num_kv_heads;
    const int head_dim;    // padded
    const int v_head_dim;  // padded
    const int block_size;

private:
    uint8_t* unit_of(uint8_t* cache, int dim, int64_t block, int head, int place) const {
        return cache + ((block * num_kv_heads + head) * block_size + place / kUnit * kUnit) * dim;
    }

    void encode(const T* x, int size, float scale, uint8_t* codes) const {
        for (int i = 0; i < size; ++i) {
            const float number = to_float(x[i]) / scale;
            codes[i] = format_ == kE4M3Cache ? encode_float8<Float8E4M3>(number) : encode_float8<Float8E5M2>(number);
        }
    }

    void decode_codes(const uint8_t* codes, Number* block, Fetch& fetch) const {
        if (format_ == kE4M3Cache)
            decode_block<Float8E4M3>(codes, block, fetch);
        else
            decode_block<Float8E5M2>(codes, block, fetch);
    }

    uint8_t* keys_;
    uint8_t* values_;
    int32_t format_;
    float k_scale_;
    float v_scale_;
    Number* numbers_;  // of a unit of K, or of 32 columns of V in each unit of a split
};

}  // namespace octavo
