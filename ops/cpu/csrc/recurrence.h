// What recurrences have in common: states, one per block of the cache, and the convolution of their inputs.
#pragma once

#include <algorithm>
#include <cmath>

#include "octavo.h"
#include "simd.h"
#include "vec_math.h"

namespace octavo {

inline float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

// The states of a step's requests. A block holds the state after the last of its tokens that were computed.
struct States {
    const OctavoGroup& group;
    float* cache;
    int64_t size;  // of a state

    float* of(int request, int position) const {
        const int64_t block = group.block_table[request * group.block_table_stride + position / group.block_size];
        return cache + block * size;
    }

    // Calls `function(token, count, before, after)` for the tokens from `first` to `last`, at most `most` at a time and
    // none of two requests or blocks together. `before` is the state that precedes them, or null; `after` may be it.
    template <class F>
    void each(int first, int last, int most, F function) const {
        for (int request = 0; request < group.num_reqs; ++request) {
            const int stop = group.query_start_loc[request + 1], end = std::min(stop, last);
            int token = std::max(group.query_start_loc[request], first);
            if (token >= end) continue;
            const int offset = group.seq_lens[request] - stop;  // from tokens to positions
            float* state = token + offset ? of(request, token + offset - 1) : nullptr;
            while (token < end) {
                const int left = group.block_size - (token + offset) % group.block_size;
                const int count = std::min({left, most, end - token});
                float* target = of(request, token + offset);
                function(token, count, state, target);
                state = target;
                token += count;
            }
        }
    }
};

// A causal convolution of each column of x, then SiLU. A state begins with its last inputs, [length - 1, width].
// T: the model's type; W: that of the weights.
template <class T, class W>
struct StateConvolution {
    const OctavoMatrix& x;
    const W* weight;    // [length, width]
    const float* bias;  // [width] or null
    int length;
    int64_t width;

    const T* row_of(int64_t token) const { return static_cast<const T*>(x.data) + token * x.stride; }

    // An input of column `at`, `back` tokens before the token that `t` others of a piece precede.
    Vec input(int token, int t, int back, const float* before, int64_t at, int some) const {
        const int source = t - back;
        if (source >= 0) return load_first(row_of(token + source) + at, some);
        return before ? load_first(before + (length - 1 + source) * width + at, some) : zero();
    }

    // Results for some columns, rounded to T, [count][stride]; keeps the last inputs.
    template <class U>
    void run(int token, int count, const float* before, float* after, int64_t column, int size, U* out,
             int64_t stride) const {
        for (int i = 0; i < size; i += kLanes) {
            const int64_t at = column + i;
            const int some = size - i;
            for (int t = 0; t < count; ++t) {
                Vec sum = zero();
                for (int j = 0; j < length; ++j)
                    sum = fma(load_first(weight + j * width + at, some),
                              input(token, t, length - 1 - j, before, at, some), sum);
                if (bias) sum = sum + load_first(bias + at, some);
                store_first(out + t * stride + i, round_to<T>(activate(sum, kSilu, 0.0f)), some);
            }
            for (int j = 0; j < length - 1; ++j)  // ascending: `before` may be `after`
                store_first(after + j * width + at, input(token, count, length - 1 - j, before, at, some), some);
        }
    }
};

}  // namespace octavo
