// From a row of logits to a token. Defined by ops/reference/sampling.py, which this matches bit for bit.
#pragma once

#include "sampling_cut.h"

namespace octavo::sampling {

struct Filters {
    float temperature;
    int top_k;
    float top_p;
    float min_p;
};

// The first token, in id order, at which the running sum of units exceeds number / 2^53 of the total.
class Picker {
public:
    Picker(uint64_t number, int64_t total)
        : target_(static_cast<int64_t>(static_cast<unsigned __int128>(number) * static_cast<uint64_t>(total) >> 53)) {}

    int block(const int64_t* sums) {
        int result = 0;
        while (sums[result] <= target_) target_ -= sums[result++];
        return result;
    }
    int place(const float* weights) {
        int result = 0;
        for (;; ++result) {
            target_ -= units(weights[result]);
            if (target_ < 0) return result;
        }
    }

private:
    int64_t target_;
};

inline int64_t units_for(float top_p, int64_t total) {
    const auto wanted = static_cast<int64_t>(std::ceil(static_cast<double>(top_p) * static_cast<double>(total)));
    return wanted > 1 ? wanted : 1;
}

// Applies top-p to a list in [least, top], as a fraction of `total`, and returns the units that remain.
inline int64_t cut_top_p(List& list, float least, float top, float top_p, int64_t total, Scratch& scratch) {
    const int64_t need = units_for(top_p, total);
    cut_list(list, find_cut<true>(list.logits.data(), list.weights.data(), list.size, least, top, need, scratch));
    return sum_units(list.weights.data(), list.size, scratch.sums.data());
}

// Fills the list with the tokens of a whole row that top-p keeps; returns their units.
inline int64_t top_p_of_all(const float* logits, int vocab, const Weighing& weighing, float top, float top_p,
                            Scratch& scratch) {
    List& list = scratch.list;
    int64_t* const sums = scratch.sums.data();
    const double tail = (1.0 - static_cast<double>(top_p)) / vocab;

    // Usually a few tokens hold nearly all the mass and the rest need not be weighed: whatever it holds, between
    // nothing and an upper bound, top-p keeps the same tokens.
    constexpr int kFew = 8;              // as a divisor of the vocabulary size
    constexpr double kMostOfTail = 0.1;  // bound on the rest's mass, as a fraction of 1 - top_p
    const double most = kMostOfTail * tail;
    float least = weighing.below(std::log2(most));
    if (collect(logits, vocab, least, vocab / kFew, list)) {
        const int64_t held = weigh(list.logits.data(), list.size, weighing, list.weights.data(), sums);
        list.pad();
        const auto most_units = static_cast<int64_t>(std::ceil(most * static_cast<double>(kOneInUnits)));
        const int64_t need = units_for(top_p, held + (vocab - list.size) * most_units);
        const int64_t kept = cut_top_p(list, least, top, top_p, held, scratch);
        if (kept >= need) return kept;
    }

    // The last token that top-p keeps and all after it hold more than 1 - top_p of the total. None of them weighs more
    // than that last token, so it weighs at least their mass divided by the number of tokens.
    const int64_t total = weigh(logits, vocab, weighing, nullptr, sums);
    least = weighing.below(std::log2(tail * static_cast<double>(total) / static_cast<double>(kOneInUnits)));
    collect(logits, vocab, least, vocab, list);
    weigh(list.logits.data(), list.size, weighing, list.weights.data(), sums);
    list.pad();
    return cut_top_p(list, least, top, top_p, total, scratch);
}

// Samples a token from a row whose largest logit is finite.
inline int pick(const float* logits, int vocab, const Scan& scanned, const Filters& filters, uint64_t number,
                Scratch& scratch) {
    if (!(filters.temperature > 0)) return first_of_top(logits, vocab, scanned, scratch);
    const Weighing weighing(scanned.top, filters.temperature);
    const bool has_k = filters.top_k > 0 && filters.top_k < vocab;
    int64_t* const sums = scratch.sums.data();
    List& list = scratch.list;
    int64_t total;

    if (!has_k && filters.min_p <= 0) {
        if (filters.top_p >= 1) {
            Picker picker(number, weigh(logits, vocab, weighing, nullptr, sums));
            const int begin = picker.block(sums) * kBlock;
            const int size = vocab - begin < kBlock ? vocab - begin : kBlock;
            weigh(logits + begin, size, weighing, scratch.weights.data(), sums);
            return begin + picker.place(scratch.weights.data());
        }
        total = top_p_of_all(logits, vocab, weighing, scanned.top, filters.top_p, scratch);
    } else {
        // Weigh only tokens that min-p or top-k may keep: those above a cheap, safe bound.
        const float least = filters.min_p > 0 ? weighing.below(std::log2(static_cast<double>(filters.min_p)))
                                              : reached_by(filters.top_k, scanned, scratch);
        collect(logits, vocab, least, vocab, list);
        total = weigh(list.logits.data(), list.size, weighing, list.weights.data(), sums);
        list.pad();
        if (filters.min_p > 0) {
            cut_weights(list, filters.min_p);
            total = sum_units(list.weights.data(), list.size, sums);
        }
        if (has_k && list.size > filters.top_k) {
            cut_list(list, find_cut<false>(list.logits.data(), nullptr, list.size, least, scanned.top, filters.top_k,
                                           scratch));
            total = sum_units(list.weights.data(), list.size, sums);
        }
        if (filters.top_p < 1) total = cut_top_p(list, least, scanned.top, filters.top_p, total, scratch);
    }
    Picker picker(number, total);
    const int begin = picker.block(sums) * kBlock;
    return list.ids[begin + picker.place(list.weights.data() + begin)];
}

}  // namespace octavo::sampling
