// Products of many rows with a right factor that must be float32: panels of it, converted once for all rows.
//
// `dot` converts its right factor anew for every few rows, and reads those rows anew for every 32 columns, though they
// soon exceed the L1 cache. Here k is cut into panels instead: one is converted into the L1 cache, and all rows pass by
// it. The sums wait in memory between panels, so each element still has one accumulator over ascending k, and the bits
// are those of `dot`. (The blocking of Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication".)
#pragma once

#include "dot.h"

namespace octavo {

// A panel has 16 KiB: at most half an L1 cache, beside the rows that pass by. With AVX-512 and a larger L1 cache it has
// 32 KiB: twice the blocks of k, so that sums are read and written half as often.
#if defined(__AVX512F__)
constexpr int kPanelColumns = 32;  // of a block
constexpr int kPanelWidth = 2;     // blocks of columns
constexpr int kPanelBlocks = 4;    // of k, at most
#else
constexpr int kPanelColumns = 16;
constexpr int kPanelWidth = 1;
constexpr int kPanelBlocks = 8;
#endif
constexpr int kLargeL1Bytes = 48 << 10;
constexpr int kPanelElements = kPanelWidth * kPanelColumns * kPanelBlocks * kBlock;
constexpr int kPanelsPerBlock = kColumns / kPanelColumns;

// Blocks of k in a panel on this CPU.
int panel_blocks();

// The right factor of `dot_panel`: float32, a row of columns for each k.
struct Panel {
    const float* data[kPanelWidth];  // of each block of columns
    int64_t step;                    // from one k to the next
};

// Panel number `part` of kPanelsPerBlock, of `width` <= kPanelWidth blocks of columns that lie `distance` elements
// apart. `buffer`: kPanelElements numbers, which the panel uses if it must be converted.
template <class T>
Panel make_panel(const Right<T>& right, int width, int64_t distance, int blocks, int part, float* buffer);

// Sums of a tile and some blocks of columns.
struct PanelSums {
    float* data;       // rows lie kColumns apart
    int64_t distance;  // from one block of columns to the next
};

// What the next call of `dot_panel` reads beside its panel: brought into the L1 cache at the end of this one.
struct NextTile {
    const float* left;
    int64_t row;  // from one row to the next
    const float* sums;
};

// sums[r][0..kPanelColumns] += left[r] * panel, or = if `first`, for each of the panel's `width` blocks of columns.
// 1 <= rows <= kRows<float>. The rows of `left` lie in blocks of k as in `dot`. `fetch` is left at what follows.
void dot_panel(int rows, int width, const Left<float>& left, const Panel& panel, int blocks, bool first, Fetch& fetch,
               const NextTile& next, const PanelSums& sums);

// Cache lines that one call of `dot_panel` prefetches.
int fetches_of_panel(int rows, int width, int blocks);

}  // namespace octavo
