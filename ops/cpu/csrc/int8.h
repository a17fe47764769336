// Vectors of codes and of their products with int8.
//
// A vector of codes holds four consecutive k of some columns, side by side, as one 32-bit number for each column. It is
// multiplied with four numbers in int8, the same for all columns. Sums of integers are exact, so all CPUs agree.
#pragma once

#include <cmath>

#include "simd.h"

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(OCTAVO_VNNI_EMULATION)
#define OCTAVO_DOT_INT8 1  // the CPU multiplies uint8 with int8 and adds four products
#endif

namespace octavo {

// ---------------------------------------------------------------------------------------------------------------------
#if defined(__AVX512F__)

constexpr int kIntColumns = 16;
using Codes = __m512i;
using Totals = __m512i;
using Floats = __m512;

inline Codes load_codes(const void* p) { return _mm512_loadu_si512(p); }
inline void store_codes(void* p, Codes a) { _mm512_storeu_si512(p, a); }
inline Codes splat_codes(int32_t x) { return _mm512_set1_epi32(x); }
inline Codes both(Codes a, Codes b) { return _mm512_and_si512(a, b); }
inline Codes either(Codes a, Codes b) { return _mm512_or_si512(a, b); }
inline Codes exclusive(Codes a, Codes b) { return _mm512_xor_si512(a, b); }
template <int kBits>
inline Codes shift_right(Codes a) {
    return _mm512_srli_epi16(a, kBits);
}
template <int kBits>
inline Codes shift_left(Codes a) {
    return _mm512_slli_epi16(a, kBits);
}
// The bytes of a table of 16 at these indices.
inline Codes lookup(const uint8_t* table, Codes indices) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table))),
                               indices);
}
// Sums of two products of uint8 and int8, which must fit int16.
inline Codes multiply_pairs(Codes a, Codes b) { return _mm512_maddubs_epi16(a, b); }
inline Codes add_pairs(Codes a, Codes b) { return _mm512_add_epi16(a, b); }
inline Totals widen(Codes pairs) { return _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)); }
inline Codes magnitudes(Codes a) { return _mm512_abs_epi8(a); }
// Negated where the other is negative; anything where it is zero.
inline Codes signed_as(Codes a, Codes other) {
    return _mm512_mask_sub_epi8(a, _mm512_movepi8_mask(other), _mm512_setzero_si512(), a);
}
#if defined(OCTAVO_DOT_INT8)
inline Totals dot(Totals sum, Codes a, Codes b) { return _mm512_dpbusd_epi32(sum, a, b); }
#endif

inline Totals splat_total(int32_t x) { return _mm512_set1_epi32(x); }
inline Totals plus(Totals a, Totals b) { return _mm512_add_epi32(a, b); }
// Without a rest.
template <int kBits>
inline Totals over_power(Totals a) {
    return kBits == 0 ? a : _mm512_srai_epi32(a, kBits);
}

inline Floats to_floats(Totals a) { return _mm512_cvtepi32_ps(a); }
inline Floats splat_floats(float x) { return _mm512_set1_ps(x); }
inline Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
inline void store_floats(float* p, Floats a) { _mm512_storeu_ps(p, a); }
inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }

