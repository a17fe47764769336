#include "dequantize.h"

namespace octavo {

template <class T, class W>
void dequantize_blocks(Cursor& at, int blocks, uintptr_t ahead, W* out) {
    with_zero_points(at.layout->encoding, [&](auto form, auto zero_points) {
        for (int k = 0; k < blocks; ++k, at.next(), out += kBlockElements) {
            prefetch_block(at, ahead);
            dequantize_block<decltype(form), decltype(zero_points)::value, T>(at, out);
        }
    });
}

template <class T>
void dequantize_row(const QuantizedLayout& layout, const uint8_t* packed, int row, T* out) {
    const PackedRow place = layout.shape.locate(row);
    Cursor at = Cursor::at(layout, packed + place.block * layout.stride(), 0);
    alignas(64) float numbers[kBlockElements];
    for (int begin = 0; begin < layout.shape.columns; begin += kBlock) {
        dequantize_blocks<T>(at, 1, 0, numbers);
        const int count = std::min(kBlock, layout.shape.columns - begin);
        for (int i = 0; i < count; ++i)
            out[begin + i] = from_float<T>(numbers[i * kStepElements + place.half * kLanes + place.lane]);
    }
}

template void dequantize_blocks<BFloat16, float>(Cursor&, int, uintptr_t, float*);
template void dequantize_blocks<Float16, float>(Cursor&, int, uintptr_t, float*);
template void dequantize_blocks<float, float>(Cursor&, int, uintptr_t, float*);
#if defined(OCTAVO_DOT_BF16)
template void dequantize_blocks<BFloat16, BFloat16>(Cursor&, int, uintptr_t, BFloat16*);
#endif
template void dequantize_row<BFloat16>(const QuantizedLayout&, const uint8_t*, int, BFloat16*);
template void dequantize_row<Float16>(const QuantizedLayout&, const uint8_t*, int, Float16*);
template void dequantize_row<float>(const QuantizedLayout&, const uint8_t*, int, float*);

}  // namespace octavo
