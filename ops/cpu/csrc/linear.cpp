// Linear layers: out = x W^T, with the epilogue applied while the results are in registers.
#include "linear.h"

#include "panel.h"

namespace octavo {

namespace {

// Weights that stay in the L2 cache while all rows pass by. With many rows: as many as fit beside those being
// prefetched. With few rows: fewer, since the first chunk is not prefetched.
constexpr int64_t kChunkBytes = 256 << 10;
constexpr int64_t kChunkBytesPerTile = 32 << 10;

// Rows that stay in the L2 cache while panels of weights pass by.
constexpr int64_t kRowBytesPerGroup = 512 << 10;
constexpr int64_t kMinTilesPerGroup = 8;

// From this many tiles for each thread on, threads divide rows instead of weights.
constexpr int kTilesOfOwn = 8;

// With fewer tiles than this, converting weights for each costs less than a panel. AVX2 converts a vector of bfloat16
// in one instruction, on ports that products leave idle: that costs less however many tiles there are.
template <class T>
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int kMinTilesPerPanel = kIsBFloat16<T> ? std::numeric_limits<int>::max() : 3;
#else
constexpr int kMinTilesPerPanel = 3;
#endif

// Blocks of k of 32 columns that fewer tiles pass by at a time: they stay in the L1 cache.
#if defined(__AVX512F__)
constexpr int kBlocksOfFewTiles = 4;
#else
constexpr int kBlocksOfFewTiles = 8;
#endif

// How far ahead a long stream of weights is prefetched, on AMD's CPUs and on others.
constexpr int64_t kFetchAheadBytes = 16384;
constexpr int64_t kFetchAheadBytesOfOthers = 8192;

// Up to this many rows, the loads of weights follow each other closely.
template <class T>
constexpr int kRowsReadByHardware = kMultipliesFloat<T> ? 2 : 5;

// Prefetches a long stream of weights.
template <class T>
Fetch fetch_ahead(uintptr_t block, int rows) {
    if (rows <= kRowsReadByHardware<T> && is_amd()) return {block, 0};  // what is there already
    return {block + (is_amd() ? kFetchAheadBytes : kFetchAheadBytesOfOthers), kCacheLineBytes};
}

// The part of the next block to prefetch during one of the products that read the current block.
Fetch part_of(uintptr_t block, int64_t bytes, int part, int parts) {
    const int64_t step = blocks_of(kCacheLineBytes, parts);
    const int64_t offset = part * step * (bytes / kCacheLineBytes);
    if (offset >= bytes) return {};
    return {block + offset, step};
}

// Most tiles that share the prefetches of a stream's next weights. Memory is idle while a tile prefetches nothing: two
// that share are 5 to 10% faster on Intel's CPUs, and with AVX2 on AMD's too, where products take as long as memory.
#if defined(__AVX512F__)
inline int most_tiles_that_share() { return is_amd() ? 1 : 2; }
#else
inline int most_tiles_that_share() { return is_amd() ? 3 : 2; }
#endif

// The part of a stream's next weights to prefetch during one tile's products: shared, or all during the last ones.
Fetch fetch_during(uintptr_t next, int64_t bytes, int tile, int tiles) {
    if (tiles <= most_tiles_that_share()) return part_of(next, bytes, tile, tiles);
    return tile + 1 < tiles ? Fetch{} : Fetch{next, kCacheLineBytes};
}

// Whether a chunk of weights was prefetched, and whether the next one is to be.
struct Prefetched {
    bool is_here;
    bool fetches_next;
};

// Products of some tiles with a chunk of weights: some blocks of 32 columns.
template <class T>
void multiply_chunk(const OctavoLinear& op, const PackedShape& shape, const Rows<T>& rows, const Range& tiles,
                    const Range& blocks, const Prefetched& prefetched, float* sums) {
    const T* weight = static_cast<const T*>(op.weight.data);
    const int64_t block_bytes = shape.block_stride() * static_cast<int64_t>(sizeof(T));
    const int num_tiles = tiles.end - tiles.begin, chunk = blocks.end - blocks.begin;
    for (int tile = tiles.begin; tile < tiles.end; ++tile) {
        const int begin = rows.tiles.begin(tile);
        const int count = rows.tiles.begin(tile + 1) - begin;
        const Left<T> left = rows.tile(begin, count);
        for (int block = blocks.begin; block < blocks.end; ++block) {
            Fetch fetch;
            if (num_tiles == 1 || (tile == tiles.begin && !prefetched.is_here))
                fetch = fetch_ahead<T>(address_of(weight) + block * block_bytes, count);
            else if (prefetched.fetches_next && block + chunk < shape.row_blocks())
                fetch = part_of(address_of(weight) + (block + chunk) * block_bytes, block_bytes, tile - tiles.begin,
                                num_tiles);
            Right<T> right = packed_block(weight, shape, block, fetch);
            right.is_cached = num_tiles > 1;
            dot(count, left, right, shape.column_blocks(), sums);
            finish<T>(op, Columns::of(shape, block), begin, count, sums);
        }
    }
}

// Weights stay in the L2 cache, a chunk at a time, while all rows pass by.
template <class T>
void multiply_chunks(const OctavoLinear& op, const PackedShape& shape, const Rows<T>& rows, const Grid& grid,
                     const Team& team) {
    alignas(kCacheLine) float sums[kMostRows * kColumns];
    const int64_t block_bytes = shape.block_stride() * static_cast<int64_t>(sizeof(T));
    const int row_blocks = shape.row_blocks();
    const int num_tiles = grid.tiles.end - grid.tiles.begin;
    const int64_t chunk_bytes = std::min(kChunkBytes, kChunkBytesPerTile * num_tiles);
    const int chunk = static_cast<int>(std::max<int64_t>(1, chunk_bytes / block_bytes));
    int fetched = -1;  // the chunk that was prefetched
    team.each(blocks_of(row_blocks, chunk), grid.parts, [&](int number, int end) {
        const Range blocks = {number * chunk, std::min((number + 1) * chunk, row_blocks)};
        const Prefetched state = {fetched == number, number + 1 < end};
        multiply_chunk(op, shape, rows, grid.tiles, blocks, state, sums);
        fetched = number + 1 < end ? number + 1 : -1;
    });
}

// A tile of rows, and where its sums are.
template <class T>
struct TileSums {
    int begin;
    int count;
    Left<T> left;
    float* sums;
};

// Adds the products of few tiles with blocks of k of 32 columns.
//
// While they are computed, the same amount of weights after these is prefetched: weights are one long stream.
template <class T>
void add_products(const TileSums<T>* tiles, int num_tiles, Right<T> right, int k, int blocks) {
    right.data += k * right.block;
    const int64_t bytes = blocks * kBlockElements * static_cast<int64_t>(sizeof(T));
    for (int i = 0; i < num_tiles; ++i) {
        Left<T> left = tiles[i].left;
        left.data += k * left.block;
        right.fetch = fetch_during(address_of(right.data) + bytes, bytes, i, num_tiles);
        add_dot(tiles[i].count, left, right, blocks, k == 0, tiles[i].sums);
    }
}

// A panel of weights, and where the next one begins.
template <class T>
struct PanelOfWeights {
    Right<T> right;    // of its first block of columns
    int width;         // blocks of columns
    int64_t distance;  // from one to the next, in elements
    int k;             // first block of k
    int blocks;
    const T* next;
};

// Adds the products of many tiles with a panel. While they are computed, the next one is prefetched likewise: half
// of the tiles see to each of its blocks of columns.
template <class T>
void add_panel(const TileSums<T>* tiles, int num_tiles, int64_t sums_distance, const PanelOfWeights<T>& weights,
               float* buffer) {
    const int width = weights.width, k = weights.k;
    Right<T> right = weights.right;
    right.data += k * right.block;
    const int64_t bytes = weights.blocks * kBlockElements * static_cast<int64_t>(sizeof(T));
    const int64_t tiles_each = num_tiles / width;
    const int64_t lines = tiles_each * kPanelsPerBlock * fetches_of_panel(tiles[0].count, width, weights.blocks);
    const int64_t step = (bytes + lines - 1) / lines;
    Fetch fetch = {address_of(weights.next), step};
    for (int part = 0; part < kPanelsPerBlock; ++part) {
        const Panel panel = make_panel(right, width, weights.distance, weights.blocks, part, buffer);
        for (int i = 0; i < num_tiles; ++i) {
            const TileSums<T>& tile = tiles[i];
            const TileSums<T>& after = tiles[i + 1 < num_tiles ? i + 1 : 0];
            if (width > 1 && i == tiles_each) fetch.first = address_of(weights.next + weights.distance);
            dot_panel(tile.count, width, {tile.left.data + k * tile.left.block, tile.left.row, tile.left.block}, panel,
                      weights.blocks, k == 0, fetch,
                      {after.left.data + k * after.left.block, after.left.row, after.sums + part * kPanelColumns},
                      {tile.sums + part * kPanelColumns, sums_distance});
        }
    }
}

// Rows stay in the L2 cache, some tiles at a time, while panels of all weights pass by.
template <class T>
class Panels {
public:
    Panels(const OctavoLinear& op, const Rows<T>& rows, Scratch& scratch)
        : op_(op), rows_(rows), shape_(op.weight), weight_(static_cast<const T*>(op.weight.data)) {
        const int64_t tile_bytes = kRows<T> * rows.padded * static_cast<int64_t>(sizeof(float));
        group_ = static_cast<int>(std::max(kMinTilesPerGroup, kRowBytesPerGroup / tile_bytes));
        buffer_ = scratch.take<float>(kPanelElements);
        sums_distance_ = static_cast<int64_t>(group_) * kRows<T> * kColumns;
        sums_ = scratch.take<float>(static_cast<size_t>(kPanelWidth * sums_distance_));
        tiles_ = scratch.take<TileSums<T>>(group_);
    }

