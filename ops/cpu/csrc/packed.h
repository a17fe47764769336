// The layout of packed weights.
//
// Rows (output features) and columns (input features) come in blocks of 32, zero-padded. The blocks of the same 32 rows
// are contiguous, so that a product streams through memory:
//   bfloat16  [rows / 32][columns / 32][2 halves of 16 rows][16 pairs of columns][16 rows][2]  tiles of AMX
//   others    [rows / 32][columns / 32][32 columns][32 rows]
// In a paired weight the two halves of a block are 16 rows of the weight's first half and the matching 16 of its
// second: the gate and up projections, whose product is the layer's result.
#pragma once

#include "octavo.h"

#include "dot.h"

namespace octavo {

constexpr int kBlockElements = kColumns * kBlock;

constexpr int blocks_of(int n, int size) { return (n + size - 1) / size; }

// Where a row of the weight lies.
struct PackedRow {
    int block;
    int half;
    int lane;
};

struct PackedShape {
    int rows;
    int columns;
    bool paired;

    explicit PackedShape(const OctavoWeight& weight)
        : rows(weight.rows), columns(weight.columns), paired(weight.paired != 0) {}
    PackedShape(int rows, int columns, bool paired) : rows(rows), columns(columns), paired(paired) {}

    int row_blocks() const { return paired ? blocks_of(rows / 2, kLanes) : blocks_of(rows, kColumns); }
    int column_blocks() const { return blocks_of(columns, kBlock); }
    int64_t block_stride() const { return static_cast<int64_t>(column_blocks()) * kBlockElements; }

    PackedRow locate(int row) const {
        if (!paired) return {row / kColumns, row % kColumns / kLanes, row % kLanes};
        const int half = row >= rows / 2;
        const int index = row - half * (rows / 2);
        return {index / kLanes, half, index % kLanes};
    }

    // The first of the (up to) 16 rows in half a block, and how many there are.
    int first_row(int block, int half) const {
        return paired ? half * (rows / 2) + block * kLanes : block * kColumns + half * kLanes;
    }
    int rows_in(int block, int half) const {
        const int end = paired ? (half + 1) * (rows / 2) : rows;
        const int count = end - first_row(block, half);
        return count < 0 ? 0 : count > kLanes ? kLanes : count;
    }
};

// The right factor of a product with 32 rows of a packed weight.
template <class T>
Right<T> packed_block(const T* packed, const PackedShape& shape, int block, Fetch fetch) {
    return {packed + block * shape.block_stride(), kBlockElements, nullptr, fetch};
}

// Offset of an element within the blocks of its 32 rows.
template <class T>
int64_t packed_offset(const PackedRow& row, int column) {
    const int64_t block = static_cast<int64_t>(column / kBlock) * kBlockElements;
    const int step = column % kBlock / kPair<T>;
    return block + step * kStepElements + row.half * kHalfElements<T> + row.lane * kPair<T> + column % kPair<T>;
}

}  // namespace octavo
