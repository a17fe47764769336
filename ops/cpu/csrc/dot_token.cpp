#include "dot_token.h"

#include "fetch.h"
#include "team.h"

#include <utility>

#if defined(OCTAVO_AMX)
#include "amx.h"
#endif

namespace octavo {

namespace {

constexpr int kVectorsAtOnce = 2;
constexpr int kVectorsOfHalf = kLanes / kIntColumns;
constexpr int kPasses = 2 * kVectorsOfHalf / kVectorsAtOnce;

// Blocks of k that are added to some columns before they are to the others: so weights are read almost in order.
constexpr int kBlocksPerPass = 4;

// From this many rows on, loads of the rows are the limit, so the two vectors share them; with fewer, memory is, so
// that weights are read in order.
#if defined(__AVX512F__) && defined(OCTAVO_DOT_INT8)
constexpr int kRowsSharingLoads = 9;
#else
constexpr int kRowsSharingLoads = 3;
#endif

#if defined(__AVX2__) && !defined(OCTAVO_DOT_INT8)

// Of four columns, 0 and 2, or 1 and 3, in 16 bits.
constexpr int kWordParts = 2;
template <int kPart>
inline Codes part_of(Codes codes) {
    return kPart ? shift_right<8>(codes) : both(codes, splat_codes(0x00ff00ff));
}
inline Totals add_products(Totals sum, Codes weights, Codes x) {
#if defined(__AVX512F__)
    return plus(sum, _mm512_madd_epi16(weights, x));
#else
    return plus(sum, _mm256_madd_epi16(weights, x));
#endif
}

#else

constexpr int kWordParts = 1;
template <int>
inline Codes part_of(Codes codes) {
    return codes;
}
inline Totals add_products(Totals sum, Codes weights, Codes x) { return dot(sum, weights, x); }

#endif

// Keeps GCC from collecting products to add them up later, and from storing sums that are still needed.
inline __attribute__((always_inline)) Totals in_register(Totals a) {
#if defined(__AVX2__)
    asm("" : "+v"(a));
#endif
    return a;
}

inline Codes splat_part(const TokenCode* x) {
    int32_t four;
    std::memcpy(&four, x, sizeof four);
    return splat_codes(four);
}

// Adds the products of one line of two vectors of weights, of which one may be left out.
template <int kNumRows, bool kFirst, bool kSecond, int kPart>
inline __attribute__((always_inline)) void add_part(Totals (&first)[kNumRows], Totals (&second)[kNumRows],
                                                    const uint8_t* weight, int distance, const TokenCode* x) {
    Codes one, two;
    if constexpr (kFirst) one = part_of<kPart>(load_codes(weight));
    if constexpr (kSecond) two = part_of<kPart>(load_codes(weight + distance));
#pragma GCC unroll 16
    for (int r = 0; r < kNumRows; ++r) {
        const Codes row = splat_part(x + r * kBlock + kPart * (4 / kWordParts));
        if constexpr (kFirst) first[r] = in_register(add_products(first[r], one, row));
        if constexpr (kSecond) second[r] = in_register(add_products(second[r], two, row));
    }
}

// The same for the 8 lines of a block.
template <int kNumRows, bool kFirst, bool kSecond>
inline __attribute__((always_inline)) void add_lines(Totals (&first)[kNumRows], Totals (&second)[kNumRows],
                                                     const uint8_t* weight, int distance, const TokenCode* x,
                                                     const Ahead& ahead) {
#pragma GCC unroll 2
    for (int line = 0; line < 2 * kLines; ++line, weight += kLineBytes, x += 4) {
        if constexpr (kFirst) ahead.fetch(address_of(weight));
        if constexpr (kSecond && kPasses == 1) ahead.fetch(address_of(weight + distance));
        add_part<kNumRows, kFirst, kSecond, 0>(first, second, weight, distance, x);
        if constexpr (kWordParts == 2) add_part<kNumRows, kFirst, kSecond, 1>(first, second, weight, distance, x);
    }
}

// Where blocks of codes are, and what is prefetched while they are read: they follow each other, or are listed.
struct Stream {
    const uint8_t* first;
    Ahead ahead;

    const uint8_t* at(int k) const { return first + k * kBlock * kColumns; }
    Ahead distance(int) const { return ahead; }
};

struct List {
    const uint8_t* const* blocks;
    int ahead;  // blocks

