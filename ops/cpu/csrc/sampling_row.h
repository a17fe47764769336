// A row of logits: its weights, and its remaining candidate tokens.
//
// All masses are integer sums (of units), so they are exact in any order: searches may cut the row anywhere and still
// find the boundary that the definition gives, ties included.
#pragma once

#include <cfloat>
#include <cmath>

#include "sampling_buffer.h"
#include "sampling_lanes.h"

namespace octavo::sampling {

constexpr int kBlock = 32 * kLanes;  // tokens per block of sums and peaks

// 2^f on [-0.5, 0.5] as 1 + c1 f + ... + c5 f^5, relative error 1.9e-7 in float32 arithmetic.
constexpr float kC1 = 0x1.62e42ap-1f, kC2 = 0x1.ebf9bcp-3f, kC3 = 0x1.c6b752p-5f, kC4 = 0x1.3cea88p-7f,
                kC5 = 0x1.5bba14p-10f;
constexpr float kRoundShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds a float32 to an integer
constexpr float kLeastExponent = -64.0f;    // smaller weights round to zero units anyway
constexpr double kLog2E = 1.4426950408889634;

// The weight of a logit is 2^((logit - top) * scale), 1 for the largest.
class Weighing {
public:
    Weighing(float top, float temperature)
        : top_(top), scale_(static_cast<float>(std::fmin(kLog2E / static_cast<double>(temperature), FLT_MAX))) {}

    [[gnu::always_inline]] Vec operator()(Vec logits) const {
        const Vec z = max((logits - splat(top_)) * splat(scale_), splat(kLeastExponent));
        const Vec shifted = z + splat(kRoundShift);
        const Vec f = z - (shifted - splat(kRoundShift));
        Vec p = splat(kC5) * f + splat(kC4);
        p = p * f + splat(kC3);
        p = p * f + splat(kC2);
        p = p * f + splat(kC1);
        p = p * f + splat(1.0f);
        return times_power_of_two(p, shifted);
    }

    // A logit that is certainly smaller than any whose weight is at least 2^exponent. The margin of 1 in the exponent
    // is a thousand times the rounding error.
    float below(double exponent) const {
        if (exponent - 1 <= kLeastExponent) return -FLT_MAX;
        const double bound = top_ + (exponent - 1) / scale_;
        if (bound <= -FLT_MAX) return -FLT_MAX;
        return std::nextafter(static_cast<float>(bound), -FLT_MAX);
    }

private:
    float top_, scale_;
};

// The remaining candidates, in id order. After the last one come kLanes values that no filter keeps.
struct List {
    Buffer<float> logits, weights;
    Buffer<int32_t> ids;
    int size = 0;

    void reserve(int count) {
        const size_t padded = static_cast<size_t>(count) + 2 * kLanes;
        logits.reserve(padded);
        weights.reserve(padded);
        ids.reserve(padded);
    }
    // Appends the chosen tokens among the kLanes from index `from` to a list that is being filtered in place.
    void keep(int& size_so_far, int from, Mask chosen) {
        if (!any(chosen)) return;
        const Vec x = load(logits.data() + from), w = load(weights.data() + from);
        compress(logits.data() + size_so_far, chosen, x);
        compress(weights.data() + size_so_far, chosen, w);
        compress_ids(ids.data() + size_so_far, chosen, ids.data() + from);
        size_so_far += count(chosen);
    }
    void end(int size_at_last) {
        size = size_at_last;
        pad();
    }
    void pad() {
        store(logits.data() + size, splat(-kInfinity));
        store(weights.data() + size, splat(0.0f));
    }
};

// A thread's memory. It grows with the vocabulary and is reused.
struct Scratch {
    Buffer<float> peaks;            // the largest logits of groups of 32 tokens
    Buffer<int64_t> sums;           // weight of each block
    Buffer<float> values, weights;  // working copy of a search
    Buffer<float> raw;              // a row before processing
    List list;

