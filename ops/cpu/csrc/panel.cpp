#include "panel.h"

#include <utility>

namespace octavo {

namespace {

constexpr int kHalves = kPanelColumns / kLanes;  // of 32 columns, in a panel

template <int kNumRows>
void panel_rows(const Left<float>& left, const Panel& panel, int blocks, bool first, Fetch fetch, const NextTile& next,
                float* result) {
    Vec sums[kHalves][kNumRows];
    // Unrolled as in dot.cpp.
    for (int h = 0; h < kHalves; ++h) {
#pragma GCC unroll 16
        for (int r = 0; r < kNumRows; ++r) sums[h][r] = zero();
    }
    if (!first) {
        for (int h = 0; h < kHalves; ++h) {
#pragma GCC unroll 16
            for (int r = 0; r < kNumRows; ++r) sums[h][r] = load(result + r * kColumns + h * kLanes);
        }
    }
    const float* w = panel.data;
    for (int k = 0; k < blocks; ++k) {
        const float* x = left.data + k * left.block;
        const bool is_last = k + 1 == blocks;
        const float* ahead = is_last ? next.left : x + left.block;
        const int64_t distance = is_last ? next.row : left.row;
        for (int r = 0; r < kNumRows; ++r) {
            prefetch_l1(address_of(ahead + r * distance));
            prefetch_l1(address_of(ahead + r * distance) + kCacheLineBytes);
        }
        for (int r = 0; is_last && r < kNumRows; ++r)
            for (int h = 0; h < kPanelColumns; h += kCacheLineBytes / static_cast<int>(sizeof(float)))
                prefetch_l1(address_of(next.sums + r * kColumns + h));
#pragma GCC unroll 4
        for (int s = 0; s < kBlock; ++s, ++x, w += panel.step) {
            if (s % 2 == 0) advance(fetch);
            Vec columns[kHalves];
            for (int h = 0; h < kHalves; ++h) columns[h] = load(w + h * kLanes);
            for (int r = 0; r < kNumRows; ++r) {
                const Vec row = splat(x[r * left.row]);
                for (int h = 0; h < kHalves; ++h) sums[h][r] = fma(row, columns[h], sums[h][r]);
            }
        }
    }
    for (int h = 0; h < kHalves; ++h) {
#pragma GCC unroll 16
        for (int r = 0; r < kNumRows; ++r) store(result + r * kColumns + h * kLanes, sums[h][r]);
    }
}

using PanelRows = void (*)(const Left<float>&, const Panel&, int, bool, Fetch, const NextTile&, float*);

template <int... kIndices>
PanelRows choose_rows(int rows, std::integer_sequence<int, kIndices...>) {
    static constexpr PanelRows kTable[] = {panel_rows<kIndices + 1>...};
    return kTable[rows - 1];
}

}  // namespace

void dot_panel(int rows, const Left<float>& left, const Panel& panel, int blocks, bool first, Fetch fetch,
               const NextTile& next, float* sums) {
    choose_rows(rows, std::make_integer_sequence<int, kRows<float>>())(left, panel, blocks, first, fetch, next, sums);
}

template <class T>
Panel make_panel(const Right<T>& right, int blocks, int part, float* buffer) {
    const T* begin = right.data + part * kHalves * kHalfElements<T>;
    if constexpr (std::is_same_v<T, float>) return {begin, kStepElements};
    float* out = buffer;
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
    return {buffer, kPanelColumns};
}

template Panel make_panel<BFloat16>(const Right<BFloat16>&, int, int, float*);
template Panel make_panel<Float16>(const Right<Float16>&, int, int, float*);
template Panel make_panel<float>(const Right<float>&, int, int, float*);

}  // namespace octavo
