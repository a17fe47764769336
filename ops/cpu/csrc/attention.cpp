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
#include "kv_int4.h"
#include "kv_int8.h"
#include "latent_cache.h"
#include "vec_math.h"

namespace octavo {

namespace {

// With fewer tiles per thread than this, threads share the context of a tile.
constexpr int kTilesPerThread = 4;

// What depends on the kind of cache.
template <class Cache>
struct Kind {
    using Op = OctavoAttention;
    static constexpr bool kIsLatent = false;
    static constexpr int kTileRows = kRows<typename Cache::T>;
    static constexpr int kMostColumns = kMaxHeadDim;
};

template <class T>
struct Kind<LatentCache<T>> {
    using Op = OctavoLatentAttention;
    static constexpr bool kIsLatent = true;
    static constexpr int kTileRows = blocks_of(kLatentRows, kRows<T>) * kRows<T>;
    static constexpr int kMostColumns = kMaxLatentDim;
};

const OctavoAttention& common(const OctavoAttention& op) { return op; }
const OctavoAttention& common(const OctavoLatentAttention& op) { return op.attention; }

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

    // Queries are the last tokens. Where attention is not causal, there may be more: those beyond seq_len attend to
    // others without being attended to.
    int position(int query) const { return std::max(0, seq_len - num_queries) + query; }

    View view(const OctavoAttention& op, int query) const {
        const int end = position(query) + 1;
        if (!op.causal) {
            if (!op.window) return {0, seq_len};
            // Far beyond seq_len, a query sees nothing.
            return {std::min(std::max(0, end - op.window), seq_len), std::min(seq_len, end - 1 + op.window)};
        }
        if (op.chunked) return {(end - 1) / op.window * op.window, end};
        return {op.window && end > op.window ? end - op.window : 0, end};
    }

