#include "dot_int8.h"

#include <utility>

#include "fetch.h"

#if defined(OCTAVO_AMX)
#include "amx.h"
#endif

namespace octavo {

namespace {

constexpr uintptr_t kAheadBytes = 6144;  // how far ahead weights are prefetched
// Up to so many rows, the loads of weights follow each other so closely that AMD's CPUs prefetch by themselves, and a
// half faster. The second: of codes of 8 bits.
constexpr int kRowsReadByHardware = 2, kRowsOfBytesReadByHardware = 4;
constexpr int kVectorsOfHalf = kLanes / kIntColumns;

// From this many rows on, products are the limit, not memory: sums stay in registers for several blocks of k, if there
// are enough registers. Up to so many rows, two vectors of columns share the loads of activations.
#if defined(__AVX512F__)
constexpr int kRowsKeepingSums = 5;
#else
constexpr int kRowsKeepingSums = kInt8Rows + 1;
#endif
#if defined(__AVX512F__) && defined(OCTAVO_DOT_INT8)
constexpr int kRowsSharingLoads = 6;
#else
constexpr int kRowsSharingLoads = 0;
#endif
constexpr int kBlocksPerPass = 8;

// Most rows that vectors multiply. With AMX, more go through tiles.
#if defined(OCTAVO_AMX)
constexpr int kVectorRows = 6;
#else
constexpr int kVectorRows = kInt8Rows;
#endif

// Up to so many rows' sums of all columns stay in registers, and so do the scales of blocks that share a header; from
// so many on, two vectors share loads.
constexpr int kRowsOfHeadersSharingLoads = 3;
#if defined(__AVX512F__)
constexpr int kRowsOfHeaders = kRowsKeepingSums - 1;
#else
constexpr int kRowsOfHeaders = 1;
#endif

// Whether the upper of two codes in a byte is multiplied where it is, and the sum shifted instead.
#if defined(OCTAVO_DOT_INT8)
template <class Code>
constexpr bool kMultipliesInPlace = std::is_same_v<Code, Nibbles>;
#else
template <class Code>
constexpr bool kMultipliesInPlace = false;
#endif

constexpr int kNoLine = 1 << 30;

// Packed blocks, decoded as they are read. Each cache line that is read prefetches one further on; or each block, some
// lines of one that lies `distance` bytes after it, and other tiles of rows the others. `kInPlace_`: see `Products`.
template <class F, bool kInPlace_ = false>
struct PackedBlocks {
    using Form = F;
    static constexpr bool kInPlace = kInPlace_;
    Cursor at;
    Ahead ahead;
    uintptr_t distance;    // bytes
    int first_line, step;  // bytes; nothing is prefetched from `first_line` = kNoLine on

    void prefetch_header() const {
        for (int line = 0; line < at.layout->header_bytes; line += kCacheLineBytes)
            ahead.fetch(address_of(at.header) + line);
    }
    void prefetch_front() const {
        if constexpr (Form::Scales::kFrontBytes > 0) ahead.fetch(address_of(at.codes) - Form::Scales::kFrontBytes);
    }
    const BlockScales& scales(BlockScales& buffer) const {
        if (at.index == 0) prefetch_header();
        prefetch_front();
        const uint8_t* begin = at.index == 0 ? at.header : at.codes;
        const int bytes = static_cast<int>(at.codes - begin) + at.layout->block_bytes;
        for (int line = first_line; line < bytes; line += step) prefetch(address_of(begin) + distance + line);
        Form::Scales::get(at.layout->encoding, at.rows, at.header, at.codes, at.index, buffer);
        return buffer;
    }
    template <int kLine>
    void get(int half, int part, Codes& first, Codes& second) const {
        using Code = typename Form::Code;
        const uint8_t* codes = at.codes + half * Code::kHalfBytes;
        if (part == 0) {
            for (int line = kLine; line < Code::kHalfBytes / kLineBytes; line += kLines)
                ahead.fetch(address_of(codes) + line * kLineBytes);
        }
        if constexpr (kInPlace)
            Code::template get_in_place<kLine>(codes + part, first, second);
        else
            Code::template get<kLine>(codes + part, first, second);
    }
    // All lines of half a block in order; in `buffer` if codes are not bytes.
    const uint8_t* lines(int half, uint8_t (&buffer)[8][kLineBytes]) const {
        using Code = typename Form::Code;
        const uint8_t* codes = at.codes + half * Code::kHalfBytes;
        for (int line = 0; line < Code::kHalfBytes; line += kLineBytes) ahead.fetch(address_of(codes) + line);
        if constexpr (std::is_same_v<Code, Bytes>) return codes;
        decode_half<Code>(codes, buffer);
        return buffer[0];
    }
    void next() { at.next(); }
};

// The bytes from which it starts, and how it prefetches.
struct Source {
    Cursor at;
    Ahead ahead;
    uintptr_t distance;
    int first_line, step;
};

// Blocks that were decoded before.
template <int kBits_, int kOffset_, int kGroups_, bool kHasMinimum_>
struct DecodedForm {
    static constexpr int kBits = kBits_;
    static constexpr int kOffset = kOffset_;
    static constexpr int kGroups = kGroups_;
    static constexpr bool kHasMinimum = kHasMinimum_;
};

template <class F>
struct DecodedBlocks {
    using Form = F;
    static constexpr bool kInPlace = false;
    const DecodedBlock* at;

