// The C interface of the sampling kernels. ops/cpu/sampling.py mirrors the structs field by field.
#pragma once

#include <stdint.h>

// What a request asks for. One per slot, written when a request enters it. The lists belong to the caller.
typedef struct {
    double presence_penalty;
    double frequency_penalty;
    uint64_t seed;
    const int32_t* allowed_ids;
    const int32_t* stop_ids;  // forbidden until min_tokens are there
    const int32_t* bias_ids;
    const float* biases;
    const int32_t* bad_words;  // the words' tokens one after another
    const int32_t* bad_word_ends;
    const int32_t* logprob_ids;  // tokens to report instead of the most likely ones
    float temperature;
    float top_p;
    float min_p;
    float repetition_penalty;
    int32_t top_k;
    int32_t min_tokens;
    int32_t num_allowed;  // -1: all are allowed
    int32_t num_stop;
    int32_t num_biases;
    int32_t num_bad_words;
    int32_t num_logprob_ids;
    int32_t num_logprobs;  // tokens to report beside the sampled one; more than the vocabulary: all; -1: none at all
} OctavoSlotParams;

// The tokens that requests with penalties have seen, by slot.
typedef struct OctavoTokenHistory OctavoTokenHistory;

// One step. Pointers with "or null" switch something off.
typedef struct {
    float* logits;            // [num_rows, vocab_size], changed in place
    const float* raw_logits;  // as the model made them, if `logits` were changed already; or null
    int64_t row_stride;       // of both
    int32_t num_rows;
    int32_t vocab_size;              // at most 2^20
    const int32_t* slots;            // [num_rows]: whose next token it is; rows of a slot come together
    const OctavoSlotParams* params;  // by slot
    OctavoTokenHistory* history;     // null: no slot has penalties
    const int32_t* token_ids;        // [slots, token_stride]: prompt and output
    int64_t token_stride;
    const int64_t* lengths;       // [num_rows]: tokens before the one that is picked, ascending for each slot
    const int64_t* num_prompt;    // by slot: how many of its tokens are the prompt
    const int32_t* bitmask;       // [.., bitmask_stride], bit set: allowed; or null
    int64_t bitmask_stride;       // in words
    const int32_t* bitmask_rows;  // [num_rows]: row of bitmask, -1: none
    const double* numbers;        // [num_rows] in [0, 1), instead of those that follow from the seeds; or null
    const int64_t* given_tokens;  // [num_rows]: nothing is sampled, only their log probabilities are wanted; or null
    int64_t* tokens;              // [num_rows], result
    int32_t* status;              // [num_rows], result: OctavoRowStatus
    // Log probabilities of the unprocessed logits. A row that wants some gets 1 + k of them, for the sampled token and
    // k others, from place logprob_starts[row] on.
    const int64_t* logprob_starts;  // [num_rows]; or null: no row wants any
    int32_t* logprob_ids;
    float* logprobs;
    int32_t* ranks;  // [num_rows]: 1 + how many tokens are more likely than the sampled one
} OctavoSampleStep;

typedef enum {
    OCTAVO_ROW_OK = 0,
    OCTAVO_ROW_NOT_FINITE = 1,    // a NaN, an infinity, or nothing but minus infinity came in
    OCTAVO_ROW_NOTHING_LEFT = 2,  // the request's own constraints forbid every token
} OctavoRowStatus;
