// A short causal convolution between two gates (LFM2). Its inputs are cached by token, as K and V are, so that a
// request may be chunked, moved and shared at will: an element of the result is a sum over a few tokens in ascending
// order.
#include <cstring>

#include "kernels.h"
#include "simd.h"

namespace octavo {

namespace {

// Columns that a thread takes at a time: threads share even a single token.
constexpr int kStrip = 16 * kLanes;

template <class T>
class ShortConv {
public:
    ShortConv(const OctavoShortConv& op, const OctavoStep& step) : op_(op), group_(step.groups[op.group]) {}

    // Writes the gated input of a token to the cache.
    void write(int token, int begin, int end) const {
        T* out = cached(group_.slot_mapping[token]);
        for (int i = begin; i < end; i += kLanes) {
            const int count = end - i;
            const Vec gate = load_first(row_of(op_.gate_in, token) + i, count);
            store_first(out + i, gate * load_first(row_of(op_.x, token) + i, count), count);
        }
    }

    void compute(int request, int token, int begin, int end) const {
        const int position = group_.seq_lens[request] - (group_.query_start_loc[request + 1] - token);
        const int first = position + 1 < op_.length ? op_.length - 1 - position : 0;  // tokens before it do not exist
        const T* weight = static_cast<const T*>(op_.weight);
        const T* bias = static_cast<const T*>(op_.bias);
        T* out = row_of(op_.out, token);
        for (int i = begin; i < end; i += kLanes) {
            const int count = end - i;
            Vec sum = bias ? load_first(bias + i, count) : zero();
            for (int j = first; j < op_.length; ++j) {
                const T* y = cached(slot(request, position - (op_.length - 1 - j)));
                sum = fma(load_first(weight + static_cast<int64_t>(j) * op_.width + i, count), load_first(y + i, count),
                          sum);
            }
            store_first(out + i, load_first(row_of(op_.gate_out, token) + i, count) * round_to<T>(sum), count);
        }
    }

private:
    static T* row_of(const OctavoMatrix& matrix, int64_t row) {
        return static_cast<T*>(matrix.data) + row * matrix.stride;
    }
    T* cached(int64_t slot) const { return static_cast<T*>(op_.cache) + slot * op_.width; }
    int64_t slot(int request, int position) const {
        const int64_t block = group_.block_table[request * group_.block_table_stride + position / group_.block_size];
        return block * group_.block_size + position % group_.block_size;
    }

    const OctavoShortConv& op_;
    const OctavoGroup& group_;
};

template <class T>
void short_conv(const OctavoShortConv& op, const OctavoStep& step, const Team& team) {
    const ShortConv<T> kernel(op, step);
    const OctavoGroup& group = step.groups[op.group];
    const int strips = (op.width + kStrip - 1) / kStrip;
    const Range mine = team.share(step.num_tokens * strips);
    const auto end_of = [&](int begin) { return begin + kStrip < op.width ? begin + kStrip : op.width; };
    for (int i = mine.begin; i < mine.end; ++i) {
        const int begin = i % strips * kStrip;
        kernel.write(i / strips, begin, end_of(begin));
    }
    team.wait();  // requests may share blocks that one of them fills in this step
    int request = 0;
    for (int i = mine.begin; i < mine.end; ++i) {
        const int token = i / strips, begin = i % strips * kStrip;
        while (group.query_start_loc[request + 1] <= token) ++request;
        kernel.compute(request, token, begin, end_of(begin));
    }
}

}  // namespace

void run_short_conv(const OctavoShortConv& op, const OctavoStep& step, const Team& team) {
    with_type(op.type, [&](auto number) { short_conv<decltype(number)>(op, step, team); });
}

}  // namespace octavo
