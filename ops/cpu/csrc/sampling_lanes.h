// Vector operations that sampling needs beyond simd.h: masks, compressing selected lanes, sums of units.
//
// Every path computes the same bits here: only individually rounded IEEE operations, no fused multiply-add, and integer
// sums, which do not depend on their order.
#pragma once

#include "simd.h"

namespace octavo::sampling {

// A weight w in [0, 1] is rounded to the nearest integer number of units of 2^-42 (half to even). Adding 1.5 * 2^10 to
// it as a double leaves that integer in the low bits of the sum, whose last bit is worth 2^(10 - 52).
constexpr double kUnitsShift = 1536.0;
constexpr int64_t kUnitsShiftBits = 0x4098000000000000;
constexpr int64_t kOneInUnits = int64_t{1} << 42;

inline int64_t units(float weight) {
    const double shifted = static_cast<double>(weight) + kUnitsShift;
    int64_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    return bits - kUnitsShiftBits;
}

#if defined(__AVX512F__)

inline Mask first_lanes(int count) { return static_cast<Mask>((1u << count) - 1); }
inline Vec load_first(const float* p, int count, float fill) {
    return {_mm512_mask_loadu_ps(_mm512_set1_ps(fill), first_lanes(count), p)};
}
inline Mask greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
inline Mask at_least(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
inline Mask equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
inline Mask either_nan(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_UNORD_Q); }
inline Mask both(Mask a, Mask b) { return static_cast<Mask>(a & b); }
inline Mask either(Mask a, Mask b) { return static_cast<Mask>(a | b); }
inline Mask mask_of(unsigned bits) { return static_cast<Mask>(bits); }  // of its low 16
inline unsigned bits(Mask m) { return m; }
inline bool any(Mask m) { return m != 0; }
inline Vec keep(Mask m, Vec a) { return {_mm512_maskz_mov_ps(m, a.v)}; }

// p * 2^n where `shifted` is n + 1.5 * 2^23: n is in its low bits, and the shift discards the rest.
inline Vec times_power_of_two(Vec p, Vec shifted) {
    const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted.v), 23);
    return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p.v), exponent))};
}

// Writes the selected lanes contiguously, followed by garbage up to kLanes values in all. (A masked compress-store is
// microcoded, and very slow, on AMD Zen 4.)
inline void compress(float* p, Mask m, Vec a) { _mm512_storeu_ps(p, _mm512_maskz_compress_ps(m, a.v)); }
inline void compress_ids(int32_t* p, Mask m, int32_t first) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(m, _mm512_add_epi32(lanes, _mm512_set1_epi32(first))));
}
inline void compress_ids(int32_t* p, Mask m, const int32_t* ids) {
    _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(m, _mm512_loadu_si512(ids)));
}

// Sum of weights in units.
class UnitSum {
public:
    void add(Vec weights) {
        const __m512d shift = _mm512_set1_pd(kUnitsShift);
        const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(weights.v), 1));
        const __m512d a = _mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(weights.v)), shift);
        const __m512d b = _mm512_add_pd(_mm512_cvtps_pd(high), shift);
        low_ = _mm512_add_epi64(low_, _mm512_castpd_si512(a));
        high_ = _mm512_add_epi64(high_, _mm512_castpd_si512(b));
        ++added_;
    }
    int64_t total() const {
        const auto shifts = static_cast<int64_t>(2 * added_ * static_cast<uint64_t>(kUnitsShiftBits));
        return _mm512_reduce_add_epi64(_mm512_sub_epi64(_mm512_add_epi64(low_, high_), _mm512_set1_epi64(shifts)));
    }

private:
    __m512i low_ = _mm512_setzero_si512(), high_ = _mm512_setzero_si512();
    uint64_t added_ = 0;  // how often each lane's sum includes the bits of the shift
};

#else  // parts of a vector, as in simd.h

// Row m lists the set bits of m: the sources of a part's selected lanes.
constexpr int kPartMasks = 1 << kPartLanes;
struct FrontTable {
    alignas(32) int32_t rows[kPartMasks][kPartLanes];
    constexpr FrontTable() : rows() {
        for (int m = 0; m < kPartMasks; ++m) {
            int n = 0;
            for (int lane = 0; lane < kPartLanes; ++lane)
                if (m >> lane & 1) rows[m][n++] = lane;
        }
    }
};
constexpr FrontTable kFront;

#if defined(__AVX2__)

using PartMask = Part;

