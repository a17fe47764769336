// The layout of packed quantised weights.
//
// Rows (output features) and columns (input features) come in blocks of 32, as those of plain weights do (packed.h),
// and the blocks of the same 32 rows are contiguous. Some of them share a header of scales:
//   [rows / 32][headers]{ scales and minimums of 32 rows; [blocks of the header][2 halves of 16 rows] codes }
// Small integers that scale one block come right before its codes, where they fill cache lines: so memory is read in
// order, byte after byte. AMD's CPUs then read it half as fast again as with their scales together in the header, and
// with prefetch instructions.
// A line of codes holds four consecutive columns of 16 rows: [16 rows][4 columns]. There are 8 lines in half a block;
// of codes of 4 bits, lines i and i + 4 share 64 bytes. Further bits of codes come before these, those of several lines
// in one.
// Where rows have scales of their own, they come first: [32 rows] float32.
#pragma once

#include "octavo.h"
#include "packed.h"
#include "small_floats.h"

namespace octavo {

constexpr int kLineBytes = kLanes * 4;
constexpr int kSuperBlocks = 8;  // of 32 columns, in a block of a k-quant

// ---------------------------------------------------------------------------------------------------------------------
// Codes. `kMiddle`: what codes without minimums count from. `get` reads lines kLine and kLine + 4 of half a block, or
// the part of them that fills a vector.

struct Nibbles {
    static constexpr int kBits = 4, kMiddle = 8, kHalfBytes = 4 * kLineBytes;
    template <int kLine>
    static void get(const uint8_t* half, Codes& first, Codes& second) {
        const Codes packed = load_codes(half + kLine * kLineBytes);
        first = bits_at<0, 4, 0>(packed);
        second = bits_at<4, 4, 0>(packed);
    }
    // The second codes times 16: where they are.
    template <int kLine>
    static void get_in_place(const uint8_t* half, Codes& first, Codes& second) {
        const Codes packed = load_codes(half + kLine * kLineBytes);
        first = bits_at<0, 4, 0>(packed);
        second = bits_at<4, 4, 4>(packed);
    }
};

struct NibblesAndBits {  // bit i of the first line is that of line i
    static constexpr int kBits = 5, kMiddle = 16, kHalfBytes = 5 * kLineBytes;
    template <int kLine>
    static void get(const uint8_t* half, Codes& first, Codes& second) {
        const Codes high = load_codes(half);
        Nibbles::get<kLine>(half + kLineBytes, first, second);
        first = either(first, bits_at<kLine, 1, 4>(high));
        second = either(second, bits_at<kLine + 4, 1, 4>(high));
    }
};

struct NibblesAndPairs {  // two bits from 2 i on, of lines i and i + 4
    static constexpr int kBits = 6, kMiddle = 32, kHalfBytes = 6 * kLineBytes;
    template <int kLine>
    static void get(const uint8_t* half, Codes& first, Codes& second) {
        const Codes first_high = load_codes(half), second_high = load_codes(half + kLineBytes);
        Nibbles::get<kLine>(half + 2 * kLineBytes, first, second);
        first = either(first, bits_at<2 * kLine, 2, 4>(first_high));
        second = either(second, bits_at<2 * kLine, 2, 4>(second_high));
    }
};

struct Pairs {
    static constexpr int kBits = 4, kMiddle = 0, kHalfBytes = 2 * kLineBytes;
    template <int kLine>
    static void get(const uint8_t* half, Codes& first, Codes& second) {
        first = bits_at<2 * kLine, 2, 0>(load_codes(half));
        second = bits_at<2 * kLine, 2, 0>(load_codes(half + kLineBytes));
    }
};

struct PairsAndBits {
    static constexpr int kBits = 4, kMiddle = 4, kHalfBytes = 3 * kLineBytes;
    template <int kLine>
    static void get(const uint8_t* half, Codes& first, Codes& second) {
        Pairs::get<kLine>(half, first, second);
        const Codes high = load_codes(half + 2 * kLineBytes);
        first = either(first, bits_at<kLine, 1, 2>(high));
        second = either(second, bits_at<kLine + 4, 1, 2>(high));
    }
};

struct Bytes {
    static constexpr int kBits = 8, kMiddle = 128, kHalfBytes = 8 * kLineBytes;
    template <int kLine>
    static void get(const uint8_t* half, Codes& first, Codes& second) {
        first = load_codes(half + kLine * kLineBytes);
        second = load_codes(half + (kLine + 4) * kLineBytes);
    }
};

// The numbers of IQ4_NL and IQ4_XS, plus 128.
alignas(16) inline constexpr uint8_t kIQ4Values[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                                       129, 141, 153, 166, 181, 197, 217, 241};

struct Indices {
    static constexpr int kBits = 8, kMiddle = 128, kHalfBytes = Nibbles::kHalfBytes;
    template <int kLine>
    static void get(const uint8_t* half, Codes& first, Codes& second) {
        Nibbles::get<kLine>(half, first, second);
        first = lookup(kIQ4Values, first);
        second = lookup(kIQ4Values, second);
    }
};

struct DoubledE2M1 {
    static constexpr int kBits = 5, kMiddle = 16, kHalfBytes = Nibbles::kHalfBytes;
    template <int kLine>
    static void get(const uint8_t* half, Codes& first, Codes& second) {
        Nibbles::get<kLine>(half, first, second);
        first = lookup(kE2M1Values, first);
        second = lookup(kE2M1Values, second);
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// Scales: w = scale * (code - offset) + minimum, where the offset is a zero point or the middle of the codes.

// Of 32 columns, for each half of a block of 32 k if it has two groups.
struct BlockScales {
    alignas(64) float scale[2][kColumns];
    alignas(64) float minimum[2][kColumns];
};

inline Vec load_as(const uint8_t* p, int32_t type, int first) {
    if (type == kFloat16) return load(reinterpret_cast<const Float16*>(p) + first);
    if (type == kBFloat16) return load(reinterpret_cast<const BFloat16*>(p) + first);
    return load(reinterpret_cast<const float*>(p) + first);
}

inline int scale_bytes(int32_t type) { return type == kFloat32 ? 4 : type > kFloat32 ? 1 : 2; }

// The same of a vector of columns.
inline Floats floats_as(const uint8_t* p, int32_t type, int column) {
    if (type == kFloat16) return to_floats(reinterpret_cast<const Float16*>(p) + column);
    alignas(64) float numbers[kLanes];
    store(numbers, load_as(p, type, column / kLanes * kLanes));
    return load_floats(numbers + column % kLanes);
}

// What scales have for a vector of columns, for all blocks that share a header.
struct Factors {
    Floats scale;
    Floats minimum;
};

// A scale for a group of any multiple of 32 columns; if shifted, also a zero (uint8) or a minimum.
template <bool kShifted>
struct GroupScales {
    static constexpr bool kIsSuper = false;
    static constexpr bool kHasFactors = true;
    static constexpr int kFrontBytes = 0;
    static constexpr int kGroups = 1;
    static constexpr bool kHasMinimum = kShifted;

    static int header_bytes(const OctavoEncoding& encoding) {
        const int scales = kColumns * scale_bytes(encoding.scale_type);
        if (!kShifted) return scales;
        return scales + (encoding.shift == kMinimums ? scales : kLineBytes);  // in whole cache lines
    }
    static void get(const OctavoEncoding& encoding, const uint8_t*, const uint8_t* header, const uint8_t*, int,
                    BlockScales& out) {
        const uint8_t* rest = header + kColumns * scale_bytes(encoding.scale_type);
        for (int i = 0; i < kColumns; i += kLanes) {
            const Vec scale = load_as(header, encoding.scale_type, i);
            store(out.scale[0] + i, scale);
            if constexpr (kShifted) {
                if (encoding.shift == kMinimums)
                    store(out.minimum[0] + i, load_as(rest, encoding.scale_type, i));
                else
                    store(out.minimum[0] + i, zero() - scale * load_integers(rest + i));
            }
        }
    }

    static Factors factors(const OctavoEncoding& encoding, const uint8_t* header, int column) {
        const uint8_t* rest = header + kColumns * scale_bytes(encoding.scale_type);
        const Floats scale = floats_as(header, encoding.scale_type, column), none = splat_floats(0.0f);
        if (!kShifted) return {scale, none};
        if (encoding.shift == kMinimums) return {scale, floats_as(rest, encoding.scale_type, column)};
        return {scale, minus(none, multiply(scale, to_floats(rest + column)))};
    }
    static void get(const Factors& factors, const uint8_t*, const uint8_t*, int, int, Floats (&scale)[1],
                    Floats (&minimum)[1]) {
        scale[0] = factors.scale;
        minimum[0] = factors.minimum;
    }
};

// K-quants: float16 scales of 256 columns, times small integers for each block or half of it.
template <class Integer, int kHalves, bool kMinimum>
struct SuperScales {
    static constexpr bool kIsSuper = true;
    static constexpr bool kHasFactors = true;
    static constexpr int kGroups = kHalves;
    static constexpr bool kHasMinimum = kMinimum;
    static constexpr int kFloatBytes = kColumns * 2 * (kMinimum ? 2 : 1);
    static constexpr int kBlockBytes = kColumns * kHalves * (kMinimum ? 2 : 1);
    static constexpr int kFrontBytes = kBlockBytes % kCacheLineBytes ? 0 : kBlockBytes;

    static int header_bytes(const OctavoEncoding&) {
        return kFloatBytes + (kFrontBytes ? 0 : kSuperBlocks * kBlockBytes);
    }
    // Those of one block.
    static const uint8_t* integers(const uint8_t* header, const uint8_t* codes, int index) {
        return kFrontBytes ? codes - kFrontBytes : header + kFloatBytes + index * kBlockBytes;
    }
    static void get(const OctavoEncoding&, const uint8_t*, const uint8_t* header, const uint8_t* codes, int index,
                    BlockScales& out) {
        const Float16* scales = reinterpret_cast<const Float16*>(header);
        for (int i = 0; i < kColumns; i += kLanes) {
            const Vec scale = load(scales + i);
            for (int half = 0; half < kHalves; ++half) {
                const uint8_t* mine = integers(header, codes, index) + half * kColumns + i;
                store(out.scale[half] + i, scale * load_integers(reinterpret_cast<const Integer*>(mine)));
                if constexpr (kMinimum)
                    store(out.minimum[half] + i,
                          zero() - load(scales + kColumns + i) * load_integers(mine + kHalves * kColumns));
            }
        }
    }

    // The float16 scales of a vector of columns.
    static Factors factors(const OctavoEncoding&, const uint8_t* header, int column) {
        const Float16* scales = reinterpret_cast<const Float16*>(header) + column;
        return {to_floats(scales), kMinimum ? to_floats(scales + kColumns) : splat_floats(0.0f)};
    }
    // As above, of these columns.
    static void get(const Factors& factors, const uint8_t* header, const uint8_t* codes, int index, int column,
                    Floats (&scale)[kHalves], Floats (&minimum)[kHalves]) {
        const uint8_t* mine = integers(header, codes, index) + column;
        for (int half = 0; half < kHalves; ++half, mine += kColumns) {
            scale[half] = multiply(factors.scale, to_floats(reinterpret_cast<const Integer*>(mine)));
            if constexpr (kMinimum)
                minimum[half] =
                    minus(splat_floats(0.0f), multiply(factors.minimum, to_floats(mine + kHalves * kColumns)));
        }
    }
};

// Q2_K: scales and minimums are halves of bytes.
struct NibbleScales {
    static constexpr bool kIsSuper = true;
    static constexpr bool kHasFactors = false;
    static constexpr int kGroups = 2;
    static constexpr bool kHasMinimum = true;
    static constexpr int kFrontBytes = 2 * kColumns;

    static int header_bytes(const OctavoEncoding&) { return 2 * kColumns * 2; }
    static void get(const OctavoEncoding&, const uint8_t*, const uint8_t* header, const uint8_t* codes, int,
                    BlockScales& out) {
        const Float16* scales = reinterpret_cast<const Float16*>(header);
        const uint8_t* integers = codes - kFrontBytes;
        for (int half = 0; half < 2; ++half, integers += kColumns) {
            uint8_t low[kColumns], high[kColumns];
            for (int i = 0; i < kColumns; ++i) {
                low[i] = integers[i] & 15;
                high[i] = integers[i] >> 4;
            }
            for (int i = 0; i < kColumns; i += kLanes) {
                store(out.scale[half] + i, load(scales + i) * load_integers(low + i));
                store(out.minimum[half] + i, zero() - load(scales + kColumns + i) * load_integers(high + i));
            }
        }
    }
};

// mxfp4: a power of two for each block; two blocks share a header.
struct PowerScales {
    static constexpr bool kIsSuper = false;
    static constexpr bool kHasFactors = false;
    static constexpr int kFrontBytes = 0;
    static constexpr int kGroups = 1;
    static constexpr bool kHasMinimum = false;

    static int header_bytes(const OctavoEncoding&) { return 2 * kColumns; }
    static void get(const OctavoEncoding&, const uint8_t*, const uint8_t* header, const uint8_t*, int index,
                    BlockScales& out) {
        for (int i = 0; i < kColumns; i += kLanes)
            store(out.scale[0] + i, load_halved_powers(header + index * kColumns + i));
    }
};

// nvfp4: a number in e4m3 for each half of a block, and one in float32 for each row.
struct MicroScales {
    static constexpr bool kIsSuper = false;
    static constexpr bool kHasFactors = false;
    static constexpr int kFrontBytes = 0;
    static constexpr int kGroups = 2;
    static constexpr bool kHasMinimum = false;

    static int header_bytes(const OctavoEncoding&) { return 2 * kColumns; }
    static void get(const OctavoEncoding& encoding, const uint8_t* rows, const uint8_t* header, const uint8_t*, int,
                    BlockScales& out) {
        const Vec half = splat(0.5f);
        for (int i = 0; i < 2 * kColumns; i += kLanes) {
            const int column = i % kColumns;
            const Vec scale = load_e4m3(header + i), row = load(reinterpret_cast<const float*>(rows) + column);
            store(out.scale[i / kColumns] + column,
                  (encoding.row_scale == kDivisor ? scale / row : scale * row) * half);
        }
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// Forms of weights: codes with scales. `V`: how codes become numbers, and `R` how they are read for that.

template <class C, class S, class V = Integers, class R = C>
struct Form {
    using Code = C;
    using Scales = S;
    using Values = V;
    using Read = R;
    static constexpr bool kIsInteger = true;
    static constexpr int kBits = C::kBits;
    static constexpr int kGroups = S::kGroups;
    static constexpr bool kHasMinimum = S::kHasMinimum;
    static constexpr int kOffset = kHasMinimum ? 0 : C::kMiddle;
};

// Of numbers that are no multiples of one: for activations as they are.
template <class C, class V>
struct FloatForm : Form<C, GroupScales<false>, V> {
    static constexpr bool kIsInteger = false;
};

// Calls `function` with the form of an encoding.
template <class F>
auto with_form(const OctavoEncoding& encoding, F function) {
    using Plain = GroupScales<false>;
    using Shifted = GroupScales<true>;
    switch (encoding.format) {
        case kQ4_1:
            return function(Form<Nibbles, Shifted>());
        case kQ5_0:
            return function(Form<NibblesAndBits, Plain>());
        case kQ5_1:
            return function(Form<NibblesAndBits, Shifted>());
        case kQ2_K:
            return function(Form<Pairs, NibbleScales>());
        case kQ3_K:
            return function(Form<PairsAndBits, SuperScales<int8_t, 2, false>>());
        case kQ4_K:
            return function(Form<Nibbles, SuperScales<uint8_t, 1, true>>());
        case kQ5_K:
            return function(Form<NibblesAndBits, SuperScales<uint8_t, 1, true>>());
        case kQ6_K:
            return function(Form<NibblesAndPairs, SuperScales<int8_t, 2, false>>());
        case kIQ4_NL:
            return function(Form<Indices, Plain, Entries<kIQ4Numbers>, Nibbles>());
        case kIQ4_XS:
            return function(Form<Indices, SuperScales<int8_t, 1, false>, Entries<kIQ4Numbers>, Nibbles>());
        case kFp8E4M3:
            return function(FloatForm<Bytes, E4M3>());
        case kNf4:
            return function(FloatForm<Nibbles, Entries<kNf4Numbers>>());
        case kFp4:
            return function(FloatForm<Nibbles, Entries<kFp4Numbers>>());
        case kMxfp4:
        case kBlocksOfMxfp4:
            return function(Form<DoubledE2M1, PowerScales, Entries<kE2M1Numbers>, Nibbles>());
        case kNvfp4:
            return function(Form<DoubledE2M1, MicroScales, Entries<kE2M1Numbers>, Nibbles>());
        case kQ8_0:
        case kInt8:
            if (encoding.shift) return function(Form<Bytes, Shifted>());
            return function(Form<Bytes, Plain>());
        default:  // kQ4_0, kInt4
            if (encoding.shift) return function(Form<Nibbles, Shifted>());
            return function(Form<Nibbles, Plain>());
    }
}

// Whether a format is a k-quant, in blocks of 256 columns.
inline bool is_super(int32_t format) {
    return with_form({format, 0, 0, 0, 0}, [](auto form) { return decltype(form)::Scales::kIsSuper; });
}

// Whether rows are codes with scales that follow, and not blocks as GGUF has them.
inline bool is_grouped(int32_t format) { return format >= kInt4 && format != kBlocksOfMxfp4; }

// The place of everything in a packed segment.
struct QuantizedLayout {
    OctavoEncoding encoding;
    PackedShape shape;
    int prefix_bytes;   // the rows' own scales
    int header_blocks;  // blocks that share a header
    int header_bytes;
    int front_bytes;  // of a block: its own scales, before its codes
    int block_bytes;

    QuantizedLayout(const OctavoEncoding& given, int rows, int columns, bool paired)
        : encoding(given), shape(rows, columns, paired) {
        if (!is_grouped(encoding.format)) {
            encoding.group_size = kBlock;
            encoding.scale_type = encoding.format == kBlocksOfMxfp4 ? kScaleE8M0 : int32_t{kFloat16};
            encoding.shift = encoding.format == kQ4_1 || encoding.format == kQ5_1 ? kMinimums : kNoShift;
        }
        prefix_bytes = encoding.row_scale ? kColumns * static_cast<int>(sizeof(float)) : 0;
        header_blocks = is_super(encoding.format)           ? kSuperBlocks
                        : encoding.scale_type == kScaleE8M0 ? 2
                                                            : blocks_of(encoding.group_size, kBlock);
        with_form(encoding, [&](auto form) {
            header_bytes = decltype(form)::Scales::header_bytes(encoding);
            front_bytes = decltype(form)::Scales::kFrontBytes;
            block_bytes = front_bytes + 2 * decltype(form)::Code::kHalfBytes;
        });
    }

    // Bytes of 32 rows.
    int64_t stride() const {
        const int64_t headers = blocks_of(shape.column_blocks(), header_blocks);
        return prefix_bytes + headers * header_bytes + static_cast<int64_t>(shape.column_blocks()) * block_bytes;
    }
};

// A place in the blocks of 32 rows.
struct Cursor {
    const QuantizedLayout* layout;
    const uint8_t* rows;  // their own scales
    const uint8_t* header;
    const uint8_t* codes;
    int index = 0;  // of the block among those of its header

    // Block number k of the rows whose bytes begin at `rows`.
    static Cursor at(const QuantizedLayout& layout, const uint8_t* rows, int k) {
        const int64_t headers = k / layout.header_blocks;
        Cursor result;
        result.layout = &layout;
        result.index = k % layout.header_blocks;
        result.rows = rows;
        result.header =
            rows + layout.prefix_bytes + headers * (layout.header_bytes + layout.header_blocks * layout.block_bytes);
        result.codes = result.header + layout.header_bytes + result.index * layout.block_bytes + layout.front_bytes;
        return result;
    }
    void next() {
        codes += layout->block_bytes;
        if (++index < layout->header_blocks) return;
        index = 0;
        header = codes - layout->front_bytes;
        codes += layout->header_bytes;
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// Decoded blocks.

struct DecodedBlock {
    alignas(64) uint8_t codes[2][8][kLineBytes];
    BlockScales scales;
};

// Half a block, as lines of bytes.
template <class Code>
inline void decode_half(const uint8_t* codes, uint8_t (&lines)[8][kLineBytes]) {
    for (int part = 0; part < kLineBytes; part += kIntColumns * 4) {
        const auto line = [&](auto number) {
            constexpr int kLine = decltype(number)::value;
            Codes first, second;
            Code::template get<kLine>(codes + part, first, second);
            store_codes(lines[kLine] + part, first);
            store_codes(lines[kLine + 4] + part, second);
        };
        line(std::integral_constant<int, 0>());
        line(std::integral_constant<int, 1>());
        line(std::integral_constant<int, 2>());
        line(std::integral_constant<int, 3>());
    }
}

template <class Form>
inline void decode(const Cursor& at, DecodedBlock& out) {
    using Code = typename Form::Code;
    for (int half = 0; half < 2; ++half) decode_half<Code>(at.codes + half * Code::kHalfBytes, out.codes[half]);
    Form::Scales::get(at.layout->encoding, at.rows, at.header, at.codes, at.index, out.scales);
}

}  // namespace octavo
