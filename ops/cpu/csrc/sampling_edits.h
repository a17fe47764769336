// Edits of a row's logits before a token is picked. Each edit touches a few tokens, except the two that forbid most of
// them.
#pragma once

#include "sampling.h"
#include "sampling_buffer.h"
#include "sampling_lanes.h"

namespace octavo::sampling {

// The distinct tokens of a request and how often each occurs in its output. It catches up with the token table before
// use, so it costs one token per step and must only be told when a slot changes hands and when drafts that it counted
// leave the table.
class SeenTokens {
public:
    static constexpr int kMaxRewind = 64;

    void clear() {
        ids_.release();
        counts_.release();
        places_.release();
        size_ = 0;
        mask_ = 0;
        counted_ = 0;
    }

    void catch_up(const int32_t* tokens, int64_t num_tokens, int64_t num_prompt) {
        if (num_tokens < counted_) clear();  // tokens were retracted: recount
        for (; counted_ < num_tokens; ++counted_) count(tokens[counted_], counted_ >= num_prompt);
    }

    // Forgets the last tokens, at most kMaxRewind of them; they are still in the table.
    void rewind(const int32_t* tokens, int64_t num_tokens, int64_t num_prompt) {
        while (counted_ > num_tokens) {
            --counted_;
            uncount(tokens[counted_], counted_ >= num_prompt);
        }
    }

    int size() const { return size_; }
    const int32_t* ids() const { return ids_.data(); }
    const int32_t* output_counts() const { return counts_.data(); }

private:
    static constexpr uint32_t kSmallest = 64;

    uint32_t place_of(int32_t token) const {
        uint32_t place = hash(token) & mask_;
        while (places_[place] >= 0 && ids_[places_[place]] != token) place = (place + 1) & mask_;
        return place;
    }

    void count(int32_t token, bool is_output) {
        if (static_cast<uint32_t>(size_ + 1) * 2 > mask_) grow();
        const uint32_t place = place_of(token);
        recently_new_ = recently_new_ << 1 | (places_[place] < 0);
        if (places_[place] < 0) {
            places_[place] = size_;
            ids_[size_] = token;
            counts_[size_] = 0;
            ++size_;
        }
        counts_[places_[place]] += is_output;
    }

    // Undoes the most recent `count`.
    void uncount(int32_t token, bool is_output) {
        const uint32_t place = place_of(token);
        counts_[places_[place]] -= is_output;
        if (recently_new_ & 1) {
            places_[place] = -1;  // it was inserted last, so no other entry probed past it
            --size_;
        }
        recently_new_ >>= 1;
    }

    void grow() {
        const uint32_t capacity = mask_ == 0 ? kSmallest : 2 * (mask_ + 1);
        mask_ = capacity - 1;
        ids_.reserve(capacity / 2);
        counts_.reserve(capacity / 2);
        places_.reserve(capacity);
        for (uint32_t i = 0; i < capacity; ++i) places_[i] = -1;
        for (int i = 0; i < size_; ++i) {
            uint32_t place = hash(ids_[i]) & mask_;
            while (places_[place] >= 0) place = (place + 1) & mask_;
            places_[place] = i;
        }
    }

    static uint32_t hash(int32_t token) { return (static_cast<uint32_t>(token) * 0x9E3779B1u) >> 7; }

