// Attention over the paged KV cache (Kwon et al., arXiv:2309.06180), for prefill and decode alike.
//
// The rows of one product are the query heads that share a KV head, for some consecutive tokens of a request. The
// context is split at multiples of kSplit tokens from its start: each split has its own softmax, and splits are merged
// in order (as in Flash-Decoding). So results do not depend on which rows are computed together, which tokens of a
// request are in the step, or how many threads process its context. Tokens that a row must not see have weight exactly
// zero.
#include <climits>

#include "heads.h"
#include "kernels.h"
#include "kv_cache.h"
#include "kv_codes.h"
#include "vec_math.h"

namespace octavo {

namespace {

// With fewer tiles per thread than this, threads share the context of a tile.
constexpr int kTilesPerThread = 4;

// Tiles (or splits) are handed out in runs, so that the K of the next one can be prefetched and threads slowed down by
// other programs take fewer runs.
constexpr int kRunsPerThread = 8;
constexpr int kMostUnits = 4;  // per run

// ---------------------------------------------------------------------------------------------------------------------
// Writing K and V

// Whether a token's slot does not follow the previous token's: a new block, or another request.
bool starts_run(const OctavoGroup& group, int token) {
    const int64_t slot = group.slot_mapping[token];
    return token == 0 || slot % group.block_size == 0 || slot != group.slot_mapping[token - 1] + 1;
}

template <class Cache, class T = typename Cache::T>
void write_head(const OctavoAttention& op, const Cache& cache, const OctavoStep& step, int token, int head) {
    const int64_t slot = step.groups[op.group].slot_mapping[token];
    const T* k = static_cast<const T*>(op.k.data) + token * op.k.stride + head * op.head_dim;
    const T* v = static_cast<const T*>(op.v.data) + token * op.v.stride + head * op.v_head_dim;
    T key[kMaxHeadDim];
    if (op.k_heads.has_norm || op.k_heads.rotary_dim) {
        float numbers[kMaxHeadDim];
        const int position = op.k_heads.rotary_dim ? step.positions[token] : 0;
        prepare_head(k, op.head_dim, op.k_heads, position, op.head_dim, numbers);
        for (int i = 0; i < op.head_dim; i += kLanes) store(key + i, load(numbers + i));
        k = key;
    }
    const int place = static_cast<int>(slot % cache.block_size);
    cache.write(slot / cache.block_size, head, place, k, op.head_dim, v, op.v_head_dim);
}

// Threads take whole runs, so that a block is cleared and filled by the same thread.
template <class Cache>
void write_kv(const OctavoAttention& op, const Cache& cache, const OctavoStep& step, const Team& team) {
    const OctavoGroup& group = step.groups[op.group];
    const Range mine = team.share(step.num_tokens);
    int token = mine.begin;
    while (token < mine.end && !starts_run(group, token)) ++token;
    if (token == mine.end) return;
    for (; token < step.num_tokens && (token < mine.end || !starts_run(group, token)); ++token)
        for (int head = 0; head < op.num_kv_heads; ++head) write_head(op, cache, step, token, head);
}

// Whether only the token's own request and head read what this step writes: each request has one token and none
// completes a block (only full blocks may be shared). Then the attending thread writes K and V itself, with no barrier
// in between.
template <class T>
bool writes_alone(const OctavoAttention& op, const OctavoGroup& group, int num_tokens) {
    if (num_tokens != group.num_reqs || op.num_heads / op.num_kv_heads > kRows<T>) return false;
    for (int i = 0; i < num_tokens; ++i)
        if (group.query_start_loc[i] != i || (group.slot_mapping[i] + 1) % group.block_size == 0) return false;
    return true;
}

// ---------------------------------------------------------------------------------------------------------------------
// Attending

// Consecutive rows of one request and KV head. Row r is query r / group_size, head r % group_size of those that share
// the KV head.
struct Tile {
    int request;
    int kv_head;
    int first_row;
    int rows;
    int first_split;
    int num_splits;
    int first_item;  // number of splits in all earlier tiles
};

// The tokens that a row sees: begin .. end - 1.
struct View {
    int begin;
    int end;
};

struct Request {
    int first_token;
    int num_queries;
    int seq_len;

    Request(const OctavoGroup& group, int index)
        : first_token(group.query_start_loc[index]),
          num_queries(group.query_start_loc[index + 1] - first_token),
          seq_len(group.seq_lens[index]) {}

