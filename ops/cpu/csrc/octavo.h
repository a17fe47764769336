// The C interface of the CPU kernels, mirrored by ops/cpu/library.py.
//
// An op is an opcode and a struct of arguments. A list of ops runs in one call and one parallel region; every op takes
// its sizes from the step descriptor, so one list serves every batch size. All strides count elements, not bytes.
#pragma once

#include <stdint.h>

#if defined(__GNUC__)
#define OCTAVO_EXPORT extern "C" __attribute__((visibility("default")))
#else
#define OCTAVO_EXPORT extern "C"
#endif

enum OctavoType : int32_t { kBFloat16 = 0, kFloat16 = 1, kFloat32 = 2, kNumTypes = 3 };

// Functions of one number; p: the op's parameter.
enum OctavoActivation : int32_t {
    kIdentity = 0,
    kSilu = 1,
    kGelu = 2,
    kGeluTanh = 3,
    kQuickGelu = 4,  // x sigmoid(1.702 x)
    kRelu = 5,
    kSquaredRelu = 6,
    kScale = 7,       // x p
    kSoftcap = 8,     // p tanh(x / p)
    kClip = 9,        // limited to -p .. p
    kSwigluOai = 10,  // of a gate: x sigmoid(p x) times the second half + 1, both limited first
    kLogistic = 11,
};

// What a KV cache holds: numbers in the type of the activations, or codes; see ops/reference/kv_codes.py.
enum OctavoCache : int32_t { kPlainCache = 0, kInt8Cache = 1, kE4M3Cache = 2, kE5M2Cache = 3, kInt4Cache = 4 };

enum OctavoNormKind : int32_t { kNoNorm = 0, kRmsNorm = 1, kLayerNorm = 2 };

// What the rows of an op's result are.
enum OctavoRows : int32_t { kTokens = 0, kSamples = 1 };

enum OctavoOpCode : int32_t {
    kOpEmbedding = 0,
    kOpLinear = 1,
    kOpRmsNorm = 2,
    kOpLayerNorm = 3,
    kOpRotary = 4,
    kOpAttention = 5,
    kOpActAndMul = 6,
    kOpActivation = 7,
    kOpAdd = 8,
    kOpGatherRows = 9,
    kOpMultiply = 10,
    kOpShortConv = 11,
    kOpRoute = 12,
    kOpExperts = 13,
    kOpHeadsLinear = 14,
    kOpLatentAttention = 15,
    kOpGatedDelta = 16,
    kOpMamba = 17,
    kNumOps = 18,
};

// ---------------------------------------------------------------------------------------------------------------------
// The step descriptor: what each step brings.

// The requests of a step, as one KV cache group sees them; see ops/metadata.py.
struct OctavoGroup {
    const int32_t* query_start_loc;  // [num_reqs + 1]
    const int32_t* seq_lens;         // [num_reqs]
    const int32_t* block_table;      // [num_reqs, block_table_stride]
    int64_t block_table_stride;
    const int64_t* slot_mapping;  // [num_tokens]
    int32_t num_reqs;
    int32_t block_size;
    const int32_t* num_replayed;  // [num_reqs] or null: 0 of each
    const int32_t* num_drafts;    // likewise
};

// One of the ranks that compute a program together; see ranks.h.
struct OctavoRanks {
    int32_t rank;
    int32_t size;
    void* place;  // octavo_meeting_bytes(size) of memory that all ranks map, zero at first
};

// Which rows of a product use which adapter; see ops/metadata.py.
struct OctavoAdapterRows {
    const int64_t* rows;      // those with an adapter, sorted by adapter
    const int32_t* adapters;  // [num_adapters]: numbers, from 1 on
    const int32_t* starts;    // [num_adapters + 1]: the rows of each
    const int32_t* of_row;    // number of each row's adapter; 0: none
    int64_t num_adapters;
};

struct OctavoStep {
    int32_t num_tokens;
    int32_t num_samples;
    const int32_t* input_ids;       // [num_tokens]
    const int32_t* positions;       // [num_tokens]
    const int32_t* token_types;     // [num_tokens]; null: no op reads them
    const int64_t* logits_rows;     // [num_samples]
    const OctavoGroup* groups;      // one per KV cache group
    OctavoAdapterRows adapters[2];  // of the rows that OctavoRows names
    const OctavoRanks* ranks;       // those that compute the step together; null: one alone
};

// ---------------------------------------------------------------------------------------------------------------------
// Arguments of the ops. Matrices are row-major; rows lie `stride` elements apart.