    const BlockScales& scales(BlockScales&) const { return at->scales; }
    template <int kLine>
    void get(int half, int part, Codes& first, Codes& second) const {
        first = load_codes(at->codes[half][kLine] + part);
        second = load_codes(at->codes[half][kLine + kLines] + part);
    }
    const uint8_t* lines(int half, uint8_t (&)[8][kLineBytes]) const { return at->codes[half][0]; }
    void next() { ++at; }
};

inline Codes splat_four(const int8_t* codes) {
    int32_t four;
    std::memcpy(&four, codes, sizeof four);
    return splat_codes(four);
}

// Takes the offset of the codes from their totals in advance.
template <int kOffset>
inline Totals total_of_offsets(int32_t minus_sum) {
    if constexpr (kOffset == 0) {
        return splat_total(0);
    } else if constexpr (kOffset == -kLargestOffset) {
        return splat_total(-minus_sum);
    } else {
        static_assert((kOffset & (kOffset - 1)) == 0 && kOffset <= kLargestOffset, "offsets are small powers of two");
        return over_power<__builtin_ctz(kLargestOffset / kOffset)>(splat_total(minus_sum));
    }
}

// Totals of the products of some vectors of columns with some rows, over a block of k.
//
// Loops over rows are unrolled early, so that GCC keeps arrays of totals in registers.
template <class Blocks, int kRows, int kVectors>
inline __attribute__((always_inline)) void multiply_block(
    const Blocks& weight, int vector, const Int8Block* x,
    Products<Blocks::Form::kBits, Blocks::Form::kGroups, kRows, Blocks::kInPlace> (&products)[kVectors]) {
    using Form = typename Blocks::Form;
    constexpr int kOffset = Form::kOffset - Products<Form::kBits, Form::kGroups, kRows>::kLess;
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
            products[v].totals[0][r] =
                total_of_offsets<kOffset>(Form::kGroups == 1 ? x[r].minus_sum : x[r].minus_first);
            if constexpr (Form::kGroups == 2)
                products[v].totals[1][r] = total_of_offsets<kOffset>(x[r].minus_sum - x[r].minus_first);
        }
    }
    const auto add_line = [&](auto number) __attribute__((always_inline)) {
        constexpr int kLine = decltype(number)::value;
        Codes first[kVectors], second[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v)
            weight.template get<kLine>((vector + v) / kVectorsOfHalf, (vector + v) % kVectorsOfHalf * kIntColumns * 4,
                                       first[v], second[v]);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
            const Codes one = splat_four(x[r].codes + 4 * kLine), two = splat_four(x[r].codes + 4 * (kLine + kLines));
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) products[v].template add<kLine>(first[v], second[v], r, one, two);
        }
    };
    add_line(std::integral_constant<int, 0>());
    add_line(std::integral_constant<int, 1>());
    add_line(std::integral_constant<int, 2>());
    add_line(std::integral_constant<int, 3>());
}

