// The recurrence of Mamba-2, with the convolution before it; see ops/reference/mamba.py.
//
// First the threads share the columns of the convolution, whose results lie in the workspace, then columns of states.
// Tokens are computed one after the other, a few columns of a state at a time, which stay in the L1 cache meanwhile. So
// bits do not depend on how a request is divided into steps, or on threads.
#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "packed.h"
#include "recurrence.h"

namespace octavo {

namespace {

// Tokens whose inputs are converted together: more than there are drafts of a step and replayed ones before them.
constexpr int kTokens = 72;
// Columns of a state that are computed together.
constexpr int kStrip = 2 * kLanes;
// Columns of the convolution that a thread takes at a time.
constexpr int kConvStrip = 4 * kLanes;
// Tokens of a request whose convolution is computed together.
constexpr int kConvTokens = 256 + kTokens;
constexpr int kMaxState = 256;
// Memory for the results of the convolution; steps that need more are computed in pieces.
constexpr size_t kMostBytes = 64 << 20;

int64_t width_of(const OctavoMamba& op) {
    return static_cast<int64_t>(op.num_heads) * op.head_dim + 2 * op.num_groups * op.state_dim;
}

// Of a token's results: after them, its steps, where they are not those of the op.
int64_t mixed_width(const OctavoMamba& op) { return width_of(op) + op.num_heads; }

size_t row_bytes(const OctavoMamba& op) { return mixed_width(op) * (op.type == kFloat32 ? 4 : 2); }

int tokens_at_once(const OctavoMamba& op) {
    return static_cast<int>(std::max<size_t>(kTokens, kMostBytes / row_bytes(op)));
}

States states_of(const OctavoMamba& op, const OctavoStep& step) {
    const int64_t kept = (op.conv_length - 1) * width_of(op) + int64_t{op.num_heads} * op.state_dim * op.head_dim;
    return {step.groups[op.group], static_cast<float*>(op.cache),
            kept + op.max_drafts * (width_of(op) + 2 * op.num_heads)};
}

template <class T>
class Mamba {
public:
    Mamba(const OctavoMamba& op, const OctavoStep& step, const Team& team)
        : op_(op),
          width_(width_of(op)),
          stride_(mixed_width(op)),
          past_(static_cast<int64_t>(op.conv_length - 1) * width_),
          kept_(past_ + static_cast<int64_t>(op.num_heads) * op.state_dim * op.head_dim),
          kept_row_(width_ + 2 * op.num_heads),
          states_(states_of(op, step)),
          mixed_(reinterpret_cast<T*>(team.shared.workspace)),
          padded_(blocks_of(op.state_dim, kLanes) * kLanes),
          b_(team.scratch.take<float>(kTokens * padded_)),
          c_(team.scratch.take<float>(kTokens * padded_)) {}

    int conv_strips() const { return blocks_of(static_cast<int>(width_), kConvStrip); }
    // The convolution of some columns, for the tokens from `first` to `last`.
    void convolve(int strip, int first, int last) const {
        const StateConvolution<T, float> conv = {op_.x,  op_.conv_weight, op_.conv_bias, op_.conv_length,
                                                 width_, kept_,           kept_row_};
        const int64_t column = static_cast<int64_t>(strip) * kConvStrip;
        const int size = static_cast<int>(std::min<int64_t>(kConvStrip, width_ - column));
        states_.each(first, last, kConvTokens, [&](const Piece& piece) {
            conv.run(piece, column, size, mixed_ + piece.row * stride_ + column, stride_);
            if (strip == 0) keep_steps(piece);
        });
    }

    int strips() const { return blocks_of(op_.head_dim, kStrip); }
    // Some columns of a head's states, and what they yield.
    void recur(int item, int first, int last) const {
        const int head = item / strips(), column = item % strips() * kStrip;
        states_.each(first, last, kTokens, [&](const Piece& piece) { advance(head, column, piece); });
    }

private:
    // What a token does to a state and reads from it.
    struct Token {
        float factor;
        Vec x[2];  // times the step
        const float* b;
        const float* c;
    };

    // Rows of a state, of which columns may end early.
    template <bool kIsPart>
    struct Rows {
        float* data;
        int64_t stride;
        int first;

        Vec get(int i, int h) const {
            const float* p = data + i * stride + h * kLanes;
            if constexpr (kIsPart) return first > h * kLanes ? load_first(p, first - h * kLanes) : zero();
            return load(p);
        }
        void put(int i, int h, Vec x) const {
            float* p = data + i * stride + h * kLanes;
            if constexpr (kIsPart) {
                if (first > h * kLanes) store_first(p, x, first - h * kLanes);
            } else {
                store(p, x);
            }
        }
    };

    template <bool kFromPart, bool kToPart>
    void apply(const Token& token, const Rows<kFromPart>& from, const Rows<kToPart>& to, Vec* out) const {
        const Vec factor = splat(token.factor);
        Vec sums[2] = {zero(), zero()};
        for (int i = 0; i < op_.state_dim; ++i) {
            const Vec b = splat(token.b[i]), c = splat(token.c[i]);
            for (int h = 0; h < 2; ++h) {
                const Vec state = fma(b, token.x[h], from.get(i, h) * factor);
                to.put(i, h, state);
                sums[h] = fma(c, state, sums[h]);
            }
        }
        out[0] = sums[0];
        out[1] = sums[1];
    }

