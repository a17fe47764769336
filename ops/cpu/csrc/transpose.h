// Transposition of 32-bit words.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace octavo {

constexpr int kTile = 8;

// target[i][j] = source[j][i] for i, j < kTile. Rows are the given numbers of bytes apart.
inline void transpose_tile(const char* source, int64_t source_row, char* target, int64_t target_row) {
#if defined(__AVX2__)
    __m256 row[kTile], pair[kTile], four[kTile];
    for (int i = 0; i < kTile; ++i) row[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(source + i * source_row));
    for (int i = 0; i < kTile; i += 2) {
        pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
        pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
    }
    for (int i = 0; i < kTile; i += 4) {
        four[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
        four[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
        four[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
        four[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
    }
    for (int i = 0; i < kTile / 2; ++i) {
        const __m256 low = _mm256_permute2f128_ps(four[i], four[i + 4], 0x20);
        const __m256 high = _mm256_permute2f128_ps(four[i], four[i + 4], 0x31);
        _mm256_storeu_ps(reinterpret_cast<float*>(target + i * target_row), low);
        _mm256_storeu_ps(reinterpret_cast<float*>(target + (i + kTile / 2) * target_row), high);
    }
#else
    uint32_t words[kTile][kTile];
    for (int i = 0; i < kTile; ++i) std::memcpy(words[i], source + i * source_row, sizeof words[i]);
    for (int i = 0; i < kTile; ++i) {
        uint32_t column[kTile];
        for (int j = 0; j < kTile; ++j) column[j] = words[j][i];
        std::memcpy(target + i * target_row, column, sizeof column);
    }
#endif
}

// The same for `rows` rows of `columns` words, both multiples of kTile.
inline void transpose(const void* source, int64_t source_row, void* target, int64_t target_row, int rows, int columns) {
    const char* from = static_cast<const char*>(source);
    char* to = static_cast<char*>(target);
    constexpr int kBytes = kTile * sizeof(uint32_t);
    for (int i = 0; i < rows / kTile; ++i)
        for (int j = 0; j < columns / kTile; ++j)
            transpose_tile(from + i * kTile * source_row + j * kBytes, source_row,
                           to + j * kTile * target_row + i * kBytes, target_row);
}

}  // namespace octavo