    void reserve(int vocab) {
        const size_t blocks = static_cast<size_t>(vocab) / kBlock + 1;
        peaks.reserve((blocks + 1) * kLanes);
        sums.reserve(blocks);
        values.reserve(static_cast<size_t>(vocab) + 2 * kLanes);
        weights.reserve(static_cast<size_t>(vocab) + 2 * kLanes);
        list.reserve(vocab);
    }
};

// Result of the first pass over a row.
struct Scan {
    float top;  // the largest logit
    bool has_nan;
    int num_peaks;  // in Scratch::peaks, with minus infinity for missing groups
};

inline Scan scan(const float* logits, int vocab, Scratch& scratch) {
    Mask nan = first_lanes(0);
    Vec highest = splat(-kInfinity);
    float* peak = scratch.peaks.data();
    for (int begin = 0; begin < vocab; begin += kBlock, peak += kLanes) {
        const int end = vocab - begin < kBlock ? vocab : begin + kBlock;
        Vec a = splat(-kInfinity), b = a;
        int i = begin;
        for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
            const Vec x = load(logits + i), y = load(logits + i + kLanes);
            nan = either(nan, either_nan(x, y));
            a = max(a, x);
            b = max(b, y);
        }
        for (; i < end; i += kLanes) {
            const Vec x = load_first(logits + i, end - i < kLanes ? end - i : kLanes, -kInfinity);
            nan = either(nan, either_nan(x, x));
            a = max(a, x);
        }
        a = max(a, b);
        store(peak, a);
        highest = max(highest, a);
    }
    return {largest(highest), any(nan), static_cast<int>(peak - scratch.peaks.data())};
}

// The lowest id with the largest logit.
inline int first_of_top(const float* logits, int vocab, const Scan& scanned, const Scratch& scratch) {
    const Vec top = splat(scanned.top);
    int block = 0;
    while (!any(equal(load(scratch.peaks.data() + block * kLanes), top))) ++block;
    for (int i = block * kBlock;; i += kLanes) {
        const int left = vocab - i;
        const Mask found = equal(load_first(logits + i, left < kLanes ? left : kLanes, -kInfinity), top);
        if (any(found)) return i + first(found);
    }
}

// Copies the logits of at least `least` (not NaN). False: there are more than `limit`, and not all were copied.
inline bool collect(const float* logits, int count_all, float least, int limit, List& list) {
    const Vec bound = splat(least);
    float* out = list.logits.data();
    int32_t* ids = list.ids.data();
    int n = 0, i = 0;
    for (; i + kLanes <= count_all; i += kLanes) {
        const Vec x = load(logits + i);
        const Mask kept = at_least(x, bound);
        if (!any(kept)) continue;
        compress(out + n, kept, x);
        compress_ids(ids + n, kept, i);
        n += count(kept);
        if (n > limit) return false;
    }
    if (i < count_all) {
        const Vec x = load_first(logits + i, count_all - i, -kInfinity);
        const Mask kept = at_least(x, bound);
        compress(out + n, kept, x);
        compress_ids(ids + n, kept, i);
        n += count(kept);
    }
    list.end(n);
    return n <= limit;
}

// Sums the weights of logits block by block; also stores them if `weights` is given (in whole vectors).
inline int64_t weigh(const float* logits, int count_all, const Weighing& weighing, float* weights, int64_t* sums) {
    int64_t total = 0;
    for (int begin = 0; begin < count_all; begin += kBlock) {
        const int end = count_all - begin < kBlock ? count_all : begin + kBlock;
        UnitSum sum;
        int i = begin;
        for (; i + kLanes <= end; i += kLanes) {
            const Vec w = weighing(load(logits + i));
            if (weights != nullptr) store(weights + i, w);
            sum.add(w);
        }
        if (i < end) {
            const Vec w = weighing(load_first(logits + i, end - i, -kInfinity));
            if (weights != nullptr) store(weights + i, w);
            sum.add(w);
        }
        const int64_t block_total = sum.total();
        sums[begin / kBlock] = block_total;
        total += block_total;
    }
    return total;
}

inline int64_t sum_units(const float* weights, int size, int64_t* sums) {
    int64_t total = 0;
    for (int begin = 0; begin < size; begin += kBlock) {
        const int end = size - begin < kBlock ? size : begin + kBlock;
        UnitSum sum;
        for (int i = begin; i < end; i += kLanes) sum.add(load(weights + i));
        sums[begin / kBlock] = sum.total();
        total += sums[begin / kBlock];
    }
    return total;
}

}  // namespace octavo::sampling