inline Floats to_floats(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline Floats to_floats(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline Floats to_floats(const Float16* p) { return load(p).v; }
template <class T>
inline Vec load_integers(const T* p) {
    return {to_floats(p)};
}

#elif defined( \
    __AVX2__)  // ---------------------------------------------------------------------------------------------

constexpr int kIntColumns = 8;
using Codes = __m256i;
using Totals = __m256i;
using Floats = __m256;

inline Codes load_codes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store_codes(void* p, Codes a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
inline Codes splat_codes(int32_t x) { return _mm256_set1_epi32(x); }
inline Codes both(Codes a, Codes b) { return _mm256_and_si256(a, b); }
inline Codes either(Codes a, Codes b) { return _mm256_or_si256(a, b); }
inline Codes exclusive(Codes a, Codes b) { return _mm256_xor_si256(a, b); }
template <int kBits>
inline Codes shift_right(Codes a) {
    return _mm256_srli_epi16(a, kBits);
}
template <int kBits>
inline Codes shift_left(Codes a) {
    return _mm256_slli_epi16(a, kBits);
}
inline Codes lookup(const uint8_t* table, Codes indices) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table))),
                               indices);
}
inline Codes multiply_pairs(Codes a, Codes b) { return _mm256_maddubs_epi16(a, b); }
inline Codes add_pairs(Codes a, Codes b) { return _mm256_add_epi16(a, b); }
inline Totals widen(Codes pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }
inline Codes magnitudes(Codes a) { return _mm256_abs_epi8(a); }
inline Codes signed_as(Codes a, Codes other) { return _mm256_sign_epi8(a, other); }
#if defined(OCTAVO_VNNI_EMULATION)
inline Totals dot(Totals sum, Codes a, Codes b) {
    const __m256i low = _mm256_set1_epi16(255);
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(a, low), _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
    return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
}
#elif defined(OCTAVO_DOT_INT8)
inline Totals dot(Totals sum, Codes a, Codes b) { return _mm256_dpbusd_avx_epi32(sum, a, b); }
#endif

inline Totals splat_total(int32_t x) { return _mm256_set1_epi32(x); }
inline Totals plus(Totals a, Totals b) { return _mm256_add_epi32(a, b); }
// Without a rest.
template <int kBits>
inline Totals over_power(Totals a) {
    return kBits == 0 ? a : _mm256_srai_epi32(a, kBits);
}

inline Floats to_floats(Totals a) { return _mm256_cvtepi32_ps(a); }
inline Floats splat_floats(float x) { return _mm256_set1_ps(x); }
inline Floats load_floats(const float* p) { return _mm256_loadu_ps(p); }
inline void store_floats(float* p, Floats a) { _mm256_storeu_ps(p, a); }
inline Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }

inline Floats to_floats(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline Floats to_floats(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline Floats to_floats(const Float16* p) { return part_load(p); }
template <class T>
inline Vec load_integers(const T* p) {
    return each([=](int i) { return to_floats(p + i * kPartLanes); });
}

#else  // any CPU ------------------------------------------------------------------------------------------------------

constexpr int kIntColumns = 4;
typedef uint8_t Codes __attribute__((vector_size(16)));
typedef int32_t Totals __attribute__((vector_size(16)));
typedef float Floats __attribute__((vector_size(16)));

inline Codes load_codes(const void* p) {
    Codes a;
    std::memcpy(&a, p, sizeof a);
    return a;
}
inline void store_codes(void* p, Codes a) { std::memcpy(p, &a, sizeof a); }
inline Codes splat_codes(int32_t x) { return reinterpret_cast<Codes>(Totals{x, x, x, x}); }
inline Codes both(Codes a, Codes b) { return a & b; }
inline Codes either(Codes a, Codes b) { return a | b; }
inline Codes exclusive(Codes a, Codes b) { return a ^ b; }
template <int kBits>
inline Codes shift_right(Codes a) {
    return a >> static_cast<uint8_t>(kBits);
}
template <int kBits>
inline Codes shift_left(Codes a) {
    return a << static_cast<uint8_t>(kBits);
}
inline Codes lookup(const uint8_t* table, Codes indices) {
    for (int i = 0; i < 16; ++i) indices[i] = table[indices[i]];
    return indices;
}
inline Totals dot(Totals sum, Codes a, Codes b) {
    for (int i = 0; i < 16; ++i) sum[i / 4] += static_cast<int32_t>(a[i]) * static_cast<int8_t>(b[i]);
    return sum;
}

inline Totals splat_total(int32_t x) { return Totals{x, x, x, x}; }
template <int kBits>
inline Totals over_power(Totals a) {
    return a >> kBits;
}

inline Floats to_floats(Totals a) { return __builtin_convertvector(a, Floats); }
inline Floats splat_floats(float x) { return part_splat(x); }
inline Floats load_floats(const float* p) { return part_load(p); }
inline void store_floats(float* p, Floats a) { part_store(p, a); }
inline Floats multiply(Floats a, Floats b) { return a * b; }
// Rounded once, as on CPUs that have an instruction for it.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
    for (int i = 0; i < 4; ++i) c[i] = std::fma(a[i], b[i], c[i]);
    return c;
}

template <class T>
inline Floats to_floats(const T* p) {
    return Floats{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]),
                  static_cast<float>(p[3])};
}
inline Floats to_floats(const Float16* p) { return part_load(p); }
template <class T>
inline Vec load_integers(const T* p) {
    return each([=](int i) { return to_floats(p + i * kPartLanes); });
}