    // Most tiles at a time.
    int group() const { return group_; }

    void choose_tiles(int first, int count) {
        count_ = count;
        const int first_row = rows_.tiles.begin(first);
        for (int i = 0; i < count; ++i) {
            const int begin = rows_.tiles.begin(first + i);
            const int count = rows_.tiles.begin(first + i + 1) - begin;
            tiles_[i] = {begin, count, rows_.tile(begin, count), sums_ + (begin - first_row) * kColumns};
        }
    }

    // Products of the chosen tiles with blocks of 32 columns.
    void multiply(const Range& blocks) const {
        const int most = count_ < kMinTilesPerPanel<T> ? 1 : kPanelWidth;
        for (int block = blocks.begin; block < blocks.end; block += most) {
            const int width = std::min(most, blocks.end - block);
            const Right<T> right = packed_block(weight_, shape_, block, {});
            if (count_ < kMinTilesPerPanel<T>)
                add_few(right);
            else
                add_many(right, width);
            for (int i = 0; i < count_; ++i)
                for (int w = 0; w < width; ++w)
                    finish<T>(op_, Columns::of(shape_, block + w), tiles_[i].begin, tiles_[i].count,
                              tiles_[i].sums + w * sums_distance_);
        }
    }

private:
    void add_few(const Right<T>& right) const {
        const int all = shape_.column_blocks();
        for (int k = 0; k < all; k += kBlocksOfFewTiles)
            add_products(tiles_, count_, right, k, std::min(kBlocksOfFewTiles, all - k));
    }