    // What queries that follow each other see together; a token even if they see nothing.
    View view(const OctavoAttention& op, int first, int last) const {
        const int end = view(op, last).end;
        return {std::min(view(op, first).begin, end - 1), end};
    }
};

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

template <class T>
void write_head(const OctavoAttention&, const LatentCache<T>& cache, const OctavoStep& step, int token, int) {
    cache.write(step, token);
}

// Whether there are fewer runs than `count`.
bool has_fewer_runs(const OctavoGroup& group, int num_tokens, int count) {
    for (int token = 0; token < num_tokens && count > 0; ++token) count -= starts_run(group, token);
    return count > 0;
}

// Threads take whole runs, or heads where there are too few of these, so that a head's part of a block is cleared and
// filled by the same thread.
template <class Cache>
void write_kv(const OctavoAttention& op, const Cache& cache, const OctavoStep& step, const Team& team) {
    const OctavoGroup& group = step.groups[op.group];
    Range mine = team.share(step.num_tokens), heads = {0, op.num_kv_heads};
    if (has_fewer_runs(group, step.num_tokens, team.size)) {
        mine = {0, step.num_tokens};
        heads = team.share(op.num_kv_heads);
    }
    int token = mine.begin;
    while (token < mine.end && !starts_run(group, token)) ++token;
    if (token == mine.end) return;
    for (; token < step.num_tokens && (token < mine.end || !starts_run(group, token)); ++token)
        for (int head = heads.begin; head < heads.end; ++head) write_head(op, cache, step, token, head);
}

// Whether only one tile reads what this step writes of a request and head: the one of all its rows, in the split where
// its context ends, as no token completes a block (only full blocks may be shared). Then the attending thread writes K
// and V itself, with no barrier in between.
bool writes_alone(const OctavoAttention& op, const OctavoGroup& group, int num_tokens, int rows_per_tile) {
    const int most = rows_per_tile / (op.num_heads / op.num_kv_heads);
    if (num_tokens > static_cast<int64_t>(most) * group.num_reqs) return false;
    for (int i = 0; i < group.num_reqs; ++i) {
        const Request request(group, i);
        if (request.num_queries < 1 || request.num_queries > most) return false;
        if (request.position(0) / kSplit != request.position(request.num_queries - 1) / kSplit) return false;
    }
    for (int i = 0; i < num_tokens; ++i)
        if ((group.slot_mapping[i] + 1) % group.block_size == 0) return false;
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
                const View seen = request.view(op, first / group_size, (first + count - 1) / group_size);
                const int splits = (seen.end - 1) / kSplit - seen.begin / kSplit + 1;
                *tiles++ = {index, head, first, count, seen.begin / kSplit, splits, items};
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

// Some units of a request's context.
struct Extent {
    int begin;  // first token
    int units;
};

// The blocks of K and V that a thread will read, in order. They are listed some time before, so that those a fixed
// distance ahead can be prefetched: splits may be short, and what is read by a thread is one long stream.
template <class Stored>
class Upcoming {
public:
    // `most`: blocks that are listed at once.
    Upcoming(int most, Scratch& scratch)
        : capacity_(kTimesMost * most + kBlocksAhead<Stored>), blocks_(scratch.take<const Stored*>(capacity_)) {}

    void clear() { begin_ = end_ = 0; }

    // Whether those ahead of the first `count` blocks are listed.
    bool suffices(int count) const { return end_ - begin_ >= count + kBlocksAhead<Stored>; }

    // Space for `count` blocks at the end.
    const Stored** append(int count) {
        if (end_ + count + kBlocksAhead<Stored> > capacity_) {
            std::copy(blocks_ + begin_, blocks_ + end_, blocks_);
            end_ -= begin_;
            begin_ = 0;
        }
        end_ += count;
        return blocks_ + end_ - count;
    }

    // Takes the first `count` blocks, which kBlocksAhead<Stored> others follow, unless all are listed.
    const Stored* const* take(int count) {
        const Stored** first = blocks_ + begin_;
        if (!suffices(count)) std::fill_n(blocks_ + end_, kBlocksAhead<Stored>, blocks_[end_ - 1]);
        begin_ += count;
        return first;
    }

private:
    static constexpr int kTimesMost = 4;

    const int capacity_;
    const Stored** blocks_;
    int begin_ = 0;
    int end_ = 0;
};

template <class Cache>
class Attention {
public:
    using T = typename Cache::T;
    using Stored = typename Cache::Stored;
    static constexpr bool kIsLatent = Kind<Cache>::kIsLatent;
    static constexpr int kTileRows = Kind<Cache>::kTileRows;

    Attention(const OctavoAttention& op, const OctavoStep& step, Cache& cache, Scratch& scratch)
        : op_(op),
          step_(step),
          group_(step.groups[op.group]),
          cache_(cache),
          scale_(op.scale * op.k_scale),
          group_size_(op.num_heads / op.num_kv_heads),
          key_blocks_(cache.head_dim / kBlock),
          value_blocks_(kIsLatent ? 0 : cache.v_head_dim / kColumns),
          queries_(kTileRows, key_blocks_, scratch),
          scores_(scratch.take<float>(kTileRows * kSplit)),
          weights_(kTileRows, kSplitUnits, scratch),
          sums_(scratch.take<float>(kTileRows * kColumns)) {}

    // Copies the tile's query heads.
    void stage(const Tile& tile) {
        const Request request(group_, tile.request);
        float head[Kind<Cache>::kMostColumns];
        queries_.resize(tile.rows, key_blocks_);
        for (int r = 0; r < tile.rows; ++r) {
            const int row = tile.first_row + r;
            const int token = request.first_token + row / group_size_;
            if constexpr (kIsLatent) {
                cache_.stage_query(step_, token, head_of(tile, r), head);
            } else {
                const int column = head_of(tile, r) * op_.head_dim;
                const int position = op_.q_heads.rotary_dim ? step_.positions[token] : 0;
                prepare_head(static_cast<const T*>(op_.q.data) + token * op_.q.stride + column, op_.head_dim,
                             op_.q_heads, position, cache_.head_dim, head);
            }
            queries_.set(r, head, kBlock);
        }
    }

    // Writes K and V of the tokens of a tile to the cache.
    void write(const Tile& tile) const {
        const Request request(group_, tile.request);
        for (int i = 0; i < request.num_queries; ++i)
            write_head(op_, cache_, step_, request.first_token + i, tile.kv_head);
    }

    // Prefetches where those of the first one will be written.
    void prefetch_place(const Tile& tile) const {
        const int64_t slot = group_.slot_mapping[Request(group_, tile.request).first_token];
        cache_.prefetch_place(slot / cache_.block_size, tile.kv_head, static_cast<int>(slot % cache_.block_size));
    }

    // The part of a split that is visible to a tile.
    Extent extent(const Tile& tile, int split) const {
        const Request request(group_, tile.request);
        const View seen =
            request.view(op_, tile.first_row / group_size_, (tile.first_row + tile.rows - 1) / group_size_);
        const int begin = std::max(split * kSplit, seen.begin / kUnit * kUnit);
        return {begin, blocks_of(std::min((split + 1) * kSplit, seen.end) - begin, kUnit)};
    }

    int blocks_in(const Extent& extent) const { return extent.units * (key_blocks_ + value_blocks_); }

    // Lists the blocks of a tile's K and V as `attend` reads them: K unit by unit, then V of 32 columns after another.
    void list(const Tile& tile, const Extent& extent, const Stored** blocks) const {
        const int32_t* table = group_.block_table + tile.request * group_.block_table_stride;
        [[maybe_unused]] const Stored** values = blocks + extent.units * key_blocks_;
        for (int i = 0; i < extent.units; ++i) {
            const int token = extent.begin + i * kUnit;
            const int64_t block = table[token / cache_.block_size];
            const Stored* key = cache_.keys_of(block, tile.kv_head, token % cache_.block_size);
            for (int j = 0; j < key_blocks_; ++j) *blocks++ = key + j * kBlockElements;
            if constexpr (!kIsLatent) {
                const Stored* value = cache_.values_of(block, tile.kv_head, token % cache_.block_size);
                for (int j = 0; j < value_blocks_; ++j)
                    values[j * extent.units + i] = value + j * Cache::kValueElements;
            }
        }
    }

    // Attention of a staged tile over one split, whose blocks are listed.
    void attend(const Tile& tile, const Extent& extent, const Stored* const* blocks, const Partial& result) {
        const Request request(group_, tile.request);
        if constexpr (Cache::kIsInteger) cache_.read_scales(extent.units, blocks);
        for (int i = 0; i < extent.units; ++i, blocks += key_blocks_) {
            cache_.multiply(queries_, blocks, scores_ + i * tile.rows * kColumns);
            if constexpr (kIsLatent) cache_.transpose_unit(i, blocks);
        }
        weights_.resize(tile.rows, extent.units);
        for (int r = 0; r < tile.rows; ++r) {
            const View view = request.view(op_, (tile.first_row + r) / group_size_);
            const int head = head_of(tile, r);
            const float* biases = nullptr;  // of the first score
            if (op_.biases) {
                const int position = request.position((tile.first_row + r) / group_size_);
                biases = op_.biases + static_cast<int64_t>(2 * head + 1) * op_.bias_reach + extent.begin - position;
            }
            softmax(tile.rows, r, extent.units, view.begin - extent.begin, view.end - extent.begin,
                    op_.slopes ? op_.slopes[head] : 0.0f, biases, result);
        }
        for (int column = 0; column < cache_.v_head_dim; column += kColumns, blocks += extent.units) {
            if constexpr (kIsLatent)
                cache_.multiply_values(weights_, column, sums_);
            else if constexpr (Cache::kHasGroups)
                cache_.multiply_values(scores_, tile.rows, extent.units, column, blocks, weights_, sums_);
            else
                cache_.multiply(weights_, blocks, sums_);
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
            // A sink has its share of the weights, and no value.
            const Vec own = op_.sinks ? exp(splat(op_.sinks[head_of(tile, r)] - sum.largest[r])) : zero();
            const View seen = request.view(op_, row / group_size_);
            const Vec scale = seen.begin < seen.end ? splat(op_.v_scale) / (splat(sum.total[r]) + own) : zero();
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

    static float first_lane(Vec x) {
        float lanes[kLanes];
        store(lanes, x);
        return lanes[0];
    }

    // One row: scores -> weights, with the largest score and the sum of weights. Tokens are numbered from the first
    // score. Each token's distance from the row's own, which is the last visible one, lowers its score by the slope;
    // biases are added.
    void softmax(int rows, int row, int units, int begin, int end, float slope, const float* biases,
                 const Partial& result) {
        const Vec hidden = splat(-kInfinity), lanes = lane_numbers();
        const bool capped = op_.softcap != 0.0f;
        const bool sloped = slope != 0.0f, biased = sloped || biases;
        const Vec scale = splat(capped || biased ? 1.0f : scale_);  // of the scores as stored
        float* scores = scores_ + row * kColumns;
        const int stride = rows * kColumns;
        Vec top = hidden;
        for (int i = 0; i < units * kUnit; i += kLanes) {
            float* place = scores + i / kUnit * stride + i % kUnit;
            Vec x = load(place);
            if constexpr (Cache::kIsInteger) x = x * load(cache_.key_scales() + i);
            const bool partly_hidden = i < begin || i + kLanes > end;
            if (capped) x = tanh(x * splat(scale_) / splat(op_.softcap)) * splat(op_.softcap);
            if (biases) x = fma(x, splat(capped ? 1.0f : scale_), load(biases + i));
            if (sloped) {
                const Vec distance = splat(static_cast<float>(end - 1 - i)) - lanes;
                x = fma(distance, splat(-slope), capped ? x : x * splat(scale_));
            }
            if (partly_hidden) {
                const Vec tokens = lanes + splat(static_cast<float>(i));
                x = select(less(tokens, splat(static_cast<float>(end))), x, hidden);
                x = select(less(tokens, splat(static_cast<float>(begin))), hidden, x);
            }
            if (capped || biased || partly_hidden || Cache::kIsInteger) store(place, x);
            top = max(top, x);
        }
        const float peak = largest(top * scale);
        // e^(scale x - peak) as a power of 2
        constexpr float kLog2E = 1.44269504f;
        const Vec factor = scale * splat(kLog2E);
        const Vec shift = splat(peak == -kInfinity ? 0.0f : -kLog2E * peak);
        Vec total = zero(), others = zero();
        for (int i = 0; i < units; ++i) {
            float* x = scores + i * stride;
            Vec first = exp2_below<kIsBFloat16<T>>(fma(load(x), factor, shift));
            Vec second = exp2_below<kIsBFloat16<T>>(fma(load(x + kLanes), factor, shift));
            total = total + first;
            others = others + second;
            if constexpr (Cache::kHasGroups) {  // which have scales of their own
                store(x, first);
                store(x + kLanes, second);
            } else if constexpr (Cache::kIsInteger) {  // and then to integers
                store(x, first * load(cache_.value_scales() + i * kUnit));
                store(x + kLanes, second * load(cache_.value_scales() + i * kUnit + kLanes));
            } else {
                store(weights_.at(row, i), first);
                store(weights_.at(row, i) + kLanes, second);
            }
        }
        if constexpr (Cache::kIsInteger && !Cache::kHasGroups) weights_.set(row, scores, stride);
        result.largest[row] = peak;
        result.total[row] = sum(total + others);
    }

    const OctavoAttention& op_;
    const OctavoStep& step_;
    const OctavoGroup& group_;
    Cache& cache_;
    const float scale_;  // of the scores, with K as it is stored
    const int group_size_;
    const int key_blocks_;  // of 32 x 32 numbers, in a unit
    const int value_blocks_;
    typename Cache::Rows queries_;
    float* scores_;
    typename Cache::Rows weights_;
    float* sums_;
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
        if (unit == units()) return num_items;
        return partials ? unit : tiles[unit].first_item;
    }
    // The tile of an item, which is `tile` or a later one.
    int tile_of(int item, int tile) const {
        while (tile + 1 < num_tiles && tiles[tile + 1].first_item <= item) ++tile;
        return tile;
    }
};

// A thread's way through items, most of which follow each other.
template <class Cache>
class Walk {
public:
    Walk(Attention<Cache>& kernel, const Work& work, int blocks_of_split, Scratch& scratch)
        : kernel_(kernel),
          work_(work),
          upcoming_(blocks_of_split, scratch),
          sum_(scratch.take<float>(work.partial_floats), kTileRows),
          part_(scratch.take<float>(work.partial_floats), kTileRows) {}

    // Attends to some items. Those that follow them before `end` are prefetched.
    void attend(Range items, int end) {
        if (items.begin != next_) {
            upcoming_.clear();
            listed_ = items.begin;
            listed_tile_ = tile_ = work_.tile_of(items.begin, 0);
        }
        for (int item = items.begin; item < items.end; ++item) attend_item(item, end);
        next_ = items.end;
    }

private:
    static constexpr int kTileRows = Kind<Cache>::kTileRows;

    void attend_item(int item, int end) {
        tile_ = work_.tile_of(item, tile_);
        const Tile& tile = work_.tiles[tile_];
        const int split = item - tile.first_item;
        const bool is_last = split == tile.num_splits - 1;
        const Extent extent = kernel_.extent(tile, tile.first_split + split);
        const int count = kernel_.blocks_in(extent);
        while (listed_ < end && !upcoming_.suffices(count)) list(listed_++);
        if (staged_ != tile_) kernel_.stage(tile);
        staged_ = tile_;
        if (work_.writes_alone && is_last) kernel_.write(tile);
        const auto* blocks = upcoming_.take(count);
        if (work_.partials) {
            kernel_.attend(tile, extent, blocks, work_.partial(item, kTileRows));
            return;
        }
        kernel_.attend(tile, extent, blocks, split == 0 ? sum_ : part_);
        if (split > 0) kernel_.merge(tile.rows, sum_, part_);
        if (is_last) kernel_.finish(tile, sum_);
    }

    void list(int item) {
        listed_tile_ = work_.tile_of(item, listed_tile_);
        const Tile& tile = work_.tiles[listed_tile_];
        const int split = item - tile.first_item;
        const Extent extent = kernel_.extent(tile, tile.first_split + split);
        kernel_.list(tile, extent, upcoming_.append(kernel_.blocks_in(extent)));
        if (work_.writes_alone && split == tile.num_splits - 1) kernel_.prefetch_place(tile);
    }

    Attention<Cache>& kernel_;
    const Work& work_;
    Upcoming<typename Cache::Stored> upcoming_;
    const Partial sum_;
    const Partial part_;
    int next_ = -1;    // item
    int tile_ = 0;     // of the item
    int staged_ = -1;  // tile
    int listed_ = 0;   // items before it are listed
    int listed_tile_ = 0;
};

template <class Cache>
void attention(const typename Kind<Cache>::Op& whole, const OctavoStep& step, const Team& team) {
    constexpr int kTileRows = Kind<Cache>::kTileRows;
    const OctavoAttention& op = common(whole);
    const OctavoGroup& group = step.groups[op.group];
    Cache cache(whole, group.block_size, team.scratch);
    Work work;
    work.writes_alone = op.k.data && writes_alone(op, group, step.num_tokens, kTileRows);
    const bool writes_first = op.k.data && !work.writes_alone;
    if (writes_first) write_kv(op, cache, step, team);
    work.num_tiles = count_tiles(op, group, kTileRows);
    Tile* tiles = team.scratch.take<Tile>(work.num_tiles);
    work.num_items = list_tiles(op, group, kTileRows, tiles);
    work.tiles = tiles;
    work.partial_floats = Partial::floats(kTileRows, cache.v_head_dim);
    const bool shared = shares_context(work.num_tiles, work.num_items, team.size);
    work.partials = shared ? reinterpret_cast<float*>(team.shared.workspace) : nullptr;
    Attention<Cache> kernel(op, step, cache, team.scratch);
    Walk<Cache> walk(kernel, work, kSplitUnits * (cache.head_dim + cache.v_head_dim) / kBlock, team.scratch);
    if (writes_first) team.wait();  // for all K and V of the step
    team.each(work.units(), team.size, [&](int unit, int end) {
        walk.attend({work.first_item(unit), work.first_item(unit + 1)}, work.first_item(end));
    });
    if (!shared) return;

    team.wait();
    const Range mine = team.share(work.num_tiles);
    for (int i = mine.begin; i < mine.end; ++i) {
        const Tile& tile = tiles[i];
        const Partial first = work.partial(tile.first_item, kTileRows);
        for (int s = 1; s < tile.num_splits; ++s)
            kernel.merge(tile.rows, first, work.partial(tile.first_item + s, kTileRows));
        kernel.finish(tile, first);
    }
}

size_t workspace(const OctavoAttention& op, const OctavoGroup& group, int threads, int rows_per_tile) {
    const int tiles = count_tiles(op, group, rows_per_tile);
    int longest = 0;
    for (int i = 0; i < group.num_reqs; ++i) longest = std::max(longest, static_cast<int>(group.seq_lens[i]));
    const int items = tiles * blocks_of(longest, kSplit);  // or fewer
    if (!shares_context(tiles, items, threads)) return 0;
    return items * Partial::floats(rows_per_tile, blocks_of(op.v_head_dim, kBlock) * kBlock) * sizeof(float);
}

}  // namespace

void run_attention(const OctavoAttention& op, const OctavoStep& step, const Team& team) {
    with_type(op.type, [&](auto number) {
        using T = decltype(number);
        if (op.cache == kPlainCache)
            attention<KVCache<T>>(op, step, team);
        else if (op.cache == kInt8Cache)
            attention<Int8Cache<T>>(op, step, team);
        else if (op.cache == kInt4Cache)
            attention<Int4Cache<T>>(op, step, team);
        else
            attention<CodedCache<T>>(op, step, team);
    });
}

size_t attention_workspace(const OctavoAttention& op, const OctavoStep& step, int threads) {
    return with_type(
        op.type, [&](auto number) { return workspace(op, step.groups[op.group], threads, kRows<decltype(number)>); });
}

void run_latent_attention(const OctavoLatentAttention& op, const OctavoStep& step, const Team& team) {
    with_type(op.attention.type, [&](auto number) { attention<LatentCache<decltype(number)>>(op, step, team); });
}

size_t latent_attention_workspace(const OctavoLatentAttention& op, const OctavoStep& step, int threads) {
    return with_type(op.attention.type, [&](auto number) {
        constexpr int kTileRows = Kind<LatentCache<decltype(number)>>::kTileRows;
        return workspace(op.attention, step.groups[op.attention.group], threads, kTileRows);
    });
}

}  // namespace octavo
