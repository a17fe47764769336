#include "dot.h"

#include <utility>

#include "fetch.h"

#if defined(OCTAVO_AMX)
#include "amx.h"
#endif

namespace octavo {

#if defined(OCTAVO_AMX)

namespace {

// What this thread's tiles are configured for; 0 rows: nothing.
thread_local int tile_rows = 0;
thread_local int tile_left_bytes = 0;

}  // namespace

void configure_tiles(int rows, int left_bytes) {
    if (rows == tile_rows && left_bytes == tile_left_bytes) return;
    tile_rows = rows;
    tile_left_bytes = left_bytes;
    const int upper = rows < amx::kTileRows ? rows : amx::kTileRows;
    const int lower = rows > amx::kTileRows ? rows - amx::kTileRows : 1;  // a tile must have rows
    amx::Config config = {};
    config.palette = 1;
    for (int tile = 0; tile < 8; ++tile) config.row_bytes[tile] = amx::kRowBytes;
    for (int tile : {0, 1}) config.row_bytes[tile] = static_cast<uint16_t>(left_bytes);
    for (int tile : {0, 4, 5}) config.rows[tile] = static_cast<uint8_t>(upper);
    for (int tile : {1, 6, 7}) config.rows[tile] = static_cast<uint8_t>(lower);
    for (int tile : {2, 3}) config.rows[tile] = static_cast<uint8_t>(left_bytes / 4);
    amx::configure(config);
}

#endif

// Most rows for which the sums of all 32 columns fit into registers.
#if defined(__AVX512F__)
constexpr int kRowsOfBothHalves = 12;
#elif defined(__AVX2__)
constexpr int kRowsOfBothHalves = 3;
#else
constexpr int kRowsOfBothHalves = 1;
#endif

namespace {

// From this many rows on, their next block of k is prefetched into the L1 cache, which they may exceed. With fewer, the
// bandwidth of memory is the limit: these prefetches keep AMD's hardware prefetcher from recognising the stream.
constexpr int kFetchedRows = 9;

// Most rows for which a stream is read in order: those that memory delays, not multiplications.
#if defined(__AVX512BF16__)
constexpr int kRowsInOrder = 8;
#else
constexpr int kRowsInOrder = 4;
#endif

// Blocks of k for which 16 columns are added before the other 16 are: few if they are read in order.
template <bool kInOrder>
constexpr int kBlocksPerPass = kInOrder ? 2 : 4;

// Steps of k that are unrolled. With more, GCC moves all of their prefetches to the front.
constexpr int kUnrolled = 4;

#if defined(__AVX2__) && !defined(__AVX512F__)

// The numbers of pairs of bfloat16, in float32.
//
// A pair is read once for each of its numbers: few pairs would stay in registers. Read from one element earlier, the
// even number is in the upper half of its lane as the odd one is, and more ports mask than shift. Only the upper
// columns are read so: the element before the lower ones may be in another cache line or page.
class Pairs {
public:
    Pairs() : mask_(_mm256_set1_epi32(static_cast<int>(0xffff0000))) {
        asm("" : "+x"(mask_));  // or else GCC makes it anew, or keeps it in memory
    }
    Vec even(const BFloat16* p) const {
        return {{part_of_bits(part_shift_left(part_load_bits(p), 16)), masked(p + 15)}};
    }
    Vec odd(const BFloat16* p) const { return {{masked(p), masked(p + 16)}}; }

private:
    Part masked(const BFloat16* p) const { return part_of_bits(_mm256_and_si256(part_load_bits(p), mask_)); }