    int position(int query) const { return seq_len - num_queries + query; }

    View view(const OctavoAttention& op, int query) const {
        if (!op.causal) return {0, seq_len};
        const int end = position(query) + 1;
        return {op.window && end > op.window ? end - op.window : 0, end};
    }
};

int count_tiles(const OctavoAttention& op, const OctavoGroup& group, int rows_per_tile) {
    const int group_size = op.num_heads / op.num_kv_heads;
    int count = 0;
    for (int i = 0; i < group.num_reqs; ++i)
        count += blocks_of(Request(group, i).num_queries * group_size, rows_per_tile);
    return count * op.num_kv_heads;
}

// Fills in the tiles, within a request those with the longest context first; returns the number of splits.
int list_tiles(const OctavoAttention& op, const OctavoGroup& group, int rows_per_tile, Tile* tiles) {
    const int group_size = op.num_heads / op.num_kv_heads;
    int items = 0;
    for (int index = 0; index < group.num_reqs; ++index) {
        const Request request(group, index);
        const int rows = request.num_queries * group_size;
        for (int head = 0; head < op.num_kv_heads; ++head) {
            for (int i = blocks_of(rows, rows_per_tile) - 1; i >= 0; --i) {
                const int first = i * rows_per_tile;
                const int count = std::min(rows_per_tile, rows - first);
                const int begin = request.view(op, first / group_size).begin;
                const int end = request.view(op, (first + count - 1) / group_size).end;
                const int splits = (end - 1) / kSplit - begin / kSplit + 1;
                *tiles++ = {index, head, first, count, begin / kSplit, splits, items};
                items += splits;
            }
        }
    }
    return items;
}

// Partial softmax of some rows over a part of the context: sums of exp(score - largest), plain and weighted by V.
struct Partial {
    float* largest;  // [rows]; minus infinity: the row sees nothing here
    float* total;    // [rows]
    float* out;      // [rows][v_head_dim, padded]

    static size_t floats(int rows, int v_head_dim) { return static_cast<size_t>(rows) * (v_head_dim + 2); }
    Partial(float* memory, int rows) : largest(memory), total(memory + rows), out(memory + 2 * rows) {}
};

// K and V of a part of a tile's context, unit by unit.
template <class Cache>
struct Context {
    int begin = 0;  // first token
    int units = 0;
    const typename Cache::Stored* keys[kSplitUnits];
    const typename Cache::Stored* values[kSplitUnits];
};

template <class Cache>
class Attention {
public:
    using T = typename Cache::T;
    using Factor = Left<typename Cache::Number>;

    Attention(const OctavoAttention& op, const OctavoStep& step, Cache& cache, Scratch& scratch)
        : op_(op),
          step_(step),
          group_(step.groups[op.group]),
          cache_(cache),
          group_size_(op.num_heads / op.num_kv_heads),
          queries_(scratch.take<LeftOf<T>>(kRows<T> * cache.head_dim)),
          scores_(scratch.take<float>(kRows<T> * kSplit)),
          weights_(scratch.take<LeftOf<T>>(kRows<T> * kSplit)),
          sums_(scratch.take<float>(kRows<T> * kColumns)) {}

    // Copies the tile's query heads into [head_dim / 32][rows][32].
    void stage(const Tile& tile) {
        const Request request(group_, tile.request);
        float head[kMaxHeadDim];
        for (int r = 0; r < tile.rows; ++r) {
            const int row = tile.first_row + r;
            const int token = request.first_token + row / group_size_;
            const int column = head_of(tile, r) * op_.head_dim;
            const int position = op_.q_heads.rotary_dim ? step_.positions[token] : 0;
            prepare_head(static_cast<const T*>(op_.q.data) + token * op_.q.stride + column, op_.head_dim, op_.q_heads,
                         position, cache_.head_dim, head);
            for (int i = 0; i < cache_.head_dim; i += kLanes)
                store(queries_ + (i / kBlock * tile.rows + r) * kBlock + i % kBlock, load(head + i));
        }
    }

    // Writes K and V of a tile's single token to the cache.
    void write(const Tile& tile) const {
        write_head(op_, cache_, step_, Request(group_, tile.request).first_token, tile.kv_head);
    }