#endif  // -------------------------------------------------------------------------------------------------------------

inline Totals load_totals(const int32_t* p) {
    Totals result;
    std::memcpy(&result, p, sizeof result);
    return result;
}

inline void store_totals(int32_t* p, Totals a) { std::memcpy(p, &a, sizeof a); }

// The largest of the bits of the numbers without their signs.
inline int32_t largest_magnitude(Vec a, Vec b) {
#if defined(__AVX512F__)
    const __m512i mask = _mm512_set1_epi32(0x7fffffff);
    const __m512i one = _mm512_and_si512(_mm512_castps_si512(a.v), mask);
    return _mm512_reduce_max_epi32(_mm512_max_epi32(one, _mm512_and_si512(_mm512_castps_si512(b.v), mask)));
#elif defined(__AVX2__)
    __m256i most = _mm256_setzero_si256();
    for (const __m256 part : {a.v[0], a.v[1], b.v[0], b.v[1]})
        most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_castps_si256(part), _mm256_set1_epi32(0x7fffffff)));
    __m128i rest = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    rest = _mm_max_epi32(rest, _mm_shuffle_epi32(rest, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(rest, _mm_shuffle_epi32(rest, 0xb1)));
#else
    float numbers[2 * kLanes];
    store(numbers, a);
    store(numbers + kLanes, b);
    int32_t result = 0;
    for (int i = 0; i < 2 * kLanes; ++i) {
        const int32_t bits = static_cast<int32_t>(bits_of(numbers[i]) & 0x7fffffff);
        result = bits > result ? bits : result;
    }
    return result;
#endif
}

// Stores the low bytes of the bits of numbers; returns their sum.
template <class Byte>
inline int32_t store_low_bytes(Byte* p, Vec a) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
    const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_castps_si512(a.v));
#else
    const __m256i low = _mm256_set1_epi32(0xff);
    const __m256i first = _mm256_and_si256(_mm256_castps_si256(a.v[0]), low);
    const __m256i words = _mm256_packus_epi32(first, _mm256_and_si256(_mm256_castps_si256(a.v[1]), low));
    const __m256i sorted = _mm256_permute4x64_epi64(words, 0xd8);
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(sorted), _mm256_extracti128_si256(sorted, 1));
#endif
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
    const __m128i sums = _mm_sad_epu8(_mm_xor_si128(bytes, _mm_set1_epi8(-128)), _mm_setzero_si128());
    return _mm_cvtsi128_si32(sums) + _mm_extract_epi16(sums, 4) - kLanes * 128;
#else
    float numbers[kLanes];
    store(numbers, a);
    int32_t sum = 0;
    for (int i = 0; i < kLanes; ++i) {
        p[i] = static_cast<Byte>(bits_of(numbers[i]));
        sum += static_cast<int8_t>(p[i]);
    }
    return sum;
#endif
}

// Selects kCount bits of each byte from kFrom on, and moves them to kTo.
template <int kFrom, int kCount, int kTo>
inline Codes bits_at(Codes a) {
    constexpr int kMask = ((1 << kCount) - 1) << kTo;
    const Codes mask = splat_codes(static_cast<int32_t>(kMask * 0x01010101u));
    if constexpr (kFrom > kTo)
        return both(shift_right<kFrom - kTo>(a), mask);
    else if constexpr (kFrom < kTo)
        return both(shift_left<kTo - kFrom>(a), mask);
    else
        return both(a, mask);
}

constexpr int kLines = 4;  // steps of a block: vectors of its first 16 k, each with one of its last 16

#if defined(__AVX2__) && !defined(OCTAVO_DOT_INT8)
#define OCTAVO_ADD_PAIRS 1

// Keeps GCC from collecting products to add them up later, which takes more registers than there are.
inline __attribute__((always_inline)) Codes in_order(Codes a) {
    asm("" : "+v"(a));
    return a;
}
#endif

