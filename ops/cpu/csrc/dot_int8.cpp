#include "dot_int8.h"

#include <utility>

namespace octavo {

namespace {

constexpr uintptr_t kAheadBytes = 4096;  // how far ahead weights are prefetched
constexpr int kRowsReadByHardware = 1;   // up to so many, AMD's CPUs prefetch by themselves
constexpr int kVectorsOfHalf = kLanes / kIntColumns;

// Packed blocks, decoded as they are read. Each cache line that is read prefetches one further on.
template <class F>
struct PackedBlocks {
    using Form = F;
    Cursor at;
    uintptr_t ahead;  // bytes; 0: what is prefetched is there already
    BlockScales buffer;

    PackedBlocks(const Cursor& begin, uintptr_t ahead) : at(begin), ahead(ahead) {}
    const BlockScales& scales() {
        if (at.index == 0)
            for (int line = 0; line < at.layout->header_bytes; line += kCacheLineBytes)
                prefetch(address_of(at.header) + ahead + line);
        Form::Scales::get(at.layout->encoding, at.rows, at.header, at.index, buffer);
        return buffer;
    }
    template <int kLine>
    void get(int half, int part, Codes& first, Codes& second) const {
        using Code = typename Form::Code;
        const uint8_t* codes = at.codes + half * Code::kHalfBytes;
        if (part == 0) {
            for (int line = kLine; line < Code::kHalfBytes / kLineBytes; line += kLines)
                prefetch(address_of(codes) + ahead + line * kLineBytes);
        }
        Code::template get<kLine>(codes + part, first, second);
    }
    void next() { at.next(); }
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
    const DecodedBlock* at;

    const BlockScales& scales() const { return at->scales; }
    template <int kLine>
    void get(int half, int part, Codes& first, Codes& second) const {
        first = load_codes(at->codes[half][kLine] + part);
        second = load_codes(at->codes[half][kLine + kLines] + part);
    }
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
    } else {
        static_assert((kOffset & (kOffset - 1)) == 0, "offsets are powers of two");
        return times_power<__builtin_ctz(kOffset)>(splat_total(minus_sum));
    }
}

// Loops over rows are unrolled early, so that GCC keeps arrays of totals in registers.
template <class Blocks, int kRows>
void multiply_rows(Blocks weight, int blocks, const Int8Block* x, float* sums) {
    using Form = typename Blocks::Form;
    constexpr int kGroups = Form::kGroups;
    constexpr int kOffset = Form::kOffset;
    for (int k = 0; k < blocks; ++k, x += kRows, weight.next()) {
        const BlockScales& scales = weight.scales();
        for (int v = 0; v < 2 * kVectorsOfHalf; ++v) {
            const int half = v / kVectorsOfHalf, part = v % kVectorsOfHalf * kIntColumns * 4;
            Products<Form::kBits, kGroups, kRows> products;
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r) {
                products.totals[0][r] = total_of_offsets<kOffset>(kGroups == 1 ? x[r].minus_sum : x[r].minus_first);
                if constexpr (kGroups == 2)
                    products.totals[1][r] = total_of_offsets<kOffset>(x[r].minus_sum - x[r].minus_first);
            }
            const auto add_line = [&](auto number) __attribute__((always_inline)) {
                constexpr int kLine = decltype(number)::value;
                Codes first, second;
                weight.template get<kLine>(half, part, first, second);
#pragma GCC unroll 16
                for (int r = 0; r < kRows; ++r)
                    products.template add<kLine>(first, second, r, splat_four(x[r].codes + 4 * kLine),
                                                 splat_four(x[r].codes + 4 * (kLine + kLines)));
            };
            add_line(std::integral_constant<int, 0>());
            add_line(std::integral_constant<int, 1>());
            add_line(std::integral_constant<int, 2>());
            add_line(std::integral_constant<int, 3>());
            const int column = v * kIntColumns;
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r) {
                const Floats x_scale = splat_floats(x[r].scale);
                Floats sum = load_floats(sums + r * kColumns + column);
#pragma GCC unroll 2
                for (int g = 0; g < kGroups; ++g)
                    sum = multiply_add(to_floats(products.totals[g][r]),
                                       multiply(load_floats(scales.scale[g] + column), x_scale), sum);
                if constexpr (Form::kHasMinimum && kGroups == 1) {
                    sum = multiply_add(splat_floats(x[r].scaled_sum), load_floats(scales.minimum[0] + column), sum);
                } else if constexpr (Form::kHasMinimum) {
                    const int totals[2] = {-x[r].minus_first, x[r].minus_first - x[r].minus_sum};
                    for (int g = 0; g < kGroups; ++g)
                        sum = multiply_add(splat_floats(static_cast<float>(totals[g]) * x[r].scale),
                                           load_floats(scales.minimum[g] + column), sum);
                }
                store_floats(sums + r * kColumns + column, sum);
            }
        }
    }
}

