// RMS norm (Zhang and Sennrich, arXiv:1910.07467) and layer norm (Ba et al., arXiv:1607.06450).
#pragma once

#include <cmath>

#include "octavo.h"
#include "simd.h"

namespace octavo {

// 1 / sqrt(mean of squares + eps). The order of the sum depends only on the size.
template <class T>
float inverse_rms(const T* x, int size, float eps) {
    constexpr int kSums = 4;
    Vec sums[kSums] = {zero(), zero(), zero(), zero()};
    int i = 0;
    for (; i + kSums * kLanes <= size; i += kSums * kLanes) {
        for (int j = 0; j < kSums; ++j) {
            const Vec v = load(x + i + j * kLanes);
            sums[j] = fma(v, v, sums[j]);
        }
    }
    for (; i < size; i += kLanes) {
        const Vec v = load_first(x + i, size - i);
        sums[0] = fma(v, v, sums[0]);
    }
    const float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    return 1.0f / std::sqrt(total / static_cast<float>(size) + eps);
}

// T: the model's type; U: T, or float holding values of T.
template <class T, class U>
void rms_norm(const T* x, const OctavoRmsNorm& norm, int size, U* out) {
    const T* weight = static_cast<const T*>(norm.weight);
    const Vec scale = splat(inverse_rms(x, size, norm.eps)), offset = splat(norm.offset);
    if (!weight || !norm.rounds_first) {
        for (int i = 0; i < size; i += kLanes) {
            Vec normed = load_first(x + i, size - i) * scale;
            if (weight) normed = normed * (offset + load_first(weight + i, size - i));
            store_first(out + i, round_to<T>(normed), size - i);
        }
        return;
    }
    for (int i = 0; i < size; i += kLanes) {
        const Vec normed = round_to<T>(load_first(x + i, size - i) * scale);
        store_first(out + i, round_to<T>(normed * load_first(weight + i, size - i)), size - i);
    }
}

// Layer norm; weight and bias may be null. Two-pass variance: E[x^2] - E[x]^2 would lose digits.
template <class T>
void layer_norm(const T* x, const T* weight, const T* bias, int size, float eps, T* out) {
    Vec total = zero();
    for (int i = 0; i < size; i += kLanes) total = total + load_first(x + i, size - i);
    const float mean = sum(total) / static_cast<float>(size);
    Vec squares = zero();
    for (int i = 0; i < size; i += kLanes) {
        float difference[kLanes];
        store(difference, load_first(x + i, size - i) - splat(mean));
        const Vec d = load_first(difference, size - i);
        squares = fma(d, d, squares);
    }
    const float scale = 1.0f / std::sqrt(sum(squares) / static_cast<float>(size) + eps);
    for (int i = 0; i < size; i += kLanes) {
        Vec y = (load_first(x + i, size - i) - splat(mean)) * splat(scale);
        if (weight) y = y * load_first(weight + i, size - i);
        if (bias) y = y + load_first(bias + i, size - i);
        store_first(out + i, y, size - i);
    }
}

}  // namespace octavo