    const uint8_t* at(int k) const { return blocks[k]; }
    Ahead distance(int k) const { return {address_of(blocks[k + ahead]) - address_of(blocks[k]), 0}; }
};

// Adds the products of some blocks of k with the columns of two vectors: those at an offset in the blocks, and others
// `distance` bytes after them.
template <int kNumRows, class Source>
inline void add_blocks(const Source& source, Range blocks, int offset, int distance, const TokenCode* x,
                       int32_t* totals) {
    Totals first[kNumRows], second[kNumRows];
    // Unrolled as in dot.cpp.
#pragma GCC unroll 16
    for (int r = 0; r < kNumRows; ++r) {
        first[r] = load_totals(totals + r * kColumns);
        second[r] = load_totals(totals + r * kColumns + kIntColumns);
    }
    x += static_cast<int64_t>(blocks.begin) * kNumRows * kBlock;
    for (int k = blocks.begin; k < blocks.end; ++k, x += kNumRows * kBlock) {
        const uint8_t* codes = source.at(k) + offset;
        const Ahead ahead = source.distance(k);
        if constexpr (kNumRows >= kRowsSharingLoads || kPasses > 1) {
            add_lines<kNumRows, true, true>(first, second, codes, distance, x, ahead);
        } else {
            add_lines<kNumRows, true, false>(first, second, codes, distance, x, ahead);
            add_lines<kNumRows, false, true>(first, second, codes, distance, x, ahead);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kNumRows; ++r) {
        store_totals(totals + r * kColumns, first[r]);
        store_totals(totals + r * kColumns + kIntColumns, second[r]);
    }
}

// totals: what the sums start with.
template <int kNumRows, class Source>
void multiply_rows(const Source& source, int blocks, const TokenCode* x, int32_t* totals) {
    constexpr int kMost = kNumRows < kRowsSharingLoads ? 1 : kBlocksPerPass;
    const int most = kPasses == 1 ? blocks : kMost;
    for (int k = 0; k < blocks; k += most) {
        for (int pass = 0; pass < kPasses; ++pass) {
            const int vector = pass * kVectorsAtOnce;
            const int offset = vector / kVectorsOfHalf * (kBlock * kLanes) + vector % kVectorsOfHalf * kIntColumns * 4;
            add_blocks<kNumRows>(source, {k, std::min(k + most, blocks)}, offset,
                                 kPasses == 1 ? kBlock * kLanes : kIntColumns * 4, x, totals + vector * kIntColumns);
        }
    }
}

template <class Source>
using MultiplyRows = void (*)(const Source&, int, const TokenCode*, int32_t*);

template <class Source, int... kIndices>
MultiplyRows<Source> choose_rows(int rows, std::integer_sequence<int, kIndices...>) {
    static constexpr MultiplyRows<Source> kTable[] = {multiply_rows<kIndices + 1, Source>...};
    return kTable[rows - 1];
}

#if defined(OCTAVO_AMX)

// Tiles of 32 k by 16 columns, which are half full: the same sums as with vectors, since they are exact.
template <class Source>
void multiply(const Source& source, int rows, int blocks, const TokenCode* x, int32_t* totals) {
    constexpr long kSumStride = kColumns * sizeof(int32_t);
    constexpr int kHalfBytes = kBlock * kLanes;
    const bool two = rows > amx::kTileRows;
    int32_t* const lower = totals + amx::kTileRows * kColumns;
    configure_tiles(rows, kBlock);
    amx::load<4>(totals, kSumStride);
    amx::load<5>(totals + kLanes, kSumStride);
    if (two) {
        amx::load<6>(lower, kSumStride);
        amx::load<7>(lower + kLanes, kSumStride);
    }
    for (int k = 0; k < blocks; ++k, x += rows * kBlock) {
        const uint8_t* codes = source.at(k);
        const uintptr_t ahead = address_of(codes) + source.distance(k).far;
        for (int line = 0; line < 2 * kHalfBytes; line += kCacheLineBytes) prefetch(ahead + line);
        amx::load<0>(x, kBlock);
        amx::load<2>(codes, kLineBytes);
        amx::load<3>(codes + kHalfBytes, kLineBytes);
        amx::dot_codes<4, 0, 2>();
        amx::dot_codes<5, 0, 3>();
        if (two) {
            amx::load<1>(x + amx::kTileRows * kBlock, kBlock);
            amx::dot_codes<6, 1, 2>();
            amx::dot_codes<7, 1, 3>();
        }
    }
    amx::store<4>(totals, kSumStride);
    amx::store<5>(totals + kLanes, kSumStride);
    if (two) {
        amx::store<6>(lower, kSumStride);
        amx::store<7>(lower + kLanes, kSumStride);
    }
}

#else

template <class Source>
void multiply(const Source& source, int rows, int blocks, const TokenCode* x, int32_t* totals) {
    choose_rows<Source>(rows, std::make_integer_sequence<int, kTokenRows>())(source, blocks, x, totals);
}

#endif

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
        for (int i = 0; i < kBlock; ++i) codes[i] = rounded[place_of_code(i)];
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
    const Stream stream = {at.codes, {ahead, is_fetched_twice(count) ? kNearBytes : 0}};
    multiply(stream, count, layout.shape.column_blocks(), codes, totals);
    for (int i = 0; i < kColumns; i += kIntColumns) {
        alignas(64) float scales[kLanes];
        store(scales, load_as(at.header, layout.encoding.scale_type, i / kLanes * kLanes));
        const Floats scale = load_floats(scales + i % kLanes);
        for (int r = 0; r < count; ++r)
            store_floats(sums + r * kColumns + i, multiply(to_floats(load_totals(totals + r * kColumns + i)),
                                                           multiply(scale, splat_floats(rows[r].scale))));
    }
}

void add_products(const uint8_t* const* blocks, int count, int ahead, int rows, const TokenCode* x, int32_t* totals) {
    multiply(List{blocks, ahead}, rows, count, x, totals);
}

}  // namespace octavo
