// 16-bit floating-point numbers: storage types with conversions.
#pragma once

#include <cstdint>
#include <cstring>

namespace octavo {

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

inline uint32_t bits_of(float x) {
    uint32_t u;
    std::memcpy(&u, &x, sizeof u);
    return u;
}

inline float float_of(uint32_t u) {
    float x;
    std::memcpy(&x, &u, sizeof x);
    return x;
}

inline float to_float(float x) { return x; }

inline float to_float(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

inline float to_float(Float16 x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
    const uint32_t magnitude = x.bits & 0x7fff;
    if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);  // infinite or NaN
    // Multiplying moves the exponent's bias from 15 to 127, for subnormal numbers too.
    return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
}

template <class T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
    return x;
}

template <>
inline BFloat16 from_float<BFloat16>(float x) {
    const uint32_t u = bits_of(x);
    if ((u & 0x7fffffff) > 0x7f800000) return {static_cast<uint16_t>(u >> 16 | 0x40)};  // NaN
    return {static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}

template <>
inline Float16 from_float<Float16>(float x) {
    const uint32_t u = bits_of(x);
    const uint16_t sign = static_cast<uint16_t>(u >> 16 & 0x8000);
    const uint32_t magnitude = u & 0x7fffffff;
    if (magnitude > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
    if (magnitude >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // rounds to infinity
    if (magnitude < 0x38800000) {  // subnormal: adding 0.5 leaves the rounded number in the low bits
        const float shifted = float_of(magnitude) + 0.5f;
        return {static_cast<uint16_t>(sign | (bits_of(shifted) - 0x3f000000))};
    }
    const uint32_t rebased = magnitude - (112u << 23);
    return {static_cast<uint16_t>(sign | (rebased + 0xfff + (rebased >> 13 & 1)) >> 13)};
}

}  // namespace octavo
