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

// With fewer tiles than this, converting weights for each costs less than a panel. AVX2 converts a vector of bfloat16
// in one instruction, on ports that products leave idle: that costs less however many tiles there are.
template <class T>
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int kMinTilesPerPanel = kIsBFloat16<T> ? std::numeric_limits<int>::max() : 3;
#else
constexpr int kMinTilesPerPanel = 3;
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

// The part of a stream's next weights to prefetch during one tile's products. Spread over two tiles, memory is never
// idle: 5 to 10% faster on Intel's CPUs than during the last one.
Fetch fetch_during(uintptr_t next, int64_t bytes, int tile, int tiles) {
    if (tiles == 2 && !is_amd()) return part_of(next, bytes, tile, tiles);
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
    if (num_tiles < kMinTilesPerPanel<T>) {
        for (int i = 0; i < num_tiles; ++i) {
            Left<T> left = rows.tile(tiles[i].begin, tiles[i].count);
            left.data += k * left.block;
            right.fetch = fetch_during(next, bytes, i, num_tiles);
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
            const TileSums& after = tiles[i + 1 < num_tiles ? i + 1 : 0];
            const Left<T> next = rows.tile(after.begin, after.count);
            dot_panel(tiles[i].count, {left.data + k * left.block, left.row, left.block}, panel, blocks, k == 0, fetch,
                      {next.data + k * next.block, next.row, after.sums + part * kPanelColumns},
                      tiles[i].sums + part * kPanelColumns);
            fetch.first += fetch.step * fetches;
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
        sums_ = scratch.take<float>(static_cast<size_t>(group_) * kRows<T> * kColumns);
        tiles_ = scratch.take<TileSums>(group_);
    }

    // Most tiles at a time.
    int group() const { return group_; }

    void choose_tiles(int first, int count) {
        count_ = count;
        const int first_row = rows_.tiles.begin(first);
        for (int i = 0; i < count; ++i) {
            const int begin = rows_.tiles.begin(first + i);
            tiles_[i] = {begin, rows_.tiles.begin(first + i + 1) - begin, sums_ + (begin - first_row) * kColumns};
        }
    }

    // Products of the chosen tiles with a block of 32 columns.
    void multiply(int block) const {
        const int column_blocks = shape_.column_blocks();
        const Right<T> right = packed_block(weight_, shape_, block, {});
        for (int k = 0; k < column_blocks; k += kPanelBlocks)
            add_products(rows_, tiles_, count_, right, k, std::min(kPanelBlocks, column_blocks - k), buffer_);
        for (int i = 0; i < count_; ++i)
            finish<T>(op_, Columns::of(shape_, block), tiles_[i].begin, tiles_[i].count, tiles_[i].sums);
    }

private:
    const OctavoLinear& op_;
    const Rows<T>& rows_;
    const PackedShape shape_;
    const T* weight_;
    int group_;
    int count_ = 0;
    float* buffer_;
    float* sums_;
    TileSums* tiles_;
};

template <class T>
void multiply_panels(const OctavoLinear& op, const PackedShape& shape, const Rows<T>& rows, const Grid& grid,
                     const Team& team) {
    Panels<T> panels(op, rows, team.scratch);
    for (int first = grid.tiles.begin; first < grid.tiles.end; first += panels.group()) {
        panels.choose_tiles(first, std::min(panels.group(), grid.tiles.end - first));
        const auto multiply = [&](int block, int) { panels.multiply(block); };
        team.each(shape.row_blocks(), grid.parts, multiply, first + panels.group() < grid.tiles.end);
    }
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
                for (int block = blocks.begin; block < blocks.end; ++block) panels.multiply(block);
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
