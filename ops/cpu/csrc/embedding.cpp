// Packing of weights, and embedding lookup: from a plain table, or from a packed one that also serves as the LM head.
#include "dequantize.h"
#include "kernels.h"
#include "packed.h"
#include "transpose.h"

namespace octavo {

namespace {

// Packs 16 rows of a block of columns.
template <class T>
void pack_half(const T* rows, int64_t stride, T* target) {
    constexpr int kWords = kBlock * sizeof(T) / sizeof(uint32_t);
    const int64_t row = stride * static_cast<int64_t>(sizeof(T));
    if constexpr (sizeof(T) * kPair<T> == sizeof(uint32_t)) {
        transpose(rows, row, target, kStepElements * sizeof(T), kLanes, kWords);
    } else {
        uint32_t pairs[kWords][kLanes];  // of consecutive columns
        transpose(rows, row, pairs, sizeof pairs[0], kLanes, kWords);
        for (int i = 0; i < kWords; ++i) {
            T* first = target + 2 * i * kStepElements;
            T* second = first + kStepElements;
            for (int lane = 0; lane < kLanes; ++lane) {
                first[lane].bits = static_cast<uint16_t>(pairs[i][lane]);
                second[lane].bits = static_cast<uint16_t>(pairs[i][lane] >> 16);
            }
        }
    }
}

template <class T>
void pack(const T* weight, int64_t stride, T* packed, const PackedShape& shape) {
    const int blocks = shape.row_blocks();
#pragma omp parallel for schedule(static)
    for (int block = 0; block < blocks; ++block) {
        for (int half = 0; half < 2; ++half) {
            const T* rows = weight + shape.first_row(block, half) * stride;
            const int count = shape.rows_in(block, half);
            T* target = packed + block * shape.block_stride() + half * kHalfElements<T>;
            for (int begin = 0; begin < shape.columns; begin += kBlock, target += kBlockElements) {
                const int width = std::min(kBlock, shape.columns - begin);
                if (count == kLanes && width == kBlock) {
                    pack_half(rows + begin, stride, target);
                    continue;
                }
                T padded[kLanes][kBlock] = {};
                for (int lane = 0; lane < count; ++lane)
                    std::memcpy(padded[lane], rows + lane * stride + begin, width * sizeof(T));
                pack_half(padded[0], kBlock, target);
            }
        }
    }
}

template <class T>
void copy_row(const T* packed, const PackedShape& shape, int row, T* out) {
    const PackedRow place = shape.locate(row);
    const T* source = packed + place.block * shape.block_stride() + packed_offset<T>(place, 0);
    for (int begin = 0; begin < shape.columns; begin += kBlock, source += kBlockElements) {
        const int count = std::min(kBlock, shape.columns - begin);
        for (int i = 0; i < count; ++i) out[begin + i] = source[i / kPair<T> * kStepElements + i % kPair<T>];
    }
}

template <class T>
void copy_quantized_row(const OctavoWeight& weight, int row, T* out) {
    for (const OctavoSegment* segment = weight.segments;; ++segment) {
        if (row < segment->rows) {
            const QuantizedLayout layout(segment->encoding, segment->rows, weight.columns, weight.paired != 0);
            return dequantize_row(layout, static_cast<const uint8_t*>(segment->data), row, out);
        }
        row -= segment->rows;
    }
}

template <class T>
void embedding(const OctavoEmbedding& op, const OctavoStep& step, const Team& team) {
    const PackedShape shape(op.weight);
    const int32_t* ids = op.ids == kPositions    ? step.positions
                         : op.ids == kTokenTypes ? step.token_types
                                                 : step.input_ids;
    const Range mine = team.share(step.num_tokens);
    for (int i = mine.begin; i < mine.end; ++i) {
        T* out = static_cast<T*>(op.out.data) + i * op.out.stride;
        const int id = ids[i] - op.first;
        if (id < 0 || id >= op.weight.rows) continue;
        if (op.plain.data)
            std::memcpy(out, static_cast<const T*>(op.plain.data) + id * op.plain.stride, shape.columns * sizeof(T));
        else if (op.weight.num_segments)
            copy_quantized_row(op.weight, id, out);
        else
            copy_row(static_cast<const T*>(op.weight.data), shape, id, out);
    }
}

template <class T>
void unpack(const T* packed, T* weight, const PackedShape& shape) {
#pragma omp parallel for schedule(static)
    for (int row = 0; row < shape.rows; ++row)
        copy_row(packed, shape, row, weight + static_cast<int64_t>(row) * shape.columns);
}

}  // namespace

void run_embedding(const OctavoEmbedding& op, const OctavoStep& step, const Team& team) {
    with_type(op.type, [&](auto number) { embedding<decltype(number)>(op, step, team); });
}

}  // namespace octavo

using namespace octavo;

int64_t octavo_packed_size(int32_t rows, int32_t columns, int32_t paired) {
    const PackedShape shape(rows, columns, paired != 0);
    return shape.row_blocks() * shape.block_stride();
}

void octavo_pack(const void* weight, int64_t stride, void* packed, int32_t rows, int32_t columns, int32_t paired,
                 int32_t type) {
    with_type(type, [&](auto number) {
        using T = decltype(number);
        pack(static_cast<const T*>(weight), stride, static_cast<T*>(packed), PackedShape(rows, columns, paired != 0));
    });
}

void octavo_unpack(const void* packed, void* weight, int32_t rows, int32_t columns, int32_t paired, int32_t type) {
    with_type(type, [&](auto number) {
        using T = decltype(number);
        unpack(static_cast<const T*>(packed), static_cast<T*>(weight), PackedShape(rows, columns, paired != 0));
    });
}