struct OctavoMatrix {
    void* data;
    int64_t stride;
};

// The encodings of quantised rows: blocks of GGUF, and codes with scales for groups of columns; those from kFp8E4M3 on
// stand for floating-point numbers.
enum OctavoFormat : int32_t {
    kQ4_0 = 0,
    kQ4_1 = 1,
    kQ5_0 = 2,
    kQ5_1 = 3,
    kQ8_0 = 4,
    kQ2_K = 5,
    kQ3_K = 6,
    kQ4_K = 7,
    kQ5_K = 8,
    kQ6_K = 9,
    kIQ4_NL = 10,
    kIQ4_XS = 11,
    kInt4 = 12,
    kInt8 = 13,
    kFp8E4M3 = 14,
    kNf4 = 15,
    kFp4 = 16,
    kMxfp4 = 17,
    kNvfp4 = 18,
    kBlocksOfMxfp4 = 19,  // of GGUF
};

// Types of scales beside those of OctavoType.
enum OctavoScaleType : int32_t { kScaleE4M3 = 3, kScaleE8M0 = 4 };

// A float32 number of each row that its groups' scales are multiplied with, or divided by.
enum OctavoRowScale : int32_t { kNoRowScale = 0, kFactor = 1, kDivisor = 2 };

// What a group of codes has beside its scale.
enum OctavoShift : int32_t { kNoShift = 0, kZeros = 1, kMinimums = 2 };

struct OctavoEncoding {
    int32_t format;
    int32_t group_size;  // columns that share a scale; not of blocks
    int32_t scale_type;  // likewise: OctavoType or OctavoScaleType of scales and minimums
    int32_t shift;       // likewise
    int32_t row_scale;
};

// How activations are rounded that a quantised weight is multiplied with.
enum OctavoRounding : int32_t {
    kExact = 0,    // not at all
    kByBlock = 1,  // to int8, with a scale for 32 columns
    kByRow = 2,    // to int8, with a scale for a row; of weights in int8 with a scale for each row
};

// Consecutive rows of a quantised weight, packed by octavo_pack_quantized.
struct OctavoSegment {
    const void* data;
    int32_t rows;
    OctavoEncoding encoding;
};

// A weight packed by octavo_pack, or a quantised one.
struct OctavoWeight {
    const void* data;
    int32_t rows;          // out_features
    int32_t columns;       // in_features
    int32_t paired;        // the two halves of the rows are interleaved, 16 by 16
    int32_t num_segments;  // 0: not quantised
    const OctavoSegment* segments;
    int32_t rounding;  // OctavoRounding
};

// Which numbers of the step's tokens choose rows of a table.
enum OctavoIds : int32_t { kInputIds = 0, kPositions = 1, kTokenTypes = 2 };

struct OctavoEmbedding {
    OctavoWeight weight;  // rows: vocabulary
    OctavoMatrix plain;   // the unpacked table; null: use `weight`
    OctavoMatrix out;
    int32_t type;
    int32_t ids;    // OctavoIds: what numbers the rows
    int32_t first;  // the number of the weight's first row; tokens with others' rows are left out
};

enum OctavoEpilogue : int32_t {
    kStore = 0,  // out = act(x W^T + bias)
    kResidual,   // out = residual + act(x W^T + bias)
    kGated,      // out = act(first half) * second half; the weight is paired
    kLogits,     // out = act(x W^T + bias), not rounded: float32
};

// An RMS norm. Rounded once, after the weight, or also before it.
struct OctavoRmsNorm {
    const void* weight;  // [size]; null: 1
    float eps;
    float offset;  // added to the weight; 0 if rounds_first
    int32_t rounds_first;
};

// Where the part of B for 16 columns of a result is, and which rows of A it is multiplied with.
struct OctavoAdapterHalf {
    int64_t offset;  // elements of B
    int32_t first;
    int32_t count;
};

// One adapter's part of a linear layer: (x W^T + factors x A^T B^T) magnitude + bias, in float32. Columns of B are in
// blocks of 32, those that the weight's rows form, of two halves each; all that is by column is in their order.
struct OctavoAdapter {
    const void* a;                    // [rank / 4][columns / 32][4][32]
    const void* b;                    // [count of a half][16], half by half
    const OctavoAdapterHalf* halves;  // [num_halves]
    const float* factors;             // [rank]
    const float* magnitude;           // [num_halves][16] or null
    const float* bias;                // [num_halves][16] or null
    const OctavoWeight* weight;       // takes the place of the layer's, plain; null: it remains
    int32_t rank;                     // a multiple of 4
    int32_t num_halves;
};

