// Vectors of 16 floats on every CPU: one AVX-512 register, two of AVX2, or four of the compiler's own vectors.
//
// The width is the same everywhere, and so are layouts and the order of sums. Results differ between paths only because
// some fuse multiply and add.
#pragma once

#include <cstddef>
#include <limits>

#include "number.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace octavo {

constexpr int kLanes = 16;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Prefetches a cache line into the L2 cache.
inline void prefetch(uintptr_t address) { __builtin_prefetch(reinterpret_cast<const void*>(address), 0, 2); }

inline void prefetch_l1(uintptr_t address) { __builtin_prefetch(reinterpret_cast<const void*>(address), 0, 3); }

// Whether this is a CPU of AMD's, whose hardware prefetcher runs ahead of closely spaced loads by itself, and a third
// faster than with prefetch instructions.
inline bool is_amd() {
#if defined(__x86_64__)
    static const bool result = __builtin_cpu_is("amd");
    return result;
#else
    return false;
#endif
}

constexpr int kCacheLineBytes = 64;

inline uintptr_t address_of(const void* p) { return reinterpret_cast<uintptr_t>(p); }

// ---------------------------------------------------------------------------------------------------------------------
#if defined(__AVX512F__)

struct Vec {
    __m512 v;
};
using Mask = __mmask16;

inline Vec splat(float x) { return {_mm512_set1_ps(x)}; }
inline Vec zero() { return {_mm512_setzero_ps()}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Mask less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
inline Vec select(Mask m, Vec a, Vec b) { return {_mm512_mask_blend_ps(m, b.v, a.v)}; }
inline Vec nearest(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a * 2^n for integer n from -126 to 128, with a normal result.
inline Vec scale_by_power(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }

inline Vec load(const BFloat16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
inline Vec load(const Float16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline void store(Float16* p, Vec a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(BFloat16* p, Vec a) {
#if defined(__AVX512BF16__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a.v));
#else
    const __m512i u = _mm512_castps_si512(a.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
    const Mask nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    const __m512i result = _mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(result));
#endif
}
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(Vec a) { return _mm512_reduce_max_ps(a.v); }

// The even and odd elements of 16 pairs.
inline Vec load_even(const BFloat16* p) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16))}; }
inline Vec load_odd(const BFloat16* p) {
    return {
        _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(static_cast<int>(0xffff0000))))};
}

#else  // ---------------------------------------------------------------------------------------------------------------

#if defined(__AVX2__)

constexpr int kParts = 2;
using Part = __m256;
using IntPart = __m256i;
struct Mask {
    Part v[kParts];
};