// Adds a row's totals of a block to its sums. `scale` and `minimum`: of a vector of columns, for each group.
template <class Form>
inline __attribute__((always_inline)) Floats add_scaled(const Totals (&totals)[Form::kGroups],
                                                        const Floats (&scale)[Form::kGroups],
                                                        const Floats (&minimum)[Form::kGroups], const Int8Block& x,
                                                        Floats sum) {
    constexpr int kGroups = Form::kGroups;
    const Floats x_scale = splat_floats(x.scale);
#pragma GCC unroll 2
    for (int g = 0; g < kGroups; ++g) sum = multiply_add(to_floats(totals[g]), multiply(scale[g], x_scale), sum);
    if constexpr (Form::kHasMinimum && kGroups == 1) {
        sum = multiply_add(splat_floats(x.scaled_sum), minimum[0], sum);
    } else if constexpr (Form::kHasMinimum) {
        const int totals_of_x[2] = {-x.minus_first / kLargestOffset, (x.minus_first - x.minus_sum) / kLargestOffset};
        for (int g = 0; g < kGroups; ++g)
            sum = multiply_add(splat_floats(static_cast<float>(totals_of_x[g]) * x.scale), minimum[g], sum);
    }
    return sum;
}

// Some vectors of columns and some blocks of k: the sums stay in registers. `scales` of the blocks; null: they are read
// meanwhile.
template <class Blocks, int kRows, int kVectors>
inline void multiply_vectors(Blocks weight, int blocks, const BlockScales* const* scales, int vector,
                             const Int8Block* x, float* sums) {
    using Form = typename Blocks::Form;
    constexpr bool kIsWhole = kVectors == 2 * kVectorsOfHalf;
    BlockScales buffer;
    sums += vector * kIntColumns;
    Floats kept[kVectors][kRows];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) kept[v][r] = load_floats(sums + r * kColumns + v * kIntColumns);
    for (int k = 0; k < blocks; ++k, x += kRows, weight.next()) {
        const BlockScales& own = kIsWhole ? weight.scales(buffer) : *scales[k];
        Products<Form::kBits, Form::kGroups, kRows, Blocks::kInPlace> products[kVectors];
        multiply_block<Blocks, kRows, kVectors>(weight, vector, x, products);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
            Floats scale[Form::kGroups], minimum[Form::kGroups];
            for (int g = 0; g < Form::kGroups; ++g) {
                scale[g] = load_floats(own.scale[g] + (vector + v) * kIntColumns);
                minimum[g] = load_floats(own.minimum[g] + (vector + v) * kIntColumns);
            }
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r) {
                Totals totals[Form::kGroups];
                for (int g = 0; g < Form::kGroups; ++g) totals[g] = products[v].total(g, r);
                kept[v][r] = add_scaled<Form>(totals, scale, minimum, x[r], kept[v][r]);
            }
        }
    }
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) store_floats(sums + r * kColumns + v * kIntColumns, kept[v][r]);
}

// With few rows, memory is the limit: weights are read in order, a block at a time. With many, some vectors of columns
// keep their sums in registers for several blocks.
template <class Blocks, int kRows>
void multiply_rows(Blocks weight, int blocks, const Int8Block* x, float* sums) {
    constexpr int kMost = kRows >= kRowsKeepingSums ? kBlocksPerPass : 1;
    constexpr int kVectors = kRows >= kRowsKeepingSums && kRows * Blocks::Form::kGroups <= kRowsSharingLoads ? 2 : 1;
    if constexpr (kVectors == 2 * kVectorsOfHalf)
        return multiply_vectors<Blocks, kRows, kVectors>(weight, blocks, nullptr, 0, x, sums);
    BlockScales buffers[kMost];
    const BlockScales* scales[kMost];
    for (int begin = 0; begin < blocks; begin += kMost, x += kMost * kRows) {
        const int count = std::min(kMost, blocks - begin);
        Blocks next = weight;
        for (int k = 0; k < count; ++k, next.next()) scales[k] = &next.scales(buffers[k]);
        for (int vector = 0; vector < 2 * kVectorsOfHalf; vector += kVectors)
            multiply_vectors<Blocks, kRows, kVectors>(weight, count, scales, vector, x, sums);
        weight = next;
    }
}