struct OctavoLinear {
    OctavoMatrix x;
    OctavoRmsNorm rms_norm;
    const void* norm_weight;  // layer norm: [weight.columns]; null: 1
    const void* norm_bias;    // layer norm: [weight.columns]; null: 0
    OctavoWeight weight;
    const void* bias;  // [weight.rows] or null
    OctavoMatrix out;
    OctavoMatrix residual;
    int32_t type;
    int32_t epilogue;
    int32_t activation;
    float parameter;  // of the activation
    float limit;      // likewise, of kSwigluOai: x to at most this, the second half to plus and minus this
    int32_t rows;     // OctavoRows
    int32_t norm;     // OctavoNormKind: of each row of x first
    float norm_eps;   // of a layer norm
    int32_t gather;   // x holds all tokens; read the rows in logits_rows
    // By number, null for those that leave the layer alone; null: the layer has none.
    const OctavoAdapter* const* adapters;
    // Set by the kernels, for the time that the op runs.
    const void* adapted;    // the adapters of the rows
    const int64_t* listed;  // the only rows to compute; null: all
    int64_t num_listed;
};

struct OctavoNorm {
    OctavoMatrix x;
    OctavoMatrix out;
    OctavoMatrix residual;  // added to an RMS norm's result; null: 0
    OctavoRmsNorm rms_norm;
    const void* weight;  // layer norm: [size], or [groups * size]; null: 1
    const void* bias;    // likewise; null: 0
    float eps;           // of a layer norm
    int32_t groups;      // each of `size` columns
    int32_t size;
    int32_t weight_stride;  // from one group's weights to the next's: 0 or `size`
    int32_t type;
    int32_t rows;
};

// Transforms applied to each head of q or k before use.
struct OctavoHeads {
    OctavoRmsNorm norm;  // of each head
    int32_t has_norm;
    int32_t rotary_dim;    // 0: no rotary embedding
    const float* cos_sin;  // [max_positions, rotary_dim]
    int32_t interleaved;
};

struct OctavoRotary {
    OctavoMatrix x;
    OctavoMatrix out;
    OctavoHeads heads;
    const int32_t* positions;  // null: the step's
    int32_t num_heads;
    int32_t head_dim;
    int32_t type;
};

struct OctavoAttention {
    OctavoMatrix q;
    OctavoMatrix k;  // null, as v: the cache holds those of this step already
    OctavoMatrix v;
    OctavoMatrix out;
    OctavoHeads q_heads;
    OctavoHeads k_heads;
    void* k_cache;
    void* v_cache;
    const float* slopes;  // [num_heads], of ALiBi; null: none
    const float* sinks;   // [num_heads]: scores without a value; null: none
    // Added to the scaled scores: [num_heads][2 * bias_reach], of a key d tokens after the query at bias_reach + d,
    // with room for 32 tokens beyond the longest distance; null: none.
    const float* biases;
    float scale;
    float k_scale;  // of caches in 8-bit floats, which hold K and V divided by these; of others 1
    float v_scale;
    float softcap;  // 0: none
    int32_t num_heads;
    int32_t num_kv_heads;
    int32_t head_dim;
    int32_t v_head_dim;
    int32_t window;   // 0: none; if not causal, it reaches as far forward as back
    int32_t chunked;  // the window begins at a multiple of its size
    int32_t causal;
    int32_t group;  // index into the step's groups
    int32_t type;
    int32_t cache;  // OctavoCache
    int32_t bias_reach;
};

// Products of the heads of x with weights of their own: out[h] = x[h] W[h]^T. A head of x may have further columns.
struct OctavoHeadsLinear {
    OctavoMatrix x;               // heads of `head_dim` columns, which begin with those that are multiplied
    OctavoMatrix out;             // [tokens, num_heads * rows of a weight]
    const OctavoWeight* weights;  // [num_heads]: all of one shape
    int32_t num_heads;
    int32_t head_dim;
    int32_t type;
};

// Attention to rows that are the keys of all heads and, in their first columns, the values: latents, with a few columns
// after them that are rotated. `attention` has the latent part: q [tokens, num_heads * v_head_dim], k [tokens,
// v_head_dim], one KV head, and the cache as k_cache.
struct OctavoLatentAttention {
    OctavoAttention attention;
    OctavoMatrix q_rope;  // the columns to rotate are the last of each head of q_rope_dim columns
    OctavoMatrix k_rope;  // [tokens, rotary_dim]
    OctavoHeads rope;
    int32_t q_rope_dim;
};

