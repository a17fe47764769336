#include "vec_math.h"

namespace octavo {

static Vec sigmoid(Vec x) { return splat(1.0f) / (splat(1.0f) + exp(negate(x))); }

Vec tanh(Vec x) {
    // (1 - e) / (1 + e) loses digits near 0, so use an odd polynomial there
    const Vec a = absolute(x);
    const Vec e = exp(a * splat(-2.0f));
    const Vec large = (splat(1.0f) - e) / (splat(1.0f) + e);
    const Vec s = a * a;
    Vec p = splat(-5.70498872745e-3f);
    p = fma(p, s, splat(2.06390887954e-2f));
    p = fma(p, s, splat(-5.37397155531e-2f));
    p = fma(p, s, splat(1.33314422036e-1f));
    p = fma(p, s, splat(-3.33332819422e-1f));
    const Vec small = fma(p * s, a, a);
    const Vec result = select(less(a, splat(0.625f)), small, large);
    return select(less(x, zero()), negate(result), result);
}

// The standard normal distribution function (Abramowitz and Stegun 7.1.26, absolute error below 1e-7).
static Vec normal_cdf(Vec x) {
    const Vec z = absolute(x) * splat(0.70710678f);
    const Vec t = splat(1.0f) / fma(z, splat(0.3275911f), splat(1.0f));
    Vec p = splat(1.061405429f);
    p = fma(p, t, splat(-1.453152027f));
    p = fma(p, t, splat(1.421413741f));
    p = fma(p, t, splat(-0.284496736f));
    p = fma(p, t, splat(0.254829592f));
    const Vec tail = p * t * exp(negate(z * z)) * splat(0.5f);
    return select(less(x, zero()), tail, splat(1.0f) - tail);
}

Vec limited_swish(Vec x, float alpha, float limit) {
    const Vec bounded = min(splat(limit), x);
    return bounded * sigmoid(bounded * splat(alpha));
}

Vec activate(Vec x, int32_t kind, float parameter) {
    switch (kind) {
        case kSilu:
            return x * sigmoid(x);
        case kGelu:
            return x * normal_cdf(x);
        case kGeluTanh: {
            const Vec inner = x * fma(x * x, splat(0.7978845608f * 0.044715f), splat(0.7978845608f));
            return splat(0.5f) * x * (splat(1.0f) + tanh(inner));
        }
        case kQuickGelu:
            return x * sigmoid(x * splat(1.702f));
        case kRelu:
            return select(less(x, zero()), zero(), x);
        case kSquaredRelu: {
            const Vec positive = select(less(x, zero()), zero(), x);
            return positive * positive;
        }
        case kLogistic:
            return sigmoid(x);
        case kScale:
            return x * splat(parameter);
        case kSoftcap:
            return tanh(x / splat(parameter)) * splat(parameter);
        case kClip:  // both return their second argument for NaN
            return min(splat(parameter), max(splat(-parameter), x));
        default:
            return x;
    }
}

}  // namespace octavo