inline PartMask part_greater(Part a, Part b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
inline PartMask part_at_least(Part a, Part b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
inline PartMask part_equal(Part a, Part b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
inline PartMask part_either_nan(Part a, Part b) { return _mm256_cmp_ps(a, b, _CMP_UNORD_Q); }
inline PartMask part_both(PartMask a, PartMask b) { return _mm256_and_ps(a, b); }
inline PartMask part_either(PartMask a, PartMask b) { return _mm256_or_ps(a, b); }
inline Part part_keep(PartMask m, Part a) { return _mm256_and_ps(a, m); }
inline PartMask part_mask_of(unsigned bits) {
    const __m256i lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i all = _mm256_set1_epi32(static_cast<int>(bits));
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(all, lanes), lanes));
}
inline unsigned part_mask_bits(PartMask m) { return static_cast<unsigned>(_mm256_movemask_ps(m)); }
inline IntPart part_add(IntPart a, IntPart b) { return _mm256_add_epi32(a, b); }
inline void part_store_bits(int32_t* p, IntPart a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
inline IntPart part_splat_bits(int32_t x) { return _mm256_set1_epi32(x); }
inline void part_compress(int32_t* p, unsigned m, IntPart a) {
    part_store_bits(p, _mm256_permutevar8x32_epi32(a, part_load_bits(kFront.rows[m])));
}
inline bool any(Mask m) { return _mm256_movemask_ps(part_either(m.v[0], m.v[1])) != 0; }

struct LongPart {
    __m256i low = _mm256_setzero_si256(), high = _mm256_setzero_si256();
};
inline void add_shifted(LongPart& sum, Part weights) {
    const __m256d shift = _mm256_set1_pd(kUnitsShift);
    const __m256d a = _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(weights)), shift);
    const __m256d b = _mm256_add_pd(_mm256_cvtps_pd(_mm256_extractf128_ps(weights, 1)), shift);
    sum.low = _mm256_add_epi64(sum.low, _mm256_castpd_si256(a));
    sum.high = _mm256_add_epi64(sum.high, _mm256_castpd_si256(b));
}
inline uint64_t total_of(const LongPart& sum) {
    uint64_t lanes[4];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), _mm256_add_epi64(sum.low, sum.high));
    return lanes[0] + lanes[1] + lanes[2] + lanes[3];
}

#else  // any CPU: vectors of the compiler

using PartMask = IntPart;

inline PartMask part_greater(Part a, Part b) { return a > b; }
inline PartMask part_at_least(Part a, Part b) { return a >= b; }
inline PartMask part_equal(Part a, Part b) { return a == b; }
inline PartMask part_either_nan(Part a, Part b) { return (a != a) | (b != b); }
inline PartMask part_both(PartMask a, PartMask b) { return a & b; }
inline PartMask part_either(PartMask a, PartMask b) { return a | b; }
inline Part part_keep(PartMask m, Part a) { return part_of_bits(part_bits(a) & m); }
inline PartMask part_mask_of(unsigned bits) {
    const IntPart lanes = {1, 2, 4, 8};
    const int all = static_cast<int>(bits);
    return (IntPart{all, all, all, all} & lanes) == lanes;
}
inline unsigned part_mask_bits(PartMask m) {
    const IntPart one_bit_each = {1, 2, 4, 8};
    const IntPart found = m & one_bit_each;
    return static_cast<unsigned>(found[0] | found[1] | found[2] | found[3]);
}
inline IntPart part_add(IntPart a, IntPart b) { return a + b; }
inline void part_store_bits(int32_t* p, IntPart a) { std::memcpy(p, &a, sizeof a); }
inline IntPart part_splat_bits(int32_t x) { return IntPart{x, x, x, x}; }
inline void part_compress(int32_t* p, unsigned m, IntPart a) {
    int32_t lanes[kPartLanes];
    part_store_bits(lanes, a);
    for (int i = 0; i < kPartLanes; ++i) p[i] = lanes[kFront.rows[m][i]];
}
inline bool any(Mask m) {
    const IntPart all = (m.v[0] | m.v[1]) | (m.v[2] | m.v[3]);
    uint64_t halves[2];
    std::memcpy(halves, &all, sizeof halves);
    return (halves[0] | halves[1]) != 0;
}