// A causal convolution over the last `length` tokens of a request, each column by itself, between two gates:
// out = gate_out * (sum of weight[i] * y of the i-th of these tokens, the latest last, + bias), y = gate_in * x.
struct OctavoShortConv {
    OctavoMatrix gate_in;
    OctavoMatrix gate_out;
    OctavoMatrix x;
    OctavoMatrix out;
    void* cache;         // y [num_blocks, block_size, width]
    const void* weight;  // [length, width]
    const void* bias;    // [width] or null
    int32_t width;
    int32_t length;
    int32_t group;  // index into the step's groups
    int32_t type;
};

// A convolution, as that of OctavoShortConv but with SiLU instead of gates, and a gated delta rule; see
// ops/reference/delta.py.
struct OctavoGatedDelta {
    OctavoMatrix qkv;
    OctavoMatrix beta;
    OctavoMatrix steps;
    OctavoMatrix out;
    void* cache;              // float32 [num_blocks, state]
    const void* conv_weight;  // [conv_length, columns of qkv]
    const float* decay;       // [num_heads]
    const float* step_bias;   // [num_heads]
    int32_t num_heads;
    int32_t num_key_heads;
    int32_t key_dim;
    int32_t value_dim;
    int32_t conv_length;
    int32_t tiled;       // a head of q and k has every num_key_heads-th value head, not consecutive ones
    int32_t max_drafts;  // whose inputs a state has room for
    int32_t group;       // index into the step's groups
    int32_t type;
};

// A convolution likewise, and the recurrence of Mamba-2; see ops/reference/mamba.py.
struct OctavoMamba {
    OctavoMatrix x;      // [tokens, num_heads * head_dim + 2 * num_groups * state_dim]: x, B and C
    OctavoMatrix steps;  // [tokens, num_heads]
    OctavoMatrix gate;   // [tokens, num_heads * head_dim]; null: 1
    OctavoMatrix out;
    void* cache;               // float32 [num_blocks, state]
    const float* conv_weight;  // [conv_length, columns of x]
    const float* conv_bias;    // [columns of x] or null
    const float* decay;        // [num_heads]
    const float* skip;         // [num_heads]
    const float* step_bias;    // [num_heads]
    float least_step;
    float most_step;
    int32_t num_heads;
    int32_t num_groups;
    int32_t state_dim;
    int32_t head_dim;
    int32_t conv_length;
    int32_t max_drafts;  // as of OctavoGatedDelta
    int32_t group;       // index into the step's groups
    int32_t type;
};

enum OctavoScores : int32_t { kSoftmax = 0, kSigmoid = 1, kSparseMixer = 2 };

// Weights of the chosen experts of each token, 0 for all others; see ops/reference/experts.py.
struct OctavoRoute {
    OctavoMatrix x;        // float32 [rows, num_experts]
    OctavoMatrix out;      // float32 [rows, num_experts]
    const float* bias;     // [num_experts] or null
    const float* factors;  // [num_experts] or null
    int32_t num_experts;
    int32_t top_k;
    int32_t scores;  // OctavoScores
    int32_t normalize;
    float factor;
    float jitter;
    int32_t num_groups;
    int32_t top_groups;
    int32_t group_best;  // experts whose scores are a group's: 1 or 2
    int32_t rows;
};

// out = the sum of routed[e] * down[e](act(gate[e](x)) * up[e](x)) over the experts e with a weight, ascending, and
// then of sigmoid(shared_gate) * shared. Without gates: down[e](act(up[e](x))).
struct OctavoExperts {
    OctavoMatrix x;
    OctavoMatrix routed;                // float32 [tokens, num_experts]; at most top_k of a token are not 0
    OctavoMatrix shared;                // null: 0
    OctavoMatrix shared_gate;           // float32 [tokens, 1]; null: the weight is 1
    OctavoMatrix out;                   // [tokens, hidden]
    const OctavoWeight* gate_up;        // [num_experts]: all of one shape, and read in the same form
    const OctavoWeight* down;           // [num_experts]: likewise
    const void* const* gate_up_biases;  // [num_experts] or null
    const void* const* down_biases;     // [num_experts] or null
    // [num_experts]: adapters of the step's tokens, as of OctavoLinear, none with a weight of its own; null: none.
    const OctavoAdapter* const* const* gate_up_adapters;
    const OctavoAdapter* const* const* down_adapters;
    int32_t num_experts;
    int32_t top_k;
    int32_t activation;
    float parameter;  // of the activation, as of OctavoLinear
    float limit;
    int32_t scales_input;  // weights multiply inputs instead of results
    int32_t gated;         // 0: gate_up holds ups alone
    int32_t type;
    int32_t first_inner;  // the first of the results of gates that this rank makes
    void* inner;          // memory that ranks share for these, as large as the workspace; null: there is one rank
};

