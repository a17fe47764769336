// How streams of weights are prefetched that few rows are multiplied with.
#pragma once

#include "simd.h"

namespace octavo {

// With few rows, CPUs other than AMD's read a tenth faster if what is in the L2 cache is then fetched into the L1
// cache, a little ahead: loads that wait for the L2 cache occupy the few fill buffers that lines from memory need, too.
constexpr int kRowsFetchedTwice = 4;
constexpr uintptr_t kNearBytes = 2048;

inline bool is_fetched_twice(int rows) { return rows <= kRowsFetchedTwice && !is_amd(); }

// How far ahead weights are prefetched, in bytes.
struct Ahead {
    uintptr_t far = 0;   // into the L2 cache
    uintptr_t near = 0;  // into the L1 cache; 0: not at all

    void fetch(uintptr_t line) const {
        prefetch(line + far);
        if (near) prefetch_l1(line + near);
    }
};

}  // namespace octavo
