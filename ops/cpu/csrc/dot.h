// The inner kernel of everything that multiplies matrices: a few rows times 32 columns.
//
// Linear layers, attention scores and the weighted sum of values are all calls of `dot`. Every number of the result
// has one accumulator that runs over k in ascending order, however many rows there are: that is why results do not
// depend on the batch. On a CPU with AMX that order is the one of TDPBF16PS, also for a single row.
#pragma once

#include <algorithm>
#include <type_traits>

#include "simd.h"

#if defined(OCTAVO_AMX) || defined(__AVX512BF16__)
#define OCTAVO_DOT_BF16 1  // the CPU multiplies pairs of bfloat16
#endif

namespace octavo {

constexpr int kColumns = 32;  // of a result
constexpr int kBlock = 32;    // k are taken by so many; both factors are padded with zeros to that

template <class T>
constexpr bool kIsBFloat16 = std::is_same_v<T, BFloat16>;

// Numbers of consecutive k that lie together in the right factor, of type T.
template <class T>
constexpr int kPair = kIsBFloat16<T> ? 2 : 1;

// Steps in a block of k.
template <class T>
constexpr int kSteps = kBlock / kPair<T>;

// Type of the left factor: what the CPU multiplies a right factor of type T by.
#if defined(OCTAVO_DOT_BF16)
template <class T>
using LeftOf = std::conditional_t<kIsBFloat16<T>, BFloat16, float>;
#else
template <class T>
using LeftOf = float;
#endif

// Most rows of one call.
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

constexpr int kMostRows = 32;  // of any type and CPU

// The left factor: rows of k; a block of one row is contiguous.
template <class T>
struct Left {
    const LeftOf<T>* data;
    int64_t row;    // from one row to the next
    int64_t block;  // from one block of k to the next
};

// What is fetched into the L2 cache while a right factor is being read: with each of its cache lines the line at
// `first`, which then goes on by `step` bytes. The default costs nothing but the instruction: it fetches nothing.
struct Fetch {
    uintptr_t first = 0;
    int64_t step = 0;
};

// The right factor: blocks of k, of 32 columns in two halves of 16. In a step, each column has kPair numbers.
template <class T>
struct Right {
    const T* data;
    int64_t step;                    // from one step to the next
    int64_t half;                    // from the first 16 columns to the others
    int64_t block;                   // from one block of k to the next
    const T* const* list = nullptr;  // instead of `data` and `block`: where each block starts
    Fetch fetch = {};
    const T* const* next = nullptr;  // instead of `fetch.first`: what is fetched with each block of `list`
};

// sums[r][0..31] = left[r] * right, over `blocks` blocks of k. 1 <= rows <= kRows<T>.
template <class T>
void dot(int rows, const Left<T>& left, const Right<T>& right, int blocks, float* sums);

extern template void dot<BFloat16>(int, const Left<BFloat16>&, const Right<BFloat16>&, int, float*);
extern template void dot<Float16>(int, const Left<Float16>&, const Right<Float16>&, int, float*);
extern template void dot<float>(int, const Left<float>&, const Right<float>&, int, float*);

// Leaves the tile registers as they were found; the last thing a thread does.
void release_tiles();

}  // namespace octavo
