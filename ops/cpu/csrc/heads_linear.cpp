// Products of heads with weights of their own, as between the heads and the latents of latent attention.
#include "linear.h"

namespace octavo {

namespace {

// Of a weight, about, that a thread takes at a time.
constexpr int64_t kTaskBytes = 32 << 10;
// Rows that a thread stages at a time.
constexpr int kMostStaged = 256;

// The product of a head with its weight.
OctavoLinear head_of(const OctavoHeadsLinear& op, int head) {
    const int64_t bytes = op.type == kFloat32 ? 4 : 2;
    OctavoLinear result = {};
    result.weight = op.weights[head];
    result.type = op.type;
    result.epilogue = kStore;
    result.activation = kIdentity;
    result.x = {static_cast<char*>(op.x.data) + bytes * head * op.head_dim, op.x.stride};
    result.out = {static_cast<char*>(op.out.data) + bytes * head * result.weight.rows, op.out.stride};
    return result;
}

OctavoMatrix from_row(const OctavoMatrix& matrix, int row, int32_t type) {
    const int64_t bytes = type == kFloat32 ? 4 : 2;
    return {static_cast<char*>(matrix.data) + bytes * row * matrix.stride, matrix.stride};
}

}  // namespace

void run_heads_linear(const OctavoHeadsLinear& op, const OctavoStep& step, const Team& team) {
    if (step.num_tokens == 0) return;
    const OctavoLinear any = head_of(op, 0);
    const int blocks = row_blocks_of(any), most = most_rows(any);
    const int blocks_at_once =
        static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(blocks, kTaskBytes / block_bytes_of(any))));
    const int tasks = blocks_of(blocks, blocks_at_once);
    const int staged_rows = std::min(step.num_tokens, kMostStaged);
    char* const staged = team.scratch.take<char>(staged_rows * staged_bytes(any));
    team.each(op.num_heads * tasks, team.size, [&](int item, int) {
        OctavoLinear linear = head_of(op, item / tasks);
        const int first = item % tasks * blocks_at_once;
        const Range some = {first, std::min(first + blocks_at_once, blocks)};
        const OctavoMatrix x = linear.x, out = linear.out;
        for (int row = 0; row < step.num_tokens; row += kMostStaged) {
            const int rows = std::min(kMostStaged, step.num_tokens - row);
            linear.x = from_row(x, row, op.type);
            linear.out = from_row(out, row, op.type);
            for (int tile = 0; tile < blocks_of(rows, most); ++tile) stage_tile(linear, {}, rows, tile, staged);
            multiply_part(linear, rows, staged, some, team);
        }
    });
}

}  // namespace octavo