inline Part part_splat(float x) { return _mm256_set1_ps(x); }
inline Part part_load(const float* p) { return _mm256_loadu_ps(p); }
inline void part_store(float* p, Part a) { _mm256_storeu_ps(p, a); }
inline Part part_fma(Part a, Part b, Part c) { return _mm256_fmadd_ps(a, b, c); }
inline Part part_max(Part a, Part b) { return _mm256_max_ps(a, b); }
inline Part part_min(Part a, Part b) { return _mm256_min_ps(a, b); }
inline Part part_less(Part a, Part b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
inline Part part_select(Part m, Part a, Part b) { return _mm256_blendv_ps(b, a, m); }
inline IntPart part_bits(Part a) { return _mm256_castps_si256(a); }
inline Part part_of_bits(IntPart a) { return _mm256_castsi256_ps(a); }
inline IntPart part_load_bits(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline IntPart part_shift_left(IntPart a, int n) { return _mm256_slli_epi32(a, n); }
inline IntPart part_shift_right(IntPart a, int n) { return _mm256_srli_epi32(a, n); }
inline IntPart part_and(IntPart a, uint32_t mask) {
    return _mm256_and_si256(a, _mm256_set1_epi32(static_cast<int>(mask)));
}
inline Part part_load(const BFloat16* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline Part part_load(const Float16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void part_store(Float16* p, Part a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
inline void part_store(BFloat16* p, Part a) {
    const __m256i u = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    const __m256i result = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(result, result), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

#else  // any CPU: vectors of the compiler

constexpr int kParts = 4;
typedef float Part __attribute__((vector_size(16)));
typedef int32_t IntPart __attribute__((vector_size(16)));
struct Mask {
    IntPart v[kParts];
};

inline Part part_splat(float x) { return Part{x, x, x, x}; }
inline Part part_load(const float* p) {
    Part a;
    std::memcpy(&a, p, sizeof a);
    return a;
}
inline void part_store(float* p, Part a) { std::memcpy(p, &a, sizeof a); }
inline Part part_fma(Part a, Part b, Part c) { return a * b + c; }
inline Part part_max(Part a, Part b) { return a > b ? a : b; }
inline Part part_min(Part a, Part b) { return a < b ? a : b; }
inline IntPart part_less(Part a, Part b) { return a < b; }
inline Part part_select(IntPart m, Part a, Part b) { return m ? a : b; }
inline IntPart part_bits(Part a) { return reinterpret_cast<IntPart>(a); }
inline Part part_of_bits(IntPart a) { return reinterpret_cast<Part>(a); }
inline IntPart part_load_bits(const void* p) {
    IntPart a;
    std::memcpy(&a, p, sizeof a);
    return a;
}
inline IntPart part_shift_left(IntPart a, int n) { return a << n; }
inline IntPart part_shift_right(IntPart a, int n) { return a >> n; }
inline IntPart part_and(IntPart a, uint32_t mask) { return a & static_cast<int32_t>(mask); }
// Out of line: these are long and used everywhere.
template <class T>
__attribute__((noinline)) Part part_load(const T* p) {
    return Part{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
template <class T>
__attribute__((noinline)) void part_store(T* p, Part a) {
    for (int i = 0; i < 4; ++i) p[i] = from_float<T>(a[i]);
}

#endif

constexpr int kPartLanes = kLanes / kParts;

struct Vec {
    Part v[kParts];
};

template <class F>
inline Vec each(F function) {
    Vec result;
    for (int i = 0; i < kParts; ++i) result.v[i] = function(i);
    return result;
}

inline Vec splat(float x) {
    return each([=](int) { return part_splat(x); });
}
inline Vec zero() { return splat(0.0f); }
template <class T>
inline Vec load(const T* p) {
    return each([=](int i) { return part_load(p + i * kPartLanes); });
}
template <class T>
inline void store(T* p, Vec a) {
    for (int i = 0; i < kParts; ++i) part_store(p + i * kPartLanes, a.v[i]);
}
inline Vec operator+(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
}
inline Vec operator-(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] - b.v[i]; });
}
inline Vec operator*(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] * b.v[i]; });
}
inline Vec operator/(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] / b.v[i]; });
}
inline Vec fma(Vec a, Vec b, Vec c) {
    return each([&](int i) { return part_fma(a.v[i], b.v[i], c.v[i]); });
}
inline Vec max(Vec a, Vec b) {
    return each([&](int i) { return part_max(a.v[i], b.v[i]); });
}
inline Vec min(Vec a, Vec b) {
    return each([&](int i) { return part_min(a.v[i], b.v[i]); });
}
inline Mask less(Vec a, Vec b) {
    Mask m;
    for (int i = 0; i < kParts; ++i) m.v[i] = part_less(a.v[i], b.v[i]);
    return m;
}
inline Vec select(Mask m, Vec a, Vec b) {
    return each([&](int i) { return part_select(m.v[i], a.v[i], b.v[i]); });
}
// Adding and subtracting 1.5 * 2^23 rounds to an integer, since the numbers are below 2^22.
inline Vec nearest(Vec a) {
    const Part shift = part_splat(0x1.8p23f);
    return each([&](int i) { return (a.v[i] + shift) - shift; });
}
inline Vec scale_by_power(Vec a, Vec n) {
    // An exponent of 128 would mean infinity, so compute 2^n as 2^(n - 1) times 2. n + 126 is in the low bits of the
    // sum.
    const Part shift = part_splat(0x1.8p23f + 126.0f), two = part_splat(2.0f);
    return each([&](int i) { return a.v[i] * part_of_bits(part_shift_left(part_bits(n.v[i] + shift), 23)) * two; });
}
inline float sum(Vec a) {
    float x[kLanes];
    store(x, a);
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) x[i] += x[i + half];
    return x[0];
}
inline float largest(Vec a) {
    float x[kLanes];
    store(x, a);
    float result = x[0];
    for (int i = 1; i < kLanes; ++i) result = x[i] > result ? x[i] : result;
    return result;
}
inline Vec load_even(const BFloat16* p) {
    return each([=](int i) { return part_of_bits(part_shift_left(part_load_bits(p + 2 * i * kPartLanes), 16)); });
}
inline Vec load_odd(const BFloat16* p) {
    return each([=](int i) { return part_of_bits(part_and(part_load_bits(p + 2 * i * kPartLanes), 0xffff0000)); });
}

#endif  // -------------------------------------------------------------------------------------------------------------

template <class T>
[[gnu::noinline]] Vec load_some(const T* p, int count) {
    T buffer[kLanes] = {};
    std::memcpy(buffer, p, static_cast<size_t>(count) * sizeof(T));
    return load(buffer);
}

template <class T>
[[gnu::noinline]] void store_some(T* p, Vec a, int count) {
    T buffer[kLanes];
    store(buffer, a);
    std::memcpy(p, buffer, static_cast<size_t>(count) * sizeof(T));
}

// Loads the first `count` numbers and zeros after them. Usually a whole vector, so that is always inlined: GCC decides
// anew with each file that calls it, and norms became slower that way.
template <class T>
[[gnu::always_inline]] inline Vec load_first(const T* p, int count) {
    return count >= kLanes ? load(p) : load_some(p, count);
}

template <class T>
[[gnu::always_inline]] inline void store_first(T* p, Vec a, int count) {
    if (count >= kLanes)
        store(p, a);
    else
        store_some(p, a, count);
}

// The value after a store and load as T.
template <class T>
[[gnu::always_inline]] inline Vec round_to(Vec a) {
    T buffer[kLanes];
    store(buffer, a);
    return load(buffer);
}
template <>
inline Vec round_to<float>(Vec a) {
    return a;
}

// Numbers 0, 1, 2 ... as floats.
inline Vec lane_numbers() {
    alignas(64) static const float numbers[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return load(numbers);
}

}  // namespace octavo