typedef double DoublePart __attribute__((vector_size(32)));
typedef uint64_t LongPart __attribute__((vector_size(32)));
inline void add_shifted(LongPart& sum, Part weights) {
    sum += reinterpret_cast<LongPart>(__builtin_convertvector(weights, DoublePart) + kUnitsShift);
}
inline uint64_t total_of(const LongPart& sum) { return sum[0] + sum[1] + sum[2] + sum[3]; }

#endif

template <class F>
inline Mask each_mask(F function) {
    Mask result;
    for (int i = 0; i < kParts; ++i) result.v[i] = function(i);
    return result;
}

inline Mask greater(Vec a, Vec b) {
    return each_mask([&](int i) { return part_greater(a.v[i], b.v[i]); });
}
inline Mask at_least(Vec a, Vec b) {
    return each_mask([&](int i) { return part_at_least(a.v[i], b.v[i]); });
}
inline Mask equal(Vec a, Vec b) {
    return each_mask([&](int i) { return part_equal(a.v[i], b.v[i]); });
}
inline Mask either_nan(Vec a, Vec b) {
    return each_mask([&](int i) { return part_either_nan(a.v[i], b.v[i]); });
}
inline Mask both(Mask a, Mask b) {
    return each_mask([&](int i) { return part_both(a.v[i], b.v[i]); });
}
inline Mask either(Mask a, Mask b) {
    return each_mask([&](int i) { return part_either(a.v[i], b.v[i]); });
}
inline Mask first_lanes(int count) { return less(lane_numbers(), splat(static_cast<float>(count))); }
inline Mask mask_of(unsigned bits) {
    return each_mask([&](int i) { return part_mask_of(bits >> (i * kPartLanes)); });
}
inline unsigned bits(Mask m) {
    unsigned result = 0;
    for (int i = 0; i < kParts; ++i) result |= part_mask_bits(m.v[i]) << (i * kPartLanes);
    return result;
}
inline Vec keep(Mask m, Vec a) {
    return each([&](int i) { return part_keep(m.v[i], a.v[i]); });
}
inline Vec load_first(const float* p, int count, float fill) {
    float buffer[kLanes];
    for (int i = 0; i < kLanes; ++i) buffer[i] = i < count ? p[i] : fill;
    return load(buffer);
}

inline Vec times_power_of_two(Vec p, Vec shifted) {
    return each(
        [&](int i) { return part_of_bits(part_add(part_bits(p.v[i]), part_shift_left(part_bits(shifted.v[i]), 23))); });
}

// `part(i)` returns part i as bits.
template <class F>
inline void compress_parts(int32_t* p, Mask m, F part) {
    for (int i = 0; i < kParts; ++i) {
        const unsigned chosen = part_mask_bits(m.v[i]);
        part_compress(p, chosen, part(i));
        p += __builtin_popcount(chosen);
    }
}
inline void compress(float* p, Mask m, Vec a) {
    compress_parts(reinterpret_cast<int32_t*>(p), m, [&](int i) { return part_bits(a.v[i]); });
}
inline void compress_ids(int32_t* p, Mask m, const int32_t* ids) {
    Vec copy;
    std::memcpy(&copy, ids, sizeof copy);
    compress_parts(p, m, [&](int i) { return part_bits(copy.v[i]); });
}
inline void compress_ids(int32_t* p, Mask m, int32_t first) {
    for (int i = 0; i < kParts; ++i) {
        const unsigned chosen = part_mask_bits(m.v[i]);
        const IntPart lanes = part_load_bits(kFront.rows[chosen]);
        part_store_bits(p, part_add(lanes, part_splat_bits(first + i * kPartLanes)));
        p += __builtin_popcount(chosen);
    }
}

class UnitSum {
public:
    void add(Vec weights) {
        for (int i = 0; i < kParts; ++i) add_shifted(parts_[i], weights.v[i]);
        ++added_;
    }
    int64_t total() const {
        uint64_t sum = 0;
        for (const LongPart& part : parts_) sum += total_of(part);
        return static_cast<int64_t>(sum - added_ * kLanes * static_cast<uint64_t>(kUnitsShiftBits));
    }

private:
    LongPart parts_[kParts] = {};
    uint64_t added_ = 0;
};

#endif

inline int count(Mask m) { return __builtin_popcount(bits(m)); }
inline int first(Mask m) { return __builtin_ctz(bits(m)); }

inline float smallest(Vec a) {
    float lanes[kLanes];
    store(lanes, a);
    float result = lanes[0];
    for (int i = 1; i < kLanes; ++i) result = lanes[i] < result ? lanes[i] : result;
    return result;
}

}  // namespace octavo::sampling
