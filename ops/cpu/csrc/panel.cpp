#include "panel.h"

#include <utility>

#if defined(__linux__)
#include <unistd.h>
#endif

namespace octavo {

namespace {

constexpr int kHalves = kPanelColumns / kLanes;  // of 32 columns, in a panel

// Most rows for which the sums of all columns of a panel fit into registers.
template <int kWidth>
constexpr int kRowsOfPanel = kWidth == 1 ? kRows<float> : kRows<float> / 2;

// Products of some rows with `kWidth` blocks of columns. The wider they are, the fewer loads a product takes: 10 for
// 24 with two blocks, 14 with one. Loads and the addresses of rows need few ports and slots then, which a core shares
// with its other hardware thread. `T`: a type whose rows are copies, or float if they are not.
template <class T, int kNumRows, int kWidth>
Fetch panel_rows(const Left<float>& left, const Panel& panel, int blocks, bool first, Fetch fetch, const NextTile& next,
                 const PanelSums& result) {
    constexpr int kVecs = kWidth * kHalves;
    constexpr int kLine = kCacheLineBytes / static_cast<int>(sizeof(float));
    constexpr int kUnrolled = 4;
    Vec sums[kVecs][kNumRows];
    const auto place = [&](int r, int v) {
        return result.data + v / kHalves * result.distance + r * kColumns + v % kHalves * kLanes;
    };
    // Unrolled as in dot.cpp.
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
#pragma GCC unroll 16
        for (int r = 0; r < kNumRows; ++r) sums[v][r] = zero();
    }
    if (!first) {
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) {
#pragma GCC unroll 16
            for (int r = 0; r < kNumRows; ++r) sums[v][r] = load(place(r, v));
        }
    }
    const int64_t step = kPanelColumns == kStepElements ? kStepElements : panel.step;
    const float* w = panel.data[0];
    const int64_t other = panel.data[kWidth - 1] - w;
    RowPointers<T, kNumRows> x(left.data, left.row);
    for (int k = 0; k < blocks; ++k) {
        const bool is_last = k + 1 == blocks;
        const float* ahead = is_last ? next.left : left.data + (k + 1) * left.block;
        const int64_t distance = is_last ? next.row : left.row;
        for (int r = 0; r < kNumRows; ++r, ahead += distance) {
            prefetch_l1(address_of(ahead));
            prefetch_l1(address_of(ahead) + kCacheLineBytes);
        }
        for (int v = 0; is_last && v < kWidth; ++v)
            for (int r = 0; r < kNumRows; ++r)
                for (int h = 0; h < kPanelColumns; h += kLine)
                    prefetch_l1(address_of(next.sums + v * result.distance + r * kColumns + h));
#pragma GCC unroll 1
        for (int s = 0; s < kBlock; s += kUnrolled) {
#pragma GCC unroll 4
            for (int i = 0; i < kUnrolled; ++i, w += step) {
                if (i % 2 == 0) advance(fetch);
                Vec columns[kVecs];
#pragma GCC unroll 4
                for (int v = 0; v < kVecs; ++v) columns[v] = load(w + v / kHalves * other + v % kHalves * kLanes);
#pragma GCC unroll 16
                for (int r = 0; r < kNumRows; ++r) {
                    const Vec row = splat(x[r][i]);
#pragma GCC unroll 4
                    for (int v = 0; v < kVecs; ++v) sums[v][r] = fma(row, columns[v], sums[v][r]);
                }
            }
            x.advance(kUnrolled);
        }
        x.advance(left.block - kBlock);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
#pragma GCC unroll 16
        for (int r = 0; r < kNumRows; ++r) store(place(r, v), sums[v][r]);
    }
    return fetch;
}

using PanelRows = Fetch (*)(const Left<float>&, const Panel&, int, bool, Fetch, const NextTile&, const PanelSums&);

