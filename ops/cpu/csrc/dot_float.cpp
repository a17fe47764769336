#include "dot_float.h"

#include <utility>

namespace octavo {

namespace {

// As a product with plain weights does it.
inline Floats add_product(Floats sum, float x, Floats w) {
#if defined(__AVX2__)
    return multiply_add(splat_floats(x), w, sum);
#else
    return splat_floats(x) * w + sum;
#endif
}

// Adds the products of one line, four columns of k, with rows of x.
template <class Form, bool kZeroPoints, class T, int kNumRows>
inline __attribute__((always_inline)) void add_line(Codes codes, const ColumnScales& scales, int half,
                                                    const Left<T>& left, const LeftOf<T>* x, Floats (&sums)[kNumRows]) {
    const Floats first = number_at<Form, kZeroPoints, 0>(codes, scales, half);
    const Floats second = number_at<Form, kZeroPoints, 1>(codes, scales, half);
    const Floats third = number_at<Form, kZeroPoints, 2>(codes, scales, half);
    const Floats fourth = number_at<Form, kZeroPoints, 3>(codes, scales, half);
    if constexpr (kMultipliesFloat<T>) {
        const Floats numbers[4] = {rounded<T>(first), rounded<T>(second), rounded<T>(third), rounded<T>(fourth)};
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
            for (int r = 0; r < kNumRows; ++r) sums[r] = add_product(sums[r], x[r * left.row + i], numbers[i]);
        }
    } else {
#if defined(__AVX512BF16__)
        const __m512bh numbers[2] = {rounded_pairs(first, second), rounded_pairs(third, fourth)};
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 4
            for (int r = 0; r < kNumRows; ++r) {
                int32_t pair;
                std::memcpy(&pair, x + r * left.row + 2 * i, sizeof pair);
                sums[r] = _mm512_dpbf16_ps(sums[r], numbers[i], (__m512bh)_mm512_set1_epi32(pair));
            }
        }
#endif
    }
}

// Adds the products of a block with one vector of columns.
template <class Form, bool kZeroPoints, class T, int kNumRows>
inline void add_block(const Cursor& at, const BlockScales& found, int column, const Left<T>& left, const LeftOf<T>* x,
                      float* result) {
    using Read = typename Form::Read;
    const ColumnScales scales = scales_of<Form, kZeroPoints>(at, found, column);
    const uint8_t* codes = at.codes + column / kLanes * Read::kHalfBytes + column % kLanes * 4;
    Codes lines[2][kLines];
    Read::template get<0>(codes, lines[0][0], lines[1][0]);
    Read::template get<1>(codes, lines[0][1], lines[1][1]);
    Read::template get<2>(codes, lines[0][2], lines[1][2]);
    Read::template get<3>(codes, lines[0][3], lines[1][3]);
    Floats sums[kNumRows];
#pragma GCC unroll 4
    for (int r = 0; r < kNumRows; ++r) sums[r] = load_floats(result + r * kColumns + column);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 4
        for (int line = 0; line < kLines; ++line)
            add_line<Form, kZeroPoints, T>(lines[half][line], scales, half, left, x + 4 * (half * kLines + line), sums);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kNumRows; ++r) store_floats(result + r * kColumns + column, sums[r]);
}

template <class Form, bool kZeroPoints, class T, int kNumRows>
void multiply_rows(const QuantizedLayout& layout, const uint8_t* weight, const Left<T>& left, uintptr_t ahead,
                   float* sums) {
    Cursor at = Cursor::at(layout, weight, 0);
    BlockScales found;
    for (int k = 0; k < layout.shape.column_blocks(); ++k, at.next()) {
        Form::Scales::get(layout.encoding, at.rows, at.header, at.codes, at.index, found);
        prefetch_block(at, ahead);
        for (int column = 0; column < kColumns; column += kIntColumns)
            add_block<Form, kZeroPoints, T, kNumRows>(at, found, column, left, left.data + k * left.block, sums);
    }
}

}  // namespace

template <class T>
void dot_float(const QuantizedLayout& layout, const uint8_t* weight, int rows, const Left<T>& left, uintptr_t ahead,
               float* sums) {
    std::memset(sums, 0, rows * kColumns * sizeof(float));
    with_zero_points(layout.encoding, [&](auto form, auto zero_points) {
        using F = decltype(form);
        constexpr bool kZeroPoints = decltype(zero_points)::value;
        if (rows == 1)
            multiply_rows<F, kZeroPoints, T, 1>(layout, weight, left, ahead, sums);
        else
            multiply_rows<F, kZeroPoints, T, 2>(layout, weight, left, ahead, sums);
    });
}

#if !defined(OCTAVO_AMX)
template void dot_float(const QuantizedLayout&, const uint8_t*, int, const Left<BFloat16>&, uintptr_t, float*);
#endif

}  // namespace octavo
