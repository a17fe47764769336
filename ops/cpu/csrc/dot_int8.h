// The inner kernel of products with quantised weights and activations in int8: a few rows times 32 columns.
//
// The order of operations is that of ops/reference/quantized.py, on every CPU and for any number of rows.
#pragma once

#include "quantized.h"
#include "team.h"

namespace octavo {

constexpr int kLargestOffset = 128;  // of the codes of a weight

// 32 columns of a row of activations: x = scale * code.
struct Int8Block {
    int8_t codes[kBlock];
    float scale;
    float scaled_sum;     // scale * the sum of codes
    int32_t minus_sum;    // of all codes, times the largest offset
    int32_t minus_first;  // likewise of the first 16
};

// Rounds a row of numbers to int8, zero-padded; its blocks lie `stride` apart.
template <class T>
void quantize_row(const T* x, int columns, Int8Block* out, int64_t stride);

// Most rows per call.
#if defined(OCTAVO_AMX)
constexpr int kInt8Rows = 16;
#elif defined(__AVX512F__)
constexpr int kInt8Rows = 6;
#elif defined(__AVX2__)
constexpr int kInt8Rows = 6;
#else
constexpr int kInt8Rows = 2;
#endif

// Blocks of k that are decoded into the L1 cache for all rows to pass by.
constexpr int kInt8PanelBlocks = 8;

// Which of several tiles of rows is multiplied with the same part of the weight. Each prefetches its share of the next
// part.
struct Turn {
    int index;
    int count;
};

// sums[r][0..31] += x[r] * the weight's 32 rows that begin at `weight`, of which some blocks of columns are multiplied.
// x: [blocks][rows]. 1 <= rows <= kInt8Rows.
void dot_int8(const QuantizedLayout& layout, const uint8_t* weight, const Range& blocks, int rows, const Int8Block* x,
              float* sums, const Turn& turn);

// sums[block][r][0..31] = x[r] * 32 rows of the weight, for each of some consecutive blocks of these.
void dot_int8_blocks(const QuantizedLayout& layout, const uint8_t* weight, int row_blocks, int rows, const Int8Block* x,
                     float* sums);

// Whether blocks had better be decoded first, once for many tiles of rows.
bool is_better_decoded(const QuantizedLayout& layout);

// The same in parts, of `blocks` decoded blocks.
void dot_decoded(const QuantizedLayout& layout, const DecodedBlock* panel, int blocks, int rows, const Int8Block* x,
                 float* sums);

// Decodes blocks of the weight from block k of the columns on, and prefetches as many after them.
void decode_blocks(const QuantizedLayout& layout, const uint8_t* weight, int k, int blocks, DecodedBlock* out);

}  // namespace octavo
