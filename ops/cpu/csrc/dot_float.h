// Products of quantised weights with very few rows of activations as they are: numbers are made in registers and never
// stored.
#pragma once

#include "dequantize.h"

namespace octavo {

// Most rows per call: with more, numbers are made once for all of them (dequantize.h). Of the type that models are
// mostly served in alone, since there are many formats to compile; the tiles of AMX take none.
template <class T>
constexpr int kFloatRows = kIsBFloat16<T> && kAddsInParts<T> ? 2 : 0;

// sums[r][0..31] = left[r] * the weight's 32 rows that begin at `weight`: the bits of `dot` with its numbers. 1 <= rows
// <= kFloatRows<T>. What lies `ahead` bytes after what is read is prefetched.
template <class T>
void dot_float(const QuantizedLayout& layout, const uint8_t* weight, int rows, const Left<T>& left, uintptr_t ahead,
               float* sums);

}  // namespace octavo