// The same with few rows, of all blocks of some headers: sums and the headers' scales stay in registers.
template <class Blocks, int kRows>
void multiply_headers(Blocks weight, int blocks, const Int8Block* x, float* sums) {
    using Form = typename Blocks::Form;
    using Scales = typename Form::Scales;
    constexpr int kVectors = 2 * kVectorsOfHalf;
    constexpr int kAtOnce = kRows >= kRowsOfHeadersSharingLoads && kRows <= kRowsSharingLoads ? 2 : 1;
    const QuantizedLayout& layout = *weight.at.layout;
    Floats kept[kVectors][kRows];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) kept[v][r] = load_floats(sums + r * kColumns + v * kIntColumns);
    for (int k = 0; k < blocks; k += layout.header_blocks) {
        weight.prefetch_header();
        Factors factors[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v)
            factors[v] = Scales::factors(layout.encoding, weight.at.header, v * kIntColumns);
        const int end = std::min(layout.header_blocks, blocks - k);
#pragma GCC unroll 1
        for (int block = 0; block < end; ++block, x += kRows) {
            weight.prefetch_front();
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; v += kAtOnce) {
                Products<Form::kBits, Form::kGroups, kRows, Blocks::kInPlace> products[kAtOnce];
                multiply_block<Blocks, kRows, kAtOnce>(weight, v, x, products);
#pragma GCC unroll 2
                for (int i = 0; i < kAtOnce; ++i) {
                    const int column = (v + i) * kIntColumns;
                    Floats scale[Form::kGroups], minimum[Form::kGroups];
                    Scales::get(factors[v + i], weight.at.header, weight.at.codes, block, column, scale, minimum);
#pragma GCC unroll 16
                    for (int r = 0; r < kRows; ++r) {
                        Totals totals[Form::kGroups];
                        for (int g = 0; g < Form::kGroups; ++g) totals[g] = products[i].total(g, r);
                        kept[v + i][r] = add_scaled<Form>(totals, scale, minimum, x[r], kept[v + i][r]);
                    }
                }
            }
            weight.at.codes += layout.block_bytes;
        }
        weight.at.header = weight.at.codes - Scales::kFrontBytes;
        weight.at.codes += layout.header_bytes;
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) store_floats(sums + r * kColumns + v * kIntColumns, kept[v][r]);
}

#if defined(OCTAVO_AMX)

// The totals of a block's products with 16 columns; of two groups, one after the other.
template <int kGroups>
struct TileTotals {
    alignas(64) int32_t halves[2][kGroups][amx::kTileRows][kLanes];
};

// Products of rows with a block: a tile for each group of its k. They start from zero, since the offset of codes is
// added to the same integers later.
template <class Blocks>
void multiply_block_in_tiles(const Blocks& weight, const Int8Block* x, TileTotals<Blocks::Form::kGroups>& totals) {
    constexpr long kStride = kLanes * sizeof(int32_t);
    uint8_t buffer[8][kLineBytes];
    for (int half = 0; half < 2; ++half) {
        const uint8_t* lines = weight.lines(half, buffer);
        auto& out = totals.halves[half];
        amx::zero<4>();
        amx::load<0>(x->codes, sizeof *x);
        amx::load<2>(lines, kLineBytes);
        amx::dot_codes<4, 0, 2>();
        amx::store<4>(out[0], kStride);
        if constexpr (Blocks::Form::kGroups == 2) {
            amx::zero<5>();
            amx::load<0>(x->codes + kBlock / 2, sizeof *x);
            amx::load<3>(lines + kLines * kLineBytes, kLineBytes);
            amx::dot_codes<5, 0, 3>();
            amx::store<5>(out[1], kStride);
        }
    }
}

// Adds the totals of a block to the sums, as above.
template <class Form>
void add_tile_totals(const TileTotals<Form::kGroups>& totals, const BlockScales& scales, int rows, const Int8Block* x,
                     float* sums) {
    constexpr int kGroups = Form::kGroups;
    for (int half = 0; half < 2; ++half) {
        Floats scale[kGroups], minimum[kGroups];
        for (int g = 0; g < kGroups; ++g) {
            scale[g] = load_floats(scales.scale[g] + half * kLanes);
            minimum[g] = load_floats(scales.minimum[g] + half * kLanes);
        }
        for (int r = 0; r < rows; ++r) {
            float* sum = sums + r * kColumns + half * kLanes;
            const int32_t first = kGroups == 1 ? x[r].minus_sum : x[r].minus_first;
            Totals found[kGroups];
            for (int g = 0; g < kGroups; ++g)
                found[g] = plus(load_totals(totals.halves[half][g][r]),
                                total_of_offsets<Form::kOffset>(g == 0 ? first : x[r].minus_sum - first));
            store_floats(sum, add_scaled<Form>(found, scale, minimum, x[r], load_floats(sum)));
        }
    }
}