template <int kWidth, int... kIndices>
PanelRows choose_rows(int rows, bool are_copies, std::integer_sequence<int, kIndices...>) {
    static constexpr PanelRows kCopies[] = {panel_rows<Float16, kIndices + 1, kWidth>...};
    static constexpr PanelRows kInPlace[] = {panel_rows<float, kIndices + 1, kWidth>...};
    return (are_copies ? kCopies : kInPlace)[rows - 1];
}

template <int kWidth>
void dot_parts(int rows, const Left<float>& left, const Panel& panel, int blocks, bool first, Fetch& fetch,
               const NextTile& next, const PanelSums& sums) {
    const auto choose = [&](int count) {
        return choose_rows<kWidth>(count, left.row == kBlock, std::make_integer_sequence<int, kRowsOfPanel<kWidth>>());
    };
    if (rows <= kRowsOfPanel<kWidth>) {
        fetch = choose(rows)(left, panel, blocks, first, fetch, next, sums);
        return;
    }
    const int upper = (rows + 1) / 2;
    const Left<float> lower = {left.data + upper * left.row, left.row, left.block};
    float* const lower_sums = sums.data + upper * kColumns;
    fetch = choose(upper)(left, panel, blocks, first, fetch, {lower.data, left.row, lower_sums}, sums);
    fetch = choose(rows - upper)(lower, panel, blocks, first, fetch, next, {lower_sums, sums.distance});
}

}  // namespace

int panel_blocks() {
#if defined(__AVX512F__) && defined(_SC_LEVEL1_DCACHE_SIZE)
    static const bool is_large = sysconf(_SC_LEVEL1_DCACHE_SIZE) >= kLargeL1Bytes;
    return is_large ? kPanelBlocks : kPanelBlocks / 2;
#else
    return kPanelBlocks;
#endif
}

void dot_panel(int rows, int width, const Left<float>& left, const Panel& panel, int blocks, bool first, Fetch& fetch,
               const NextTile& next, const PanelSums& sums) {
    if constexpr (kPanelWidth > 1) {
        if (width > 1) return dot_parts<kPanelWidth>(rows, left, panel, blocks, first, fetch, next, sums);
    }
    dot_parts<1>(rows, left, panel, blocks, first, fetch, next, sums);
}

int fetches_of_panel(int rows, int width, int blocks) {
    const int most = width > 1 ? kRowsOfPanel<kPanelWidth> : kRowsOfPanel<1>;
    return (rows > most ? 2 : 1) * blocks * kBlock / 2;
}

template <class T>
Panel make_panel(const Right<T>& right, int width, int64_t distance, int blocks, int part, float* buffer) {
    const T* begin = right.data + part * kHalves * kHalfElements<T>;
    Panel panel = {};
    panel.step = std::is_same_v<T, float> ? kStepElements : kPanelColumns;
    float* out = buffer;
    for (int i = 0; i < width; ++i, begin += distance) {
        if constexpr (std::is_same_v<T, float>) {
            panel.data[i] = begin;
            continue;
        }
        panel.data[i] = out;
        for (int k = 0; k < blocks; ++k) {
            const T* w = begin + k * right.block;
            for (int s = 0; s < kSteps<T>; ++s, w += kStepElements, out += kPair<T> * kPanelColumns) {
                for (int h = 0; h < kHalves; ++h) {
                    if constexpr (kIsBFloat16<T>) {
                        store(out + h * kLanes, load_even(w + h * kHalfElements<T>));
                        store(out + kPanelColumns + h * kLanes, load_odd(w + h * kHalfElements<T>));
                    } else {
                        store(out + h * kLanes, load(w + h * kHalfElements<T>));
                    }
                }
            }
        }
    }
    return panel;
}

template Panel make_panel<BFloat16>(const Right<BFloat16>&, int, int64_t, int, int, float*);
template Panel make_panel<Float16>(const Right<Float16>&, int, int64_t, int, int, float*);
template Panel make_panel<float>(const Right<float>&, int, int64_t, int, int, float*);

}  // namespace octavo
