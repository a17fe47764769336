// The numbers of quantised weights, rounded to the type of the activations.
#pragma once

#include "quantized.h"

namespace octavo {

// What float products need of a block: w = scale * (code - offset) + minimum, for each half of it.
struct ExactScales {
    float scale[2][kColumns];
    float offset[kColumns];
    float minimum[2][kColumns];
    bool has_minimum;
};

template <class Form>
void exact_scales(const Cursor& at, const BlockScales& found, ExactScales& out) {
    const OctavoEncoding& encoding = at.layout->encoding;
    out.has_minimum = Form::kHasMinimum && encoding.shift != kZeros;
    for (int half = 0; half < 2; ++half) {
        const int group = Form::kGroups == 2 ? half : 0;
        std::memcpy(out.scale[half], found.scale[group], sizeof out.scale[half]);
        if (out.has_minimum) std::memcpy(out.minimum[half], found.minimum[group], sizeof out.minimum[half]);
    }
    const uint8_t* zeros = at.header + kColumns * scale_bytes(encoding.scale_type);
    for (int i = 0; i < kColumns; ++i)
        out.offset[i] = encoding.shift == kZeros ? zeros[i] : static_cast<float>(Form::kOffset);
}

// Decodes a block: its codes, and the scales of its numbers.
inline void decode_exactly(const Cursor& at, DecodedBlock& block, ExactScales& scales) {
    with_form(at.layout->encoding, [&](auto form) {
        decode<decltype(form)>(at, block);
        exact_scales<decltype(form)>(at, block.scales, scales);
    });
}

// The numbers of 16 rows of a block, in float32: number i of 4 of one of its 8 lines.
inline void numbers_of(const DecodedBlock& block, const ExactScales& scales, int half, int line, int i, float* out) {
    uint32_t codes[kLanes];
    std::memcpy(codes, block.codes[half][line], sizeof codes);
    const int group = line / kLines, first = half * kLanes;
    for (int lane = 0; lane < kLanes; ++lane) {
        const float code = static_cast<float>(static_cast<int32_t>(codes[lane] >> 8 * i & 255));
        out[lane] = scales.scale[group][first + lane] * (code - scales.offset[first + lane]);
    }
    if (scales.has_minimum)
        for (int lane = 0; lane < kLanes; ++lane) out[lane] += scales.minimum[group][first + lane];
}

// 32 rows of a segment, in the layout of plain weights.
template <class T>
void dequantize_rows(const QuantizedLayout& layout, const uint8_t* packed, T* out) {
    Cursor at = Cursor::at(layout, packed, 0);
    DecodedBlock block;
    ExactScales scales;
    float numbers[kLanes];
    for (int k = 0; k < layout.shape.column_blocks(); ++k, at.next(), out += kBlockElements) {
        decode_exactly(at, block, scales);
        for (int half = 0; half < 2; ++half) {
            for (int column = 0; column < kBlock; column += kPair<T>) {
                T rounded[kPair<T>][kLanes];
                for (int i = 0; i < kPair<T>; ++i) {
                    numbers_of(block, scales, half, column / 4, column % 4 + i, numbers);
                    store(rounded[i], load(numbers));
                }
                T* target = out + packed_offset<T>({0, half, 0}, column);
                for (int lane = 0; lane < kLanes; ++lane)
                    for (int i = 0; i < kPair<T>; ++i) target[lane * kPair<T> + i] = rounded[i][lane];
            }
        }
    }
}

// A row of a segment.
template <class T>
void dequantize_row(const QuantizedLayout& layout, const uint8_t* packed, int row, T* out) {
    const PackedRow place = layout.shape.locate(row);
    const int column = place.half * kLanes + place.lane;
    Cursor at = Cursor::at(layout, packed + place.block * layout.stride(), 0);
    DecodedBlock block;
    ExactScales scales;
    for (int begin = 0; begin < layout.shape.columns; begin += kBlock, at.next()) {
        decode_exactly(at, block, scales);
        const int count = std::min(kBlock, layout.shape.columns - begin);
        for (int i = 0; i < count; ++i) {
            const int half = i / (kBlock / 2);
            const float code = block.codes[place.half][i / 4][place.lane * 4 + i % 4];
            float number = scales.scale[half][column] * (code - scales.offset[column]);
            if (scales.has_minimum) number += scales.minimum[half][column];
            out[begin + i] = from_float<T>(number);
        }
    }
}

}  // namespace octavo
