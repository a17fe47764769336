// Peak rates of this machine, by loops that share no code with the kernels: the limits that these are measured against.
#include <omp.h>

#include "dot.h"
#include "int8.h"
#include "kernels.h"

#if defined(OCTAVO_AMX)
#include "amx.h"
#endif

using namespace octavo;

namespace {

constexpr int64_t kAheadBytes = 4096;
constexpr int64_t kBytesPerTurn = 4 * kCacheLineBytes;

// Reads memory in order. With prefetching some CPUs are faster, others slower.
template <bool kPrefetch>
float read_all(const char* p, int64_t turns) {
    constexpr int kVecs = kBytesPerTurn / (kLanes * sizeof(float));
    Vec sums[kVecs];
    for (int j = 0; j < kVecs; ++j) sums[j] = zero();
    for (int64_t i = 0; i < turns; ++i, p += kBytesPerTurn) {
        if constexpr (kPrefetch)
            for (int64_t line = 0; line < kBytesPerTurn; line += kCacheLineBytes)
                prefetch(address_of(p) + kAheadBytes + line);
        for (int j = 0; j < kVecs; ++j) sums[j] = max(sums[j], load(reinterpret_cast<const float*>(p) + j * kLanes));
    }
    for (int j = 1; j < kVecs; ++j) sums[0] = sums[0] + sums[j];
    return sum(sums[0]);
}

template <bool kPrefetch>
double read_rate(const void* data, int64_t num_bytes, int32_t threads) {
    float sink = 0.0f;
    const double begin = omp_get_wtime();
#pragma omp parallel num_threads(threads) reduction(+ : sink)
    {
        const int64_t turns = num_bytes / kBytesPerTurn / omp_get_num_threads();
        const char* p = static_cast<const char*>(data) + omp_get_thread_num() * turns * kBytesPerTurn;
        sink += read_all<kPrefetch>(p, turns);
    }
    const double seconds = omp_get_wtime() - begin;
    return sink == 1.25f ? 0.0 : static_cast<double>(num_bytes) / seconds;
}

// Enough independent sums to hide the latency of a multiply-add, few enough to stay in registers.
#if defined(__AVX512F__)
constexpr int kSums = 12;
#elif defined(__AVX2__)
constexpr int kSums = 6;
#else
constexpr int kSums = 2;
#endif
constexpr int64_t kTurns = 1000000;

// Each of these loops multiplies and adds in registers, and returns how many numbers.
int64_t multiply_floats(float& sink) {
    Vec sums[kSums];
    for (int j = 0; j < kSums; ++j) sums[j] = splat(sink);
    const Vec x = splat(sink + 0.5f), y = splat(sink + 0.25f);
    for (int64_t i = 0; i < kTurns; ++i)
        for (int j = 0; j < kSums; ++j) sums[j] = fma(x, sums[j], y);
    for (int j = 0; j < kSums; ++j) sink += sum(sums[j]);
    return kTurns * kSums * kLanes;
}

#if defined(OCTAVO_AMX)

int64_t multiply_bfloats(float& sink) {
    alignas(kCacheLineBytes) float tile[amx::kTileRows * kLanes] = {};
    amx::Config config = {};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) {
        config.row_bytes[i] = amx::kRowBytes;
        config.rows[i] = amx::kTileRows;
    }
    amx::configure(config);
    amx::zero<0>();
    amx::zero<1>();
    amx::zero<2>();
    amx::zero<3>();
    amx::load<4>(tile, amx::kRowBytes);
    amx::load<5>(tile, amx::kRowBytes);
    constexpr int64_t kTileTurns = kTurns / 256;
    for (int64_t i = 0; i < kTileTurns; ++i) {
        amx::dot_product<0, 4, 5>();
        amx::dot_product<1, 4, 5>();
        amx::dot_product<2, 4, 5>();
        amx::dot_product<3, 4, 5>();
    }
    amx::store<0>(tile, amx::kRowBytes);
    amx::release();
    sink += tile[0];
    return kTileTurns * 4 * amx::kTileRows * amx::kTileRows * (amx::kRowBytes / 2);
}

#elif defined(__AVX512BF16__)

int64_t multiply_bfloats(float& sink) {
    __m512 sums[kSums];
    for (int j = 0; j < kSums; ++j) sums[j] = _mm512_set1_ps(sink);
    const __m512bh x = (__m512bh)_mm512_set1_epi32(static_cast<int>(bits_of(sink + 0.5f)));
    for (int64_t i = 0; i < kTurns; ++i)
        for (int j = 0; j < kSums; ++j) sums[j] = _mm512_dpbf16_ps(sums[j], x, x);
    for (int j = 0; j < kSums; ++j) sink += _mm512_reduce_add_ps(sums[j]);
    return kTurns * kSums * kLanes * 2;
}

#else

int64_t multiply_bfloats(float& sink) { return multiply_floats(sink); }

#endif

// Adds products of 8-bit integers.
inline Totals dot_product(Totals sum, Codes x) {
#if defined(OCTAVO_ADD_PAIRS)
    asm volatile("" : "+v"(x));  // multiply each time
    return add_pairs(sum, multiply_pairs(x, x));
#else
    return dot(sum, x, x);
#endif
}

int64_t multiply_integers(float& sink) {
    constexpr int kCodes = kIntColumns * 4;
    Totals sums[kSums];
    for (int j = 0; j < kSums; ++j) sums[j] = splat_total(j);
    const Codes x = splat_codes(static_cast<int32_t>(bits_of(sink + 0.5f)));
    for (int64_t i = 0; i < kTurns; ++i)
        for (int j = 0; j < kSums; ++j) sums[j] = dot_product(sums[j], x);
    float numbers[kIntColumns];
    for (int j = 0; j < kSums; ++j) {
        store_floats(numbers, to_floats(sums[j]));
        sink += numbers[0];
    }
    return kTurns * kSums * kCodes;
}

}  // namespace

double octavo_measure_bandwidth(const void* data, int64_t num_bytes, int32_t threads) {
    const double plain = read_rate<false>(data, num_bytes, threads);
    const double prefetched = read_rate<true>(data, num_bytes, threads);
    return plain > prefetched ? plain : prefetched;
}

double octavo_measure_peak(int32_t type, int32_t threads) {
    double seconds = 0.0;
    double count = 0.0;
    float sink = 0.0f;
#pragma omp parallel num_threads(threads) reduction(max : seconds) reduction(+ : count, sink)
    {
        float x = 0.0f;
#pragma omp barrier
        const double begin = omp_get_wtime();
        count = static_cast<double>(type == kNumTypes   ? multiply_integers(x)
                                    : type == kBFloat16 ? multiply_bfloats(x)
                                                        : multiply_floats(x));
        seconds = omp_get_wtime() - begin;
        sink = x;
    }
    return sink == 1.25f ? 0.0 : count / seconds;
}
