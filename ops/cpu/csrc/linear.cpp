// Linear layers: out = x W^T, with the epilogue applied while the results are in registers.
#include "kernels.h"
#include "norm.h"
#include "packed.h"
#include "panel.h"
#include "vec_math.h"

namespace octavo {

namespace {

// Weights that stay in the L2 cache while all rows pass by. With many rows: as many as fit beside those being
// prefetched. With few rows: fewer, since the first chunk is not prefetched.
constexpr int64_t kChunkBytes = 256 << 10;
constexpr int64_t kChunkBytesPerTile = 32 << 10;

// Weights are one long stream from memory, which the hardware prefetcher alone does not keep up with.
constexpr int64_t kFetchAheadBytes = 4096;

// Rows that stay in the L2 cache while panels of weights pass by.
constexpr int64_t kRowBytesPerGroup = 512 << 10;
constexpr int64_t kMinTilesPerGroup = 8;

// With fewer tiles than this, converting weights for each costs less than a panel.
constexpr int kMinTilesPerPanel = 3;

// Rows a multiple of this apart map to the same few lines of the L1 cache.
constexpr int64_t kAliasBytes = 4096;

// The rows, split into tiles of nearly equal size.
struct Tiles {
    int rows;
    int count;

    template <class T>
    static Tiles of(int rows) {
        return {rows, blocks_of(rows, kRows<T>)};
    }
    int begin(int tile) const { return static_cast<int>(static_cast<int64_t>(rows) * tile / count); }
};

// Whether the kernel can read the rows of x in place.
template <class T>
bool reads_in_place(const OctavoLinear& op, int rows) {
    if (!std::is_same_v<LeftOf<T>, T> || op.weight.columns % kBlock != 0 || op.gather || op.norm) return false;
    return rows <= kRows<T> || op.x.stride * static_cast<int64_t>(sizeof(T)) % kAliasBytes != 0;
}

// Copies rows into [columns / 32][rows][32]: normalised on request, converted and zero-padded.
template <class T>
void stage(const OctavoLinear& op, const OctavoStep& step, int begin, int rows, T* normed, LeftOf<T>* staged) {
    const int columns = op.weight.columns;
    const int blocks = blocks_of(columns, kBlock);
    for (int r = 0; r < rows; ++r) {
        const int64_t row = op.gather ? step.logits_rows[begin + r] : begin + r;
        const T* x = static_cast<const T*>(op.x.data) + row * op.x.stride;
        if (op.norm == kRmsNorm)
            rms_norm(x, op.rms_norm, columns, normed);
        else if (op.norm == kLayerNorm)
            layer_norm(x, static_cast<const T*>(op.norm_weight), static_cast<const T*>(op.norm_bias), columns,
                       op.norm_eps, normed);
        if (op.norm) x = normed;
        for (int k = 0; k < blocks; ++k) {
            LeftOf<T>* target = staged + (static_cast<int64_t>(k) * rows + r) * kBlock;
            for (int i = 0; i < kBlock; i += kLanes) {
                const int count = columns - k * kBlock - i;
                store(target + i, count > 0 ? load_first(x + k * kBlock + i, count) : zero());
            }
        }
    }
}

// How the team divides the results: by columns, so that each thread streams its own weights, and also by rows if there
// are too few columns.
struct Grid {
    Range tiles;
    Range blocks;
};

Grid divide(int tiles, int blocks, int thread, int threads) {
    int best = threads;
    int64_t best_cost = INT64_MAX;
    for (int parts = threads; parts >= 1; --parts) {
        if (threads % parts) continue;
        const int64_t cost = static_cast<int64_t>(blocks_of(blocks, parts)) * blocks_of(tiles, threads / parts);
        if (cost < best_cost) {
            best_cost = cost;
            best = parts;
        }
    }
    return {share(tiles, thread / best, threads / best), share(blocks, thread % best, best)};
}

// The part of the next block to prefetch during one of the products that read the current block.
Fetch part_of(uintptr_t block, int64_t bytes, int part, int parts) {
    const int64_t step = blocks_of(kCacheLineBytes, parts);
    const int64_t offset = part * step * (bytes / kCacheLineBytes);
    if (offset >= bytes) return {};
    return {block + offset, step};
}

// Epilogue: turns the sums of a tile's rows and one block of columns into results.
template <class T>
void finish(const OctavoLinear& op, const PackedShape& shape, int row, int rows, int block, const float* sums) {
    for (int r = 0; r < rows; ++r, sums += kColumns) {
        Vec halves[2];
        for (int half = 0; half < 2; ++half) {
            const int column = shape.first_row(block, half);
            const int count = shape.rows_in(block, half);
            Vec x = load(sums + half * kLanes);
            if (op.bias && count) x = x + load_first(static_cast<const T*>(op.bias) + column, count);
            if (op.epilogue == kLogits) {
                if (op.activation) x = activate(x, op.activation, op.parameter);
                float* out = static_cast<float*>(op.out.data) + (row + r) * op.out.stride + column;
                if (count) store_first(out, x, count);
                continue;
            }
            x = round_to<T>(x);
            halves[half] = x;
            if (op.epilogue == kGated || !count) continue;
            if (op.activation) x = round_to<T>(activate(x, op.activation, op.parameter));
            if (op.epilogue == kResidual)
                x = load_first(static_cast<const T*>(op.residual.data) + (row + r) * op.residual.stride + column,
                               count) +
                    x;
            store_first(static_cast<T*>(op.out.data) + (row + r) * op.out.stride + column, x, count);
        }
        if (op.epilogue != kGated) continue;
        T* out = static_cast<T*>(op.out.data) + (row + r) * op.out.stride + block * kLanes;
        store_first(out, round_to<T>(activate(halves[0], op.activation, op.parameter)) * halves[1],
                    shape.rows_in(block, 0));
    }
}

// The rows of x, in tiles: in place, or staged as [tile][columns / 32][rows of the tile][32].
template <class T>
struct Rows {
    Tiles tiles;
    const LeftOf<T>* data;
    int64_t stride;  // in place; 0: staged
    int64_t padded;  // columns