    // Locates the K and V of a split that are visible to a tile.
    void locate(const Tile& tile, int split, Context<Cache>& context) const {
        const Request request(group_, tile.request);
        const View first = request.view(op_, tile.first_row / group_size_);
        const View last = request.view(op_, (tile.first_row + tile.rows - 1) / group_size_);
        context.begin = std::max(split * kSplit, first.begin / kUnit * kUnit);
        const int end = std::min((split + 1) * kSplit, last.end);
        context.units = blocks_of(end - context.begin, kUnit);
        const int32_t* table = group_.block_table + tile.request * group_.block_table_stride;
        for (int i = 0; i < context.units; ++i) {
            const int token = context.begin + i * kUnit;
            const int64_t block = table[token / cache_.block_size];
            context.keys[i] = cache_.keys_of(block, tile.kv_head, token % cache_.block_size);
            context.values[i] = cache_.values_of(block, tile.kv_head, token % cache_.block_size);
        }
    }

    // Attention of a staged tile over one split, while the keys of the next split are prefetched.
    void attend(const Tile& tile, const Context<Cache>& context, const Context<Cache>& next, const Partial& result) {
        const Request request(group_, tile.request);
        const int64_t block = static_cast<int64_t>(tile.rows) * kBlock;
        const Factor queries = {queries_, kBlock, block};
        for (int i = 0; i < context.units; ++i)
            dot(tile.rows, queries, cache_.scores_of(context.keys[i], context.values[i]), cache_.head_dim / kBlock,
                scores_ + i * tile.rows * kColumns);
        if constexpr (Cache::kHasScales) scaled_ = cache_.read_scales(context.units, context.keys, context.values);
        for (int r = 0; r < tile.rows; ++r) {
            const View view = request.view(op_, (tile.first_row + r) / group_size_);
            softmax(tile.rows, r, context.units, view.begin - context.begin, view.end - context.begin,
                    op_.slopes ? op_.slopes[head_of(tile, r)] : 0.0f, result);
        }
        const Factor weights = {weights_, kBlock, block};
        for (int column = 0; column < cache_.v_head_dim; column += kColumns) {
            dot(tile.rows, weights,
                cache_.sum_of(column / kColumns, context.units, context.values, next.units, next.keys), context.units,
                sums_);
            for (int r = 0; r < tile.rows; ++r)
                for (int i = 0; i < kColumns; i += kLanes)
                    store(result.out + r * cache_.v_head_dim + column + i, load(sums_ + r * kColumns + i));
        }
    }

    // Merges a later part of the context into an earlier one.
    void merge(int rows, const Partial& sum, const Partial& part) {
        const int width = cache_.v_head_dim;
        for (int r = 0; r < rows; ++r) {
            if (part.largest[r] == -kInfinity) continue;
            float* out = sum.out + r * width;
            const float* more = part.out + r * width;
            const bool first = sum.largest[r] == -kInfinity;
            const float largest = std::max(sum.largest[r], part.largest[r]);
            const Vec old_scale = first ? zero() : exp(splat(sum.largest[r] - largest));
            const Vec new_scale = exp(splat(part.largest[r] - largest));
            sum.largest[r] = largest;
            sum.total[r] = first_lane(splat(sum.total[r]) * old_scale + splat(part.total[r]) * new_scale);
            for (int i = 0; i < width; i += kLanes)
                store(out + i, load(out + i) * old_scale + load(more + i) * new_scale);
        }
    }

    void finish(const Tile& tile, const Partial& sum) {
        const Request request(group_, tile.request);
        for (int r = 0; r < tile.rows; ++r) {
            const int row = tile.first_row + r;
            const int64_t token = request.first_token + row / group_size_;
            const int column = head_of(tile, r) * op_.v_head_dim;
            T* target = static_cast<T*>(op_.out.data) + token * op_.out.stride + column;
            const Vec scale = splat(1.0f) / splat(sum.total[r]);
            const float* out = sum.out + r * cache_.v_head_dim;
            // Adding zero turns minus zero into zero: its sign could depend on invisible tokens.
            for (int i = 0; i < op_.v_head_dim; i += kLanes)
                store_first(target + i, load(out + i) * scale + zero(), op_.v_head_dim - i);
        }
    }

private:
    // The query head of a tile's row.
    int head_of(const Tile& tile, int row) const {
        return tile.kv_head * group_size_ + (tile.first_row + row) % group_size_;
    }

    // Whether the tokens of K and V have scales.
    bool is_scaled() const { return Cache::kHasScales && scaled_; }

    static float first_lane(Vec x) {
        float lanes[kLanes];
        store(lanes, x);
        return lanes[0];
    }