// Up to 16 rows: while tiles multiply a block, the totals of the block before are added.
template <class Blocks>
void multiply_tiles(Blocks weight, int blocks, int rows, const Int8Block* x, float* sums) {
    using Form = typename Blocks::Form;
    TileTotals<Form::kGroups> totals[2];
    BlockScales buffers[2];
    const BlockScales* scales[2];
    configure_tiles(rows, kBlock / Form::kGroups);
    for (int k = 0; k < blocks; ++k, weight.next(), x += rows) {
        scales[k % 2] = &weight.scales(buffers[k % 2]);
        multiply_block_in_tiles(weight, x, totals[k % 2]);
        if (k) add_tile_totals<Form>(totals[(k - 1) % 2], *scales[(k - 1) % 2], rows, x - rows, sums);
    }
    add_tile_totals<Form>(totals[(blocks - 1) % 2], *scales[(blocks - 1) % 2], rows, x - rows, sums);
}

#endif

template <class Blocks>
using MultiplyRows = void (*)(Blocks, int, const Int8Block*, float*);

template <class Blocks, int... kIndices>
void multiply_headers_of(const Blocks& weight, int blocks, int rows, const Int8Block* x, float* sums,
                         std::integer_sequence<int, kIndices...>) {
    static constexpr MultiplyRows<Blocks> kTable[] = {multiply_headers<Blocks, kIndices + 1>...};
    kTable[rows - 1](weight, blocks, x, sums);
}

template <class Blocks, int... kIndices>
void choose_rows(const Blocks& weight, int blocks, int rows, const Int8Block* x, float* sums,
                 std::integer_sequence<int, kIndices...>) {
#if defined(OCTAVO_AMX)
    if (rows > kVectorRows) return multiply_tiles(weight, blocks, rows, x, sums);
#endif
    static constexpr MultiplyRows<Blocks> kTable[] = {multiply_rows<Blocks, kIndices + 1>...};
    kTable[rows - 1](weight, blocks, x, sums);
}

// Formats whose headers' scales are kept in registers. Of codes of 8 bits, that is slower: memory is the limit.
template <class F>
constexpr bool kKeepsHeaders =
    F::kIsInteger && F::Scales::kHasFactors && (F::Scales::kIsSuper || !std::is_same_v<typename F::Code, Bytes>);

// Products of some rows with blocks of k of 32 columns.
template <class F>
inline void multiply(const Source& from, int blocks, int rows, const Int8Block* x, float* sums) {
    if constexpr (kKeepsHeaders<F>) {
        using Packed = PackedBlocks<F, kMultipliesInPlace<typename F::Code>>;
        if (rows <= kRowsOfHeaders && from.first_line == kNoLine && from.at.index == 0)
            return multiply_headers_of(Packed{from.at, from.ahead, from.distance, from.first_line, from.step}, blocks,
                                       rows, x, sums, std::make_integer_sequence<int, kRowsOfHeaders>());
    }
    if constexpr (F::kIsInteger)
        choose_rows(PackedBlocks<F>{from.at, from.ahead, from.distance, from.first_line, from.step}, blocks, rows, x,
                    sums, std::make_integer_sequence<int, kVectorRows>());
}

// Formats of which blocks are decoded once for many tiles of rows, if not in no time. Tiles of AMX read bytes.
#if defined(OCTAVO_AMX)
template <class F>
constexpr bool kIsBetterDecoded = F::kIsInteger && !std::is_same_v<typename F::Code, Bytes>;
#else
template <class F>
constexpr bool kIsBetterDecoded = F::Scales::kIsSuper;
#endif

// How far ahead weights are prefetched for so many rows; {}: the CPU does so by itself.
Ahead bytes_ahead(const QuantizedLayout& layout, int rows) {
    if (!is_amd()) return {kAheadBytes, is_fetched_twice(rows) ? kNearBytes : 0};
    const bool are_bytes = layout.block_bytes == 2 * Bytes::kHalfBytes;
    return {rows <= (are_bytes ? kRowsOfBytesReadByHardware : kRowsReadByHardware) ? 0 : kAheadBytes, 0};
}

// Codes that were decoded are multiplied alike, unless their products are added up in 16 bits.
constexpr int decoded_bits(int bits) {
#if defined(OCTAVO_ADD_PAIRS)
    return bits;
#else
    return std::max(bits, 8);
#endif
}

}  // namespace