    Left<T> tile(int begin, int count) const {
        if (stride) return {data + begin * stride, stride, kBlock};
        return {data + begin * padded, kBlock, static_cast<int64_t>(count) * kBlock};
    }
};

template <class T>
Rows<T> rows_of_x(const OctavoLinear& op, const OctavoStep& step, const Team& team, const Tiles& tiles) {
    const int64_t padded = static_cast<int64_t>(blocks_of(op.weight.columns, kBlock)) * kBlock;
    if (reads_in_place<T>(op, tiles.rows))
        return {tiles, static_cast<const LeftOf<T>*>(op.x.data), op.x.stride, padded};
    T* normed = op.norm ? team.scratch.take<T>(padded) : nullptr;
    if (tiles.count == 1) {  // every thread stages all rows: quicker than a barrier
        LeftOf<T>* staged = team.scratch.take<LeftOf<T>>(tiles.rows * padded);
        stage<T>(op, step, 0, tiles.rows, normed, staged);
        return {tiles, staged, 0, padded};
    }
    LeftOf<T>* staged = reinterpret_cast<LeftOf<T>*>(team.shared.workspace);
    const Range mine = team.share(tiles.count);
    for (int tile = mine.begin; tile < mine.end; ++tile) {
        const int begin = tiles.begin(tile);
        stage<T>(op, step, begin, tiles.begin(tile + 1) - begin, normed, staged + begin * padded);
    }
    team.wait();
    return {tiles, staged, 0, padded};
}

// Weights stay in the L2 cache, a chunk at a time, while all rows pass by.
template <class T>
void multiply_chunks(const OctavoLinear& op, const PackedShape& shape, const Rows<T>& rows, const Grid& grid) {
    alignas(kCacheLine) float sums[kMostRows * kColumns];
    const T* weight = static_cast<const T*>(op.weight.data);
    const int64_t block_bytes = shape.block_stride() * static_cast<int64_t>(sizeof(T));
    const int column_blocks = shape.column_blocks();
    const int num_tiles = grid.tiles.end - grid.tiles.begin;
    const int64_t chunk_bytes = std::min(kChunkBytes, kChunkBytesPerTile * num_tiles);
    const int chunk = static_cast<int>(std::max<int64_t>(1, chunk_bytes / block_bytes));
    for (int first = grid.blocks.begin; first < grid.blocks.end; first += chunk) {
        const int last = std::min(first + chunk, grid.blocks.end);
        for (int tile = grid.tiles.begin; tile < grid.tiles.end; ++tile) {
            const int begin = rows.tiles.begin(tile);
            const int count = rows.tiles.begin(tile + 1) - begin;
            const Left<T> left = rows.tile(begin, count);
            for (int block = first; block < last; ++block) {
                Fetch fetch;
                if (num_tiles == 1 || (tile == grid.tiles.begin && first == grid.blocks.begin))
                    fetch = {address_of(weight) + block * block_bytes + kFetchAheadBytes, kCacheLineBytes};
                else if (block + chunk < grid.blocks.end)
                    fetch = part_of(address_of(weight) + (block + chunk) * block_bytes, block_bytes,
                                    tile - grid.tiles.begin, num_tiles);
                dot(count, left, packed_block(weight, shape, block, fetch), column_blocks, sums);
                finish<T>(op, shape, begin, count, block, sums);
            }
        }
    }
}

// A tile of rows, and where its sums are.
struct TileSums {
    int begin;
    int count;
    float* sums;
};

// Adds the products of some tiles with blocks of k of 32 columns.
//
// While they are computed, the same amount of weights after these is prefetched: weights are one long stream.
template <class T>
void add_products(const Rows<T>& rows, const TileSums* tiles, int num_tiles, Right<T> right, int k, int blocks,
                  float* buffer) {
    right.data += k * right.block;
    const int64_t bytes = blocks * kBlockElements * static_cast<int64_t>(sizeof(T));
    const uintptr_t next = address_of(right.data) + bytes;
    if (num_tiles < kMinTilesPerPanel) {
        for (int i = 0; i < num_tiles; ++i) {
            Left<T> left = rows.tile(tiles[i].begin, tiles[i].count);
            left.data += k * left.block;
            right.fetch = part_of(next, bytes, i, num_tiles);
            add_dot(tiles[i].count, left, right, blocks, k == 0, tiles[i].sums);
        }
        return;
    }
    const int64_t fetches = fetches_of_panel(blocks);
    const int64_t lines = num_tiles * kPanelsPerBlock * fetches;
    Fetch fetch = {next, (bytes + lines - 1) / lines};
    for (int part = 0; part < kPanelsPerBlock; ++part) {
        const Panel panel = make_panel(right, blocks, part, buffer);
        for (int i = 0; i < num_tiles; ++i) {
            const Left<T> left = rows.tile(tiles[i].begin, tiles[i].count);
            dot_panel(tiles[i].count, {left.data + k * left.block, left.row, left.block}, panel, blocks, k == 0, fetch,
                      tiles[i].sums + part * kPanelColumns);
            fetch.first += fetch.step * fetches;
        }
    }
}

// Rows stay in the L2 cache, some tiles at a time, while panels of all weights pass by.
template <class T>
void multiply_panels(const OctavoLinear& op, const PackedShape& shape, const Rows<T>& rows, const Grid& grid,
                     Scratch& scratch) {
    const T* weight = static_cast<const T*>(op.weight.data);
    const int column_blocks = shape.column_blocks();
    const int64_t tile_bytes = kRows<T> * rows.padded * static_cast<int64_t>(sizeof(float));
    const int group = static_cast<int>(std::max(kMinTilesPerGroup, kRowBytesPerGroup / tile_bytes));
    float* buffer = scratch.take<float>(kPanelElements);
    float* sums = scratch.take<float>(static_cast<size_t>(group) * kRows<T> * kColumns);
    TileSums* tiles = scratch.take<TileSums>(group);
    for (int first = grid.tiles.begin; first < grid.tiles.end; first += group) {
        const int num_tiles = std::min(group, grid.tiles.end - first);
        const int first_row = rows.tiles.begin(first);
        for (int i = 0; i < num_tiles; ++i) {
            const int begin = rows.tiles.begin(first + i);
            tiles[i] = {begin, rows.tiles.begin(first + i + 1) - begin, sums + (begin - first_row) * kColumns};
        }
        for (int block = grid.blocks.begin; block < grid.blocks.end; ++block) {
            const Right<T> right = packed_block(weight, shape, block, {});
            for (int k = 0; k < column_blocks; k += kPanelBlocks)
                add_products(rows, tiles, num_tiles, right, k, std::min(kPanelBlocks, column_blocks - k), buffer);
            for (int i = 0; i < num_tiles; ++i)
                finish<T>(op, shape, tiles[i].begin, tiles[i].count, block, tiles[i].sums);
        }
    }
}

template <class T>
void linear(const OctavoLinear& op, const OctavoStep& step, const Team& team) {
    const int num_rows = rows_of(step, op.rows);
    if (num_rows == 0) return;
    const PackedShape shape(op.weight);
    const Tiles tiles = Tiles::of<T>(num_rows);
    const Grid grid = divide(tiles.count, shape.row_blocks(), team.index, team.size);
    const Rows<T> rows = rows_of_x<T>(op, step, team, tiles);
    if constexpr (kMultipliesFloat<T>) {
        if (grid.tiles.end - grid.tiles.begin > 1) return multiply_panels(op, shape, rows, grid, team.scratch);
    }
    multiply_chunks(op, shape, rows, grid);
}

template <class T>
size_t workspace(const OctavoLinear& op, int rows) {
    if (rows <= kRows<T> || reads_in_place<T>(op, rows)) return 0;
    return static_cast<size_t>(rows) * blocks_of(op.weight.columns, kBlock) * kBlock * sizeof(LeftOf<T>);
}

}  // namespace

void run_linear(const OctavoLinear& op, const OctavoStep& step, const Team& team) {
    with_type(op.type, [&](auto number) { linear<decltype(number)>(op, step, team); });
}

size_t linear_workspace(const OctavoLinear& op, const OctavoStep& step) {
    return with_type(op.type, [&](auto number) { return workspace<decltype(number)>(op, rows_of(step, op.rows)); });
}

}  // namespace octavo