    void add_many(const Right<T>& right, int width) const {
        const int all = shape_.column_blocks(), each = panel_blocks();
        const int64_t distance = shape_.block_stride();
        for (int k = 0; k < all; k += each) {
            const int end = std::min(k + each, all);
            const T* next = right.data + (end < all ? end * right.block : width * distance);
            add_panel<T>(tiles_, count_, sums_distance_, {right, width, distance, k, end - k, next}, buffer_);
        }
    }

    const OctavoLinear& op_;
    const Rows<T>& rows_;
    const PackedShape shape_;
    const T* weight_;
    int group_;
    int64_t sums_distance_;  // from one block of columns to the next
    int count_ = 0;
    float* buffer_;
    float* sums_;
    TileSums<T>* tiles_;
};

template <class T>
void multiply_panels(const OctavoLinear& op, const PackedShape& shape, const Rows<T>& rows, const Grid& grid,
                     const Team& team) {
    Panels<T> panels(op, rows, team.scratch);
    for (int first = grid.tiles.begin; first < grid.tiles.end; first += panels.group()) {
        panels.choose_tiles(first, std::min(panels.group(), grid.tiles.end - first));
        const auto multiply = [&](const Range& blocks, int) { panels.multiply(blocks); };
        const bool only_own = first + panels.group() < grid.tiles.end;
        team.each_run(shape.row_blocks(), grid.parts, kPanelWidth, multiply, only_own, kPanelWidth);
    }
}

// Whether each thread has enough rows for itself.
inline bool divides_rows(const Tiles& tiles, int threads) { return tiles.count >= kTilesOfOwn * threads; }

// Divides the rows into groups that stay in a thread's L2 cache, and stages one right before its products: rows that
// threads stage for each other would come from another core's cache, and large ones from memory. A thread takes pairs
// of blocks of its own groups in turn, and its neighbours' last ones.
template <class T>
void multiply_groups(const OctavoLinear& op, const OctavoStep& step, const PackedShape& shape, const Tiles& tiles,
                     const Team& team) {
    const int64_t padded = static_cast<int64_t>(shape.column_blocks()) * kBlock;
    const bool in_place = reads_in_place<T>(op, tiles.rows);
    Rows<T> rows = {tiles, static_cast<const LeftOf<T>*>(op.x.data), in_place ? op.x.stride : 0, padded};
    Panels<T> panels(op, rows, team.scratch);
    const int groups = blocks_of(blocks_of(tiles.count, team.size), panels.group()) * team.size;
    const int64_t most_rows = static_cast<int64_t>(blocks_of(tiles.count, groups)) * kRows<T>;
    T* normed = op.norm ? team.scratch.take<T>(padded) : nullptr;
    LeftOf<T>* staged = in_place ? nullptr : team.scratch.take<LeftOf<T>>(most_rows * padded);
    const int turns = blocks_of(shape.row_blocks(), kPanelWidth);
    int chosen = -1;
    team.each(groups * turns, team.size, [&](int item, int) {
        const int group = item / turns, block = item % turns * kPanelWidth;
        if (group != chosen) {
            chosen = group;
            const Range mine = share(tiles.count, group, groups);
            const int first_row = tiles.begin(mine.begin);
            for (int tile = mine.begin; tile < mine.end && !in_place; ++tile) {
                const int begin = tiles.begin(tile);
                stage<T>(op, step, begin, tiles.size(tile), normed, staged + (begin - first_row) * padded);
            }
            if (!in_place) rows.data = staged - first_row * padded;
            panels.choose_tiles(mine.begin, mine.end - mine.begin);
        }
        panels.multiply({block, std::min(block + kPanelWidth, shape.row_blocks())});
    });
}

template <class T>
void multiply_plain_part(const OctavoLinear& op, int num_rows, const LeftOf<T>* staged, const Range& blocks,
                         const Team& team) {
    const PackedShape shape(op.weight);
    const int64_t padded = static_cast<int64_t>(shape.column_blocks()) * kBlock;
    const Rows<T> rows = {Tiles::of(num_rows, kRows<T>), staged, 0, padded};
    const int count = rows.tiles.count;
    if constexpr (kMultipliesFloat<T>) {
        if (count > 1) {
            const Scratch::Mark mark = team.scratch.mark();
            Panels<T> panels(op, rows, team.scratch);
            for (int first = 0; first < count; first += panels.group()) {
                panels.choose_tiles(first, std::min(panels.group(), count - first));
                panels.multiply(blocks);
            }
            team.scratch.release(mark);
            return;
        }
    }
    alignas(kCacheLine) float sums[kMostRows * kColumns];
    multiply_chunk(op, shape, rows, {0, count}, blocks, {false, false}, sums);
}

template <class T>
void linear(const OctavoLinear& op, const OctavoStep& step, const Team& team) {
    const int num_rows = num_rows_of(op, step);
    if (num_rows == 0) return;
    const PackedShape shape(op.weight);
    const Tiles tiles = Tiles::of(num_rows, kRows<T>);
    if constexpr (kMultipliesFloat<T>) {
        if (divides_rows(tiles, team.size)) return multiply_groups<T>(op, step, shape, tiles, team);
    }
    const Grid grid = divide(tiles.count, shape.row_blocks(), team.index, team.size);
    const Rows<T> rows = rows_of_x<T>(op, step, team, tiles);
    if constexpr (kMultipliesFloat<T>) {
        if (grid.tiles.end - grid.tiles.begin > 1) return multiply_panels(op, shape, rows, grid, team);
    }
    multiply_chunks(op, shape, rows, grid, team);
}

void run_product(const OctavoLinear& op, const OctavoStep& step, const Team& team) {
    if (op.weight.num_segments) return run_quantized_linear(op, step, team);
    with_type(op.type, [&](auto number) { linear<decltype(number)>(op, step, team); });
}

// Bytes of the rows that the threads share, whichever weight they are multiplied with.
size_t shared_bytes(const OctavoLinear& op, const OctavoStep& step, const OctavoAdapterRows* adapters) {
    const int rows = rows_of(step, op.rows);
    size_t bytes = op.weight.num_segments
                       ? quantized_linear_workspace(op, rows)
                       : with_type(op.type, [&](auto number) { return workspace_of_rows<decltype(number)>(op, rows); });
    if (adapters && replaces_weight(op, *adapters)) {
        const int64_t padded = static_cast<int64_t>(blocks_of(op.weight.columns, kBlock)) * kBlock;
        bytes = std::max(bytes, static_cast<size_t>(rows * padded) * sizeof(float));
    }
    return (bytes + kCacheLine - 1) / kCacheLine * kCacheLine;
}

// The products of rows of which some have an adapter. Those whose adapter has a weight of its own are computed again.
void run_adapted(const OctavoLinear& op, const OctavoStep& step, const OctavoAdapterRows& rows, const Team& team) {
    const int64_t stride = projected_stride(op, rows);
    float* projected = reinterpret_cast<float*>(team.shared.workspace + shared_bytes(op, step, &rows));
    if (stride) {
        project_rows(op, step, rows, team, projected, stride);
        team.wait();
    }
    const Adapted adapted = {op.adapters, rows.of_row, projected, stride, false};
    const Adapted replaced = {op.adapters, rows.of_row, projected, stride, true};
    OctavoLinear all = op;
    all.adapted = &adapted;
    run_product(all, step, team);
    for (int i = 0; i < rows.num_adapters; ++i) {
        const OctavoAdapter* adapter = op.adapters[rows.adapters[i]];
        if (!adapter || !adapter->weight) continue;
        OctavoLinear some = op;
        some.adapted = &replaced;
        some.weight = *adapter->weight;
        some.listed = rows.rows + rows.starts[i];
        some.num_listed = rows.starts[i + 1] - rows.starts[i];
        team.wait();
        run_product(some, step, team);
    }
}

}  // namespace

void run_linear(const OctavoLinear& op, const OctavoStep& step, const Team& team) {
    const OctavoAdapterRows* adapters = adapter_rows(op, step);
    if (adapters) return run_adapted(op, step, *adapters, team);
    run_product(op, step, team);
}

int most_rows(const OctavoLinear& op) {
    if (op.weight.num_segments) return most_quantized_rows(op);
    return with_type(op.type, [&](auto number) { return kRows<decltype(number)>; });
}

size_t staged_bytes(const OctavoLinear& op) {
    if (op.weight.num_segments) return staged_quantized_bytes(op);
    return with_type(op.type, [&](auto number) {
        return static_cast<size_t>(blocks_of(op.weight.columns, kBlock)) * kBlock * sizeof(LeftOf<decltype(number)>);
    });
}

int row_blocks_of(const OctavoLinear& op) {
    return op.weight.num_segments ? quantized_row_blocks(op) : PackedShape(op.weight).row_blocks();
}

int64_t block_bytes_of(const OctavoLinear& op) {
    if (op.weight.num_segments) return quantized_block_bytes(op);
    const int64_t elements = PackedShape(op.weight).block_stride();
    return with_type(op.type, [&](auto number) { return elements * static_cast<int64_t>(sizeof(number)); });
}

uintptr_t address_of_block(const OctavoLinear& op, int block) {
    if (op.weight.num_segments) return address_of_quantized_block(op, block);
    return address_of(op.weight.data) + block * block_bytes_of(op);
}

void stage_tile(const OctavoLinear& op, const OctavoStep& step, int rows, int tile, void* staged) {
    if (op.weight.num_segments) return stage_quantized_tile(op, step, rows, tile, staged);
    with_type(op.type, [&](auto number) {
        using T = decltype(number);
        const Tiles tiles = Tiles::of(rows, kRows<T>);
        const int64_t padded = static_cast<int64_t>(blocks_of(op.weight.columns, kBlock)) * kBlock;
        const int begin = tiles.begin(tile);
        stage<T>(op, step, begin, tiles.size(tile), nullptr, static_cast<LeftOf<T>*>(staged) + begin * padded);
    });
}

void multiply_part(const OctavoLinear& op, int rows, const void* staged, const Range& blocks, const Team& team) {
    if (op.weight.num_segments) return multiply_quantized_part(op, rows, staged, blocks, team);
    with_type(op.type, [&](auto number) {
        using T = decltype(number);
        multiply_plain_part<T>(op, rows, static_cast<const LeftOf<T>*>(staged), blocks, team);
    });
}

size_t linear_workspace(const OctavoLinear& op, const OctavoStep& step) {
    const OctavoAdapterRows* adapters = adapter_rows(op, step);
    const size_t shared = shared_bytes(op, step, adapters);
    if (!adapters) return shared;
    const int64_t floats = rows_of(step, op.rows) * projected_stride(op, *adapters);
    return shared + static_cast<size_t>(floats) * sizeof(float);
}

}  // namespace octavo