template <class T>
void quantize_row(const T* x, int columns, Int8Block* out, int64_t stride) {
    constexpr float kSmallest = 0x1p-100f;  // the reciprocals of smaller ones would not be finite
    constexpr float kRounder = 0x1.8p23f;   // what is added to it is rounded to an integer, in the low bits
    constexpr float kMost = 127.0f;
    for (int begin = 0; begin < columns; begin += kBlock, out += stride) {
        Vec numbers[2];
        for (int half = 0; half < 2; ++half) {
            const int first = begin + half * kLanes, count = columns - first;
            numbers[half] = count >= kLanes ? load(x + first) : count > 0 ? load_first(x + first, count) : zero();
        }
        // As integers, since comparisons with NaN differ among CPUs.
        const int32_t largest_bits = largest_magnitude(numbers[0], numbers[1]);
        const float largest = float_of(static_cast<uint32_t>(largest_bits));
        const bool is_finite = largest_bits < 0x7f800000, is_zero = largest < kSmallest;
        const float inverse = is_finite && !is_zero ? kMost / largest : 0.0f;
        out->scale = !is_finite ? std::numeric_limits<float>::quiet_NaN() : is_zero ? 0.0f : largest / kMost;
        int32_t sums[2];
        for (int half = 0; half < 2; ++half)
            sums[half] = store_low_bytes(out->codes + half * kLanes, numbers[half] * splat(inverse) + splat(kRounder));
        out->scaled_sum = static_cast<float>(sums[0] + sums[1]) * out->scale;
        out->minus_sum = -(sums[0] + sums[1]) * kLargestOffset;
        out->minus_first = -sums[0] * kLargestOffset;
    }
}

template void quantize_row(const BFloat16*, int, Int8Block*, int64_t);
template void quantize_row(const Float16*, int, Int8Block*, int64_t);
template void quantize_row(const float*, int, Int8Block*, int64_t);

void dot_int8(const QuantizedLayout& layout, const uint8_t* weight, const Range& range, int rows, const Int8Block* x,
              float* sums, const Turn& turn) {
    const Ahead ahead = turn.count > 1 ? Ahead{} : bytes_ahead(layout, rows);
    const Cursor at = Cursor::at(layout, weight, range.begin), end = Cursor::at(layout, weight, range.end);
    const uintptr_t distance = address_of(end.codes) - address_of(at.codes);
    const int step = turn.count * kCacheLineBytes;
    const int first_line = turn.count > 1 ? turn.index * kCacheLineBytes : kNoLine;
    with_form(layout.encoding, [&](auto form) {
        multiply<decltype(form)>({at, ahead, distance, first_line, step}, range.end - range.begin, rows, x, sums);
    });
}

void dot_int8_blocks(const QuantizedLayout& layout, const uint8_t* weight, int row_blocks, int rows, const Int8Block* x,
                     float* sums) {
    const Ahead ahead = bytes_ahead(layout, rows);
    const int blocks = layout.shape.column_blocks();
    const int64_t stride = layout.stride();
    std::memset(sums, 0, static_cast<size_t>(row_blocks) * rows * kColumns * sizeof(float));
    with_form(layout.encoding, [&](auto form) {
        for (int i = 0; i < row_blocks; ++i, sums += rows * kColumns)
            multiply<decltype(form)>({Cursor::at(layout, weight + i * stride, 0), ahead, 0, kNoLine, kCacheLineBytes},
                                     blocks, rows, x, sums);
    });
}

bool is_better_decoded(const QuantizedLayout& layout) {
    return with_form(layout.encoding, [](auto form) { return kIsBetterDecoded<decltype(form)>; });
}

void dot_decoded(const QuantizedLayout& layout, const DecodedBlock* panel, int blocks, int rows, const Int8Block* x,
                 float* sums) {
    with_form(layout.encoding, [&](auto form) {
        using F = decltype(form);
        if constexpr (kIsBetterDecoded<F>) {
            using Decoded = DecodedForm<decoded_bits(F::kBits), F::kOffset, F::kGroups, F::kHasMinimum>;
            choose_rows(DecodedBlocks<Decoded>{panel}, blocks, rows, x, sums,
                        std::make_integer_sequence<int, kVectorRows>());
        }
    });
}

void decode_blocks(const QuantizedLayout& layout, const uint8_t* weight, int k, int blocks, DecodedBlock* out) {
    with_form(layout.encoding, [&](auto form) {
        Cursor at = Cursor::at(layout, weight, k);
        const uint8_t* end = Cursor::at(layout, weight, k + blocks).codes;
        const int64_t bytes = end - at.codes;
        for (int64_t line = 0; line < bytes; line += kCacheLineBytes) prefetch(address_of(end) + line);
        if constexpr (kIsBetterDecoded<decltype(form)>)
            for (int i = 0; i < blocks; ++i, at.next()) decode<decltype(form)>(at, out[i]);
    });
}

}  // namespace octavo