struct OctavoPointwise {  // act_and_mul, activation, add, multiply, gather_rows
    OctavoMatrix x;
    OctavoMatrix y;  // add and multiply only
    OctavoMatrix out;
    int32_t width;  // of the result
    int32_t activation;
    float parameter;  // of the activation, as of OctavoLinear
    float limit;
    int32_t type;
    int32_t rows;
};

// ---------------------------------------------------------------------------------------------------------------------
// Functions.

struct OctavoNode {
    int32_t op;        // OctavoOpCode
    int32_t meets;     // all ranks meet once it is done
    const void* args;  // the struct of that op
};

// Runs ops in order on omp_get_max_threads() threads, or on at most `max_threads` if that is positive. Returns 0, or 1
// if a rank has left: the results are wrong then.
OCTAVO_EXPORT int32_t octavo_run(const OctavoNode* nodes, int32_t count, const OctavoStep* step, int32_t max_threads);

// Bytes of the place where so many ranks meet.
OCTAVO_EXPORT int64_t octavo_meeting_bytes(int32_t size);
// Waits for all ranks. Returns 0, or 1 if one has left.
OCTAVO_EXPORT int32_t octavo_meet(const OctavoRanks* ranks);
// Leaves the ranks, which then no longer wait for this one.
OCTAVO_EXPORT void octavo_leave(const OctavoRanks* ranks);

// Elements of a packed weight.
OCTAVO_EXPORT int64_t octavo_packed_size(int32_t rows, int32_t columns, int32_t paired);
// Packs a row-major weight, [rows, columns], with a row stride of `stride` elements.
OCTAVO_EXPORT void octavo_pack(const void* weight, int64_t stride, void* packed, int32_t rows, int32_t columns,
                               int32_t paired, int32_t type);
OCTAVO_EXPORT void octavo_unpack(const void* packed, void* weight, int32_t rows, int32_t columns, int32_t paired,
                                 int32_t type);

// Bytes of packed rows.
OCTAVO_EXPORT int64_t octavo_quantized_size(const OctavoEncoding* encoding, int32_t rows, int32_t columns,
                                            int32_t paired);
// Packs quantised rows that lie `stride` bytes apart; see ops/reference/quantized.py.
OCTAVO_EXPORT void octavo_pack_quantized(const OctavoEncoding* encoding, const void* source, int64_t stride,
                                         void* packed, int32_t rows, int32_t columns, int32_t paired);
// Quantises rows that lie `stride` elements apart, to 4 or 8 bits in whole groups of 32 columns; see
// ops/reference/quantize.py. `importance` of the columns: 1 in each group; null: they are alike.
OCTAVO_EXPORT void octavo_quantize_groups(const void* source, int64_t stride, int32_t type, const float* importance,
                                          void* out, int64_t out_stride, int32_t rows, int32_t columns, int32_t bits);

// Prepares the process (requests AMX from the kernel). Returns 0 or an error number.
OCTAVO_EXPORT int32_t octavo_initialize();
// Size of an op's argument struct, of OctavoStep (-1), OctavoGroup (-2), OctavoNode (-3), OctavoAdapter (-4) or
// OctavoRanks (-5), to check the Python mirror.
OCTAVO_EXPORT int64_t octavo_sizeof(int32_t op);
// From now on octavo_run notes when the first threads work on ops, in seconds: times[i][thread][0] is when one began
// with op number i of a list, times[i][thread][1] when it had done its part. Null ends this.
OCTAVO_EXPORT void octavo_profile(double* times, int32_t threads);
// Bytes per second that `threads` threads read from a buffer; multiply-adds per second that they do in registers, as
// products of `type` need them, or with kNumTypes those of int8.
OCTAVO_EXPORT double octavo_measure_bandwidth(const void* data, int64_t num_bytes, int32_t threads);
OCTAVO_EXPORT double octavo_measure_peak(int32_t type, int32_t threads);
