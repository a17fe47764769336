// What recurrences have in common: states, one per block of the cache, and the convolution of their inputs.
#pragma once

#include <algorithm>
#include <cmath>

#include "octavo.h"
#include "simd.h"
#include "vec_math.h"

namespace octavo {

inline float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

// Tokens of a request that are computed one after the other. `before` is the state that precedes them, or null; `after`
// may be it. A state leaves out drafts, and keeps their inputs: the next step replays those that were accepted.
struct Piece {
    int token;     // the first one of the step
    int count;     // tokens of the step
    int replayed;  // tokens before them, whose inputs `before` keeps
    int drafts;    // the last ones of `count`
    int row;       // of the first token, replayed ones included, among all of the pieces
    const float* before;
    float* after;

    int total() const { return replayed + count; }
    // The last one that `after` includes.
    int last_known() const { return total() - drafts - 1; }
};

// The states of a step's requests. A block holds the state after the last of its tokens that were computed and are no
// drafts.
struct States {
    const OctavoGroup& group;
    float* cache;
    int64_t size;  // of a state, with the inputs that it keeps

    int block_of(int request, int position) const {
        return group.block_table[request * group.block_table_stride + position / group.block_size];
    }
    float* of(int request, int position) const { return cache + int64_t{block_of(request, position)} * size; }

    // Tokens from `position` to `end` whose blocks have the same memory.
    int same_block(int request, int position, int end) const {
        int next = position - position % group.block_size + group.block_size;
        while (next < end && block_of(request, next) == block_of(request, position)) next += group.block_size;
        return std::min(next, end) - position;
    }
    int drafts(int request) const { return group.num_drafts ? group.num_drafts[request] : 0; }
    int replayed(int request) const { return group.num_replayed ? group.num_replayed[request] : 0; }

    // Tokens that are replayed before those of the step.
    int all_replayed() const {
        int count = 0;
        for (int request = 0; request < group.num_reqs; ++request) count += replayed(request);
        return count;
    }

    // Where a part of the step ends that begins with `first` and has at most `most` tokens, more than any request has
    // drafts: drafts stay with the token before them.
    int end_of(int first, int most, int num_tokens) const {
        const int end = std::min(first + most, num_tokens);
        for (int request = 0; request < group.num_reqs; ++request) {
            const int stop = group.query_start_loc[request + 1], tail = stop - drafts(request) - 1;
            if (tail < end && end < stop && tail > first) return tail;
        }
        return end;
    }

    // Calls `function` with the pieces of the tokens from `first` to `last`, of at most `most` tokens each and none of
    // two requests, or of blocks that differ.
    template <class F>
    void each(int first, int last, int most, F function) const {
        int row = 0;
        for (int request = 0; request < group.num_reqs; ++request) {
            const int start = group.query_start_loc[request], stop = group.query_start_loc[request + 1];
            const int end = std::min(stop, last), own_drafts = drafts(request);
            int token = std::max(start, first);
            if (token >= end) continue;
            const int offset = group.seq_lens[request] - stop;  // from tokens to positions
            int replays = token == start ? replayed(request) : 0;
            const int known = token + offset - replays;
            float* state = known ? of(request, known - 1) : nullptr;
            while (token < end) {
                int count = std::min({most - replays - own_drafts, end - token, stop - own_drafts - token});
                count = same_block(request, token + offset, token + offset + count);
                const int more = token + count == stop - own_drafts ? own_drafts : 0;
                float* target = of(request, token + offset);
                function(Piece{token, count + more, replays, more, row, state, target});
                row += replays + count + more;
                token += count + more;
                state = target;
                replays = 0;
            }
        }
    }
};

// A causal convolution of each column of x, then SiLU. A state begins with its last inputs, [length - 1, width], and
// keeps those of drafts. T: the model's type; W: that of the weights.
template <class T, class W>
struct StateConvolution {
    const OctavoMatrix& x;
    const W* weight;    // [length, width]
    const float* bias;  // [width] or null
    int length;
    int64_t width;
    int64_t kept;      // where a state has the inputs that it keeps
    int64_t kept_row;  // numbers of a token there

    const T* row_of(int64_t token) const { return static_cast<const T*>(x.data) + token * x.stride; }

    // An input of column `at`, `back` tokens before the token that `t` others of a piece precede.
    Vec input(const Piece& piece, int t, int back, int64_t at, int some) const {
        const int source = t - back;
        if (source >= piece.replayed) return load_first(row_of(piece.token + source - piece.replayed) + at, some);
        if (source >= 0) return load_first(piece.before + kept + source * kept_row + at, some);
        return piece.before ? load_first(piece.before + (length - 1 + source) * width + at, some) : zero();
    }

    // Results for some columns, rounded to T, [replayed and others][stride]; keeps the last inputs, and those of
    // drafts.
    template <class U>
    void run(const Piece& piece, int64_t column, int size, U* out, int64_t stride) const {
        const int known = piece.last_known() + 1;
        for (int i = 0; i < size; i += kLanes) {
            const int64_t at = column + i;
            const int some = size - i;
            for (int t = 0; t < piece.total(); ++t) {
                Vec sum = zero();
                for (int j = 0; j < length; ++j)
                    sum =
                        fma(load_first(weight + j * width + at, some), input(piece, t, length - 1 - j, at, some), sum);
                if (bias) sum = sum + load_first(bias + at, some);
                store_first(out + t * stride + i, round_to<T>(activate(sum, kSilu, 0.0f)), some);
            }
            for (int j = 0; j < length - 1; ++j)  // ascending: `before` may be `after`
                store_first(piece.after + j * width + at, input(piece, known, length - 1 - j, at, some), some);
            for (int t = 0; t < piece.drafts; ++t)
                store_first(piece.after + kept + t * kept_row + at, input(piece, known + t, 0, at, some), some);
        }
    }
};

}  // namespace octavo
