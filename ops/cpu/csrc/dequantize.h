// The numbers of quantised weights, rounded to the type of the activations.
#pragma once

#include "quantized.h"

namespace octavo {

// What float products read weights as: pairs of bfloat16, or float32.
template <class T>
using Unpacked = std::conditional_t<kMultipliesFloat<T>, float, T>;

// Scales of some columns in registers: w = scale * value + minimum, where integer values count from `offset`.
struct ColumnScales {
    Floats scale[2];
    Floats minimum[2];
    Floats offset;
};

template <class Form, bool kZeroPoints>
inline ColumnScales scales_of(const Cursor& at, const BlockScales& found, int column) {
    ColumnScales out;
    for (int half = 0; half < 2; ++half) {
        const int group = Form::kGroups == 2 ? half : 0;
        out.scale[half] = load_floats(found.scale[group] + column);
        if constexpr (Form::kHasMinimum && !kZeroPoints) out.minimum[half] = load_floats(found.minimum[group] + column);
    }
    if constexpr (kZeroPoints) {
        const OctavoEncoding& encoding = at.layout->encoding;
        alignas(64) float zeros[kLanes];
        store(zeros, load_integers(at.header + kColumns * scale_bytes(encoding.scale_type) + column / kLanes * kLanes));
        out.offset = load_floats(zeros + column % kLanes);
    } else {
        out.offset = splat_floats(static_cast<float>(Form::kOffset));
    }
    return out;
}

template <class Form, bool kZeroPoints, int kByte>
inline Floats number_at(Codes codes, const ColumnScales& scales, int half) {
    const Floats product = multiply(scales.scale[half], Form::Values::template get<kByte>(codes, scales.offset));
    if constexpr (Form::kHasMinimum && !kZeroPoints) return plus(product, scales.minimum[half]);
    return product;
}

// Numbers of one line, four columns of k, to where products read them; `half`: of the block's k.
template <class Form, bool kZeroPoints, class T, class W>
inline void store_line(Codes codes, const ColumnScales& scales, int half, W* out) {
    const Floats first = number_at<Form, kZeroPoints, 0>(codes, scales, half);
    const Floats second = number_at<Form, kZeroPoints, 1>(codes, scales, half);
    const Floats third = number_at<Form, kZeroPoints, 2>(codes, scales, half);
    const Floats fourth = number_at<Form, kZeroPoints, 3>(codes, scales, half);
    if constexpr (std::is_same_v<W, float>) {
        store_floats(out, rounded<T>(first));
        store_floats(out + kStepElements, rounded<T>(second));
        store_floats(out + 2 * kStepElements, rounded<T>(third));
        store_floats(out + 3 * kStepElements, rounded<T>(fourth));
    } else {
#if defined(__AVX512BF16__)
        _mm512_storeu_si512(out, (__m512i)rounded_pairs(first, second));
        _mm512_storeu_si512(out + kStepElements, (__m512i)rounded_pairs(third, fourth));
#endif
    }
}

// A block of 32 rows and 32 columns.
template <class Form, bool kZeroPoints, class T, class W>
inline void dequantize_block(const Cursor& at, W* out) {
    using Read = typename Form::Read;
    constexpr int kLineElements = 4 / kPair<W> * kStepElements;
    BlockScales found;
    Form::Scales::get(at.layout->encoding, at.rows, at.header, at.codes, at.index, found);
    for (int half = 0; half < 2; ++half) {
        for (int part = 0; part < kLanes; part += kIntColumns) {
            const ColumnScales scales = scales_of<Form, kZeroPoints>(at, found, half * kLanes + part);
            const uint8_t* codes = at.codes + half * Read::kHalfBytes + part * 4;
            W* target = out + half * kHalfElements<W> + part * kPair<W>;
            const auto line = [&](auto number) {
                constexpr int kLine = decltype(number)::value;
                Codes first, second;
                Read::template get<kLine>(codes, first, second);
                store_line<Form, kZeroPoints, T>(first, scales, 0, target + kLine * kLineElements);
                store_line<Form, kZeroPoints, T>(second, scales, 1, target + (kLine + kLines) * kLineElements);
            };
            line(std::integral_constant<int, 0>());
            line(std::integral_constant<int, 1>());
            line(std::integral_constant<int, 2>());
            line(std::integral_constant<int, 3>());
        }
    }
}

// Calls `function` with the form of an encoding, and with whether its codes count from zero points.
template <class F>
void with_zero_points(const OctavoEncoding& encoding, F function) {
    with_form(encoding, [&](auto form) {
        if constexpr (decltype(form)::kHasMinimum && !decltype(form)::Scales::kIsSuper) {
            if (encoding.shift == kZeros) return function(form, std::true_type());
        }
        function(form, std::false_type());
    });
}

inline void prefetch_block(const Cursor& at, uintptr_t ahead) {
    for (int line = -at.layout->front_bytes; line < at.layout->block_bytes - at.layout->front_bytes;
         line += kCacheLineBytes)
        prefetch(address_of(at.codes) + ahead + line);
}

// Some blocks of the same 32 rows, in the layout of plain weights of type W. What lies `ahead` bytes further on is
// prefetched.
template <class T, class W>
void dequantize_blocks(Cursor& at, int blocks, uintptr_t ahead, W* out);

// A row of a segment.
template <class T>
void dequantize_row(const QuantizedLayout& layout, const uint8_t* packed, int row, T* out);

}  // namespace octavo