template <class Blocks>
using MultiplyRows = void (*)(Blocks, int, const Int8Block*, float*);

template <class Blocks, int... kIndices>
void choose_rows(const Blocks& weight, int blocks, int rows, const Int8Block* x, float* sums,
                 std::integer_sequence<int, kIndices...>) {
    static constexpr MultiplyRows<Blocks> kTable[] = {multiply_rows<Blocks, kIndices + 1>...};
    kTable[rows - 1](weight, blocks, x, sums);
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
    alignas(64) float numbers[kBlock];
    for (int begin = 0; begin < columns; begin += kBlock, out += stride) {
        for (int i = 0; i < kBlock; i += kLanes) {
            const int count = columns - begin - i;
            store(numbers + i, count > 0 ? load_first(x + begin + i, count) : zero());
        }
        int32_t largest_bits = 0;  // as integers, since comparisons with NaN differ among CPUs
        for (int i = 0; i < kBlock; ++i) {
            const int32_t bits = static_cast<int32_t>(bits_of(numbers[i]) & 0x7fffffff);
            largest_bits = bits > largest_bits ? bits : largest_bits;
        }
        const float largest = float_of(static_cast<uint32_t>(largest_bits));
        const bool is_finite = largest_bits < 0x7f800000, is_zero = largest < kSmallest;
        const float inverse = is_finite && !is_zero ? kMost / largest : 0.0f;
        out->scale = !is_finite ? std::numeric_limits<float>::quiet_NaN() : is_zero ? 0.0f : largest / kMost;
        int32_t sums[2] = {0, 0};
        for (int half = 0; half < 2; ++half) {
            for (int i = half * kBlock / 2; i < (half + 1) * kBlock / 2; ++i) {
                const int8_t code = static_cast<int8_t>(bits_of(numbers[i] * inverse + kRounder));
                out->codes[i] = code;
                sums[half] += code;
            }
        }
        out->scaled_sum = static_cast<float>(sums[0] + sums[1]) * out->scale;
        out->minus_sum = -(sums[0] + sums[1]);
        out->minus_first = -sums[0];
    }
}

template void quantize_row(const BFloat16*, int, Int8Block*, int64_t);
template void quantize_row(const Float16*, int, Int8Block*, int64_t);
template void quantize_row(const float*, int, Int8Block*, int64_t);

void dot_int8(const QuantizedLayout& layout, const uint8_t* weight, int rows, const Int8Block* x, float* sums) {
    // Scales of k-quants keep the loads of codes too far apart for the hardware prefetcher.
    const bool is_there = rows <= kRowsReadByHardware && is_amd() && !is_super(layout.encoding.format);
    const uintptr_t ahead = is_there ? 0 : kAheadBytes;
    with_form(layout.encoding, [&](auto form) {
        using F = decltype(form);
        if constexpr (F::kIsInteger)
            choose_rows(PackedBlocks<F>(Cursor::at(layout, weight, 0), ahead), layout.shape.column_blocks(), rows, x,
                        sums, std::make_integer_sequence<int, kInt8Rows>());
    });
}

void dot_decoded(const QuantizedLayout& layout, const DecodedBlock* panel, int blocks, int rows, const Int8Block* x,
                 float* sums) {
    with_form(layout.encoding, [&](auto form) {
        using F = decltype(form);
        if constexpr (F::Scales::kIsSuper) {
            using Decoded = DecodedForm<decoded_bits(F::kBits), F::kOffset, F::kGroups, F::kHasMinimum>;
            choose_rows(DecodedBlocks<Decoded>{panel}, blocks, rows, x, sums,
                        std::make_integer_sequence<int, kInt8Rows>());
        }
    });
}

void decode_blocks(const QuantizedLayout& layout, const uint8_t* weight, int k, int blocks, DecodedBlock* out) {
    with_form(layout.encoding, [&](auto form) {
        Cursor at = Cursor::at(layout, weight, k);
        const uint8_t* end = Cursor::at(layout, weight, k + blocks).codes;
        const int64_t bytes = end - at.codes;
        for (int64_t line = 0; line < bytes; line += kCacheLineBytes) prefetch(address_of(end) + line);
        if constexpr (decltype(form)::Scales::kIsSuper)
            for (int i = 0; i < blocks; ++i, at.next()) decode<decltype(form)>(at, out[i]);
    });
}

}  // namespace octavo
