#include "dot_token.h"

#include <utility>

namespace octavo {

namespace {

constexpr int kVectorsAtOnce = 2;
constexpr int kVectorsOfHalf = kLanes / kIntColumns;
constexpr int kPasses = 2 * kVectorsOfHalf / kVectorsAtOnce;

// Blocks of k that are added to some columns before they are to the others: so weights are read almost in order.
constexpr int kBlocksPerPass = 4;

// Products of a vector of weights with rows of activations.
#if defined(__AVX2__) && !defined(OCTAVO_DOT_INT8)

#if defined(__AVX512F__)
inline Codes multiply_words(Codes a, Codes b) { return _mm512_madd_epi16(a, b); }
#else
inline Codes multiply_words(Codes a, Codes b) { return _mm256_madd_epi16(a, b); }
#endif

struct Weights {
    Codes even, odd;  // columns 0 and 2, 1 and 3 of four, in 16 bits

    explicit Weights(const uint8_t* p) {
        const Codes codes = load_codes(p);
        even = both(codes, splat_codes(0x00ff00ff));
        odd = shift_right<8>(codes);
    }
    Totals add(Totals sum, const TokenCode* x) const {
        int32_t pairs[2];
        std::memcpy(pairs, x, sizeof pairs);
        sum = plus(sum, multiply_words(even, splat_codes(pairs[0])));
        return plus(sum, multiply_words(odd, splat_codes(pairs[1])));
    }
};

#else

struct Weights {
    Codes codes;

