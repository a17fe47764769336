// What products with plain and with quantised weights share: how rows are read and divided among threads, and how sums
// become results.
#pragma once

#include "adapters.h"
#include "kernels.h"
#include "norm.h"
#include "packed.h"
#include "vec_math.h"

namespace octavo {

// The rows, split into tiles of nearly equal size.
struct Tiles {
    int rows;
    int count;

    // `most`: rows of a tile.
    static Tiles of(int rows, int most) { return {rows, blocks_of(rows, most)}; }
    int begin(int tile) const { return static_cast<int>(static_cast<int64_t>(rows) * tile / count); }
    int size(int tile) const { return begin(tile + 1) - begin(tile); }
};

// How the team divides the results: by columns, so that each thread streams its own weights, and also by rows if there
// are too few columns.
struct Grid {
    Range tiles;
    int parts;  // of the columns, among threads that follow each other
};

inline Grid divide(int tiles, int blocks, int thread, int threads) {
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
    return {share(tiles, thread / best, threads / best), best};
}

// Rows that an op computes, and the place of one in x and in the result.
inline int num_rows_of(const OctavoLinear& op, const OctavoStep& step) {
    return op.listed ? static_cast<int>(op.num_listed) : rows_of(step, op.rows);
}

inline int64_t place_of(const OctavoLinear& op, int row) { return op.listed ? op.listed[row] : row; }

// A row that is multiplied: of x, or of those selected, and normalised on request, into `normed`.
template <class T>
const T* read_row(const OctavoLinear& op, const OctavoStep& step, int index, T* normed) {
    const int64_t place = place_of(op, index);
    const int64_t row = op.gather ? step.logits_rows[place] : place;
    const T* x = static_cast<const T*>(op.x.data) + row * op.x.stride;
    const int columns = op.weight.columns;
    if (op.norm == kRmsNorm)
        rms_norm(x, op.rms_norm, columns, normed);
    else if (op.norm == kLayerNorm)
        layer_norm(x, static_cast<const T*>(op.norm_weight), static_cast<const T*>(op.norm_bias), columns, op.norm_eps,
                   normed);
    return op.norm ? normed : x;
}

// Rows a multiple of this apart map to the same few lines of the L1 cache.
constexpr int64_t kAliasBytes = 4096;

// Whether the kernel can read the rows of x in place.
template <class T>
bool reads_in_place(const OctavoLinear& op, int rows) {
    if (!std::is_same_v<LeftOf<T>, T> || op.weight.columns % kBlock != 0 || op.gather || op.norm || op.listed)
        return false;
    return rows <= kRows<T> || op.x.stride * static_cast<int64_t>(sizeof(T)) % kAliasBytes != 0;
}

// Copies rows into [columns / 32][rows][32]: normalised on request, converted and zero-padded.
template <class T>
void stage(const OctavoLinear& op, const OctavoStep& step, int begin, int rows, T* normed, LeftOf<T>* staged) {
    const int columns = op.weight.columns;
    const int blocks = blocks_of(columns, kBlock);
    for (int r = 0; r < rows; ++r) {
        const T* x = read_row(op, step, begin + r, normed);
        for (int k = 0; k < blocks; ++k) {
            LeftOf<T>* target = staged + (static_cast<int64_t>(k) * rows + r) * kBlock;
            for (int i = 0; i < kBlock; i += kLanes) {
                const int count = columns - k * kBlock - i;
                store(target + i, count > 0 ? load_first(x + k * kBlock + i, count) : zero());
            }
        }
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

// Bytes of the staged rows that all threads share.
template <class T>
size_t workspace_of_rows(const OctavoLinear& op, int rows) {
    if (rows <= kRows<T> || reads_in_place<T>(op, rows)) return 0;
    return static_cast<size_t>(rows) * blocks_of(op.weight.columns, kBlock) * kBlock * sizeof(LeftOf<T>);
}

// The columns of the result that a block of a weight makes: two halves of up to 16.
struct Columns {
    int first[2];
    int count[2];
    int block;  // number of the block

    // `row`, `first_block`: the first of `shape` in the whole weight.
    static Columns of(const PackedShape& shape, int block, int row = 0, int first_block = 0) {
        return {{row + shape.first_row(block, 0), row + shape.first_row(block, 1)},
                {shape.rows_in(block, 0), shape.rows_in(block, 1)},
                first_block + block};
    }
};

// Epilogue: turns the sums of some rows and one block of columns into results.
template <class T>
void finish(const OctavoLinear& op, const Columns& columns, int row, int rows, float* sums) {
    for (int r = 0; r < rows; ++r, sums += kColumns) {
        const int64_t place = place_of(op, row + r);
        if (op.adapted) adapt<T>(*static_cast<const Adapted*>(op.adapted), columns.block, place, sums);
        Vec halves[2];
        for (int half = 0; half < 2; ++half) {
            const int column = columns.first[half];
            const int count = columns.count[half];
            Vec x = load(sums + half * kLanes);
            if (op.bias && count) x = x + load_first(static_cast<const T*>(op.bias) + column, count);
            if (op.epilogue == kLogits) {
                if (op.activation) x = activate(x, op.activation, op.parameter);
                float* out = static_cast<float*>(op.out.data) + place * op.out.stride + column;
                if (count) store_first(out, x, count);
                continue;
            }
            x = round_to<T>(x);
            halves[half] = x;
            if (op.epilogue == kGated || !count) continue;
            if (op.activation) x = round_to<T>(activate(x, op.activation, op.parameter));
            if (op.epilogue == kResidual)
                x = load_first(static_cast<const T*>(op.residual.data) + place * op.residual.stride + column, count) +
                    x;
            store_first(static_cast<T*>(op.out.data) + place * op.out.stride + column, x, count);
        }
        if (op.epilogue != kGated) continue;
        T* out = static_cast<T*>(op.out.data) + place * op.out.stride + columns.first[0];
        const Vec result = gated<T>(halves[0], halves[1], op.activation, op.parameter, op.limit);
        store_first(out, result, columns.count[0]);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// For ops that multiply rows with parts of many weights. The rows are those that `read_row` gives, staged in the form
// that products with the weight read.

// Most rows of a tile.
int most_rows(const OctavoLinear& op);
// Bytes of a staged row.
size_t staged_bytes(const OctavoLinear& op);
// Blocks of 32 rows of the weight, and bytes of each.
int row_blocks_of(const OctavoLinear& op);
int64_t block_bytes_of(const OctavoLinear& op);
uintptr_t address_of_block(const OctavoLinear& op, int block);
// Stages one of the tiles of `rows` rows.
void stage_tile(const OctavoLinear& op, const OctavoStep& step, int rows, int tile, void* staged);
// Products of all staged rows with some blocks of the weight, with the op's epilogue.
void multiply_part(const OctavoLinear& op, int rows, const void* staged, const Range& blocks, const Team& team);

// The same for quantised weights.
int most_quantized_rows(const OctavoLinear& op);
size_t staged_quantized_bytes(const OctavoLinear& op);
int quantized_row_blocks(const OctavoLinear& op);
int64_t quantized_block_bytes(const OctavoLinear& op);
uintptr_t address_of_quantized_block(const OctavoLinear& op, int block);
void stage_quantized_tile(const OctavoLinear& op, const OctavoStep& step, int rows, int tile, void* staged);
void multiply_quantized_part(const OctavoLinear& op, int rows, const void* staged, const Range& blocks,
                             const Team& team);

// ---------------------------------------------------------------------------------------------------------------------
// Products with a quantised weight.
void run_quantized_linear(const OctavoLinear& op, const OctavoStep& step, const Team& team);
size_t quantized_linear_workspace(const OctavoLinear& op, int rows);

}  // namespace octavo
