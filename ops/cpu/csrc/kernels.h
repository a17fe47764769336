// The ops as the runner calls them: by all threads of a team, one op at a time.
#pragma once

#include "number.h"
#include "octavo.h"
#include "team.h"

namespace octavo {

// Calls `function` with a value of the type that OctavoType names.
template <class F>
auto with_type(int32_t type, F function) {
    switch (type) {
        case kBFloat16:
            return function(BFloat16());
        case kFloat16:
            return function(Float16());
        default:
            return function(float());
    }
}

inline int rows_of(const OctavoStep& step, int32_t rows) {
    return rows == kSamples ? step.num_samples : step.num_tokens;
}

void run_embedding(const OctavoEmbedding& op, const OctavoStep& step, const Team& team);
void run_linear(const OctavoLinear& op, const OctavoStep& step, const Team& team);
void run_rms_norm(const OctavoNorm& op, const OctavoStep& step, const Team& team);
void run_layer_norm(const OctavoNorm& op, const OctavoStep& step, const Team& team);
void run_rotary(const OctavoRotary& op, const OctavoStep& step, const Team& team);
void run_attention(const OctavoAttention& op, const OctavoStep& step, const Team& team);
void run_act_and_mul(const OctavoPointwise& op, const OctavoStep& step, const Team& team);
void run_activation(const OctavoPointwise& op, const OctavoStep& step, const Team& team);
void run_multiply(const OctavoPointwise& op, const OctavoStep& step, const Team& team);
void run_add(const OctavoPointwise& op, const OctavoStep& step, const Team& team);
void run_gather_rows(const OctavoPointwise& op, const OctavoStep& step, const Team& team);
void run_heads_linear(const OctavoHeadsLinear& op, const OctavoStep& step, const Team& team);
void run_latent_attention(const OctavoLatentAttention& op, const OctavoStep& step, const Team& team);
void run_gated_delta(const OctavoGatedDelta& op, const OctavoStep& step, const Team& team);
void run_mamba(const OctavoMamba& op, const OctavoStep& step, const Team& team);
void run_short_conv(const OctavoShortConv& op, const OctavoStep& step, const Team& team);
void run_route(const OctavoRoute& op, const OctavoStep& step, const Team& team);
void run_experts(const OctavoExperts& op, const OctavoStep& step, const Team& team);

// Bytes of workspace that the threads share during an op.
size_t linear_workspace(const OctavoLinear& op, const OctavoStep& step);
size_t mamba_workspace(const OctavoMamba& op, const OctavoStep& step);
size_t experts_workspace(const OctavoExperts& op, const OctavoStep& step);
size_t attention_workspace(const OctavoAttention& op, const OctavoStep& step, int threads);
size_t latent_attention_workspace(const OctavoLatentAttention& op, const OctavoStep& step, int threads);

}  // namespace octavo
