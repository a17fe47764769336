// Sampling: one call turns a step's logits into tokens and log probabilities, row by row.
//
// A row's result depends on that row alone: threads take whole rows and share only read-only parameters. With filters
// only, a row costs at most three passes over its logits: one for the largest logit, one for the sum of weights, one to
// collect the few candidate tokens.

#include "sampling.h"

#include <new>

#include "octavo.h"
#include "sampling_edits.h"
#include "sampling_logprobs.h"
#include "sampling_pick.h"

struct OctavoTokenHistory {
    octavo::sampling::SeenTokens* slots;
};

namespace octavo::sampling {
namespace {

// Philox4x32-10 (Salmon et al., SC11): the random bits of a seed, a position and a stream.
constexpr uint32_t kStreamSample = 0;

inline uint64_t philox_53_bits(uint64_t seed, uint64_t position, uint32_t stream) {
    uint32_t c0 = static_cast<uint32_t>(position), c1 = static_cast<uint32_t>(position >> 32), c2 = stream, c3 = 0;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = uint64_t{c0} * 0xD2511F53u, p1 = uint64_t{c2} * 0xCD9E8D57u;
        c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
        c1 = static_cast<uint32_t>(p1);
        c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
        c3 = static_cast<uint32_t>(p0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return (uint64_t{c0} << 21 ^ c1 >> 11) & ((uint64_t{1} << 53) - 1);
}

uint64_t number_of(const OctavoSampleStep& step, int index, const RowContext& row) {
    if (step.numbers != nullptr) {
        return static_cast<uint64_t>(step.numbers[index] * static_cast<double>(uint64_t{1} << 53));
    }
    return philox_53_bits(row.params.seed, static_cast<uint64_t>(row.num_tokens - row.num_prompt), kStreamSample);
}

// The ids to report in addition to the sampled one. Returns how many.
int reported_ids(const float* raw, int vocab, const OctavoSlotParams& params, const Scan& scanned, Scratch& scratch,
                 int32_t* ids) {
    if (params.num_logprob_ids > 0) {
        std::memcpy(ids, params.logprob_ids, sizeof(int32_t) * static_cast<size_t>(params.num_logprob_ids));
        return params.num_logprob_ids;
    }
    const int wanted = params.num_logprobs < vocab ? params.num_logprobs : vocab;
    top_ids(raw, vocab, wanted, scanned, scratch, ids);
    return wanted;
}

OctavoRowStatus sample_row(const OctavoSampleStep& step, int index, Scratch& scratch) {
    const int vocab = step.vocab_size;
    const int32_t slot = step.slots[index];
    const bool masked = step.bitmask != nullptr && step.bitmask_rows[index] >= 0;
    const RowContext row = {
        step.params[slot],
        step.token_ids + slot * step.token_stride,
        step.lengths[index],
        step.num_prompt[slot],
        masked ? step.bitmask + step.bitmask_rows[index] * step.bitmask_stride : nullptr,
        step.history != nullptr ? &step.history->slots[slot] : nullptr,
    };
    float* const logits = step.logits + index * step.row_stride;
    const float* raw = step.raw_logits != nullptr ? step.raw_logits + index * step.row_stride : logits;
    scratch.reserve(vocab);

    if (step.given_tokens == nullptr) step.tokens[index] = 0;
    Scan scanned = scan(raw, vocab, scratch);
    if (scanned.has_nan || !std::isfinite(scanned.top)) return OCTAVO_ROW_NOT_FINITE;

    const float raw_top = scanned.top;
    const bool edits = step.given_tokens == nullptr && has_edits(row);
    const bool wants_logprobs = row.params.num_logprobs >= 0 && step.logprob_starts != nullptr;
    int32_t* ids = nullptr;
    int num_reported = 0;
    if (wants_logprobs) {
        ids = step.logprob_ids + step.logprob_starts[index];
        num_reported = 1 + reported_ids(raw, vocab, row.params, scanned, scratch, ids + 1);
        if (edits && raw == logits) {
            scratch.raw.reserve(static_cast<size_t>(vocab));
            std::memcpy(scratch.raw.data(), logits, sizeof(float) * static_cast<size_t>(vocab));
            raw = scratch.raw.data();
        }
    }
    int64_t token;
    if (step.given_tokens != nullptr) {
        token = step.given_tokens[index];
    } else {
        if (edits) edit(logits, vocab, row, scratch.values.data());
        if (edits || raw != logits) {
            scanned = scan(logits, vocab, scratch);
            if (scanned.top == -kInfinity) return OCTAVO_ROW_NOTHING_LEFT;
            if (scanned.has_nan || !std::isfinite(scanned.top)) return OCTAVO_ROW_NOT_FINITE;
        }
        const Filters filters = {row.params.temperature, row.params.top_k, row.params.top_p, row.params.min_p};
        token = pick(logits, vocab, scanned, filters, number_of(step, index, row), scratch);
        step.tokens[index] = token;
    }
    if (wants_logprobs) {
        const LogProbs logprob(raw, vocab, raw_top, scratch);
        float* const logprobs = step.logprobs + step.logprob_starts[index];
        ids[0] = static_cast<int32_t>(token);
        for (int i = 0; i < num_reported; ++i) logprobs[i] = logprob(raw[ids[i]]);
        step.ranks[index] = rank(raw, vocab, raw[token]);
    }
    return OCTAVO_ROW_OK;
}

// Whether one thread must sample the rows of a slot in order, because its history grows with them.
bool is_ordered(const OctavoSampleStep& step, int index) {
    return step.history != nullptr && step.given_tokens == nullptr && has_penalties(step.params[step.slots[index]]);
}

// Samples a row; for the first row of an ordered slot, samples all rows of that slot. Returns how many failed.
int sample_rows(const OctavoSampleStep& step, int first, Scratch& scratch) {
    const int32_t slot = step.slots[first];
    const bool ordered = is_ordered(step, first);
    if (ordered && first > 0 && step.slots[first - 1] == slot) return 0;
    int failed = 0;
    int index = first;
    do {
        step.status[index] = sample_row(step, index, scratch);
        failed += step.status[index] != OCTAVO_ROW_OK;
        ++index;
    } while (ordered && index < step.num_rows && step.slots[index] == slot);
    if (index - first > 1) {  // the later rows follow drafts, which may be rejected
        const int32_t* tokens = step.token_ids + slot * step.token_stride;
        step.history->slots[slot].rewind(tokens, step.lengths[first], step.num_prompt[slot]);
    }
    return failed;
}

}  // namespace
}  // namespace octavo::sampling

// Samples a row for each entry of `slots`. Returns the number of rows whose status is not OCTAVO_ROW_OK.
OCTAVO_EXPORT int32_t octavo_sample(const OctavoSampleStep* step, int32_t num_threads) {
    // A parallel region ends only when every thread has run, and on a busy machine one may wait for its turn much
    // longer than a few rows take. Use all threads or none: libgomp terminates those that a smaller region leaves out.
    constexpr int64_t kWorthAllThreads = 1 << 21;  // tokens, about 0.3 ms of one thread
    const bool parallel = step->num_rows > 1 && step->num_rows * int64_t{step->vocab_size} >= kWorthAllThreads;
    const int threads = parallel && num_threads > 1 ? num_threads : 1;
    int32_t failed = 0;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) reduction(+ : failed) if (threads > 1)
    for (int32_t index = 0; index < step->num_rows; ++index) {
        static thread_local octavo::sampling::Scratch scratch;
        failed += octavo::sampling::sample_rows(*step, index, scratch);
    }
    return failed;
}

OCTAVO_EXPORT OctavoTokenHistory* octavo_token_history_new(int32_t num_slots) {
    auto* history = new (std::nothrow) OctavoTokenHistory;
    if (history == nullptr) return nullptr;
    history->slots = new (std::nothrow) octavo::sampling::SeenTokens[static_cast<size_t>(num_slots)];
    return history;
}

// Another request takes the slot: drops the history of the earlier one and frees its memory.
OCTAVO_EXPORT void octavo_token_history_clear(OctavoTokenHistory* history, int32_t slot) {
    history->slots[slot].clear();
}

OCTAVO_EXPORT void octavo_token_history_free(OctavoTokenHistory* history) {
    delete[] history->slots;
    delete history;
}

// Lets Python check its mirror of the structs.
OCTAVO_EXPORT int32_t octavo_slot_params_size() { return sizeof(OctavoSlotParams); }
OCTAVO_EXPORT int32_t octavo_sample_step_size() { return sizeof(OctavoSampleStep); }
