// Floating-point numbers of 4 and 8 bits: vectors of their codes become vectors of float32; and rounding in registers.
//
// Codes lie as in int8.h: byte i of each 32-bit lane is the code of column i of four.
#pragma once

#include "int8.h"

namespace octavo {

// Bytes of e4m3 are kept inverted, since a NaN, all of whose lower bits are set, is then found with one instruction.
constexpr uint8_t kInvertedE4M3 = 0xff;

// Twice the numbers of E2M1, plus 16.
alignas(16) inline constexpr uint8_t kE2M1Values[16] = {16, 17, 18, 19, 20, 22, 24, 28, 16, 15, 14, 13, 12, 10, 8, 4};

alignas(64) inline constexpr float kE2M1Numbers[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

alignas(64) inline constexpr float kIQ4Numbers[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                                      1,    13,   25,  38,  53,  69,  89,  113};

alignas(64) inline constexpr float kNf4Numbers[16] = {-1.0f,
                                                      -0.6961928009986877f,
                                                      -0.5250730514526367f,
                                                      -0.39491748809814453f,
                                                      -0.28444138169288635f,
                                                      -0.18477343022823334f,
                                                      -0.09105003625154495f,
                                                      0.0f,
                                                      0.07958029955625534f,
                                                      0.16093020141124725f,
                                                      0.24611230194568634f,
                                                      0.33791524171829224f,
                                                      0.44070982933044434f,
                                                      0.5626170039176941f,
                                                      0.7229568362236023f,
                                                      1.0f};

alignas(64) inline constexpr float kFp4Numbers[16] = {0.0f,
                                                      static_cast<float>(0.0625 / 12),
                                                      static_cast<float>(8.0 / 12),
                                                      1.0f,
                                                      static_cast<float>(4.0 / 12),
                                                      0.5f,
                                                      static_cast<float>(2.0 / 12),
                                                      0.25f,
                                                      -0.0f,
                                                      static_cast<float>(-0.0625 / 12),
                                                      static_cast<float>(-8.0 / 12),
                                                      -1.0f,
                                                      static_cast<float>(-4.0 / 12),
                                                      -0.5f,
                                                      static_cast<float>(-2.0 / 12),
                                                      -0.25f};

constexpr uint32_t kE4M3Magnitude = 0x07f00000, kE4M3Bits = 0x87f00000;  // moved to where float32 has them
constexpr float kE4M3Rebase = 0x1p120f;                                  // then moves the exponent's bias from 7 to 127

// ---------------------------------------------------------------------------------------------------------------------
#if defined(__AVX512F__)

inline Floats plus(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats minus(Floats a, Floats b) { return _mm512_sub_ps(a, b); }

// 2^(e - 128) of the exponents in 32-bit lanes; those below 2 are subnormal.
inline Floats halved_powers(Codes exponents) {
    const Codes normal = _mm512_slli_epi32(_mm512_sub_epi32(exponents, _mm512_set1_epi32(1)), 23);
    const Codes subnormal = _mm512_slli_epi32(_mm512_add_epi32(exponents, _mm512_set1_epi32(1)), 21);
    const __mmask16 is_subnormal = _mm512_cmplt_epi32_mask(exponents, _mm512_set1_epi32(2));
    return _mm512_castsi512_ps(_mm512_mask_blend_epi32(is_subnormal, normal, subnormal));
}

template <int kByte>
inline Floats integer_at(Codes a) {
    return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(a, 8 * kByte), _mm512_set1_epi32(255)));
}
// Of a table of 16; bits of bytes above the lower four are ignored.
template <int kByte>
inline Floats entry_at(Codes a, const float* table) {
    return _mm512_permutexvar_ps(_mm512_srli_epi32(a, 8 * kByte), _mm512_load_ps(table));
}
template <int kByte>
inline Floats e4m3_at(Codes inverted) {
    const Codes bits = _mm512_srai_epi32(_mm512_slli_epi32(inverted, 24 - 8 * kByte), 4);
    const __mmask16 is_number = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(kE4M3Magnitude));
    const Codes moved = _mm512_andnot_si512(bits, _mm512_set1_epi32(static_cast<int>(kE4M3Bits)));
    return _mm512_mask_mul_ps(_mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000)), is_number, _mm512_castsi512_ps(moved),
                              _mm512_set1_ps(kE4M3Rebase));
}

// As stored as T and loaded.
template <class T>
inline Floats rounded(Floats a) {
    if constexpr (std::is_same_v<T, Float16>) {
        return _mm512_cvtph_ps(_mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
    } else if constexpr (std::is_same_v<T, BFloat16>) {
        const __m512i u = _mm512_castps_si512(a);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
        const __m512i even = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        const __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
        const __m512i result = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), even, quiet);
        return _mm512_castsi512_ps(_mm512_and_si512(result, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
    } else {
        return a;
    }
}

#if defined(__AVX512BF16__)
// Pairs of columns, rounded: [16 rows][2].
inline __m512bh rounded_pairs(Floats even, Floats odd) {
    alignas(64) static const uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                    8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    return (__m512bh)_mm512_permutexvar_epi16(_mm512_load_si512(kOrder), both);
}
#endif

#elif defined( \
    __AVX2__)  // ---------------------------------------------------------------------------------------------

