// Exact filters on a list of tokens, without sorting it.
#pragma once

#include "sampling_row.h"

namespace octavo::sampling {

// Where a prefix of an ordered row ends: everything above `logit`, and the first `equals` of those equal to it.
struct Cut {
    float logit;
    int equals;
    bool all_equals;
};

// A midpoint for bisection: greater than `low`, at most `high`.
inline float middle(float low, float high, int round) {
    // Halving the distance is best for logits, but slow for values of many magnitudes; halving the number of floats in
    // between ends every search within another 32 rounds.
    constexpr int kRoundsOfDistance = 24;
    float result = 0.5f * low + 0.5f * high;
    if (round >= kRoundsOfDistance) {
        const auto order = [](float x) {
            int32_t bits;
            std::memcpy(&bits, &x, sizeof bits);
            return bits >= 0 ? int64_t{bits} : -int64_t{bits & 0x7fffffff};
        };
        const int64_t sum = order(low) + order(high);
        const int64_t half = sum >= 0 ? sum / 2 : -(-sum / 2);
        const int32_t bits = half >= 0 ? static_cast<int32_t>(half) : static_cast<int32_t>(-half) | INT32_MIN;
        std::memcpy(&result, &bits, sizeof result);
    }
    return result > low ? result : high;
}

// The shortest prefix of a list, ordered by logit (larger first) and then by index, that is worth `need`: a token is
// worth its weight in units, or 1 without weights. The list lies in [low, high], is padded, and is worth at least
// `need` > 0. Quickselect: partitions the list and continues with the part that holds the boundary.
template <bool kWeighted>
Cut find_cut(const float* logits, const float* weights, int size, float low, float high, int64_t need,
             Scratch& scratch) {
    float* const values_out = scratch.values.data();
    float* const weights_out = scratch.weights.data();
    int64_t above = 0;  // worth of all values above the remaining list
    for (int round = 0; low < high; ++round) {
        const Vec pivot = splat(middle(low, high, round));
        int64_t worth = 0;
        if (kWeighted) {
            UnitSum sum;
            for (int i = 0; i < size; i += kLanes) {
                sum.add(keep(at_least(load(logits + i), pivot), load(weights + i)));
            }
            worth = sum.total();
        } else {
            for (int i = 0; i < size; i += kLanes) worth += count(at_least(load(logits + i), pivot));
        }
        const bool upper = above + worth >= need;
        if (!upper) above += worth;

        const Vec least = splat(low);  // excludes the padding
        Vec lowest = splat(kInfinity), highest = splat(-kInfinity);
        int n = 0;
        for (int i = 0; i < size; i += kLanes) {
            const Vec x = load(logits + i);
            const Mask kept = upper ? at_least(x, pivot) : both(at_least(x, least), greater(pivot, x));
            if (!any(kept)) continue;
            lowest = min(lowest, select(kept, x, lowest));
            highest = max(highest, select(kept, x, highest));
            compress(values_out + n, kept, x);
            if (kWeighted) compress(weights_out + n, kept, load(weights + i));
            n += count(kept);
        }
        store(values_out + n, splat(-kInfinity));
        if (kWeighted) store(weights_out + n, splat(0.0f));
        logits = values_out;
        weights = weights_out;
        size = n;
        low = smallest(lowest);
        high = largest(highest);
    }
    const int64_t each = kWeighted ? units(weights[0]) : 1;
    const int64_t equals = (need - above + each - 1) / each;
    return {low, static_cast<int>(equals), equals >= size};
}

// Keeps the part of a list up to a cut.
inline void cut_list(List& list, const Cut& cut) {
    const Vec bound = splat(cut.logit);
    int boundary = list.size;  // equal values before this index are kept
    if (!cut.all_equals) {
        for (int i = 0, left = cut.equals; left > 0; ++i) {
            if (list.logits[i] == cut.logit && --left == 0) boundary = i + 1;
        }
    }
    int n = 0;
    for (int i = 0; i < list.size; i += kLanes) {
        const Vec x = load(list.logits.data() + i);
        Mask kept = at_least(x, bound);
        if (i + kLanes > boundary) {
            const Mask early = first_lanes(boundary > i ? boundary - i : 0);
            kept = either(both(kept, early), greater(x, bound));
        }
        list.keep(n, i, kept);
    }
    list.end(n);
}

// Keeps the tokens with at least `min_p` times the largest weight.
inline void cut_weights(List& list, float min_p) {
    const Vec bound = splat(min_p);
    int n = 0;
    for (int i = 0; i < list.size; i += kLanes) {
        Mask kept = at_least(load(list.weights.data() + i), bound);
        if (i + kLanes > list.size) kept = both(kept, first_lanes(list.size - i));
        list.keep(n, i, kept);
    }
    list.end(n);
}

// A logit that at least k tokens reach, or the smallest float: the k-th largest peak, since a group's peak is one of
// its tokens.
inline float reached_by(int k, const Scan& scanned, Scratch& scratch) {
    if (k > scanned.num_peaks) return -FLT_MAX;
    collect(scratch.peaks.data(), scanned.num_peaks, -FLT_MAX, scanned.num_peaks, scratch.list);
    if (k > scratch.list.size) return -FLT_MAX;
    const float* peaks = scratch.list.logits.data();
    return find_cut<false>(peaks, nullptr, scratch.list.size, -FLT_MAX, scanned.top, k, scratch).logit;
}

}  // namespace octavo::sampling
