// The gated delta rule, with the convolution before it; see ops/reference/delta.py.
//
// A thread takes heads of q and k with the value heads that share them, and computes all requests for these, in order:
// a request may begin with a state that another one of the step leaves. Tokens are computed one after the other, a few
// columns of a state at a time, which stay in the L1 cache meanwhile. So bits do not depend on how a request is divided
// into steps, or on threads.
#include <cmath>

#include "kernels.h"
#include "packed.h"
#include "recurrence.h"

namespace octavo {

namespace {

// Added to the squares of q and k.
constexpr float kEps = 1e-6f;
// Tokens whose q, k and v are computed before states are: more than there are drafts of a step and replayed ones before
// them.
constexpr int kTokens = 72;
// Columns of a state that are computed together.
constexpr int kStrip = 2 * kLanes;

template <class T>
class GatedDelta {
public:
    GatedDelta(const OctavoGatedDelta& op, const OctavoStep& step, Scratch& scratch)
        : op_(op),
          tokens_(step.num_tokens),
          values_each_(op.num_heads / op.num_key_heads),
          width_(2 * op.num_key_heads * op.key_dim + op.num_heads * op.value_dim),
          past_(static_cast<int64_t>(op.conv_length - 1) * width_),
          kept_(past_ + static_cast<int64_t>(op.num_heads) * op.key_dim * op.value_dim),
          kept_row_(width_ + 2 * op.num_heads),
          states_{step.groups[op.group], static_cast<float*>(op.cache), kept_ + op.max_drafts * kept_row_},
          key_padded_(padded(op.key_dim)),
          value_padded_(padded(op.value_dim)),
          q_(scratch.take<float>(kTokens * key_padded_)),
          k_(scratch.take<float>(kTokens * key_padded_)),
          v_(scratch.take<float>(static_cast<size_t>(kTokens) * values_each_ * value_padded_)),
          factors_(scratch.take<float>(kTokens)),
          rates_(scratch.take<float>(kTokens)) {}

    // All tokens of the step, for a head of q and k.
    void run(int key_head) {
        states_.each(0, tokens_, kTokens, [&](const Piece& piece) { advance(key_head, piece); });
    }

private:
    static int padded(int n) { return blocks_of(n, kStrip) * kStrip; }

    int value_head(int key_head, int i) const {
        return op_.tiled ? i * op_.num_key_heads + key_head : key_head * values_each_ + i;
    }
    int column_of_value(int head) const { return 2 * op_.num_key_heads * op_.key_dim + head * op_.value_dim; }

    void advance(int key_head, const Piece& piece) {
        const int key_column = key_head * op_.key_dim, keys = op_.num_key_heads * op_.key_dim;
        convolve(piece, key_column, op_.key_dim, q_, key_padded_);
        convolve(piece, keys + key_column, op_.key_dim, k_, key_padded_);
        for (int i = 0; i < piece.total(); ++i) {
            normalize(q_ + i * key_padded_, 1.0f / std::sqrt(static_cast<float>(op_.key_dim)));
            normalize(k_ + i * key_padded_, 1.0f);
        }
        for (int i = 0; i < values_each_; ++i) {
            const int head = value_head(key_head, i);
            convolve(piece, column_of_value(head), op_.value_dim, v_, value_padded_);
            gates(head, piece);
            for (int column = 0; column < op_.value_dim; column += kStrip) recur(head, piece, column);
        }
    }

    void convolve(const Piece& piece, int column, int size, float* out, int stride) const {
        const StateConvolution<T, T> conv = {
            op_.qkv, static_cast<const T*>(op_.conv_weight), nullptr, op_.conv_length, width_, kept_, kept_row_};
        conv.run(piece, column, size, out, stride);
    }

    void normalize(float* x, float factor) const {
        Vec squares = zero();
        for (int i = 0; i < op_.key_dim; i += kLanes) {
            const Vec some = load_first(x + i, op_.key_dim - i);
            squares = fma(some, some, squares);
        }
        const Vec scale = splat(1.0f / std::sqrt(sum(squares) + kEps)), more = splat(factor);
        for (int i = 0; i < op_.key_dim; i += kLanes) {
            const int some = op_.key_dim - i;
            store_first(x + i, load_first(x + i, some) * scale * more, some);
        }
    }

