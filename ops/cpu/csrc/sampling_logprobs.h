// Log probabilities and ranks of the model's unprocessed logits.
#pragma once

#include <algorithm>
#include <cmath>

#include "sampling_pick.h"

namespace octavo::sampling {

class LogProbs {
public:
    // The normaliser is a sum in units, so it is the same on every path.
    LogProbs(const float* logits, int vocab, float top, Scratch& scratch) : top_(top) {
        const int64_t total = weigh(logits, vocab, Weighing(top, 1.0f), nullptr, scratch.sums.data());
        log_total_ = std::log(static_cast<double>(total) / static_cast<double>(kOneInUnits));
    }
    float operator()(float logit) const {
        return static_cast<float>(static_cast<double>(logit) - static_cast<double>(top_) - log_total_);
    }

private:
    float top_;
    double log_total_;
};

inline int rank(const float* logits, int vocab, float logit) {
    const Vec bound = splat(logit);
    int above = 0, i = 0;
    for (; i + kLanes <= vocab; i += kLanes) above += count(greater(load(logits + i), bound));
    if (i < vocab) above += count(greater(load_first(logits + i, vocab - i, -kInfinity), bound));
    return above + 1;
}

struct Ranked {
    float logit;
    int32_t id;
};

// Writes the ids of the `wanted` largest logits, ordered by logit (larger first) and then by id.
inline void top_ids(const float* logits, int vocab, int wanted, const Scan& scanned, Scratch& scratch, int32_t* ids) {
    if (wanted <= 0) return;
    List& list = scratch.list;
    const float least = reached_by(wanted, scanned, scratch);
    collect(logits, vocab, least, vocab, list);
    if (list.size > wanted) {
        for (int i = 0; i < list.size; i += kLanes) store(list.weights.data() + i, splat(0.0f));
        cut_list(list, find_cut<false>(list.logits.data(), nullptr, list.size, least, scanned.top, wanted, scratch));
    }
    Buffer<Ranked> ranked;
    ranked.reserve(static_cast<size_t>(list.size));
    for (int i = 0; i < list.size; ++i) ranked[i] = {list.logits[i], list.ids[i]};
    std::sort(ranked.data(), ranked.data() + list.size, [](const Ranked& a, const Ranked& b) {
        return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
    });
    for (int i = 0; i < list.size; ++i) ids[i] = ranked[i].id;
    // The list leaves out logits of minus infinity.
    for (int id = 0, n = list.size; n < wanted && id < vocab; ++id) {
        if (logits[id] == -kInfinity) ids[n++] = id;
    }
}

}  // namespace octavo::sampling
