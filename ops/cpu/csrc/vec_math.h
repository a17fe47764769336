// Exponential, hyperbolic tangent and activation functions on vectors.
#pragma once

#include "octavo.h"
#include "simd.h"

namespace octavo {

// e^x within 2 ulp; 0 below -87.3, so exactly 0 for minus infinity. NaN stays NaN.
inline Vec exp(Vec x) {
    const Vec lowest = splat(-87.33654f);
    const Mask tiny = less(x, lowest);
    const Vec clamped = min(splat(88.72283f), max(lowest, x));  // both return their second argument for NaN
    const Vec n = nearest(clamped * splat(1.44269504f));
    // x - n ln 2, with ln 2 in two parts
    Vec r = fma(n, splat(-0.693359375f), clamped);
    r = fma(n, splat(2.12194440e-4f), r);
    Vec p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p * r, r, r) + splat(1.0f);
    return select(tiny, zero(), scale_by_power(p, n));
}

// 2^x for x up to 0 or slightly above; 0 below -125, so exactly 0 for minus infinity. NaN stays NaN.
//
// Minimax polynomials on [-0.5, 0.5]: relative error 2e-9, or 3e-6 if the result is only needed as bfloat16. No scaling
// underflows: that would take more than a hundred cycles on Intel's CPUs, in every row that hides some tokens.
template <bool kRough>
inline Vec exp2_below(Vec x) {
    const Vec lowest = splat(-125.0f);
    const Mask tiny = less(x, lowest);
    const Vec clamped = max(lowest, x);  // max returns its second argument for NaN
    const Vec n = nearest(clamped);
    const Vec r = clamped - n;
    Vec p;
    if constexpr (kRough) {
        p = fma(splat(9.570102207e-3f), r, splat(5.591785908e-2f));
        p = fma(p, r, splat(2.402474433e-1f));
        p = fma(p, r, splat(6.931217909e-1f));
        p = fma(p, r, splat(9.999992847e-1f));
    } else {
        p = fma(splat(1.534581243e-4f), r, splat(1.339993090e-3f));
        p = fma(p, r, splat(9.618489072e-3f));
        p = fma(p, r, splat(5.550328642e-2f));
        p = fma(p, r, splat(2.402264625e-1f));
        p = fma(p, r, splat(6.931471825e-1f));
        p = fma(p, r, splat(1.0f));
    }
    return select(tiny, zero(), scale_by_power(p, n));
}

inline Vec negate(Vec x) { return zero() - x; }

inline Vec absolute(Vec x) { return max(negate(x), x); }

Vec tanh(Vec x);

// Applies the function OctavoActivation `kind`, one of those of one number.
Vec activate(Vec x, int32_t kind, float parameter);

// min(x, limit) sigmoid(alpha min(x, limit)): the gate of kSwigluOai.
Vec limited_swish(Vec x, float alpha, float limit);

// A gated activation, rounded as numbers of type T after the gate's own function. NaN stays NaN.
template <class T>
inline Vec gated(Vec gate, Vec up, int32_t kind, float parameter, float limit) {
    if (kind != kSwigluOai) return round_to<T>(activate(gate, kind, parameter)) * up;
    const Vec bounded = min(splat(limit), max(splat(-limit), up));  // both return their second argument for NaN
    return round_to<T>(limited_swish(gate, parameter, limit)) * (bounded + splat(1.0f));
}

}  // namespace octavo
