// The C interface of the sampling kernels. ops/cpu/sampling.py mirrors the structs field by field.
#pragma once

#include <stdint.h>

// A request's parameters. One per slot, written when a request takes it. The caller owns the lists.
typedef struct {
    double presence_penalty;
    double frequency_penalty;
    uint64_t seed;
    const int32_t* allowed_ids;
    const int32_t* stop_ids;  // forbidden until min_tokens are generated
    const int32_t* bias_ids;
    const float* biases;
    const int32_t* bad_words;  // the words' tokens, concatenated
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
    int32_t num_logprobs;  // tokens to report besides the sampled one; more than the vocabulary: all; -1: none at all
} OctavoSlotParams;

// Tokens seen by requests with penalties, by slot.
typedef struct OctavoTokenHistory OctavoTokenHistory;

// One step. Null disables a feature whose pointer says "or null".
typedef struct {
    float* logits;            // [num_rows, vocab_size], changed in place
    const float* raw_logits;  // the model's logits, if `logits` were modified already; or null
    int64_t row_stride;       // of both
    int32_t num_rows;
    int32_t vocab_size;              // at most 2^20
    const int32_t* slots;            // [num_rows]: the row's slot; rows of a slot are adjacent
    const OctavoSlotParams* params;  // by slot
    OctavoTokenHistory* history;     // null: no slot has penalties
    const int32_t* token_ids;        // [slots, token_stride]: prompt and output
    int64_t token_stride;
    const int64_t* lengths;       // [num_rows]: tokens before the sampled one, ascending within a slot
    const int64_t* num_prompt;    // by slot: length of the prompt
    const int32_t* bitmask;       // [.., bitmask_stride], a set bit allows the token; or null
    int64_t bitmask_stride;       // in words
    const int32_t* bitmask_rows;  // [num_rows]: row of bitmask, -1: none
    const double* numbers;        // [num_rows] in [0, 1), instead of those derived from the seeds; or null
    const int64_t* given_tokens;  // [num_rows]: report log probabilities of these, sample nothing; or null
    int64_t* tokens;              // [num_rows], result
    int32_t* status;              // [num_rows], result: OctavoRowStatus
    // Log probabilities of the unprocessed logits. A row that asks for them gets 1 + k, for the sampled token and k
    // others, starting at index logprob_starts[row].
    const int64_t* logprob_starts;  // [num_rows]; or null: no row asks for them
    int32_t* logprob_ids;
    float* logprobs;
    int32_t* ranks;  // [num_rows]: 1 + number of tokens more likely than the sampled one
} OctavoSampleStep;

typedef enum {
    OCTAVO_ROW_OK = 0,
    OCTAVO_ROW_NOT_FINITE = 1,    // the logits hold a NaN or infinity, or are all minus infinity
    OCTAVO_ROW_NOTHING_LEFT = 2,  // the request's own constraints forbid every token
} OctavoRowStatus;