    __m256i mask_;
};

// Makes GCC read again what it has read through a pointer.
template <class T>
inline void forget(const T*& pointer) {
    asm("" : "+r"(pointer));
}

#else

class Pairs {
public:
    Vec even(const BFloat16* p) const { return load_even(p); }
    Vec odd(const BFloat16* p) const { return load_odd(p); }
};

template <class T>
inline void forget(const T*&) {}

#endif

// Adds the products of pair number `pair` of each row with 16 columns, or with all 32.
template <int kNumRows, int kHalves>
inline void add_pair(Vec (*sums)[kNumRows], const RowPointers<BFloat16, kNumRows>& x, int pair, const BFloat16*& w,
                     const Pairs& pairs) {
    constexpr int kHalf = kHalfElements<BFloat16>;
#if defined(__AVX512BF16__)
    __m512bh columns[kHalves];
    for (int h = 0; h < kHalves; ++h) columns[h] = (__m512bh)_mm512_loadu_si512(w + h * kHalf);
    for (int r = 0; r < kNumRows; ++r) {
        int32_t numbers;
        std::memcpy(&numbers, x[r] + 2 * pair, sizeof numbers);
        const __m512bh row = (__m512bh)_mm512_set1_epi32(numbers);
        for (int h = 0; h < kHalves; ++h) sums[h][r].v = _mm512_dpbf16_ps(sums[h][r].v, columns[h], row);
    }
#else
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        Vec columns[kHalves];
        for (int h = 0; h < kHalves; ++h) columns[h] = i == 0 ? pairs.even(w + h * kHalf) : pairs.odd(w + h * kHalf);
#pragma GCC unroll 16
        for (int r = 0; r < kNumRows; ++r) {
            const Vec row = splat(x[r][2 * pair + i]);
            for (int h = 0; h < kHalves; ++h) sums[h][r] = fma(row, columns[h], sums[h][r]);
        }
        if (i == 0) forget(w);
    }
#endif
}

#if defined(__AVX2__) && !defined(__AVX512F__)

// Of three rows with all columns. The sums leave four registers: three for the rows, so that none is left for a mask.
template <>
inline void add_pair<3, 2>(Vec (*sums)[3], const RowPointers<BFloat16, 3>& x, int pair, const BFloat16*& w,
                           const Pairs&) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        const Part rows[3] = {part_splat(x[0][2 * pair + i]), part_splat(x[1][2 * pair + i]),
                              part_splat(x[2][2 * pair + i])};
#pragma GCC unroll 4
        for (int p = 0; p < 2 * kParts; ++p) {
            IntPart bits = part_load_bits(w + p / kParts * kHalfElements<BFloat16> + p % kParts * 2 * kPartLanes);
            if (i == 1) bits = part_shift_right(bits, 16);
            const Part columns = part_of_bits(part_shift_left(bits, 16));
            forget(w);
#pragma GCC unroll 3
            for (int r = 0; r < 3; ++r) {
                Part& sum = sums[p / kParts][r].v[p % kParts];
                sum = part_fma(rows[r], columns, sum);
            }
        }
    }
}

#endif

// One block of k for 16 columns, or for all 32: sums[r] += x[r] * w. `x` then points to the next 32 elements.
//
// Pairs of bfloat16 take the CPU's own instruction, or else the even element first and then the odd one.
template <int kNumRows, int kHalves, bool kFetchesTwice>
inline void add_block(Vec (*sums)[kNumRows], RowPointers<BFloat16, kNumRows>& x, const BFloat16* w, Fetch& fetch) {
    const Pairs pairs;
#pragma GCC unroll 1
    for (int s = 0; s < kSteps<BFloat16>; s += kUnrolled) {
#pragma GCC unroll 4
        for (int i = 0; i < kUnrolled; ++i, w += kStepElements) {
            for (int h = 0; h < kHalves; ++h) {
                advance(fetch);
                if constexpr (kFetchesTwice) prefetch_l1(address_of(w + h * kHalfElements<BFloat16>) + kNearBytes);
            }
            add_pair<kNumRows, kHalves>(sums, x, i, w, pairs);
        }
        x.advance(kUnrolled * kPair<BFloat16>);
    }
}

// The same for other types.
template <int kNumRows, int kHalves, bool kFetchesTwice, class T>
inline void add_block(Vec (*sums)[kNumRows], RowPointers<T, kNumRows>& x, const T* w, Fetch& fetch) {
    constexpr int kStepBytes = sizeof(T) * kHalves * kLanes;
#pragma GCC unroll 1
    for (int s = 0; s < kSteps<T>; s += kUnrolled) {
#pragma GCC unroll 4
        for (int i = 0; i < kUnrolled; ++i, w += kStepElements) {
            if (kStepBytes >= kCacheLineBytes || i % 2 == 0) advance(fetch);
            if constexpr (kStepBytes > kCacheLineBytes) advance(fetch);
            if constexpr (kFetchesTwice)
                for (int line = 0; line < kStepBytes; line += kCacheLineBytes)
                    prefetch_l1(address_of(w) + line + kNearBytes);
            for (int h = 0; h < kHalves; ++h) {
                const Vec columns = load(w + h * kHalfElements<T>);
                for (int r = 0; r < kNumRows; ++r) sums[h][r] = fma(splat(x[r][i]), columns, sums[h][r]);
            }
        }
        x.advance(kUnrolled);
    }
}