    // What replayed tokens and those of the step do to the states of a head; keeps the inputs of drafts.
    void gates(int head, const Piece& piece) const {
        const float decay = op_.decay[head], bias = op_.step_bias[head];
        const int64_t place = kept_ + width_ + head;
        for (int t = 0; t < piece.total(); ++t) {
            float step, beta;
            if (t < piece.replayed) {
                const float* kept = piece.before + place + t * kept_row_;
                beta = kept[0];
                step = kept[op_.num_heads];
            } else {
                const int64_t token = piece.token + t - piece.replayed;
                step = to_float(static_cast<const T*>(op_.steps.data)[token * op_.steps.stride + head]);
                beta = to_float(static_cast<const T*>(op_.beta.data)[token * op_.beta.stride + head]);
            }
            factors_[t] = std::exp(decay * softplus(step + bias));
            rates_[t] = 1.0f / (1.0f + std::exp(-beta));
        }
        for (int t = 0; t < piece.drafts; ++t) {
            const int64_t token = piece.token + piece.count - piece.drafts + t;
            float* kept = piece.after + place + t * kept_row_;
            kept[0] = to_float(static_cast<const T*>(op_.beta.data)[token * op_.beta.stride + head]);
            kept[op_.num_heads] = to_float(static_cast<const T*>(op_.steps.data)[token * op_.steps.stride + head]);
        }
    }

    // Some columns of a head's state, for all tokens of a piece.
    void recur(int head, const Piece& piece, int column) const {
        const int size = op_.value_dim, keys = op_.key_dim;
        const int first = size - column, second = first - kLanes;
        const int64_t offset = past_ + static_cast<int64_t>(head) * keys * size + column;
        const float* before = piece.before ? piece.before + offset : nullptr;
        alignas(64) float memory[kMaxKeys * kStrip];
        for (int i = 0; i < keys; ++i) {
            const float* row = before ? before + static_cast<int64_t>(i) * size : nullptr;
            store(memory + i * kStrip, row ? load_first(row, first) : zero());
            store(memory + i * kStrip + kLanes, row && second > 0 ? load_first(row + kLanes, second) : zero());
        }
        for (int t = 0; t < piece.total(); ++t) {
            const float* k = k_ + t * key_padded_;
            const float* q = q_ + t * key_padded_;
            const float* v = v_ + t * value_padded_ + column;
            const Vec factor = splat(factors_[t]), rate = splat(rates_[t]);
            Vec known[2] = {zero(), zero()}, out[2] = {zero(), zero()};
            for (int i = 0; i < keys; ++i)
                for (int h = 0; h < 2; ++h)
                    known[h] = fma(load(memory + i * kStrip + h * kLanes) * factor, splat(k[i]), known[h]);
            Vec delta[2];
            delta[0] = (load_first(v, first) - known[0]) * rate;
            delta[1] = second > 0 ? (load_first(v + kLanes, second) - known[1]) * rate : zero();
            for (int i = 0; i < keys; ++i)
                for (int h = 0; h < 2; ++h) {
                    float* place = memory + i * kStrip + h * kLanes;
                    const Vec state = fma(splat(k[i]), delta[h], load(place) * factor);
                    store(place, state);
                    out[h] = fma(splat(q[i]), state, out[h]);
                }
            if (t >= piece.replayed) {
                const int64_t token = piece.token + t - piece.replayed;
                T* target = static_cast<T*>(op_.out.data) + token * op_.out.stride + head * size + column;
                store_first(target, out[0], first);
                if (second > 0) store_first(target + kLanes, out[1], second);
            }
            if (t == piece.last_known()) keep(memory, piece.after + offset, first);
        }
    }

    // Stores some columns of a state.
    void keep(const float* memory, float* after, int first) const {
        const int second = first - kLanes;
        for (int i = 0; i < op_.key_dim; ++i) {
            float* row = after + static_cast<int64_t>(i) * op_.value_dim;
            store_first(row, load(memory + i * kStrip), first);
            if (second > 0) store_first(row + kLanes, load(memory + i * kStrip + kLanes), second);
        }
    }

    static constexpr int kMaxKeys = 256;

    const OctavoGatedDelta& op_;
    const int tokens_;
    const int values_each_;
    const int64_t width_;
    const int64_t past_;
    const int64_t kept_;
    const int64_t kept_row_;
    const States states_;
    const int key_padded_;
    const int value_padded_;
    float* q_;
    float* k_;
    float* v_;
    float* factors_;
    float* rates_;
};

}  // namespace

void run_gated_delta(const OctavoGatedDelta& op, const OctavoStep& step, const Team& team) {
    with_type(op.type, [&](auto number) {
        GatedDelta<decltype(number)> kernel(op, step, team.scratch);
        team.each(op.num_key_heads, team.size, [&](int head, int) { kernel.run(head); });
    });
}

}  // namespace octavo