    explicit Weights(const uint8_t* p) : codes(load_codes(p)) {}
    Totals add(Totals sum, const TokenCode* x) const {
        int32_t four;
        std::memcpy(&four, x, sizeof four);
        return dot(sum, codes, splat_codes(four));
    }
};

#endif

inline Totals load_totals(const int32_t* p) {
    Totals result;
    std::memcpy(&result, p, sizeof result);
    return result;
}

// Adds the products of `blocks` blocks of k with some columns, of which the first vector lies at `first` in each block.
template <int kNumRows>
inline void add_blocks(const uint8_t* weight, int blocks, const TokenCode* x, uintptr_t ahead, const int (&places)[2],
                       int32_t* totals, int column) {
    Totals sums[kVectorsAtOnce][kNumRows];
    // Unrolled as in dot.cpp.
    for (int v = 0; v < kVectorsAtOnce; ++v) {
#pragma GCC unroll 16
        for (int r = 0; r < kNumRows; ++r) sums[v][r] = load_totals(totals + r * kColumns + column + v * kIntColumns);
    }
    for (int k = 0; k < blocks; ++k, weight += kBlock * kColumns, x += kNumRows * kBlock) {
#pragma GCC unroll 2
        for (int line = 0; line < 2 * kLines; ++line) {
            const uint8_t* p = weight + line * kLineBytes;
            prefetch(address_of(p + places[0]) + ahead);
            if constexpr (kIntColumns == kLanes) prefetch(address_of(p + places[1]) + ahead);
            const Weights first(p + places[0]), second(p + places[1]);
#pragma GCC unroll 16
            for (int r = 0; r < kNumRows; ++r) {
                const TokenCode* four = x + r * kBlock + 4 * line;
                sums[0][r] = first.add(sums[0][r], four);
                sums[1][r] = second.add(sums[1][r], four);
            }
        }
    }
    for (int v = 0; v < kVectorsAtOnce; ++v) {
#pragma GCC unroll 16
        for (int r = 0; r < kNumRows; ++r)
            std::memcpy(totals + r * kColumns + column + v * kIntColumns, &sums[v][r], sizeof(Totals));
    }
}

// totals: what the sums start with.
template <int kNumRows>
void multiply_rows(const uint8_t* weight, int blocks, const TokenCode* x, uintptr_t ahead, int32_t* totals) {
    const int most = kPasses == 1 ? blocks : kBlocksPerPass;
    for (int k = 0; k < blocks; k += most) {
        for (int pass = 0; pass < kPasses; ++pass) {
            int places[kVectorsAtOnce];
            for (int v = 0; v < kVectorsAtOnce; ++v) {
                const int vector = pass * kVectorsAtOnce + v;
                places[v] = vector / kVectorsOfHalf * (kBlock * kLanes) + vector % kVectorsOfHalf * kIntColumns * 4;
            }
            add_blocks<kNumRows>(weight + k * kBlock * kColumns, std::min(most, blocks - k),
                                 x + static_cast<int64_t>(k) * kNumRows * kBlock, ahead, places, totals,
                                 pass * kVectorsAtOnce * kIntColumns);
        }
    }
}

using MultiplyRows = void (*)(const uint8_t*, int, const TokenCode*, uintptr_t, int32_t*);

template <int... kIndices>
MultiplyRows choose_rows(int rows, std::integer_sequence<int, kIndices...>) {
    static constexpr MultiplyRows kTable[] = {multiply_rows<kIndices + 1>...};
    return kTable[rows - 1];
}

}  // namespace

template <class T>
TokenRow quantize_token(const T* x, int columns, TokenCode* codes, int64_t stride) {
    constexpr float kSmallest = 0x1p-100f;  // as in dot_int8.cpp
    constexpr float kRounder = 0x1.8p23f;
    constexpr float kMost = 127.0f;
    int32_t largest_bits = 0;
    for (int i = 0; i < columns; ++i) {
        const int32_t bits = static_cast<int32_t>(bits_of(to_float(x[i])) & 0x7fffffff);
        largest_bits = bits > largest_bits ? bits : largest_bits;
    }
    const float largest = float_of(static_cast<uint32_t>(largest_bits));
    const bool is_finite = largest_bits < 0x7f800000, is_zero = largest < kSmallest;
    const float inverse = is_finite && !is_zero ? kMost / largest : 0.0f;
    const float scale = !is_finite ? std::numeric_limits<float>::quiet_NaN() : is_zero ? 0.0f : largest / kMost;
    int32_t sum = 0;
    for (int begin = 0; begin < columns; begin += kBlock, codes += stride) {
        alignas(64) float numbers[kBlock];
        for (int i = 0; i < kBlock; i += kLanes) {
            const int count = columns - begin - i;
            store(numbers + i, count > 0 ? load_first(x + begin + i, count) : zero());
        }
        int8_t rounded[kBlock];
        for (int i = 0; i < kBlock; ++i) {
            rounded[i] = static_cast<int8_t>(bits_of(numbers[i] * inverse + kRounder));
            sum += rounded[i];
        }
        if constexpr (sizeof(TokenCode) == 1) {
            std::memcpy(codes, rounded, sizeof rounded);
        } else {
            for (int i = 0; i < kBlock; i += 4)
                for (int j = 0; j < 4; ++j) codes[i + j] = rounded[i + j % 2 * 2 + j / 2];
        }
    }
    return {scale, -sum};
}

template TokenRow quantize_token(const BFloat16*, int, TokenCode*, int64_t);
template TokenRow quantize_token(const Float16*, int, TokenCode*, int64_t);
template TokenRow quantize_token(const float*, int, TokenCode*, int64_t);

void dot_token(const QuantizedLayout& layout, const uint8_t* weight, int count, const TokenRow* rows,
               const TokenCode* codes, uintptr_t ahead, float* sums) {
    alignas(64) int32_t totals[kTokenRows * kColumns];
    for (int r = 0; r < count; ++r) {
        // The offset of the weight's codes, in advance; sums that exceed 32 bits on the way come back.
        const uint32_t offset = static_cast<uint32_t>(rows[r].minus_sum) * Bytes::kMiddle;
        for (int i = 0; i < kColumns; ++i) totals[r * kColumns + i] = static_cast<int32_t>(offset);
    }
    const Cursor at = Cursor::at(layout, weight, 0);
    choose_rows(count, std::make_integer_sequence<int, kTokenRows>())(at.codes, layout.shape.column_blocks(), codes,
                                                                      ahead, totals);
    for (int i = 0; i < kColumns; i += kIntColumns) {
        alignas(64) float scales[kLanes];
        store(scales, load_as(at.header, layout.encoding.scale_type, i / kLanes * kLanes));
        const Floats scale = load_floats(scales + i % kLanes);
        for (int r = 0; r < count; ++r)
            store_floats(sums + r * kColumns + i, multiply(to_floats(load_totals(totals + r * kColumns + i)),
                                                           multiply(scale, splat_floats(rows[r].scale))));
    }
}

}  // namespace octavo