// Totals of the products of one vector of columns with some rows, over a block of 32 k: one for all of it, or one for
// each half.
//
// Without an instruction for it, sums of two products (uint8 times int8) are 16-bit numbers. As many as fit are added
// up before they are widened: of 4-bit codes all 8 vectors, since 8 * 2 * 15 * 127 < 2^15. Codes of 8 bits are taken as
// signed numbers, 128 less; their magnitudes are multiplied with numbers that take their signs.
//
// With the instruction, second vectors may be 16 times as large (`kInPlace`): their sums are kept apart.
template <int kBits, int kGroups, int kRows, bool kInPlace = false>
struct Products {
#if defined(OCTAVO_ADD_PAIRS)
    static constexpr int kLess = kBits == 8 ? 128 : 0;  // than their codes are the numbers that are multiplied
#else
    static constexpr int kLess = 0;
#endif

    Totals totals[kGroups][kRows];

#if defined(OCTAVO_ADD_PAIRS)
    static constexpr int kVectorsThatFit = kBits == 5 ? 4 : kBits == 6 ? 2 : 8;
    static constexpr int kVectorsPerLine = kGroups == 1 ? 2 : 1;  // that are added up together
    static constexpr int kLinesThatFit =
        kVectorsThatFit / kVectorsPerLine > kLines ? kLines : kVectorsThatFit / kVectorsPerLine;
    Codes pairs[2][kRows];  // of the groups

    template <int kLine>
    inline __attribute__((always_inline)) void add(Codes first, Codes second, int row, Codes x_first, Codes x_second) {
        constexpr bool kBegins = kLine % kLinesThatFit == 0, kEnds = kLine % kLinesThatFit == kLinesThatFit - 1;
        Codes &one = pairs[0][row], &two = pairs[1][row];
        if constexpr (kBits == 8) {
            add_signed(totals[0][row], first, x_first);
            add_signed(totals[kGroups - 1][row], second, x_second);
        } else if constexpr (kGroups == 1) {
            add_product<kBegins>(one, first, x_first);
            add_product<false>(one, second, x_second);
            if constexpr (kEnds) totals[0][row] = in_order(plus(totals[0][row], widen(one)));
        } else {
            add_product<kBegins>(one, first, x_first);
            add_product<kBegins>(two, second, x_second);
            if constexpr (kEnds) {
                totals[0][row] = in_order(plus(totals[0][row], widen(one)));
                totals[1][row] = in_order(plus(totals[1][row], widen(two)));
            }
        }
    }

    // A sum of two products fits 16 bits: 2 * 128 * 127 < 2^15.
    static inline __attribute__((always_inline)) void add_signed(Totals& total, Codes codes, Codes x) {
        const Codes numbers = exclusive(codes, splat_codes(static_cast<int32_t>(0x80808080)));
        total = in_order(plus(total, widen(multiply_pairs(magnitudes(numbers), signed_as(x, numbers)))));
    }

    template <bool kBegins>
    static inline __attribute__((always_inline)) void add_product(Codes& sum, Codes codes, Codes x) {
        const Codes product = multiply_pairs(codes, x);
        sum = in_order(kBegins ? product : add_pairs(sum, product));
    }
#else
    Totals apart[kInPlace ? kRows : 1];

    template <int kLine>
    inline __attribute__((always_inline)) void add(Codes first, Codes second, int row, Codes x_first, Codes x_second) {
        totals[0][row] = dot(totals[0][row], first, x_first);
        if constexpr (kInPlace)
            apart[row] = dot(kLine == 0 ? splat_total(0) : apart[row], second, x_second);
        else
            totals[kGroups - 1][row] = dot(totals[kGroups - 1][row], second, x_second);
    }
#endif

    // A sum that is complete.
    inline __attribute__((always_inline)) Totals total(int group, int row) const {
#if defined(OCTAVO_DOT_INT8)
        if constexpr (kInPlace)
            if (group == kGroups - 1) return plus(totals[group][row], over_power<4>(apart[row]));
#endif
        return totals[group][row];
    }
};

}  // namespace octavo
