// Products of weights and activations in int8 with one scale for a whole row of each: sums of integers over all of k.
//
// Such sums are exact, so their bits depend neither on the CPU nor on the number of rows.
#pragma once

#include "quantized.h"

namespace octavo {

// How the CPU reads activations: four int8 beside each other, or pairs of int16, columns 0 and 2, then 1 and 3 of four.
#if defined(__AVX2__) && !defined(OCTAVO_DOT_INT8)
using TokenCode = int16_t;
#else
using TokenCode = int8_t;
#endif

// The code that is at place i of a block.
constexpr int place_of_code(int i) { return sizeof(TokenCode) == 1 ? i : i / 4 * 4 + i % 2 * 2 + i % 4 / 2; }

// A row of activations: x = scale * code.
struct TokenRow {
    float scale;
    int32_t minus_sum;  // of the codes
};

// Rounds a row of numbers to int8, zero-padded; its blocks of 32 columns lie `stride` codes apart.
template <class T>
TokenRow quantize_token(const T* x, int columns, TokenCode* codes, int64_t stride);

// Most rows per call.
#if defined(OCTAVO_AMX)
constexpr int kTokenRows = 32;
#elif defined(__AVX512F__)
constexpr int kTokenRows = 12;
#elif defined(__AVX2__)
constexpr int kTokenRows = 6;
#else
constexpr int kTokenRows = 2;
#endif

// sums[r][0..31] = rows[r] * the weight's 32 rows that begin at `weight`. codes: [columns / 32][rows][32]. 1 <= count
// <= kTokenRows. What lies `ahead` bytes after what is read is prefetched.
void dot_token(const QuantizedLayout& layout, const uint8_t* weight, int count, const TokenRow* rows,
               const TokenCode* codes, uintptr_t ahead, float* sums);

// totals[r][0..31] += x[r] * blocks of 32 x 32 codes, listed: unsigned, and in the layout of weights. While one is
// read, that `ahead` places after it is prefetched. x: [count][rows][32].
void add_products(const uint8_t* const* blocks, int count, int ahead, int rows, const TokenCode* x, int32_t* totals);

}  // namespace octavo