    // One row: scores -> weights, with the largest score and the sum of weights. Tokens are numbered from the first
    // score. Each token's distance from the row's own, which is the last visible one, lowers its score by the slope.
    void softmax(int rows, int row, int units, int begin, int end, float slope, const Partial& result) {
        const Vec hidden = splat(-kInfinity), lanes = lane_numbers();
        const bool capped = op_.softcap != 0.0f;
        const bool biased = slope != 0.0f;
        const Vec scale = splat(capped || biased ? 1.0f : op_.scale);  // of the scores as stored
        float* scores = scores_ + row * kColumns;
        const int stride = rows * kColumns;
        const bool scaled = is_scaled();
        Vec top = hidden;
        for (int i = 0; i < units * kUnit; i += kLanes) {
            float* place = scores + i / kUnit * stride + i % kUnit;
            Vec x = load(place);
            if constexpr (Cache::kHasScales)
                if (scaled) x = x * load(cache_.key_scales() + i);
            const bool partly_hidden = i < begin || i + kLanes > end;
            if (capped) x = tanh(x * splat(op_.scale) / splat(op_.softcap)) * splat(op_.softcap);
            if (biased) {
                const Vec distance = splat(static_cast<float>(end - 1 - i)) - lanes;
                x = fma(distance, splat(-slope), capped ? x : x * splat(op_.scale));
            }
            if (partly_hidden) {
                const Vec tokens = lanes + splat(static_cast<float>(i));
                x = select(less(tokens, splat(static_cast<float>(end))), x, hidden);
                x = select(less(tokens, splat(static_cast<float>(begin))), hidden, x);
            }
            if (capped || biased || partly_hidden || scaled) store(place, x);
            top = max(top, x);
        }
        const float peak = largest(top * scale);
        // e^(scale x - peak) as a power of 2
        constexpr float kLog2E = 1.44269504f;
        const Vec factor = scale * splat(kLog2E);
        const Vec shift = splat(peak == -kInfinity ? 0.0f : -kLog2E * peak);
        Vec total = zero(), others = zero();
        for (int i = 0; i < units; ++i) {
            const float* x = scores + i * stride;
            LeftOf<T>* y = weights_ + i * stride + row * kColumns;
            Vec first = exp2_below<kIsBFloat16<T>>(fma(load(x), factor, shift));
            Vec second = exp2_below<kIsBFloat16<T>>(fma(load(x + kLanes), factor, shift));
            total = total + first;
            others = others + second;
            if constexpr (Cache::kHasScales) {
                if (is_scaled()) {
                    first = first * load(cache_.value_scales() + i * kUnit);
                    second = second * load(cache_.value_scales() + i * kUnit + kLanes);
                }
            }
            store(y, first);
            store(y + kLanes, second);
        }
        result.largest[row] = peak;
        result.total[row] = sum(total + others);
    }

    const OctavoAttention& op_;
    const OctavoStep& step_;
    const OctavoGroup& group_;
    Cache& cache_;
    const int group_size_;
    LeftOf<T>* queries_;
    float* scores_;
    LeftOf<T>* weights_;
    float* sums_;
    bool scaled_ = false;
};

bool shares_context(int tiles, int items, int threads) {
    return threads > 1 && tiles < kTilesPerThread * threads && items > tiles;
}

// The tiles of a step. An item is one split of one tile; items are numbered across all tiles.
struct Work {
    const Tile* tiles;
    int num_tiles;
    int num_items;
    float* partials;  // by item, when threads share the items of a tile; null: a thread takes whole tiles
    size_t partial_floats;
    bool writes_alone;  // K and V of this step are not in the cache yet