// Whether the halves of bfloat16, which are contiguous, are read one after the other, or almost. With few rows of a
// long stream, the bandwidth of memory is the limit, and reading in order uses more of it. With many, loads of the rows
// are the limit, so both halves share them if there are registers for that. What caches hold is no stream.
template <class T, int kNumRows>
constexpr bool kReadsInOrder = kIsBFloat16<T> && (kNumRows <= kRowsInOrder || kNumRows > kRowsOfBothHalves);

// Where a right factor is read from: a cache, or memory, from which its lines may be fetched twice.
enum class Source { kCache, kStream, kFetchedTwice };

template <int kNumRows>
constexpr Source kFetchedSource = kNumRows <= kRowsFetchedTwice ? Source::kFetchedTwice : Source::kStream;

// Adds the products with block number k of both halves of the columns, or of one. `x` then points to the next block.
template <class T, int kNumRows, int kHalves, bool kInOrder, bool kFetchesTwice>
inline void add_products(Vec (*sums)[kNumRows], RowPointers<T, kNumRows>& x, int64_t left_block, const Right<T>& right,
                         int k, int first_half, Fetch& fetch) {
    const T* w = (right.list ? right.list[k] : right.data + k * right.block) + first_half * kHalfElements<T>;
    if (right.next) fetch.first = address_of(right.next[k] + first_half * (kBlock * kColumns / 2));
    if constexpr (kNumRows >= kFetchedRows)
        for (int r = 0; r < kNumRows; ++r) prefetch_l1(address_of(x[r] + left_block));
    if constexpr (kInOrder && kHalves == 2) {
        add_block<kNumRows, 1, kFetchesTwice>(sums, x, w, fetch);
        x.advance(-kBlock);
        add_block<kNumRows, 1, kFetchesTwice>(sums + 1, x, w + kHalfElements<T>, fetch);
    } else {
        add_block<kNumRows, kHalves, kFetchesTwice>(sums, x, w, fetch);
    }
    x.advance(left_block - kBlock);
}

// All 32 columns in one pass if the sums fit into registers. Else 16 at a time, for a few blocks of k: so the right
// factor is read almost in order, and what is prefetched is what is read next.
//
// GCC keeps arrays of sums in registers only if all loops over them are unrolled early; hence the pragmas.
template <class T, int kNumRows, Source kSource>
void dot_rows(const Left<T>& left, const Right<T>& right, int blocks, bool first, float* result) {
    constexpr bool kInOrder = kSource != Source::kCache && kReadsInOrder<T, kNumRows>;
    constexpr bool kFetchesTwice = kSource == Source::kFetchedTwice && kNumRows <= kRowsFetchedTwice;
    Fetch fetch = right.fetch;
    if constexpr (kNumRows <= kRowsOfBothHalves) {
        Vec sums[2][kNumRows];
#pragma GCC unroll 16
        for (int r = 0; r < kNumRows; ++r) sums[0][r] = sums[1][r] = zero();
        if constexpr (kAddsInParts<T>) {
#pragma GCC unroll 16
            for (int r = 0; r < kNumRows && !first; ++r) {
                sums[0][r] = load(result + r * kColumns);
                sums[1][r] = load(result + r * kColumns + kLanes);
            }
        }
        RowPointers<T, kNumRows> x(left.data, left.row);
        for (int k = 0; k < blocks; ++k)
            add_products<T, kNumRows, 2, kInOrder, kFetchesTwice>(sums, x, left.block, right, k, 0, fetch);
#pragma GCC unroll 16
        for (int r = 0; r < kNumRows; ++r) {
            store(result + r * kColumns, sums[0][r]);
            store(result + r * kColumns + kLanes, sums[1][r]);
        }
    } else {
        for (int begin = 0; begin < blocks; begin += kBlocksPerPass<kInOrder>) {
            const int end = std::min(begin + kBlocksPerPass<kInOrder>, blocks);
            for (int h = 0; h < 2; ++h) {
                float* const half = result + h * kLanes;
                Vec sums[1][kNumRows];
#pragma GCC unroll 16
                for (int r = 0; r < kNumRows; ++r) sums[0][r] = zero();
                if (begin > 0 || !first) {
#pragma GCC unroll 16
                    for (int r = 0; r < kNumRows; ++r) sums[0][r] = load(half + r * kColumns);
                }
                RowPointers<T, kNumRows> x(left.data + begin * left.block, left.row);
                for (int k = begin; k < end; ++k)
                    add_products<T, kNumRows, 1, false, kFetchesTwice>(sums, x, left.block, right, k, h, fetch);
#pragma GCC unroll 16
                for (int r = 0; r < kNumRows; ++r) store(half + r * kColumns, sums[0][r]);
            }
        }
    }
}

