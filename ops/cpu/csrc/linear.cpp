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

// With fewer tiles than this, converting weights for each costs less than a panel.
constexpr int kMinTilesPerPanel = 3;

// How far ahead a long stream of weights is prefetched.
constexpr int64_t kFetchAheadBytes = 6144;

// Up to this many rows, the loads of weights follow each other closely.
template <class T>
constexpr int kRowsReadByHardware = kMultipliesFloat<T> ? 1 : 3;

// Prefetches a long stream of weights.
template <class T>
Fetch fetch_ahead(uintptr_t block, int rows) {
    if (rows <= kRowsReadByHardware<T> && is_amd()) return {block, 0};  // what is there already
    return {block + kFetchAheadBytes, kCacheLineBytes};
}

// The part of the next block to prefetch during one of the products that read the current block.
Fetch part_of(uintptr_t block, int64_t bytes, int part, int parts) {
    const int64_t step = blocks_of(kCacheLineBytes, parts);
    const int64_t offset = part * step * (bytes / kCacheLineBytes);
    if (offset >= bytes) return {};
    return {block + offset, step};
}

// Weights stay in the L2 cache, a chunk at a time, while all rows pass by.
template <class T>
void multiply_chunks(const OctavoLinear& op, const PackedShape& shape, const Rows<T>& rows, const Grid& grid,
                     const Team& team) {
    alignas(kCacheLine) float sums[kMostRows * kColumns];
    const T* weight = static_cast<const T*>(op.weight.data);
    const int64_t block_bytes = shape.block_stride() * static_cast<int64_t>(sizeof(T));
    const int row_blocks = shape.row_blocks(), column_blocks = shape.column_blocks();
    const int num_tiles = grid.tiles.end - grid.tiles.begin;
    const int64_t chunk_bytes = std::min(kChunkBytes, kChunkBytesPerTile * num_tiles);
    const int chunk = static_cast<int>(std::max<int64_t>(1, chunk_bytes / block_bytes));
    int fetched = -1;  // the chunk that was prefetched
    team.each(blocks_of(row_blocks, chunk), grid.parts, [&](int number, int end) {
        const int first = number * chunk, last = std::min(first + chunk, row_blocks);
        for (int tile = grid.tiles.begin; tile < grid.tiles.end; ++tile) {
            const int begin = rows.tiles.begin(tile);
            const int count = rows.tiles.begin(tile + 1) - begin;
            const Left<T> left = rows.tile(begin, count);
            for (int block = first; block < last; ++block) {
                Fetch fetch;
                if (num_tiles == 1 || (tile == grid.tiles.begin && fetched != number))
                    fetch = fetch_ahead<T>(address_of(weight) + block * block_bytes, count);
                else if (number + 1 < end && block + chunk < row_blocks)
                    fetch = part_of(address_of(weight) + (block + chunk) * block_bytes, block_bytes,
                                    tile - grid.tiles.begin, num_tiles);
                dot(count, left, packed_block(weight, shape, block, fetch), column_blocks, sums);
                finish<T>(op, Columns::of(shape, block), begin, count, sums);
            }
        }
        fetched = number + 1 < end ? number + 1 : -1;
    });
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
                     const Team& team) {
    const T* weight = static_cast<const T*>(op.weight.data);
    const int column_blocks = shape.column_blocks();
    const int64_t tile_bytes = kRows<T> * rows.padded * static_cast<int64_t>(sizeof(float));
    const int group = static_cast<int>(std::max(kMinTilesPerGroup, kRowBytesPerGroup / tile_bytes));
    float* buffer = team.scratch.take<float>(kPanelElements);
    float* sums = team.scratch.take<float>(static_cast<size_t>(group) * kRows<T> * kColumns);
    TileSums* tiles = team.scratch.take<TileSums>(group);
    for (int first = grid.tiles.begin; first < grid.tiles.end; first += group) {
        const int num_tiles = std::min(group, grid.tiles.end - first);
        const int first_row = rows.tiles.begin(first);
        for (int i = 0; i < num_tiles; ++i) {
            const int begin = rows.tiles.begin(first + i);
            tiles[i] = {begin, rows.tiles.begin(first + i + 1) - begin, sums + (begin - first_row) * kColumns};
        }
        const auto multiply = [&](int block, int) {
            const Right<T> right = packed_block(weight, shape, block, {});
            for (int k = 0; k < column_blocks; k += kPanelBlocks)
                add_products(rows, tiles, num_tiles, right, k, std::min(kPanelBlocks, column_blocks - k), buffer);
            for (int i = 0; i < num_tiles; ++i)
                finish<T>(op, Columns::of(shape, block), tiles[i].begin, tiles[i].count, tiles[i].sums);
        };
        team.each(shape.row_blocks(), grid.parts, multiply, first + group < grid.tiles.end);
    }
}

template <class T>
void linear(const OctavoLinear& op, const OctavoStep& step, const Team& team) {
    const int num_rows = rows_of(step, op.rows);
    if (num_rows == 0) return;
    const PackedShape shape(op.weight);
    const Tiles tiles = Tiles::of(num_rows, kRows<T>);
    const Grid grid = divide(tiles.count, shape.row_blocks(), team.index, team.size);
    const Rows<T> rows = rows_of_x<T>(op, step, team, tiles);
    if constexpr (kMultipliesFloat<T>) {
        if (grid.tiles.end - grid.tiles.begin > 1) return multiply_panels(op, shape, rows, grid, team);
    }
    multiply_chunks(op, shape, rows, grid, team);
}

}  // namespace

void run_linear(const OctavoLinear& op, const OctavoStep& step, const Team& team) {
    if (op.weight.num_segments) return run_quantized_linear(op, step, team);
    with_type(op.type, [&](auto number) { linear<decltype(number)>(op, step, team); });
}

size_t linear_workspace(const OctavoLinear& op, const OctavoStep& step) {
    if (op.weight.num_segments) return quantized_linear_workspace(op, rows_of(step, op.rows));
    return with_type(op.type,
                     [&](auto number) { return workspace_of_rows<decltype(number)>(op, rows_of(step, op.rows)); });
}

}  // namespace octavo
