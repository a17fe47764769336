// Transforms of a head of q or k before use: RMS norm and rotary embedding.
#pragma once

#include "norm.h"
#include "octavo.h"

namespace octavo {

constexpr int kMaxHeadDim = 512;
constexpr int kMaxLatentDim = 1024;  // of a latent with its rotated columns

// Rotates pairs of elements in place by the angles of a position, rounding to T wherever torch would.
template <class T>
void rotate(float* x, const OctavoHeads& heads, int position) {
    const int half = heads.rotary_dim / 2;
    const float* cos = heads.cos_sin + static_cast<int64_t>(position) * heads.rotary_dim;
    const float* sin = cos + half;
    if (heads.interleaved) {
        const auto rounded = [](float v) { return to_float(from_float<T>(v)); };
        for (int i = 0; i < half; ++i) {
            const float a = x[2 * i], b = x[2 * i + 1], c = rounded(cos[i]), s = rounded(sin[i]);
            x[2 * i] = rounded(rounded(a * c) - rounded(b * s));
            x[2 * i + 1] = rounded(rounded(b * c) + rounded(a * s));
        }
        return;
    }
    for (int i = 0; i < half; i += kLanes) {
        const int count = half - i;
        const Vec a = load_first(x + i, count), b = load_first(x + half + i, count);
        const Vec c = round_to<T>(load_first(cos + i, count)), s = round_to<T>(load_first(sin + i, count));
        store_first(x + i, round_to<T>(round_to<T>(a * c) - round_to<T>(b * s)), count);
        store_first(x + half + i, round_to<T>(round_to<T>(b * c) + round_to<T>(a * s)), count);
    }
}

// Writes a transformed head to floats (all values representable in T), zero-padded to `padded`.
template <class T>
void prepare_head(const T* x, int dim, const OctavoHeads& heads, int position, int padded, float* out) {
    if (heads.has_norm)
        rms_norm(x, heads.norm, dim, out);
    else
        for (int i = 0; i < dim; i += kLanes) store_first(out + i, load_first(x + i, dim - i), dim - i);
    if (heads.rotary_dim) rotate<T>(out, heads, position);
    for (int i = dim; i < padded; ++i) out[i] = 0.0f;
}

}  // namespace octavo
