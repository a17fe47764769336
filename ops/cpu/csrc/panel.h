// Products of many rows with a right factor that must be float32: panels of it, converted once for all rows.
//
// `dot` converts its right factor anew for every few rows, and reads those rows anew for every 32 columns, though they
// soon exceed the L1 cache. Here k is cut into panels instead: one is converted into the L1 cache, and all rows pass by
// it. The sums wait in memory between panels, so each element still has one accumulator over ascending k, and the bits
// are those of `dot`. (The blocking of Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication".)
#pragma once

#include "dot.h"

namespace octavo {

// A panel has 16 KiB: half an L1 cache, beside the rows that pass by.
#if defined(__AVX512F__)
constexpr int kPanelColumns = 32;
constexpr int kPanelBlocks = 4;  // of k
#else
constexpr int kPanelColumns = 16;
constexpr int kPanelBlocks = 8;
#endif
constexpr int kPanelElements = kPanelColumns * kPanelBlocks * kBlock;
constexpr int kPanelsPerBlock = kColumns / kPanelColumns;

// The right factor of `dot_panel`: float32, a row of columns for each k.
struct Panel {
    const float* data;
    int64_t step;  // from one k to the next
};

// Panel number `part` of kPanelsPerBlock. `buffer`: kPanelElements numbers, which the panel uses if it must be
// converted.
template <class T>
Panel make_panel(const Right<T>& right, int blocks, int part, float* buffer);

// What the next call of `dot_panel` reads beside its panel: brought into the L1 cache at the end of this one.
struct NextTile {
    const float* left;
    int64_t row;  // from one row to the next
    const float* sums;
};

// sums[r][0..kPanelColumns] += left[r] * panel, or = if `first`. The rows of sums lie kColumns apart. 1 <= rows <=
// kRows<float>. The rows of `left` lie in blocks of k as in `dot`.
void dot_panel(int rows, const Left<float>& left, const Panel& panel, int blocks, bool first, Fetch fetch,
               const NextTile& next, float* sums);

// Cache lines that one call of `dot_panel` prefetches.
constexpr int fetches_of_panel(int blocks) { return blocks * kBlock / 2; }

}  // namespace octavo