inline Floats plus(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats minus(Floats a, Floats b) { return _mm256_sub_ps(a, b); }

inline Floats halved_powers(Codes exponents) {
    const Codes normal = _mm256_slli_epi32(_mm256_sub_epi32(exponents, _mm256_set1_epi32(1)), 23);
    const Codes subnormal = _mm256_slli_epi32(_mm256_add_epi32(exponents, _mm256_set1_epi32(1)), 21);
    const Codes is_normal = _mm256_cmpgt_epi32(exponents, _mm256_set1_epi32(1));
    return _mm256_castsi256_ps(_mm256_blendv_epi8(subnormal, normal, is_normal));
}

template <int kByte>
inline Floats integer_at(Codes a) {
    return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(a, 8 * kByte), _mm256_set1_epi32(255)));
}
template <int kByte>
inline Floats entry_at(Codes a, const float* table) {
    const __m256i index = _mm256_srli_epi32(a, 8 * kByte);
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(a, 28 - 8 * kByte));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(_mm256_load_ps(table), index),
                            _mm256_permutevar8x32_ps(_mm256_load_ps(table + 8), index), upper);
}
template <int kByte>
inline Floats e4m3_at(Codes inverted) {
    const __m256i bits = _mm256_srai_epi32(_mm256_slli_epi32(inverted, 24 - 8 * kByte), 4);
    const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(kE4M3Magnitude));
    const __m256 nan = _mm256_castsi256_ps(_mm256_cmpeq_epi32(magnitude, _mm256_setzero_si256()));
    const __m256i moved = _mm256_andnot_si256(bits, _mm256_set1_epi32(static_cast<int>(kE4M3Bits)));
    return _mm256_or_ps(_mm256_mul_ps(_mm256_castsi256_ps(moved), _mm256_set1_ps(kE4M3Rebase)), nan);
}

template <class T>
inline Floats rounded(Floats a) {
    if constexpr (std::is_same_v<T, Float16>) {
        return _mm256_cvtph_ps(_mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
    } else if constexpr (std::is_same_v<T, BFloat16>) {
        const __m256i u = _mm256_castps_si256(a);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
        const __m256i even = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
        const __m256i result = _mm256_blendv_epi8(even, quiet, nan);
        return _mm256_castsi256_ps(_mm256_and_si256(result, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
    } else {
        return a;
    }
}

#else  // any CPU ------------------------------------------------------------------------------------------------------

inline Floats plus(Floats a, Floats b) { return a + b; }
inline Floats minus(Floats a, Floats b) { return a - b; }

inline Floats halved_powers(Codes exponents) {
    const Totals e = reinterpret_cast<Totals>(exponents);
    return reinterpret_cast<Floats>(e < 2 ? (e + 1) << 21 : (e - 1) << 23);
}

template <int kByte>
inline Floats integer_at(Codes a) {
    return Floats{static_cast<float>(a[kByte]), static_cast<float>(a[4 + kByte]), static_cast<float>(a[8 + kByte]),
                  static_cast<float>(a[12 + kByte])};
}
template <int kByte>
inline Floats entry_at(Codes a, const float* table) {
    return Floats{table[a[kByte] & 15], table[a[4 + kByte] & 15], table[a[8 + kByte] & 15], table[a[12 + kByte] & 15]};
}
template <int kByte>
inline Floats e4m3_at(Codes inverted) {
    const Totals bits = reinterpret_cast<Totals>(inverted) << (24 - 8 * kByte) >> 4;
    const Totals moved = ~bits & static_cast<int32_t>(kE4M3Bits);
    const Totals is_nan = (bits & static_cast<int32_t>(kE4M3Magnitude)) == 0;
    return reinterpret_cast<Floats>(reinterpret_cast<Totals>(reinterpret_cast<Floats>(moved) * kE4M3Rebase) | is_nan);
}

template <class T>
inline Floats rounded(Floats a) {
    for (int i = 0; i < 4; ++i) a[i] = to_float(from_float<T>(a[i]));
    return a;
}

#endif  // -------------------------------------------------------------------------------------------------------------

// The numbers of 16 scales: bytes become 32-bit lanes, as codes are.
template <class F>
inline Vec numbers_of_bytes(const uint8_t* p, F function) {
    alignas(64) uint32_t words[kLanes];
    alignas(64) float numbers[kLanes];
    for (int i = 0; i < kLanes; ++i) words[i] = p[i];
    for (int i = 0; i < kLanes; i += kIntColumns) store_floats(numbers + i, function(load_codes(words + i)));
    return load(numbers);
}

inline Vec load_e4m3(const uint8_t* p) {
    return numbers_of_bytes(p, [](Codes a) { return e4m3_at<0>(exclusive(a, splat_codes(kInvertedE4M3))); });
}

// Of halves of the scales of MXFP4: 2^(exponent - 128).
inline Vec load_halved_powers(const uint8_t* p) { return numbers_of_bytes(p, halved_powers); }

// How codes become numbers: what kinds of codes there are.

struct Integers {
    template <int kByte>
    static Floats get(Codes codes, Floats offset) {
        return minus(integer_at<kByte>(codes), offset);
    }
};

struct E4M3 {
    template <int kByte>
    static Floats get(Codes codes, Floats) {
        return e4m3_at<kByte>(codes);
    }
};

template <const float* kTable>
struct Entries {
    template <int kByte>
    static Floats get(Codes codes, Floats) {
        return entry_at<kByte>(codes, kTable);
    }
};

}  // namespace octavo
