// Linear layers with quantised weights; see ops/reference/quantized.py.
#include "dot_float.h"
#include "dot_int8.h"
#include "dot_token.h"
#include "linear.h"

namespace octavo {

namespace {

// Rows that stay in the L2 cache while panels of weights pass by.
constexpr int64_t kRowBytesPerGroup = 256 << 10;

// With fewer tiles than this, decoding blocks for each costs less than storing them decoded.
constexpr int kMinTilesPerPanel = 3;

// Blocks of k that stay in the L1 cache beside rows.
constexpr int kInt8BlocksInCache = 20;

// The same for float products: blocks of k that are dequantised at once, and rows beside them.
constexpr int kFloatPanelBlocks = 4;
constexpr int64_t kFloatBytesPerGroup = 512 << 10;
constexpr int64_t kMinTilesPerFloatGroup = 8;

// The same for activations with a scale for each row.
constexpr int64_t kTokenBytesPerGroup = 512 << 10;

// How far ahead weights are prefetched; with so many rows, AMD's CPUs do so by themselves.
constexpr uintptr_t kAheadBytes = 4096;
constexpr int kRowsReadByHardware = 1;

// The same for activations with a scale for each row: that many rows are read in order (dot_token.cpp).
constexpr uintptr_t kTokenAheadBytes = 8192;
#if defined(__AVX512F__) && defined(OCTAVO_DOT_INT8)
constexpr int kTokenRowsReadByHardware = 4;
#else
constexpr int kTokenRowsReadByHardware = 1;
#endif

// Bytes of the weight that a thread takes at a time, about, and the least part of its share.
constexpr int64_t kBytesAtATime = 24 << 10;
constexpr int kLeastPart = 8;
// The same of one tile of rows, and blocks of 32 rows of the weight that are multiplied before their epilogues.
constexpr int64_t kBytesOfTile = 160 << 10;
constexpr int kBlocksPerCall = 4;

// Calls `function(layout, rows, columns)` for these blocks of 32 rows of the weight, those of each segment together:
// `rows` are the bytes of all, `columns(i)` those of the result that the i-th of `columns.count` makes.
template <class F>
void each_segment_of(const OctavoWeight& weight, const Range& range, F function) {
    struct SegmentColumns {
        const PackedShape& shape;
        int first, count, row, first_block;
        Columns operator()(int i) const { return Columns::of(shape, first + i, row, first_block); }
    };
    int first_block = 0, first_row = 0;
    for (int i = 0; i < weight.num_segments && first_block < range.end; ++i) {
        const OctavoSegment& segment = weight.segments[i];
        const QuantizedLayout layout(segment.encoding, segment.rows, weight.columns, weight.paired != 0);
        const int blocks = layout.shape.row_blocks();
        const int begin = std::max(range.begin - first_block, 0), end = std::min(range.end - first_block, blocks);
        if (begin < end)
            function(layout, static_cast<const uint8_t*>(segment.data) + begin * layout.stride(),
                     SegmentColumns{layout.shape, begin, end - begin, first_row, first_block});
        first_block += blocks;
        first_row += segment.rows;
    }
}

// The same block by block: calls `function(layout, rows, columns)`.
template <class F>
void each_block_of(const OctavoWeight& weight, const Range& range, F function) {
    each_segment_of(weight, range, [&](const QuantizedLayout& layout, const uint8_t* rows, const auto& columns) {
        for (int i = 0; i < columns.count; ++i) function(layout, rows + i * layout.stride(), columns(i));
    });
}

int row_blocks(const OctavoWeight& weight) {
    int result = 0;
    for (int i = 0; i < weight.num_segments; ++i)
        result += PackedShape(weight.segments[i].rows, weight.columns, weight.paired != 0).row_blocks();
    return result;
}

// The same for the blocks of this thread, and those that it takes over from others. `only_own`: see Team::each.
template <class F>
void each_block(const OctavoWeight& weight, const Team& team, int parts, bool only_own, F function) {
    const QuantizedLayout layout(weight.segments[0].encoding, weight.segments[0].rows, weight.columns, false);
    const int blocks = row_blocks(weight);
    const int64_t wanted = std::min<int64_t>(kBytesAtATime / layout.stride(), blocks / (parts * kLeastPart));
    const int step = static_cast<int>(std::max<int64_t>(1, wanted));
    const auto take = [&](int i, int) {
        each_block_of(weight, {i * step, std::min((i + 1) * step, blocks)}, function);
    };
    team.each(blocks_of(blocks, step), parts, take, only_own);
}

// ---------------------------------------------------------------------------------------------------------------------
// Activations in int8.

// Rows in int8, as [tile][columns / 32][rows of the tile].
struct Int8Rows {
    Tiles tiles;
    const Int8Block* data;
    int blocks;  // of columns