    // Brings the steps of replayed tokens where all threads find them, and keeps those of drafts in their place.
    void keep_steps(const Piece& piece) const {
        for (int t = 0; t < piece.replayed; ++t)
            for (int head = 0; head < op_.num_heads; ++head)
                store_first(mixed_ + (piece.row + t) * stride_ + width_ + head,
                            splat(piece.before[kept_ + t * kept_row_ + width_ + head]), 1);
        for (int t = 0; t < piece.drafts; ++t)
            for (int head = 0; head < op_.num_heads; ++head)
                piece.after[kept_ + t * kept_row_ + width_ + head] =
                    input_step(piece.token + piece.count - piece.drafts + t, head);
    }

    // The states go through memory of a thread's own between the first token and the last.
    void advance(int head, int column, const Piece& piece) const {
        const int first = op_.head_dim - column, inner = op_.num_heads * op_.head_dim, count = piece.total();
        const int group = head / (op_.num_heads / op_.num_groups), n = op_.state_dim;
        const int64_t offset = past_ + static_cast<int64_t>(head) * n * op_.head_dim + column;
        const T* mixed = mixed_ + piece.row * stride_;
        alignas(64) float memory[kMaxState * kStrip];
        const Rows<false> own = {memory, kStrip, kStrip};
        float* before = piece.before ? const_cast<float*>(piece.before) + offset : nullptr;
        const Rows<true> source = {before, op_.head_dim, first}, target = {piece.after + offset, op_.head_dim, first};
        if (!piece.before) std::fill(memory, memory + n * kStrip, 0.0f);
        convert(mixed + inner + group * n, count, b_);
        convert(mixed + inner + (op_.num_groups + group) * n, count, c_);
        for (int t = 0; t < count; ++t) {
            const T* x = mixed + t * stride_ + head * op_.head_dim + column;
            const Vec xs[2] = {load_first(x, first), first > kLanes ? load_first(x + kLanes, first - kLanes) : zero()};
            const int token = piece.token + t - piece.replayed;
            const float step = step_of(
                t < piece.replayed ? to_float(mixed[t * stride_ + width_ + head]) : input_step(token, head), head);
            const Vec times = splat(step);
            const Token each = {
                std::exp(step * op_.decay[head]), {xs[0] * times, xs[1] * times}, b_ + t * padded_, c_ + t * padded_};
            Vec out[2];
            const bool is_first = t == 0 && piece.before, is_last = t == count - 1 && piece.drafts == 0;
            if (is_first && is_last)
                apply(each, source, target, out);
            else if (is_first)
                apply(each, source, own, out);
            else if (is_last)
                apply(each, own, target, out);
            else
                apply(each, own, own, out);
            if (t == piece.last_known() && piece.drafts) copy(own, target);
            if (t >= piece.replayed) finish(head, column, token, first, xs, out);
        }
    }

    // A part of a state, before drafts change it.
    void copy(const Rows<false>& from, const Rows<true>& to) const {
        for (int i = 0; i < op_.state_dim; ++i)
            for (int h = 0; h < 2; ++h) to.put(i, h, from.get(i, h));
    }

    float input_step(int64_t token, int head) const {
        return to_float(static_cast<const T*>(op_.steps.data)[token * op_.steps.stride + head]);
    }

    float step_of(float step, int head) const {
        return std::min(std::max(softplus(step + op_.step_bias[head]), op_.least_step), op_.most_step);
    }

    void convert(const T* from, int count, float* to) const {
        for (int t = 0; t < count; ++t)
            for (int i = 0; i < op_.state_dim; i += kLanes)
                store_first(to + t * padded_ + i, load_first(from + t * stride_ + i, op_.state_dim - i),
                            op_.state_dim - i);
    }

    void finish(int head, int column, int token, int first, const Vec* x, const Vec* sums) const {
        const int at = head * op_.head_dim + column;
        T* out = static_cast<T*>(op_.out.data) + token * op_.out.stride + at;
        const T* gate = op_.gate.data ? static_cast<const T*>(op_.gate.data) + token * op_.gate.stride + at : nullptr;
        const Vec skip = splat(op_.skip[head]);
        for (int h = 0; h < 2 && first > h * kLanes; ++h) {
            const int some = first - h * kLanes;
            Vec result = fma(skip, x[h], sums[h]);
            if (gate) result = result * activate(load_first(gate + h * kLanes, some), kSilu, 0.0f);
            store_first(out + h * kLanes, result, some);
        }
    }

    const OctavoMamba& op_;
    const int64_t width_;
    const int64_t stride_;
    const int64_t past_;
    const int64_t kept_;
    const int64_t kept_row_;
    const States states_;
    T* const mixed_;
    const int padded_;
    float* const b_;
    float* const c_;
};

}  // namespace

void run_mamba(const OctavoMamba& op, const OctavoStep& step, const Team& team) {
    const int at_once = tokens_at_once(op);
    const States states = states_of(op, step);
    with_type(op.type, [&](auto number) {
        const Mamba<decltype(number)> kernel(op, step, team);
        for (int first = 0, last; first < step.num_tokens; first = last) {
            last = states.end_of(first, at_once, step.num_tokens);
            if (first) team.wait();  // the workspace is used again
            team.each(kernel.conv_strips(), team.size, [&](int strip, int) { kernel.convolve(strip, first, last); });
            team.wait();
            team.each(op.num_heads * kernel.strips(), team.size,
                      [&](int item, int) { kernel.recur(item, first, last); });
        }
    });
}

size_t mamba_workspace(const OctavoMamba& op, const OctavoStep& step) {
    return row_bytes(op) * (std::min(step.num_tokens, tokens_at_once(op)) + states_of(op, step).all_replayed());
}

}  // namespace octavo
