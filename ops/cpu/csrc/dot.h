// The inner kernel of all matrix products: a few rows times 32 columns.
//
// Linear layers, attention scores and the weighted sum of values all call `dot`. Every element of the result has one
// accumulator that runs over k in ascending order, however many rows there are: this makes results independent of the
// batch. On a CPU with AMX the order is that of TDPBF16PS, even for a single row.
#pragma once

#include <algorithm>
#include <type_traits>

#include "simd.h"

#if defined(OCTAVO_AMX) || defined(__AVX512BF16__)
#define OCTAVO_DOT_BF16 1  // the CPU multiplies pairs of bfloat16
#endif

namespace octavo {

constexpr int kColumns = 32;  // of a result
constexpr int kBlock = 32;    // k is processed in blocks of this size; both factors are zero-padded to it

template <class T>
constexpr bool kIsBFloat16 = std::is_same_v<T, BFloat16>;

// Elements of consecutive k that are adjacent in a right factor of type T.
template <class T>
constexpr int kPair = kIsBFloat16<T> ? 2 : 1;

// Steps in a block of k.
template <class T>
constexpr int kSteps = kBlock / kPair<T>;

// Elements of a right factor from one step to the next, and from the first 16 columns to the last.
constexpr int kStepElements = kColumns;
template <class T>
constexpr int kHalfElements = kIsBFloat16<T> ? kBlock * kColumns / 2 : kColumns / 2;

// Type of the left factor that the CPU multiplies with a right factor of type T.
#if defined(OCTAVO_DOT_BF16)
template <class T>
using LeftOf = std::conditional_t<kIsBFloat16<T>, BFloat16, float>;
#else
template <class T>
using LeftOf = float;
#endif

// Most rows per call.
#if defined(OCTAVO_AMX)
template <class T>
constexpr int kRows = kIsBFloat16<T> ? 32 : 12;
#elif defined(__AVX512F__)
template <class T>
constexpr int kRows = 12;
#elif defined(__AVX2__)
template <class T>
constexpr int kRows = 6;
#else
template <class T>
constexpr int kRows = 2;
#endif

constexpr int kMostRows = 32;  // for any type and CPU

// The left factor: rows of k; a block of one row is contiguous.
template <class T>
struct Left {
    const LeftOf<T>* data;
    int64_t row;    // from one row to the next; kBlock if kCopiesRows<T>
    int64_t block;  // from one block of k to the next
};

// Whether the rows of a left factor must be copies, since their type is another. Copies lie kBlock elements apart.
template <class T>
constexpr bool kCopiesRows = !std::is_same_v<LeftOf<T>, T>;

// Pointers to some rows of a left factor. Few, so that all fit into registers: x86 adds a constant, or once or twice
// the distance, to an address.
template <class T, int kNumRows>
class RowPointers {
public:
    RowPointers(const LeftOf<T>* first, int64_t distance) : distance_(distance) {
        for (int i = 0; i < kPointers; ++i, first += kEach * distance) {
            pointers_[i] = first;
#if defined(__x86_64__)
            asm("" : "+r"(pointers_[i]));  // or else GCC computes each from the first, and runs out of registers
#endif
        }
    }
    const LeftOf<T>* operator[](int row) const {
        return pointers_[row / kEach] + row % kEach * (kCopiesRows<T> ? kBlock : distance_);
    }
    void advance(int64_t elements) {
        for (int i = 0; i < kPointers; ++i) pointers_[i] += elements;
    }

private:
    static constexpr int kEach = kCopiesRows<T> ? 6 : 3;
    static constexpr int kPointers = (kNumRows + kEach - 1) / kEach;

    const LeftOf<T>* pointers_[kPointers];
    int64_t distance_;
};

// Prefetch into the L2 cache while a right factor is read: with each of its cache lines the line at `first`, which then
// advances by `step` bytes. The default prefetches nothing and costs one instruction.
struct Fetch {
    uintptr_t first = 0;
    int64_t step = 0;
};

inline void advance(Fetch& fetch) {
    prefetch(fetch.first);
    fetch.first += fetch.step;
}

// The right factor: blocks of k of 32 columns, in two halves of 16. In a step, each column has kPair elements.
template <class T>
struct Right {
    const T* data;
    int64_t block;                   // from one block of k to the next
    const T* const* list = nullptr;  // instead of `data` and `block`: where each block starts
    Fetch fetch = {};
    const T* const* next = nullptr;  // instead of `fetch.first`: prefetched with each block of `list`
    bool is_cached = false;          // without `list`: no long stream from memory
};

// sums[r][0..31] = left[r] * right, over `blocks` blocks of k. 1 <= rows <= kRows<T>.
template <class T>
void dot(int rows, const Left<T>& left, const Right<T>& right, int blocks, float* sums);

// Whether a product with a right factor of type T multiplies float32 numbers.
template <class T>
constexpr bool kMultipliesFloat = std::is_same_v<LeftOf<T>, float>;

// Whether products can be computed in parts of ascending k. The tiles of AMX start from zero.
template <class T>
#if defined(OCTAVO_AMX)
constexpr bool kAddsInParts = kMultipliesFloat<T>;
#else
constexpr bool kAddsInParts = true;
#endif

// The same with += if not `first`, for a right factor that is in a cache, or prefetched into one, where `dot` reads a
// long stream from memory. T is a type for which kAddsInParts holds.
template <class T>
void add_dot(int rows, const Left<T>& left, const Right<T>& right, int blocks, bool first, float* sums);

extern template void dot<BFloat16>(int, const Left<BFloat16>&, const Right<BFloat16>&, int, float*);
extern template void dot<Float16>(int, const Left<Float16>&, const Right<Float16>&, int, float*);
extern template void dot<float>(int, const Left<float>&, const Right<float>&, int, float*);
#if !defined(OCTAVO_AMX)
extern template void add_dot<BFloat16>(int, const Left<BFloat16>&, const Right<BFloat16>&, int, bool, float*);
#endif
extern template void add_dot<Float16>(int, const Left<Float16>&, const Right<Float16>&, int, bool, float*);
extern template void add_dot<float>(int, const Left<float>&, const Right<float>&, int, bool, float*);

#if defined(OCTAVO_AMX)
// Tiles 0 and 1 hold two halves of the rows, of `left_bytes` each; 2 and 3 those of the columns, a row for 4 bytes of
// the left factor; 4 to 7 their sums.
void configure_tiles(int rows, int left_bytes);
#endif

// Restores the tile registers to their initial state; called last by each thread.
void release_tiles();

}  // namespace octavo
