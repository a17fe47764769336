// The tile instructions in plain C++, for tests on CPUs that lack them.
//
// They follow the pseudocode of Intel's manual: rows and columns come from the configuration, an access outside it is
// an error as on hardware, and TDPBF16PS sums the even and odd elements of the pairs separately before adding both to
// the destination, flushing subnormals to zero.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace octavo::emulation {

struct Config {
    uint8_t palette;
    uint8_t start_row;
    uint8_t reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

struct Tile {
    uint8_t bytes[16][64];
};

struct State {
    bool configured;
    Config config;
    Tile tiles[8];
};

inline State& state() {
    thread_local State instance;
    return instance;
}

inline void require(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "AMX emulation: %s\n", what);
    std::abort();
}

inline void configure(const Config& config) {
    State& s = state();
    require(config.palette == 1 && config.start_row == 0, "palette 1 from row 0 is what these kernels use");
    for (int i = 0; i < 16; ++i) {
        require(i < 8 || (config.rows[i] == 0 && config.row_bytes[i] == 0), "there are 8 tiles");
        require(config.rows[i] <= 16 && config.row_bytes[i] <= 64, "a tile has 16 rows of 64 bytes");
    }
    s.configured = true;
    s.config = config;
    std::memset(s.tiles, 0, sizeof s.tiles);
}

inline void release() { state().configured = false; }

inline int rows_of(int tile) {
    const State& s = state();
    require(s.configured, "no configuration");
    require(s.config.rows[tile] > 0 && s.config.row_bytes[tile] > 0, "the tile is not configured");
    return s.config.rows[tile];
}

inline int row_bytes_of(int tile) { return state().config.row_bytes[tile]; }

template <int kTile>
inline void zero() {
    rows_of(kTile);
    std::memset(&state().tiles[kTile], 0, sizeof(Tile));
}

template <int kTile>
inline void load(const void* p, long stride_bytes) {
    const int rows = rows_of(kTile);
    Tile& tile = state().tiles[kTile];
    std::memset(&tile, 0, sizeof tile);
    for (int row = 0; row < rows; ++row)
        std::memcpy(tile.bytes[row], static_cast<const char*>(p) + row * stride_bytes, row_bytes_of(kTile));
}

template <int kTile>
inline void store(void* p, long stride_bytes) {
    const int rows = rows_of(kTile);
    for (int row = 0; row < rows; ++row)
        std::memcpy(static_cast<char*>(p) + row * stride_bytes, state().tiles[kTile].bytes[row], row_bytes_of(kTile));
}

inline float flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

inline float bfloat16_at(const uint8_t* row, int index) {
    uint16_t half;
    std::memcpy(&half, row + 2 * index, sizeof half);
    const uint32_t u = static_cast<uint32_t>(half) << 16;
    float x;
    std::memcpy(&x, &u, sizeof x);
    return flush(x);
}

template <int kSum, int kLeft, int kRight>
inline void dot_product() {
    State& s = state();
    const int rows = rows_of(kSum);
    const int pairs = row_bytes_of(kLeft) / 4;
    const int columns = row_bytes_of(kSum) / 4;
    require(rows_of(kLeft) == rows, "the left factor has as many rows as the sum");
    require(rows_of(kRight) == pairs, "the right factor has a row for each pair of the left one");
    require(row_bytes_of(kRight) == row_bytes_of(kSum), "the right factor has as many columns as the sum");
    for (int m = 0; m < rows; ++m) {
        float even[16] = {}, odd[16] = {};
        for (int k = 0; k < pairs; ++k) {
            for (int n = 0; n < columns; ++n) {
                const uint8_t* left = s.tiles[kLeft].bytes[m];
                const uint8_t* right = s.tiles[kRight].bytes[k];
                even[n] = flush(std::fma(bfloat16_at(left, 2 * k), bfloat16_at(right, 2 * n), even[n]));
                odd[n] = flush(std::fma(bfloat16_at(left, 2 * k + 1), bfloat16_at(right, 2 * n + 1), odd[n]));
            }
        }
        for (int n = 0; n < columns; ++n) {
            float sum;
            std::memcpy(&sum, s.tiles[kSum].bytes[m] + 4 * n, sizeof sum);
            sum = flush(flush(sum) + flush(even[n] + odd[n]));
            std::memcpy(s.tiles[kSum].bytes[m] + 4 * n, &sum, sizeof sum);
        }
    }
}

// TDPBSUD: sums of four products of int8 and uint8, modulo 2^32.
template <int kSum, int kLeft, int kRight>
inline void dot_codes() {
    State& s = state();
    const int rows = rows_of(kSum);
    const int fours = row_bytes_of(kLeft) / 4;
    const int columns = row_bytes_of(kSum) / 4;
    require(rows_of(kLeft) == rows, "the left factor has as many rows as the sum");
    require(rows_of(kRight) == fours, "the right factor has a row for four columns of the left one");
    require(row_bytes_of(kRight) == row_bytes_of(kSum), "the right factor has as many columns as the sum");
    for (int m = 0; m < rows; ++m) {
        for (int n = 0; n < columns; ++n) {
            uint32_t sum;
            std::memcpy(&sum, s.tiles[kSum].bytes[m] + 4 * n, sizeof sum);
            for (int k = 0; k < fours; ++k)
                for (int i = 0; i < 4; ++i)
                    sum += static_cast<uint32_t>(static_cast<int8_t>(s.tiles[kLeft].bytes[m][4 * k + i]) *
                                                 s.tiles[kRight].bytes[k][4 * n + i]);
            std::memcpy(s.tiles[kSum].bytes[m] + 4 * n, &sum, sizeof sum);
        }
    }
}

inline int request_permission() { return 0; }

}  // namespace octavo::emulation