    Buffer<int32_t> ids_, counts_;  // in order of first appearance
    Buffer<int32_t> places_;        // open addressing: index into the two above, or -1
    int size_ = 0;
    uint32_t mask_ = 0;  // table size - 1
    int64_t counted_ = 0;
    uint64_t recently_new_ = 0;  // bit i: the i-th last token (from 0) had not occurred before
};

// A row and its request's state.
struct RowContext {
    const OctavoSlotParams& params;
    const int32_t* tokens;
    int64_t num_tokens;
    int64_t num_prompt;
    const int32_t* bitmask;  // or null
    SeenTokens* seen;        // or null
};

inline bool has_penalties(const OctavoSlotParams& params) {
    return params.repetition_penalty != 1.0f || params.presence_penalty != 0 || params.frequency_penalty != 0;
}

inline bool below_min_tokens(const RowContext& row) {
    return row.params.num_stop > 0 && row.num_tokens - row.num_prompt < row.params.min_tokens;
}

inline bool has_edits(const RowContext& row) {
    const OctavoSlotParams& params = row.params;
    return params.num_allowed >= 0 || row.bitmask != nullptr || params.num_bad_words > 0 || below_min_tokens(row) ||
           params.num_biases > 0 || has_penalties(params);
}

inline void leave_allowed(float* logits, int vocab, const int32_t* ids, int count, float* kept) {
    for (int i = 0; i < count; ++i) kept[i] = logits[ids[i]];
    for (int i = 0; i < vocab; ++i) logits[i] = -kInfinity;
    for (int i = 0; i < count; ++i) logits[ids[i]] = kept[i];
}

inline void apply_bitmask(float* logits, int vocab, const int32_t* bitmask) {
    constexpr int kWordBits = 32;
    const Vec forbidden = splat(-kInfinity);
    for (int begin = 0; begin < vocab; begin += kWordBits) {
        const auto word = static_cast<uint32_t>(bitmask[begin / kWordBits]);
        if (word == UINT32_MAX) continue;
        for (int i = begin, shift = 0; i < vocab && shift < kWordBits; i += kLanes, shift += kLanes) {
            const Mask allowed = mask_of(word >> shift);
            const int left = vocab - i;
            const Vec x = left >= kLanes ? load(logits + i) : load_first(logits + i, left, 0.0f);
            store_first(logits + i, select(allowed, x, forbidden), left);
        }
    }
}

// Forbids the last token of each word whose preceding tokens end the output.
inline void forbid_bad_words(float* logits, const RowContext& row) {
    const int32_t* output = row.tokens + row.num_prompt;
    const int64_t output_size = row.num_tokens - row.num_prompt;
    int begin = 0;
    for (int word = 0; word < row.params.num_bad_words; ++word) {
        const int last = row.params.bad_word_ends[word] - 1;
        const int before = last - begin;
        bool spelled = before <= output_size;
        for (int i = 0; spelled && i < before; ++i) {
            spelled = output[output_size - before + i] == row.params.bad_words[begin + i];
        }
        if (spelled) logits[row.params.bad_words[last]] = -kInfinity;
        begin = last + 1;
    }
}

inline void apply_penalties(float* logits, const RowContext& row) {
    const OctavoSlotParams& params = row.params;
    row.seen->catch_up(row.tokens, row.num_tokens, row.num_prompt);
    const int32_t* ids = row.seen->ids();
    const int32_t* counts = row.seen->output_counts();
    for (int i = 0; i < row.seen->size(); ++i) {
        float logit = logits[ids[i]];
        if (params.repetition_penalty != 1.0f) {
            logit = logit > 0 ? logit / params.repetition_penalty : logit * params.repetition_penalty;
        }
        if (counts[i] > 0) {
            logit -= static_cast<float>(params.frequency_penalty * counts[i] + params.presence_penalty);
        }
        logits[ids[i]] = logit;
    }
}

// Applies all edits, in the order of executor/sampling/stages.py. `kept` has room for the allowed ids.
inline void edit(float* logits, int vocab, const RowContext& row, float* kept) {
    const OctavoSlotParams& params = row.params;
    if (params.num_allowed >= 0) leave_allowed(logits, vocab, params.allowed_ids, params.num_allowed, kept);
    if (row.bitmask != nullptr) apply_bitmask(logits, vocab, row.bitmask);
    if (params.num_bad_words > 0) forbid_bad_words(logits, row);
    if (below_min_tokens(row)) {
        for (int i = 0; i < params.num_stop; ++i) logits[params.stop_ids[i]] = -kInfinity;
    }
    for (int i = 0; i < params.num_biases; ++i) logits[params.bias_ids[i]] += params.biases[i];
    if (has_penalties(params)) apply_penalties(logits, row);
}

}  // namespace octavo::sampling