template <class T>
using DotRows = void (*)(const Left<T>&, const Right<T>&, int, bool, float*);

template <class T, int... kIndices>
DotRows<T> choose_rows(int rows, Source source, std::integer_sequence<int, kIndices...>) {
    static constexpr DotRows<T> kCached[] = {dot_rows<T, kIndices + 1, Source::kCache>...};
    static constexpr DotRows<T> kStreams[] = {dot_rows<T, kIndices + 1, Source::kStream>...};
    static constexpr DotRows<T> kFetched[] = {dot_rows<T, kIndices + 1, kFetchedSource<kIndices + 1>>...};
    return (source == Source::kCache ? kCached : source == Source::kStream ? kStreams : kFetched)[rows - 1];
}

#if defined(OCTAVO_AMX)

void dot_tiles(int rows, const Left<BFloat16>& left, const Right<BFloat16>& right, int blocks, float* sums) {
    configure_tiles(rows, amx::kRowBytes);
    const bool two = rows > amx::kTileRows;
    const long left_stride = static_cast<long>(left.row * sizeof(BFloat16));
    const long right_stride = static_cast<long>(kStepElements * sizeof(BFloat16));
    constexpr long kSumStride = kColumns * sizeof(float);
    amx::zero<4>();
    amx::zero<5>();
    if (two) {
        amx::zero<6>();
        amx::zero<7>();
    }
    for (int k = 0; k < blocks; ++k) {
        const BFloat16* x = left.data + k * left.block;
        const BFloat16* w = right.list ? right.list[k] : right.data + k * right.block;
        amx::load<0>(x, left_stride);
        amx::load<2>(w, right_stride);
        amx::load<3>(w + kHalfElements<BFloat16>, right_stride);
        amx::dot_product<4, 0, 2>();
        amx::dot_product<5, 0, 3>();
        if (two) {
            amx::load<1>(x + amx::kTileRows * left.row, left_stride);
            amx::dot_product<6, 1, 2>();
            amx::dot_product<7, 1, 3>();
        }
    }
    amx::store<4>(sums, kSumStride);
    amx::store<5>(sums + kLanes, kSumStride);
    if (two) {
        amx::store<6>(sums + amx::kTileRows * kColumns, kSumStride);
        amx::store<7>(sums + amx::kTileRows * kColumns + kLanes, kSumStride);
    }
}

#endif

}  // namespace

template <class T>
void add_dot(int rows, const Left<T>& left, const Right<T>& right, int blocks, bool first, float* sums) {
    const DotRows<T> add = choose_rows<T>(rows, Source::kCache, std::make_integer_sequence<int, kRows<T>>());
    add(left, right, blocks, first, sums);
}

template <class T>
void dot(int rows, const Left<T>& left, const Right<T>& right, int blocks, float* sums) {
#if defined(OCTAVO_AMX)
    if constexpr (kIsBFloat16<T>) {
        dot_tiles(rows, left, right, blocks, sums);
        return;
    } else
#endif
    {
        const Source stream = is_fetched_twice(rows) ? Source::kFetchedTwice : Source::kStream;
        const Source source = right.list || right.is_cached ? Source::kCache : stream;
        const DotRows<T> add = choose_rows<T>(rows, source, std::make_integer_sequence<int, kRows<T>>());
        add(left, right, blocks, true, sums);
    }
}

template void dot<BFloat16>(int, const Left<BFloat16>&, const Right<BFloat16>&, int, float*);
template void dot<Float16>(int, const Left<Float16>&, const Right<Float16>&, int, float*);
template void dot<float>(int, const Left<float>&, const Right<float>&, int, float*);
template void add_dot<Float16>(int, const Left<Float16>&, const Right<Float16>&, int, bool, float*);
template void add_dot<float>(int, const Left<float>&, const Right<float>&, int, bool, float*);
#if !defined(OCTAVO_AMX)
template void add_dot<BFloat16>(int, const Left<BFloat16>&, const Right<BFloat16>&, int, bool, float*);
#endif

void release_tiles() {
#if defined(OCTAVO_AMX)
    if (tile_rows) amx::release();
    tile_rows = 0;
#endif
}

}  // namespace octavo
