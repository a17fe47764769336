// Norms, activations, sums and the rotary embedding: ops that make one pass over the rows.
#include "heads.h"
#include "kernels.h"
#include "vec_math.h"

namespace octavo {

namespace {

template <class T>
T* row_of(const OctavoMatrix& matrix, int64_t row) {
    return static_cast<T*>(matrix.data) + row * matrix.stride;
}

template <class T>
void rms_norm_rows(const OctavoNorm& op, const OctavoStep& step, const Team& team) {
    const Range mine = team.share(rows_of(step, op.rows) * op.groups);
    for (int i = mine.begin; i < mine.end; ++i) {
        const int64_t row = i / op.groups, column = static_cast<int64_t>(i % op.groups) * op.size;
        T* out = row_of<T>(op.out, row) + column;
        OctavoRmsNorm norm = op.rms_norm;
        if (norm.weight) norm.weight = static_cast<const T*>(norm.weight) + i % op.groups * int64_t{op.weight_stride};
        rms_norm(row_of<T>(op.x, row) + column, norm, op.size, out);
        if (!op.residual.data) continue;
        const T* residual = row_of<T>(op.residual, row) + column;
        for (int k = 0; k < op.size; k += kLanes) {
            const int count = op.size - k;
            store_first(out + k, load_first(residual + k, count) + load_first(out + k, count), count);
        }
    }
}

template <class T>
void layer_norm_rows(const OctavoNorm& op, const OctavoStep& step, const Team& team) {
    const T* weight = static_cast<const T*>(op.weight);
    const T* bias = static_cast<const T*>(op.bias);
    const Range mine = team.share(rows_of(step, op.rows) * op.groups);
    for (int i = mine.begin; i < mine.end; ++i) {
        const int64_t row = i / op.groups, column = static_cast<int64_t>(i % op.groups) * op.size;
        const int64_t place = static_cast<int64_t>(i % op.groups) * op.weight_stride;
        layer_norm(row_of<T>(op.x, row) + column, weight ? weight + place : nullptr, bias ? bias + place : nullptr,
                   op.size, op.eps, row_of<T>(op.out, row) + column);
    }
}

template <class T>
void rotary_rows(const OctavoRotary& op, const OctavoStep& step, const Team& team) {
    const int32_t* positions = op.positions ? op.positions : step.positions;
    const Range mine = team.share(step.num_tokens);
    float head[kMaxHeadDim];
    for (int row = mine.begin; row < mine.end; ++row) {
        for (int h = 0; h < op.num_heads; ++h) {
            const int column = h * op.head_dim;
            prepare_head(row_of<T>(op.x, row) + column, op.head_dim, op.heads, positions[row], op.head_dim, head);
            T* out = row_of<T>(op.out, row) + column;
            for (int i = 0; i < op.head_dim; i += kLanes)
                store_first(out + i, load_first(head + i, op.head_dim - i), op.head_dim - i);
        }
    }
}

// Calls `function(row, column, count)` for this thread's share of the rows' vectors; threads share even a single row.
template <class F>
void each_vector(const OctavoPointwise& op, const OctavoStep& step, const Team& team, F function) {
    constexpr int kStrip = 32 * kLanes;
    const int strips = (op.width + kStrip - 1) / kStrip;
    const Range mine = team.share(rows_of(step, op.rows) * strips);
    for (int i = mine.begin; i < mine.end; ++i) {
        const int begin = i % strips * kStrip;
        const int end = begin + kStrip < op.width ? begin + kStrip : op.width;
        for (int column = begin; column < end; column += kLanes) function(i / strips, column, end - column);
    }
}

}  // namespace

void run_rms_norm(const OctavoNorm& op, const OctavoStep& step, const Team& team) {
    with_type(op.type, [&](auto number) { rms_norm_rows<decltype(number)>(op, step, team); });
}

void run_layer_norm(const OctavoNorm& op, const OctavoStep& step, const Team& team) {
    with_type(op.type, [&](auto number) { layer_norm_rows<decltype(number)>(op, step, team); });
}

void run_rotary(const OctavoRotary& op, const OctavoStep& step, const Team& team) {
    with_type(op.type, [&](auto number) { rotary_rows<decltype(number)>(op, step, team); });
}

void run_act_and_mul(const OctavoPointwise& op, const OctavoStep& step, const Team& team) {
    with_type(op.type, [&](auto number) {
        using T = decltype(number);
        each_vector(op, step, team, [&](int row, int column, int count) {
            const T* gate = row_of<T>(op.x, row) + column;
            const Vec up = load_first(gate + op.width, count);
            const Vec result = gated<T>(load_first(gate, count), up, op.activation, op.parameter, op.limit);
            store_first(row_of<T>(op.out, row) + column, result, count);
        });
    });
}

void run_activation(const OctavoPointwise& op, const OctavoStep& step, const Team& team) {
    with_type(op.type, [&](auto number) {
        using T = decltype(number);
        each_vector(op, step, team, [&](int row, int column, int count) {
            const Vec x = load_first(row_of<T>(op.x, row) + column, count);
            store_first(row_of<T>(op.out, row) + column, activate(x, op.activation, op.parameter), count);
        });
    });
}

void run_add(const OctavoPointwise& op, const OctavoStep& step, const Team& team) {
    with_type(op.type, [&](auto number) {
        using T = decltype(number);
        each_vector(op, step, team, [&](int row, int column, int count) {
            const Vec x = load_first(row_of<T>(op.x, row) + column, count);
            store_first(row_of<T>(op.out, row) + column, x + load_first(row_of<T>(op.y, row) + column, count), count);
        });
    });
}

void run_multiply(const OctavoPointwise& op, const OctavoStep& step, const Team& team) {
    with_type(op.type, [&](auto number) {
        using T = decltype(number);
        each_vector(op, step, team, [&](int row, int column, int count) {
            const Vec x = load_first(row_of<T>(op.x, row) + column, count);
            store_first(row_of<T>(op.out, row) + column, x * load_first(row_of<T>(op.y, row) + column, count), count);
        });
    });
}

void run_gather_rows(const OctavoPointwise& op, const OctavoStep& step, const Team& team) {
    with_type(op.type, [&](auto number) {
        using T = decltype(number);
        const Range mine = team.share(step.num_samples);
        for (int i = mine.begin; i < mine.end; ++i)
            std::memcpy(row_of<T>(op.out, i), row_of<T>(op.x, step.logits_rows[i]), op.width * sizeof(T));
    });
}

}  // namespace octavo