    // The rows of a tile from block k of their columns on.
    const Int8Block* at(int tile, int k) const {
        return data + static_cast<int64_t>(tiles.begin(tile)) * blocks + static_cast<int64_t>(k) * tiles.size(tile);
    }
};

template <class T>
Int8Rows int8_rows(const OctavoLinear& op, const OctavoStep& step, const Team& team, const Tiles& tiles) {
    const int columns = op.weight.columns, blocks = blocks_of(columns, kBlock);
    T* normed = op.norm ? team.scratch.take<T>(static_cast<size_t>(blocks) * kBlock) : nullptr;
    const bool alone = tiles.count == 1;  // every thread rounds all rows: quicker than a barrier
    Int8Block* data = alone ? team.scratch.take<Int8Block>(static_cast<size_t>(tiles.rows) * blocks)
                            : reinterpret_cast<Int8Block*>(team.shared.workspace);
    const Range mine = alone ? Range{0, 1} : team.share(tiles.count);
    for (int tile = mine.begin; tile < mine.end; ++tile) {
        const int begin = tiles.begin(tile), size = tiles.size(tile);
        for (int r = 0; r < size; ++r)
            quantize_row(read_row(op, step, begin + r, normed), columns,
                         data + static_cast<int64_t>(begin) * blocks + r, size);
    }
    if (!alone) team.wait();
    return {tiles, data, blocks};
}

// Products of some tiles with one block of 32 rows of the weight, decoded anew for each tile: a part that stays in the
// L1 cache while all tiles pass by, or all of it at once of a k-quant.
void multiply_directly(const QuantizedLayout& layout, const uint8_t* weight, const Int8Rows& rows, const Range& tiles,
                       float* sums) {
    const int count = tiles.end - tiles.begin;
    const bool in_parts = count > 1 && !is_super(layout.encoding.format);
    const int parts = in_parts ? blocks_of(rows.blocks, kInt8BlocksInCache) : 1;
    for (int part = 0; part < parts; ++part) {
        const Range blocks = share(rows.blocks, part, parts);
        for (int i = 0; i < count; ++i)
            dot_int8(layout, weight, blocks, rows.tiles.size(tiles.begin + i), rows.at(tiles.begin + i, blocks.begin),
                     sums + i * kInt8Rows * kColumns, in_parts ? Turn{i, count} : Turn{0, 1});
    }
}

// The same with panels of the weight that are decoded for all tiles.
void multiply_decoded(const QuantizedLayout& layout, const uint8_t* weight, const Int8Rows& rows, const Range& tiles,
                      DecodedBlock* panel, float* sums) {
    for (int k = 0; k < rows.blocks; k += kInt8PanelBlocks) {
        const int blocks = std::min(kInt8PanelBlocks, rows.blocks - k);
        decode_blocks(layout, weight, k, blocks, panel);
        for (int tile = tiles.begin; tile < tiles.end; ++tile)
            dot_decoded(layout, panel, blocks, rows.tiles.size(tile), rows.at(tile, k),
                        sums + (tile - tiles.begin) * kInt8Rows * kColumns);
    }
}

// Products of some tiles with one block of 32 rows of the weight, and their results.
template <class T>
void multiply_group(const OctavoLinear& op, const QuantizedLayout& layout, const uint8_t* weight,
                    const Columns& columns, const Int8Rows& rows, const Range& tiles, DecodedBlock* panel, float* sums,
                    size_t num_sums) {
    std::memset(sums, 0, num_sums * sizeof(float));
    if (tiles.end - tiles.begin >= kMinTilesPerPanel && is_better_decoded(layout))
        multiply_decoded(layout, weight, rows, tiles, panel, sums);
    else
        multiply_directly(layout, weight, rows, tiles, sums);
    for (int tile = tiles.begin; tile < tiles.end; ++tile)
        finish<T>(op, columns, rows.tiles.begin(tile), rows.tiles.size(tile),
                  sums + (tile - tiles.begin) * kInt8Rows * kColumns);
}

// Products of a single tile with some blocks of the weight. Memory is the limit, so little is done between its reads.
template <class T>
void multiply_tile(const OctavoLinear& op, const Int8Rows& rows, const Range& blocks) {
    alignas(kCacheLine) float sums[kBlocksPerCall * kInt8Rows * kColumns];
    const int count = rows.tiles.rows;
    each_segment_of(op.weight, blocks, [&](const QuantizedLayout& layout, const uint8_t* weight, const auto& columns) {
        for (int first = 0; first < columns.count; first += kBlocksPerCall) {
            const int some = std::min(kBlocksPerCall, columns.count - first);
            dot_int8_blocks(layout, weight + first * layout.stride(), some, count, rows.data, sums);
            for (int i = 0; i < some; ++i) finish<T>(op, columns(first + i), 0, count, sums + i * count * kColumns);
        }
    });
}

// Some tiles stay in the L2 cache while all weights pass by.
template <class T>
void multiply_int8(const OctavoLinear& op, const OctavoStep& step, const Team& team, int num_rows) {
    const Tiles tiles = Tiles::of(num_rows, kInt8Rows);
    const Grid grid = divide(tiles.count, row_blocks(op.weight), team.index, team.size);
    const Int8Rows rows = int8_rows<T>(op, step, team, tiles);
    if (tiles.count == 1) {
        const QuantizedLayout layout(op.weight.segments[0].encoding, op.weight.segments[0].rows, op.weight.columns,
                                     false);
        const int most = static_cast<int>(std::max<int64_t>(1, kBytesOfTile / layout.stride()));
        return team.each_run(row_blocks(op.weight), grid.parts, most,
                             [&](const Range& blocks, int) { multiply_tile<T>(op, rows, blocks); });
    }
    const int64_t tile_bytes = kInt8Rows * static_cast<int64_t>(rows.blocks) * sizeof(Int8Block);
    const int most = static_cast<int>(std::max<int64_t>(kMinTilesPerPanel, kRowBytesPerGroup / tile_bytes));
    const size_t num_sums = static_cast<size_t>(std::min(most, tiles.count)) * kInt8Rows * kColumns;
    float* sums = team.scratch.take<float>(num_sums);
    DecodedBlock* panel = team.scratch.take<DecodedBlock>(kInt8PanelBlocks);
    for (int first = grid.tiles.begin; first < grid.tiles.end; first += most) {
        const Range group = {first, std::min(first + most, grid.tiles.end)};
        each_block(op.weight, team, grid.parts, group.end < grid.tiles.end,
                   [&](const QuantizedLayout& layout, const uint8_t* weight, const Columns& columns) {
                       multiply_group<T>(op, layout, weight, columns, rows, group, panel, sums, num_sums);
                   });
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Activations in int8 with a scale for each row.

// Rows in int8, as [tile][columns / 32][rows of the tile][32].
struct TokenRows {
    Tiles tiles;
    const TokenRow* rows;
    const TokenCode* codes;
    int64_t padded;  // columns
};

// Shared memory for rows that are rounded.
size_t bytes_of_tokens(int rows, int columns) {
    return rows * (sizeof(TokenRow) + static_cast<size_t>(blocks_of(columns, kBlock)) * kBlock * sizeof(TokenCode));
}

template <class T>
TokenRows token_rows(const OctavoLinear& op, const OctavoStep& step, const Team& team, const Tiles& tiles) {
    const int columns = op.weight.columns;
    const int64_t padded = static_cast<int64_t>(blocks_of(columns, kBlock)) * kBlock;
    T* normed = op.norm ? team.scratch.take<T>(padded) : nullptr;
    const bool alone = tiles.count == 1;  // as above
    const size_t bytes = bytes_of_tokens(tiles.rows, columns);
    TokenRow* rows = alone ? reinterpret_cast<TokenRow*>(team.scratch.take<uint8_t>(bytes))
                           : reinterpret_cast<TokenRow*>(team.shared.workspace);
    TokenCode* codes = reinterpret_cast<TokenCode*>(rows + tiles.rows);
    const Range mine = alone ? Range{0, 1} : team.share(tiles.count);
    for (int tile = mine.begin; tile < mine.end; ++tile) {
        const int begin = tiles.begin(tile), size = tiles.size(tile);
        for (int r = 0; r < size; ++r)
            rows[begin + r] = quantize_token(read_row(op, step, begin + r, normed), columns,
                                             codes + begin * padded + r * kBlock, size * kBlock);
    }
    if (!alone) team.wait();
    return {tiles, rows, codes, padded};
}

// Some tiles stay in the L2 cache while all weights pass by.
template <class T>
void multiply_tokens(const OctavoLinear& op, const OctavoStep& step, const Team& team, int num_rows) {
    const Tiles tiles = Tiles::of(num_rows, kTokenRows);
    const Grid grid = divide(tiles.count, row_blocks(op.weight), team.index, team.size);
    const TokenRows rows = token_rows<T>(op, step, team, tiles);
    const uintptr_t ahead = num_rows <= kTokenRowsReadByHardware && is_amd() ? 0 : kTokenAheadBytes;
    const int64_t tile_bytes = kTokenRows * rows.padded * static_cast<int64_t>(sizeof(TokenCode));
    const int most = static_cast<int>(std::max<int64_t>(1, kTokenBytesPerGroup / tile_bytes));
    alignas(kCacheLine) float sums[kTokenRows * kColumns];
    for (int first = grid.tiles.begin; first < grid.tiles.end; first += most) {
        const int last = std::min(first + most, grid.tiles.end);
        each_block(op.weight, team, grid.parts, last < grid.tiles.end,
                   [&](const QuantizedLayout& layout, const uint8_t* weight, const Columns& columns) {
                       for (int tile = first; tile < last; ++tile) {
                           const int begin = tiles.begin(tile), size = tiles.size(tile);
                           dot_token(layout, weight, size, rows.rows + begin, rows.codes + begin * rows.padded, ahead,
                                     sums);
                           finish<T>(op, columns, begin, size, sums);
                       }
                   });
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Activations as they are: blocks of the weight are dequantised into the L1 cache and multiplied as plain ones are.

// Blocks of k that are dequantised at a time: all of them if products cannot be computed in parts.
template <class T>
int blocks_at_once(int blocks) {
    return kAddsInParts<T> ? std::min(blocks, kFloatPanelBlocks) : blocks;
}

// Products of some tiles with a block of 32 rows of the weight.
template <class T>
void multiply_dequantized(const QuantizedLayout& layout, const uint8_t* weight, const Rows<T>& rows, const Range& tiles,
                          Unpacked<T>* numbers, float* sums) {
    using W = Unpacked<T>;
    const int all = layout.shape.column_blocks(), most = blocks_at_once<T>(all);
    const uintptr_t ahead = rows.tiles.rows <= kRowsReadByHardware && is_amd() ? 0 : kAheadBytes;
    Cursor at = Cursor::at(layout, weight, 0);
    for (int k = 0; k < all; k += most) {
        const int blocks = std::min(most, all - k);
        dequantize_blocks<T>(at, blocks, ahead, numbers);
        const Right<W> right = {numbers, kBlockElements};
        for (int tile = tiles.begin; tile < tiles.end; ++tile) {
            const int size = rows.tiles.size(tile);
            Left<T> found = rows.tile(rows.tiles.begin(tile), size);
            const Left<W> left = {found.data + k * found.block, found.row, found.block};
            float* out = sums + (tile - tiles.begin) * kRows<T> * kColumns;
            if constexpr (kAddsInParts<T>)
                add_dot(size, left, right, blocks, k == 0, out);
            else
                dot(size, left, right, blocks, out);
        }
    }
}

// Products of a single tile of very few rows.
template <class T>
void multiply_few(const OctavoLinear& op, const Team& team, const Rows<T>& rows, int parts) {
    const int count = rows.tiles.rows;
    const uintptr_t ahead = count <= kRowsReadByHardware && is_amd() ? 0 : kAheadBytes;
    alignas(kCacheLine) float sums[kFloatRows<T> * kColumns];
    each_block(op.weight, team, parts, false,
               [&](const QuantizedLayout& layout, const uint8_t* weight, const Columns& columns) {
                   dot_float<T>(layout, weight, count, rows.tile(0, count), ahead, sums);
                   finish<T>(op, columns, 0, count, sums);
               });
}

// Some tiles stay in the L2 cache while all weights pass by.
template <class T>
void multiply_floats(const OctavoLinear& op, const OctavoStep& step, const Team& team, int num_rows) {
    const Tiles tiles = Tiles::of(num_rows, kRows<T>);
    const Grid grid = divide(tiles.count, row_blocks(op.weight), team.index, team.size);
    const Rows<T> rows = rows_of_x<T>(op, step, team, tiles);
    if constexpr (kFloatRows<T> > 0) {
        if (num_rows <= kFloatRows<T>) return multiply_few(op, team, rows, grid.parts);
    }
    const int blocks = blocks_of(op.weight.columns, kBlock);
    const int64_t tile_bytes = kRows<T> * rows.padded * static_cast<int64_t>(sizeof(LeftOf<T>));
    const int most = static_cast<int>(std::max(kMinTilesPerFloatGroup, kFloatBytesPerGroup / tile_bytes));
    using W = Unpacked<T>;
    W* numbers = team.scratch.take<W>(static_cast<size_t>(blocks_at_once<T>(blocks)) * kBlockElements);
    float* sums = team.scratch.take<float>(static_cast<size_t>(std::min(most, tiles.count)) * kRows<T> * kColumns);
    for (int first = grid.tiles.begin; first < grid.tiles.end; first += most) {
        const Range group = {first, std::min(first + most, grid.tiles.end)};
        each_block(op.weight, team, grid.parts, group.end < grid.tiles.end,
                   [&](const QuantizedLayout& layout, const uint8_t* weight, const Columns& columns) {
                       multiply_dequantized<T>(layout, weight, rows, group, numbers, sums);
                       for (int tile = group.begin; tile < group.end; ++tile)
                           finish<T>(op, columns, tiles.begin(tile), tiles.size(tile),
                                     sums + (tile - group.begin) * kRows<T> * kColumns);
                   });
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Rows that others have staged, with a part of the weight.

template <class T>
void multiply_int8_part(const OctavoLinear& op, int num_rows, const Int8Block* data, const Range& part,
                        const Team& team) {
    const Tiles tiles = Tiles::of(num_rows, kInt8Rows);
    const Int8Rows rows = {tiles, data, blocks_of(op.weight.columns, kBlock)};
    if (tiles.count == 1) return multiply_tile<T>(op, rows, part);
    const int64_t tile_bytes = kInt8Rows * static_cast<int64_t>(rows.blocks) * sizeof(Int8Block);
    const int most = static_cast<int>(std::max<int64_t>(kMinTilesPerPanel, kRowBytesPerGroup / tile_bytes));
    const size_t num_sums = static_cast<size_t>(std::min(most, tiles.count)) * kInt8Rows * kColumns;
    float* sums = team.scratch.take<float>(num_sums);
    DecodedBlock* panel = team.scratch.take<DecodedBlock>(kInt8PanelBlocks);
    for (int first = 0; first < tiles.count; first += most) {
        const Range group = {first, std::min(first + most, tiles.count)};
        each_block_of(op.weight, part,
                      [&](const QuantizedLayout& layout, const uint8_t* weight, const Columns& columns) {
                          multiply_group<T>(op, layout, weight, columns, rows, group, panel, sums, num_sums);
                      });
    }
}

template <class T>
void multiply_token_part(const OctavoLinear& op, int num_rows, const TokenRow* data, const Range& part) {
    const Tiles tiles = Tiles::of(num_rows, kTokenRows);
    const int64_t padded = static_cast<int64_t>(blocks_of(op.weight.columns, kBlock)) * kBlock;
    const TokenCode* codes = reinterpret_cast<const TokenCode*>(data + num_rows);
    const uintptr_t ahead = num_rows <= kTokenRowsReadByHardware && is_amd() ? 0 : kTokenAheadBytes;
    alignas(kCacheLine) float sums[kTokenRows * kColumns];
    each_block_of(op.weight, part, [&](const QuantizedLayout& layout, const uint8_t* weight, const Columns& columns) {
        for (int tile = 0; tile < tiles.count; ++tile) {
            const int begin = tiles.begin(tile), size = tiles.size(tile);
            dot_token(layout, weight, size, data + begin, codes + begin * padded, ahead, sums);
            finish<T>(op, columns, begin, size, sums);
        }
    });
}

template <class T>
void multiply_float_part(const OctavoLinear& op, int num_rows, const LeftOf<T>* data, const Range& part,
                         const Team& team) {
    const int blocks = blocks_of(op.weight.columns, kBlock);
    const Rows<T> rows = {Tiles::of(num_rows, kRows<T>), data, 0, static_cast<int64_t>(blocks) * kBlock};
    const Tiles& tiles = rows.tiles;
    if constexpr (kFloatRows<T> > 0) {
        if (num_rows <= kFloatRows<T>) {
            const uintptr_t ahead = num_rows <= kRowsReadByHardware && is_amd() ? 0 : kAheadBytes;
            alignas(kCacheLine) float sums[kFloatRows<T> * kColumns];
            each_block_of(op.weight, part,
                          [&](const QuantizedLayout& layout, const uint8_t* weight, const Columns& columns) {
                              dot_float<T>(layout, weight, num_rows, rows.tile(0, num_rows), ahead, sums);
                              finish<T>(op, columns, 0, num_rows, sums);
                          });
            return;
        }
    }
    const int64_t tile_bytes = kRows<T> * rows.padded * static_cast<int64_t>(sizeof(LeftOf<T>));
    const int most = static_cast<int>(std::max(kMinTilesPerFloatGroup, kFloatBytesPerGroup / tile_bytes));
    using W = Unpacked<T>;
    W* numbers = team.scratch.take<W>(static_cast<size_t>(blocks_at_once<T>(blocks)) * kBlockElements);
    float* sums = team.scratch.take<float>(static_cast<size_t>(std::min(most, tiles.count)) * kRows<T> * kColumns);
    for (int first = 0; first < tiles.count; first += most) {
        const Range group = {first, std::min(first + most, tiles.count)};
        each_block_of(op.weight, part,
                      [&](const QuantizedLayout& layout, const uint8_t* weight, const Columns& columns) {
                          multiply_dequantized<T>(layout, weight, rows, group, numbers, sums);
                          for (int tile = group.begin; tile < group.end; ++tile)
                              finish<T>(op, columns, tiles.begin(tile), tiles.size(tile),
                                        sums + (tile - group.begin) * kRows<T> * kColumns);
                      });
    }
}

}  // namespace

void run_quantized_linear(const OctavoLinear& op, const OctavoStep& step, const Team& team) {
    const int num_rows = num_rows_of(op, step);
    if (num_rows == 0) return;
    with_type(op.type, [&](auto number) {
        using T = decltype(number);
        if (op.weight.rounding == kByBlock)
            multiply_int8<T>(op, step, team, num_rows);
        else if (op.weight.rounding == kByRow)
            multiply_tokens<T>(op, step, team, num_rows);
        else
            multiply_floats<T>(op, step, team, num_rows);
    });
}

size_t quantized_linear_workspace(const OctavoLinear& op, int rows) {
    if (op.weight.rounding == kByRow) return bytes_of_tokens(rows, op.weight.columns);
    if (op.weight.rounding == kExact)
        return with_type(op.type, [&](auto number) { return workspace_of_rows<decltype(number)>(op, rows); });
    return static_cast<size_t>(rows) * blocks_of(op.weight.columns, kBlock) * sizeof(Int8Block);
}

int most_quantized_rows(const OctavoLinear& op) {
    if (op.weight.rounding == kByBlock) return kInt8Rows;
    if (op.weight.rounding == kByRow) return kTokenRows;
    return with_type(op.type, [&](auto number) { return kRows<decltype(number)>; });
}

size_t staged_quantized_bytes(const OctavoLinear& op) {
    const size_t blocks = blocks_of(op.weight.columns, kBlock);
    if (op.weight.rounding == kByBlock) return blocks * sizeof(Int8Block);
    if (op.weight.rounding == kByRow) return bytes_of_tokens(1, op.weight.columns);
    return with_type(op.type, [&](auto number) { return blocks * kBlock * sizeof(LeftOf<decltype(number)>); });
}

uintptr_t address_of_quantized_block(const OctavoLinear& op, int block) {
    uintptr_t result = 0;
    each_segment_of(op.weight, {block, block + 1},
                    [&](const QuantizedLayout&, const uint8_t* rows, const auto&) { result = address_of(rows); });
    return result;
}

int quantized_row_blocks(const OctavoLinear& op) { return row_blocks(op.weight); }

int64_t quantized_block_bytes(const OctavoLinear& op) {
    const OctavoSegment& first = op.weight.segments[0];
    return QuantizedLayout(first.encoding, first.rows, op.weight.columns, op.weight.paired != 0).stride();
}

void stage_quantized_tile(const OctavoLinear& op, const OctavoStep& step, int rows, int tile, void* staged) {
    const Tiles tiles = Tiles::of(rows, most_quantized_rows(op));
    const int columns = op.weight.columns, begin = tiles.begin(tile), size = tiles.size(tile);
    const int64_t blocks = blocks_of(columns, kBlock), padded = blocks * kBlock;
    with_type(op.type, [&](auto number) {
        using T = decltype(number);
        if (op.weight.rounding == kExact)
            return stage<T>(op, step, begin, size, nullptr, static_cast<LeftOf<T>*>(staged) + begin * padded);
        TokenRow* token_rows = static_cast<TokenRow*>(staged);
        TokenCode* codes = reinterpret_cast<TokenCode*>(token_rows + rows) + begin * padded;
        Int8Block* data = static_cast<Int8Block*>(staged) + begin * blocks;
        for (int r = 0; r < size; ++r) {
            const T* x = read_row<T>(op, step, begin + r, nullptr);
            if (op.weight.rounding == kByRow)
                token_rows[begin + r] = quantize_token(x, columns, codes + r * kBlock, size * kBlock);
            else
                quantize_row(x, columns, data + r, size);
        }
    });
}

void multiply_quantized_part(const OctavoLinear& op, int rows, const void* staged, const Range& blocks,
                             const Team& team) {
    const Scratch::Mark mark = team.scratch.mark();
    with_type(op.type, [&](auto number) {
        using T = decltype(number);
        if (op.weight.rounding == kByBlock)
            multiply_int8_part<T>(op, rows, static_cast<const Int8Block*>(staged), blocks, team);
        else if (op.weight.rounding == kByRow)
            multiply_token_part<T>(op, rows, static_cast<const TokenRow*>(staged), blocks);
        else
            multiply_float_part<T>(op, rows, static_cast<const LeftOf<T>*>(staged), blocks, team);
    });
    team.scratch.release(mark);
}

}  // namespace octavo
