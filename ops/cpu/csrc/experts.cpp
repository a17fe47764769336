// Mixtures of experts; see ops/reference/experts.py.
//
// The rows of a step are sorted by expert. Then the team multiplies with the gates and ups of all experts as one list
// of tasks, and with all downs as another, so that it streams through the weights of the experts that have rows. A
// product computes each row as if alone, and the results of a token are added in the order of its experts: bits do not
// depend on the neighbours. Of several ranks, each multiplies with its share of the gates and ups, and of the downs.
#include <algorithm>
#include <cmath>

#include "linear.h"
#include "ranks.h"
#include "vec_math.h"

namespace octavo {

namespace {

// Of a weight, about, that a thread takes at a time.
constexpr int64_t kTaskBytes = 160 << 10;
// Of an expert's weight, prefetched while the one before is multiplied: after that the CPU's prefetcher has begun.
constexpr int64_t kFirstBytes = 4 << 10;
// Memory for the rows between the products; steps that need more are computed in pieces.
constexpr size_t kMostBytes = 64 << 20;

constexpr size_t whole_lines(size_t bytes) { return (bytes + kCacheLine - 1) / kCacheLine * kCacheLine; }

// ---------------------------------------------------------------------------------------------------------------------
// Routing.

// Added to a sum of sigmoids that divides.
constexpr float kTiny = 1e-20f;

float exp_of(float x) {
    float result[kLanes];
    store(result, exp(splat(x)));
    return result[0];
}

float sigmoid(float x) { return 1.0f / (1.0f + exp_of(-x)); }

// The index of the largest of the numbers that are not taken, the lowest of equal ones.
int best_of(const float* numbers, const bool* taken, int begin, int end) {
    int best = -1;
    for (int i = begin; i < end; ++i)
        if (!taken[i] && (best < 0 || numbers[i] > numbers[best])) best = i;
    return best;
}

// One thread's memory for a row.
struct RouteScratch {
    float* scores;
    float* choice;
    bool* taken;
    int* chosen;
    float* groups;
    bool* groups_taken;
};

// Softmax of a row.
void softmax(const float* x, int count, float* out) {
    float highest = x[0];
    for (int i = 1; i < count; ++i) highest = std::max(highest, x[i]);
    float total = 0.0f;
    for (int i = 0; i < count; i += kLanes)
        store_first(out + i, exp(load_first(x + i, count - i) - splat(highest)), count - i);
    for (int i = 0; i < count; ++i) total += out[i];
    for (int i = 0; i < count; ++i) out[i] /= total;
}

// Takes all experts but those of the best groups.
void take_groups(const OctavoRoute& op, const RouteScratch& s) {
    const int size = op.num_experts / op.num_groups;
    for (int g = 0; g < op.num_groups; ++g) {
        const int first = g * size, last = first + size;
        const int best = best_of(s.choice, s.taken, first, last);
        s.groups[g] = s.choice[best];
        s.groups_taken[g] = false;
        s.taken[best] = true;
        const int second = op.group_best > 1 ? best_of(s.choice, s.taken, first, last) : -1;
        if (second >= 0) s.groups[g] += s.choice[second];
        s.taken[best] = false;
    }
    for (int i = 0; i < op.top_groups; ++i) s.groups_taken[best_of(s.groups, s.groups_taken, 0, op.num_groups)] = true;
    for (int e = 0; e < op.num_experts; ++e) s.taken[e] = !s.groups_taken[e / size];
}

void route_row(const OctavoRoute& op, const float* logits, const RouteScratch& s, float* out) {
    const int count = op.num_experts;
    std::fill(s.taken, s.taken + count, false);
    std::fill(out, out + count, 0.0f);
    if (op.scores == kSoftmax) softmax(logits, count, s.scores);
    if (op.scores == kSigmoid)
        for (int e = 0; e < count; e += kLanes)
            store_first(s.scores + e, splat(1.0f) / (splat(1.0f) + exp(negate(load_first(logits + e, count - e)))),
                        count - e);
    const bool by_logits = !op.bias && op.num_groups == 1;
    for (int e = 0; e < count; ++e)
        s.choice[e] = by_logits ? logits[e] : op.bias ? s.scores[e] + op.bias[e] : s.scores[e];
    if (op.num_groups > 1) take_groups(op, s);
    float total = 0.0f, highest = 0.0f;
    for (int i = 0; i < op.top_k; ++i) {
        const int e = s.chosen[i] = best_of(s.choice, s.taken, 0, count);
        s.taken[e] = true;
        total += s.scores[e];
        highest = i == 0 ? logits[e] : std::max(highest, logits[e]);
    }
    const bool is_softmax = op.normalize && op.scores == kSoftmax;
    if (is_softmax) {
        total = 0.0f;
        for (int i = 0; i < op.top_k; ++i) total += s.scores[s.chosen[i]] = exp_of(logits[s.chosen[i]] - highest);
    }
    for (int i = 0; i < op.top_k; ++i) {
        const int e = s.chosen[i];
        out[e] = s.scores[e];
        if (op.normalize) out[e] /= is_softmax ? total : total + kTiny;
        out[e] *= op.factor;
    }
}

// One expert after the other, each weighted among those not chosen before that are not much worse.
void mix_row(const OctavoRoute& op, const float* logits, const RouteScratch& s, float* out) {
    const int count = op.num_experts;
    std::fill(s.taken, s.taken + count, false);
    std::fill(out, out + count, 0.0f);
    for (int i = 0; i < op.top_k; ++i) {
        const int chosen = best_of(logits, s.taken, 0, count);
        const float highest = logits[chosen];
        float total = 0.0f;
        for (int e = 0; e < count; ++e) {
            const float distance = (highest - logits[e]) / std::max(std::fabs(logits[e]), highest);
            if (!s.taken[e] && !(distance > 2.0f * op.jitter)) total += exp_of(logits[e] - highest);
        }
        out[chosen] = 1.0f / total * op.factor;
        s.taken[chosen] = true;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Sorting.

// The rows of a piece, sorted by expert: a row is a token with one of its experts.
struct Sorted {
    int* starts;      // [num_experts + 1]: the first row of each expert
    int64_t* tokens;  // of each row, in the step
    float* weights;   // of each row
    int* rows;        // [tokens][top_k]: the rows of each token, by ascending expert
    int* counts;      // [tokens]: how many these are
    int* touched;     // experts with rows
    int num_touched;

    int rows_of(int expert) const { return starts[expert + 1] - starts[expert]; }
};

const float* routed_row(const OctavoExperts& op, int token) {
    return static_cast<const float*>(op.routed.data) + token * op.routed.stride;
}

// Every thread sorts all rows: quicker than a barrier.
Sorted sort_rows(const OctavoExperts& op, const Range& piece, Scratch& scratch) {
    const int tokens = piece.end - piece.begin;
    const size_t most = static_cast<size_t>(tokens) * op.top_k;
    Sorted result;
    result.starts = scratch.take<int>(op.num_experts + 1);
    result.tokens = scratch.take<int64_t>(most);
    result.weights = scratch.take<float>(most);
    result.rows = scratch.take<int>(most);
    result.counts = scratch.take<int>(tokens);
    result.touched = scratch.take<int>(op.num_experts);
    result.num_touched = 0;
    int* const experts = scratch.take<int>(most);  // of each token
    int* const next = scratch.take<int>(op.num_experts);
    std::fill(next, next + op.num_experts, 0);
    for (int t = 0; t < tokens; ++t) {
        const float* routed = routed_row(op, piece.begin + t);
        int count = 0;
        for (int e = 0; e < op.num_experts && count < op.top_k; ++e)
            if (routed[e] != 0.0f) {
                experts[t * op.top_k + count++] = e;
                ++next[e];
            }
        result.counts[t] = count;
    }
    int start = 0;
    for (int e = 0; e < op.num_experts; ++e) {
        const int count = next[e];
        if (count) result.touched[result.num_touched++] = e;
        result.starts[e] = next[e] = start;
        start += count;
    }
    result.starts[op.num_experts] = start;
    for (int t = 0; t < tokens; ++t) {
        const float* routed = routed_row(op, piece.begin + t);
        for (int i = 0; i < result.counts[t]; ++i) {
            const int e = experts[t * op.top_k + i], row = next[e]++;
            result.tokens[row] = piece.begin + t;
            result.weights[row] = routed[e];
            result.rows[t * op.top_k + i] = row;
        }
    }
    return result;
}

// ---------------------------------------------------------------------------------------------------------------------
// Products.

// Sizes of what lies between the products, and where it lies in the workspace.
struct Between {
    int input;            // columns of x
    int hidden;           // of the results that this rank makes
    int inner;            // of what downs are multiplied with
    bool activated;       // the product with gates and ups yields the results of the activation
    int width;            // of what gates and ups yield
    size_t staged_x;      // bytes of a row that is multiplied with gates and ups
    size_t staged_inner;  // the same with downs
    size_t row_bytes;     // of all results of a row

    explicit Between(const OctavoExperts& op) {
        input = op.gate_up[0].columns;
        hidden = op.down[0].rows;
        inner = op.down[0].columns;
        activated = is_activated(op, op.gate_up[0]);
        width = activated ? inner : 2 * inner;
        staged_x = staged_bytes(gate_up(op, 0));
        staged_inner = staged_bytes(down(op, 0));
        row_bytes = staged_x + staged_inner + width * number_bytes(op) + input * sizeof(float);  // of any rank
    }

    static size_t number_bytes(const OctavoExperts& op) { return op.type == kFloat32 ? 4 : 2; }

    static OctavoLinear linear(const OctavoExperts& op, const OctavoWeight& weight, const void* const* biases,
                               int expert) {
        OctavoLinear result = {};
        result.weight = weight;
        result.bias = biases ? biases[expert] : nullptr;
        result.type = op.type;
        return result;
    }
    // Gates and ups are side by side in the weight, or there are no gates.
    static bool is_activated(const OctavoExperts& op, const OctavoWeight& weight) { return weight.paired || !op.gated; }
    static OctavoLinear gate_up(const OctavoExperts& op, int expert) {
        OctavoLinear result = linear(op, op.gate_up[expert], op.gate_up_biases, expert);
        result.epilogue = result.weight.paired ? kGated : kStore;
        result.activation = is_activated(op, result.weight) ? op.activation : kIdentity;
        result.parameter = op.parameter;
        result.limit = op.limit;
        return result;
    }
    static OctavoLinear down(const OctavoExperts& op, int expert) {
        OctavoLinear result = linear(op, op.down[expert], op.down_biases, expert);
        result.epilogue = kLogits;
        return result;
    }

    int tokens_at_once(int top_k) const {
        return static_cast<int>(std::max<size_t>(1, kMostBytes / (row_bytes * top_k)));
    }
};

// Products of rows with the A of their adapters, which all threads share, and where each expert's are.
struct Projections {
    int64_t stride = 0;  // 0: no row has an adapter
    const OctavoAdapter* const* const* adapters = nullptr;
    const int32_t* of_row = nullptr;  // of all rows
    float* data = nullptr;
    Adapted* adapted = nullptr;  // [num_experts]

    // Floats of a row: the largest rank of the step's adapters in any expert.
    static int64_t stride_of(const OctavoAdapter* const* const* adapters, int num_experts,
                             const OctavoAdapterRows& rows) {
        int most = 0;
        for (int e = 0; adapters && e < num_experts; ++e)
            for (int i = 0; i < rows.num_adapters; ++i) {
                const OctavoAdapter* adapter = adapters[e][rows.adapters[i]];
                if (adapter) most = std::max(most, adapter->rank);
            }
        return most;
    }

    void choose(const OctavoAdapter* const* const* chosen, const int* starts, int num_experts, Scratch& scratch) {
        adapters = chosen;
        adapted = scratch.take<Adapted>(num_experts);
        for (int e = 0; e < num_experts; ++e)
            adapted[e] = {chosen[e], of_row + starts[e], data + starts[e] * stride, stride, false};
    }

    void add_to(OctavoLinear& linear, int expert) const {
        if (!adapters) return;
        linear.adapters = adapters[expert];
        linear.adapted = &adapted[expert];
    }

    void project(const OctavoLinear& linear, const OctavoStep& step, int expert, const Range& rows,
                 const Team& team) const {
        if (!adapters || !stride) return;
        const Adapted& own = adapted[expert];
        project_some(linear, step, rows, own.of_row, team, const_cast<float*>(own.projected), stride);
    }
};

// What the threads of a piece share.
template <class T>
struct Piece {
    const OctavoExperts& op;
    const Between& sizes;
    const Sorted& sorted;
    uint8_t* staged_x;
    size_t x_stride;  // bytes from one row's to the next's; 0: they are the same
    uint8_t* staged_inner;
    T* inner;
    float* results;
    Projections of_x;
    Projections of_inner;

    // The product of an expert's rows with its gate and up.
    OctavoLinear gate_up(int expert) const {
        OctavoLinear result = Between::gate_up(op, expert);
        result.out = {inner + static_cast<int64_t>(sorted.starts[expert]) * sizes.width + op.first_inner, sizes.width};
        of_x.add_to(result, expert);
        return result;
    }
    // With its down.
    OctavoLinear down(int expert) const {
        OctavoLinear result = Between::down(op, expert);
        result.x = {inner + static_cast<int64_t>(sorted.starts[expert]) * sizes.width, sizes.width};
        result.out = {results + static_cast<int64_t>(sorted.starts[expert]) * sizes.hidden, sizes.hidden};
        of_inner.add_to(result, expert);
        return result;
    }
    void* staged_x_of(int expert) const { return staged_x + sorted.starts[expert] * x_stride; }
    void* staged_inner_of(int expert) const { return staged_inner + sorted.starts[expert] * sizes.staged_inner; }
};

// Calls `function(expert, tile)` for this thread's share of the tiles of all experts.
template <class F>
void each_tile(const Sorted& sorted, int most, const Team& team, F function) {
    int total = 0;
    for (int i = 0; i < sorted.num_touched; ++i) total += blocks_of(sorted.rows_of(sorted.touched[i]), most);
    const Range mine = team.share(total);
    int first = 0;
    for (int i = 0; i < sorted.num_touched && first < mine.end; ++i) {
        const int expert = sorted.touched[i], tiles = blocks_of(sorted.rows_of(expert), most);
        for (int tile = std::max(0, mine.begin - first); tile < std::min(tiles, mine.end - first); ++tile)
            function(expert, tile);
        first += tiles;
    }
}

template <class T>
void stage_x(const Piece<T>& piece, const Team& team) {
    const OctavoExperts& op = piece.op;
    const Sorted& sorted = piece.sorted;
    const int most = most_rows(piece.gate_up(sorted.touched[0]));
    T* scaled = op.scales_input ? team.scratch.take<T>(static_cast<size_t>(most) * piece.sizes.input) : nullptr;
    each_tile(sorted, most, team, [&](int expert, int tile) {
        const int start = sorted.starts[expert], rows = sorted.rows_of(expert);
        OctavoLinear linear = piece.gate_up(expert);
        OctavoStep step = {};
        const Tiles tiles = Tiles::of(rows, most);
        step.logits_rows = sorted.tokens + start;
        linear.x = op.x;
        linear.gather = 1;
        if (scaled) {
            for (int r = tiles.begin(tile); r < tiles.begin(tile + 1); ++r) {
                const T* x = static_cast<const T*>(op.x.data) + sorted.tokens[start + r] * op.x.stride;
                T* out = scaled + static_cast<int64_t>(r - tiles.begin(tile)) * piece.sizes.input;
                const Vec weight = splat(sorted.weights[start + r]);
                for (int k = 0; k < piece.sizes.input; k += kLanes) {
                    const int count = piece.sizes.input - k;
                    store_first(out + k, load_first(x + k, count) * weight, count);
                }
            }
            // Rows are counted from the expert's first.
            linear.x = {scaled - static_cast<int64_t>(tiles.begin(tile)) * piece.sizes.input, piece.sizes.input};
            linear.gather = 0;
        }
        stage_tile(linear, step, rows, tile, piece.staged_x_of(expert));
        piece.of_x.project(linear, step, expert, {tiles.begin(tile), tiles.begin(tile + 1)}, team);
    });
}

// The same of a single token: every thread stages it, which is quicker than a barrier, and all of its experts read it.
template <class T>
void stage_token(Piece<T>& piece, const Team& team) {
    OctavoLinear linear = piece.gate_up(piece.sorted.touched[0]);
    OctavoStep step = {};
    step.logits_rows = piece.sorted.tokens;
    linear.x = piece.op.x;
    linear.gather = 1;
    piece.staged_x = team.scratch.take<uint8_t>(piece.sizes.staged_x);
    piece.x_stride = 0;
    stage_tile(linear, step, 1, 0, piece.staged_x);
}

// The results of gates and ups, if they do not lie side by side in the weight, become those of the activation.
template <class T>
void activate_row(T* row, const OctavoExperts& op, int inner) {
    for (int k = 0; k < inner; k += kLanes) {
        const int count = inner - k;
        const Vec gate = load_first(row + k, count), up = load_first(row + inner + k, count);
        store_first(row + k, gated<T>(gate, up, op.activation, op.parameter, op.limit), count);
    }
}

template <class T>
void stage_inner(const Piece<T>& piece, const Team& team) {
    const int most = most_rows(piece.down(piece.sorted.touched[0]));
    each_tile(piece.sorted, most, team, [&](int expert, int tile) {
        const OctavoLinear linear = piece.down(expert);
        const int rows = piece.sorted.rows_of(expert);
        const Tiles tiles = Tiles::of(rows, most);
        if (!piece.sizes.activated) {
            for (int r = tiles.begin(tile); r < tiles.begin(tile + 1); ++r)
                activate_row(static_cast<T*>(linear.x.data) + r * linear.x.stride, piece.op, piece.sizes.inner);
        }
        stage_tile(linear, {}, rows, tile, piece.staged_inner_of(expert));
        piece.of_inner.project(linear, {}, expert, {tiles.begin(tile), tiles.begin(tile + 1)}, team);
    });
}

// Prefetches what a weight holds from a block on.
void fetch_first(const OctavoLinear& linear, int block) {
    const uintptr_t first = address_of_block(linear, block);
    for (int64_t line = 0; line < kFirstBytes; line += kCacheLine) prefetch(first + line);
}

// The same of this thread's share, before it can be multiplied.
template <class Make>
void fetch_share(const Sorted& sorted, const Team& team, Make make) {
    const int blocks = row_blocks_of(make(sorted.touched[0]));
    const Range mine = team.share(sorted.num_touched * blocks);
    if (mine.begin < mine.end) fetch_first(make(sorted.touched[mine.begin / blocks]), mine.begin % blocks);
}

// Divides the products of all experts with their weights into tasks: some blocks of 32 columns of one.
template <class Make, class Staged>
void multiply_all(const Sorted& sorted, const Team& team, Make make, Staged staged) {
    const OctavoLinear any = make(sorted.touched[0]);
    const int blocks = row_blocks_of(any);
    const int most = static_cast<int>(std::max<int64_t>(1, kTaskBytes / block_bytes_of(any)));
    team.each_run(sorted.num_touched * blocks, team.size, most, [&](Range items, int end) {
        while (items.begin < items.end) {
            const int number = items.begin / blocks, first = items.begin % blocks;
            const int last = std::min(blocks, first + items.end - items.begin);
            const int next = (number + 1) * blocks;
            if (last == blocks && next < end) fetch_first(make(sorted.touched[number + 1]), 0);
            const int expert = sorted.touched[number];
            multiply_part(make(expert), sorted.rows_of(expert), staged(expert), {first, last}, team);
            items.begin += last - first;
        }
    });
}

// a b + c, rounded once: also where `fma` rounds twice.
Vec fused(Vec a, Vec b, Vec c) {
#if defined(__FMA__) || defined(__AVX512F__)
    return fma(a, b, c);
#else
    float x[kLanes], y[kLanes], z[kLanes];
    store(x, a);
    store(y, b);
    store(z, c);
    for (int i = 0; i < kLanes; ++i) z[i] = std::fma(x[i], y[i], z[i]);
    return load(z);
#endif
}

// The sums of the results of each token.
template <class T>
void combine(const Piece<T>& piece, const Range& tokens, const Team& team) {
    constexpr int kStrip = 32 * kLanes;
    const OctavoExperts& op = piece.op;
    const Sorted& sorted = piece.sorted;
    const int hidden = piece.sizes.hidden, strips = blocks_of(hidden, kStrip);
    const Range mine = team.share((tokens.end - tokens.begin) * strips);
    for (int i = mine.begin; i < mine.end; ++i) {
        const int t = i / strips, token = tokens.begin + t, begin = i % strips * kStrip;
        const T* shared = op.shared.data ? static_cast<const T*>(op.shared.data) + token * op.shared.stride : nullptr;
        const float* gate = static_cast<const float*>(op.shared_gate.data);
        const Vec share = splat(gate ? sigmoid(gate[token * op.shared_gate.stride]) : 1.0f);
        T* out = static_cast<T*>(op.out.data) + token * op.out.stride;
        for (int column = begin; column < std::min(hidden, begin + kStrip); column += kLanes) {
            const int count = hidden - column;
            Vec sum = zero();
            for (int k = 0; k < sorted.counts[t]; ++k) {
                const int row = sorted.rows[t * op.top_k + k];
                const float* result = piece.results + static_cast<int64_t>(row) * hidden + column;
                const Vec weight = splat(op.scales_input ? 1.0f : sorted.weights[row]);
                sum = fused(weight, load_first(result, count), sum);
            }
            if (shared) sum = fused(share, load_first(shared + column, count), sum);
            store_first(out + column, sum, count);
        }
    }
}

// The adapters of sorted rows.
const int32_t* adapters_of(const Sorted& sorted, size_t rows, const int32_t* of_token, Scratch& scratch) {
    int32_t* result = scratch.take<int32_t>(rows);
    for (size_t row = 0; row < rows; ++row) result[row] = of_token[sorted.tokens[row]];
    return result;
}

// Waits until the results of gates and ups are complete, or no longer needed.
void wait_for_inner(const OctavoExperts& op, const OctavoStep& step, const Team& team) {
    if (op.inner)
        wait(team, *step.ranks);
    else
        team.wait();
}

template <class T>
void run_piece(const OctavoExperts& op, const OctavoStep& step, const Between& sizes, const Range& tokens,
               const Team& team) {
    const Sorted sorted = sort_rows(op, tokens, team.scratch);
    const size_t rows = sorted.starts[op.num_experts];
    uint8_t* place = reinterpret_cast<uint8_t*>(team.shared.workspace);
    const auto take = [&](size_t bytes) {
        uint8_t* result = place;
        place += whole_lines(bytes);
        return result;
    };
    Piece<T> piece = {op,
                      sizes,
                      sorted,
                      take(rows * sizes.staged_x),
                      sizes.staged_x,
                      take(rows * sizes.staged_inner),
                      static_cast<T*>(op.inner ? op.inner : static_cast<void*>(take(rows * sizes.width * sizeof(T)))),
                      reinterpret_cast<float*>(take(rows * sizes.hidden * sizeof(float))),
                      {},
                      {}};
    const OctavoAdapterRows& adapters = step.adapters[kTokens];
    if (rows && op.gate_up_adapters && adapters.num_adapters) {
        const int32_t* of_row = adapters_of(sorted, rows, adapters.of_row, team.scratch);
        const auto choose = [&](Projections& chosen, const OctavoAdapter* const* const* of_experts) {
            chosen.of_row = of_row;
            chosen.stride = Projections::stride_of(of_experts, op.num_experts, adapters);
            chosen.data = reinterpret_cast<float*>(take(rows * chosen.stride * sizeof(float)));
            chosen.choose(of_experts, sorted.starts, op.num_experts, team.scratch);
        };
        choose(piece.of_x, op.gate_up_adapters);
        choose(piece.of_inner, op.down_adapters);
    }
    if (rows) {
        const auto gate_up = [&](int expert) { return piece.gate_up(expert); };
        const auto down = [&](int expert) { return piece.down(expert); };
        fetch_share(sorted, team, gate_up);
        if (tokens.end - tokens.begin == 1 && !op.scales_input && !piece.of_x.adapters) {
            stage_token(piece, team);
        } else {
            stage_x(piece, team);
            team.wait();
        }
        multiply_all(sorted, team, gate_up, [&](int expert) { return piece.staged_x_of(expert); });
        fetch_share(sorted, team, down);
        wait_for_inner(op, step, team);
        stage_inner(piece, team);
        team.wait();
        multiply_all(sorted, team, down, [&](int expert) { return piece.staged_inner_of(expert); });
        team.wait();
    }
    combine(piece, tokens, team);
}

}  // namespace

void run_route(const OctavoRoute& op, const OctavoStep& step, const Team& team) {
    const size_t count = op.num_experts, groups = op.num_groups;
    const RouteScratch scratch = {team.scratch.take<float>(count),  team.scratch.take<float>(count),
                                  team.scratch.take<bool>(count),   team.scratch.take<int>(op.top_k),
                                  team.scratch.take<float>(groups), team.scratch.take<bool>(groups)};
    const Range mine = team.share(rows_of(step, op.rows));
    for (int row = mine.begin; row < mine.end; ++row) {
        const float* logits = static_cast<const float*>(op.x.data) + row * op.x.stride;
        float* out = static_cast<float*>(op.out.data) + row * op.out.stride;
        if (op.scores == kSparseMixer)
            mix_row(op, logits, scratch, out);
        else
            route_row(op, logits, scratch, out);
        if (!op.factors) continue;
        for (int e = 0; e < op.num_experts; ++e) out[e] *= op.factors[e];
    }
}

void run_experts(const OctavoExperts& op, const OctavoStep& step, const Team& team) {
    const Between sizes(op);
    const int at_once = sizes.tokens_at_once(op.top_k);
    with_type(op.type, [&](auto number) {
        for (int first = 0; first < step.num_tokens; first += at_once) {
            const Scratch::Mark mark = team.scratch.mark();
            if (first) wait_for_inner(op, step, team);  // the memory is used again
            run_piece<decltype(number)>(op, step, sizes, {first, std::min(first + at_once, step.num_tokens)}, team);
            team.scratch.release(mark);
        }
    });
}

size_t experts_workspace(const OctavoExperts& op, const OctavoStep& step) {
    const Between sizes(op);
    const size_t tokens = std::min(step.num_tokens, sizes.tokens_at_once(op.top_k));
    constexpr int kParts = 6;
    size_t row_bytes = sizes.row_bytes;
    for (const auto adapters : {op.gate_up_adapters, op.down_adapters})
        row_bytes += static_cast<size_t>(Projections::stride_of(adapters, op.num_experts, step.adapters[kTokens])) *
                     sizeof(float);
    return tokens * op.top_k * row_bytes + kParts * kCacheLine;
}

}  // namespace octavo
