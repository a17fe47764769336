// Quantisation of rows, as weights are loaded; see ops/reference/quantize.py. All CPUs find the same codes: sums have a
// fixed order, and nothing is fused.
#include <algorithm>
#include <limits>

#include "kernels.h"
#include "vec_math.h"

namespace octavo {

namespace {

constexpr int kGroup = 2 * kLanes;  // columns with a scale of their own

// Some numbers of a group.
struct Group {
    Vec first;
    Vec second;
};

template <class F>
Group each_of(F function) {
    return {function(0), function(1)};
}
Vec part(const Group& group, int i) { return i ? group.second : group.first; }

template <class T>
Group load_group(const T* x) {
    return {load(x), load(x + kLanes)};
}

// Halves are added until one number is left.
float total(const Group& group) { return sum(group.first + group.second); }

float largest_of(const Group& group) { return largest(max(group.first, group.second)); }
float smallest_of(const Group& group) { return -largest(max(negate(group.first), negate(group.second))); }

Group times(const Group& a, const Group& b) { return {a.first * b.first, a.second * b.second}; }

// Rounded to integers from `low` to `high`. NaN becomes either of them.
Group rounded(const Group& x, float low, float high) {
    return each_of([&](int i) { return nearest(min(max(part(x, i), splat(low)), splat(high))); });
}

void store_codes_of(const Group& codes, float offset, uint8_t* out) {
    float numbers[kGroup];
    store(numbers, codes.first + splat(offset));
    store(numbers + kLanes, codes.second + splat(offset));
    for (int i = 0; i < kGroup; ++i) out[i] = static_cast<uint8_t>(numbers[i]);
}

void quantize_int8(const Group& x, uint8_t* codes, Float16& scale) {
    const float most = std::max(largest_of(x), -smallest_of(x));
    scale = from_float<Float16>(most / 127.0f);
    const float step = to_float(scale);
    const Vec divisor = splat(step > 0.0f ? step : 1.0f);
    store_codes_of(rounded({x.first / divisor, x.second / divisor}, -127.0f, 127.0f), 128.0f, codes);
}

// Codes of 4 bits: (x - start) * factor.
struct Spread {
    float start;
    float factor;

    Group codes(const Group& x) const {
        const auto scaled = [&](int i) { return (part(x, i) - splat(start)) * splat(factor); };
        return rounded(each_of(scaled), 0.0f, 15.0f);
    }
};

// `weights`: what the errors of the columns count, 1 in all.
void quantize_int4(const Group& x, const Group& weights, uint8_t* codes, Float16& scale, Float16& minimum) {
    constexpr float kShrinks[] = {1.0f, 0.9f, 0.8f};
    constexpr float kFlat = 1e-6f;  // variance of codes that are all the same, but for rounding
    const float low = smallest_of(x), high = largest_of(x), range = high - low;
    const float mean = total(times(x, weights));
    const Group centred = {x.first - splat(mean), x.second - splat(mean)};
    Spread best = {low, 0.0f};
    float best_scale = 0.0f, best_minimum = mean, most = -std::numeric_limits<float>::infinity();
    for (const float share : kShrinks) {
        const float covered = share * range, width = covered / 15.0f;
        const Spread spread = {(low + high - covered) / 2.0f, width > 0.0f ? 1.0f / width : 0.0f};
        const Group found = spread.codes(x);
        const float code_mean = total(times(found, weights));
        const float covariance = total(times(times(found, centred), weights));
        const float variance = total(times(times(found, found), weights)) - code_mean * code_mean;
        const float fitted = covariance / (variance > kFlat ? variance : 1.0f);
        const float explained = fitted * covariance;  // the least squared error is the variance of x without it
        if (!(explained > most)) continue;
        most = explained;
        best = spread;
        best_scale = fitted;
        best_minimum = mean - fitted * code_mean;
    }
    scale = from_float<Float16>(best_scale);
    minimum = from_float<Float16>(best_minimum);
    store_codes_of(best.codes(x), 0.0f, codes);
}

// One row: codes, then the scales of its groups, then their minimums.
template <class T>
void quantize_row_of(const T* x, int columns, int bits, const float* importance, uint8_t* out) {
    const int groups = columns / kGroup;
    uint8_t* fields = out + columns;  // at any address
    for (int g = 0; g < groups; ++g) {
        const Group numbers = load_group(x + g * kGroup);
        Float16 scale, minimum;
        if (bits == 8) {
            quantize_int8(numbers, out + g * kGroup, scale);
        } else {
            Group weights = {splat(1.0f / kGroup), splat(1.0f / kGroup)};
            if (importance) weights = load_group(importance + g * kGroup);
            quantize_int4(numbers, weights, out + g * kGroup, scale, minimum);
            std::memcpy(fields + (groups + g) * sizeof minimum, &minimum, sizeof minimum);
        }
        std::memcpy(fields + g * sizeof scale, &scale, sizeof scale);
    }
}

}  // namespace

}  // namespace octavo

using namespace octavo;

void octavo_quantize_groups(const void* source, int64_t stride, int32_t type, const float* importance, void* out,
                            int64_t out_stride, int32_t rows, int32_t columns, int32_t bits) {
    with_type(type, [&](auto number) {
        using T = decltype(number);
#pragma omp parallel for schedule(static)
        for (int32_t row = 0; row < rows; ++row)
            quantize_row_of(static_cast<const T*>(source) + row * stride, columns, bits, importance,
                            static_cast<uint8_t*>(out) + row * out_stride);
    });
}
