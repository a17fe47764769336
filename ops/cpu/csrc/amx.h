// Intel AMX: tiles of 16 rows of 64 bytes, and their products in bfloat16 and in 8 bits.
//
// Inline assembly instead of the compiler's intrinsics: in GCC 12, tile loads do not declare that they read memory, and
// the configuration load declares only 8 of its 64 bytes, so stores may be moved past either.
#pragma once

#include <cstdint>

#if defined(OCTAVO_AMX_EMULATION)
#include "amx_emulation.h"
#else
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace octavo::amx {

constexpr int kTileRows = 16;
constexpr int kRowBytes = 64;

#if defined(OCTAVO_AMX_EMULATION)

using namespace emulation;

#else

// The memory operand of LDTILECFG.
struct alignas(64) Config {
    uint8_t palette;
    uint8_t start_row;
    uint8_t reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

inline void configure(const Config& config) { asm volatile("ldtilecfg %0" ::"m"(config) : "memory"); }

inline void release() { asm volatile("tilerelease" ::: "memory"); }

template <int kTile>
inline void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

template <int kTile>
inline void load(const void* p, long stride_bytes) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(kTile), "r"(p), "r"(stride_bytes) : "memory");
}

template <int kTile>
inline void store(void* p, long stride_bytes) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(kTile), "r"(p), "r"(stride_bytes) : "memory");
}

template <int kSum, int kLeft, int kRight>
inline void dot_product() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kLeft), "i"(kRight));
}

// int8 times uint8.
template <int kSum, int kLeft, int kRight>
inline void dot_codes() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kLeft), "i"(kRight));
}

// A process must ask the kernel once before it may use tile data. Returns 0, or -1 on failure.
inline int request_permission() {
    constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
    constexpr int kTileData = 18;
    return static_cast<int>(syscall(SYS_arch_prctl, kRequestPermission, kTileData));
}

#endif

}  // namespace octavo::amx