    Partial partial(int item, int rows) const { return {partials + item * partial_floats, rows}; }
    // Units of work to hand out: tiles or items.
    int units() const { return partials ? num_items : num_tiles; }
    int first_item(int unit) const {
        if (unit >= units()) return num_items;
        return partials ? unit : tiles[unit].first_item;
    }
    // The tile of an item, which is `tile` or a later one.
    int tile_of(int item, int tile) const {
        while (tile + 1 < num_tiles && tiles[tile + 1].first_item <= item) ++tile;
        return tile;
    }
};

// Some consecutive items; the keys of the next are prefetched while one is computed.
template <class Cache>
void attend_items(Attention<Cache>& kernel, const Work& work, Range items, const Partial& sum, const Partial& part) {
    Context<Cache> contexts[2];
    const auto locate = [&](int item, int tile) {
        const Tile& t = work.tiles[tile];
        if (item < items.end) kernel.locate(t, t.first_split + item - t.first_item, contexts[item % 2]);
        if (item == items.end) contexts[item % 2].units = 0;
        return tile;
    };
    int staged = -1;
    int current = locate(items.begin, work.tile_of(items.begin, 0));
    for (int item = items.begin; item < items.end; ++item) {
        const Tile& tile = work.tiles[current];
        if (staged != current) kernel.stage(tile);
        staged = current;
        const int next = locate(item + 1, work.tile_of(item + 1, current));
        const Context<Cache>& here = contexts[item % 2];
        const Context<Cache>& there = contexts[(item + 1) % 2];
        const int split = item - tile.first_item;
        if (work.writes_alone && split == tile.num_splits - 1) kernel.write(tile);
        if (work.partials) {
            kernel.attend(tile, here, there, work.partial(item, kRows<typename Cache::T>));
        } else {
            kernel.attend(tile, here, there, split == 0 ? sum : part);
            if (split > 0) kernel.merge(tile.rows, sum, part);
            if (split == tile.num_splits - 1) kernel.finish(tile, sum);
        }
        current = next;
    }
}

template <class Cache, class T = typename Cache::T>
void attention(const OctavoAttention& op, const OctavoStep& step, const Team& team) {
    const OctavoGroup& group = step.groups[op.group];
    Cache cache(op, group.block_size, team.scratch);
    Work work;
    work.writes_alone = op.k.data && writes_alone<T>(op, group, step.num_tokens);
    const bool writes_first = op.k.data && !work.writes_alone;
    if (writes_first) write_kv(op, cache, step, team);
    work.num_tiles = count_tiles(op, group, kRows<T>);
    Tile* tiles = team.scratch.take<Tile>(work.num_tiles);
    work.num_items = list_tiles(op, group, kRows<T>, tiles);
    work.tiles = tiles;
    work.partial_floats = Partial::floats(kRows<T>, cache.v_head_dim);
    const bool shared = shares_context(work.num_tiles, work.num_items, team.size);
    work.partials = shared ? reinterpret_cast<float*>(team.shared.workspace) : nullptr;
    Attention<Cache> kernel(op, step, cache, team.scratch);
    const Partial sum(team.scratch.take<float>(work.partial_floats), kRows<T>);
    const Partial part(team.scratch.take<float>(work.partial_floats), kRows<T>);
    if (writes_first) team.wait();  // for all K and V of the step

    const int run = std::min(kMostUnits, std::max(1, work.units() / (kRunsPerThread * team.size)));
    for (int unit = team.ticket() * run; unit < work.units(); unit = team.ticket() * run)
        attend_items(kernel, work, {work.first_item(unit), work.first_item(unit + run)}, sum, part);
    if (!shared) return;

    team.wait();
    const Range mine = team.share(work.num_tiles);
    for (int i = mine.begin; i < mine.end; ++i) {
        const Tile& tile = tiles[i];
        const Partial first = work.partial(tile.first_item, kRows<T>);
        for (int s = 1; s < tile.num_splits; ++s)
            kernel.merge(tile.rows, first, work.partial(tile.first_item + s, kRows<T>));
        kernel.finish(tile, first);
    }
}

template <class T>
size_t workspace(const OctavoAttention& op, const OctavoGroup& group, int threads) {
    const int tiles = count_tiles(op, group, kRows<T>);
    int longest = 0;
    for (int i = 0; i < group.num_reqs; ++i) longest = std::max(longest, static_cast<int>(group.seq_lens[i]));
    const int items = tiles * blocks_of(longest, kSplit);  // or fewer
    if (!shares_context(tiles, items, threads)) return 0;
    return items * Partial::floats(kRows<T>, blocks_of(op.v_head_dim, kBlock) * kBlock) * sizeof(float);
}

}  // namespace

void run_attention(const OctavoAttention& op, const OctavoStep& step, const Team& team) {
    with_type(op.type, [&](auto number) {
        using T = decltype(number);
        if (op.cache == kPlainCache)
            attention<KVCache<T>>(op, step, team);
        else
            attention<CodedCache<T>>(op, step, team);
    });
}

size_t attention_workspace(const OctavoAttention& op, const OctavoStep& step, int threads) {
    return with_type(op.type,
                     [&](auto number) { return workspace<decltype(number)>(op, step.groups[op.group], threads); });
}

}  // namespace octavo
