// Peak rates of this machine: the limits that kernels are measured against.
#include <omp.h>

#include <vector>

#include "dot.h"
#include "kernels.h"

using namespace octavo;

double octavo_measure_bandwidth(const void* data, int64_t num_bytes, int32_t threads) {
    const int64_t count = num_bytes / (4 * kLanes * static_cast<int64_t>(sizeof(float)));
    float sink = 0.0f;
    const double begin = omp_get_wtime();
#pragma omp parallel num_threads(threads) reduction(+ : sink)
    {
        const int64_t each = count / omp_get_num_threads();
        const float* p = static_cast<const float*>(data) + omp_get_thread_num() * each * 4 * kLanes;
        Vec sums[4] = {zero(), zero(), zero(), zero()};
        for (int64_t i = 0; i < each; ++i, p += 4 * kLanes)
            for (int j = 0; j < 4; ++j) sums[j] = max(sums[j], load(p + j * kLanes));
        sink += sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
    const double seconds = omp_get_wtime() - begin;
    return sink == 1.25f ? 0.0 : static_cast<double>(num_bytes) / seconds;
}

namespace {

template <class T>
double measure_peak(int threads) {
    constexpr int kBlocks = 8;  // both factors stay in the L1 cache
    constexpr int kCalls = 4000;
    double seconds = 0.0;
#pragma omp parallel num_threads(threads) reduction(max : seconds)
    {
        std::vector<LeftOf<T>> left(kRows<T> * kBlocks * kBlock);
        std::vector<T> right(kColumns * kBlocks * kBlock);
        std::vector<float> sums(kRows<T> * kColumns);
        const Left<T> rows = {left.data(), kBlock, kRows<T> * kBlock};
        const Right<T> columns = {right.data(), kColumns, kIsBFloat16<T> ? 512 : kLanes, kColumns * kBlock};
#pragma omp barrier
        const double begin = omp_get_wtime();
        for (int i = 0; i < kCalls; ++i) dot(kRows<T>, rows, columns, kBlocks, sums.data());
        seconds = omp_get_wtime() - begin;
        release_tiles();
    }
    return static_cast<double>(threads) * kCalls * kRows<T> * kColumns * kBlocks * kBlock / seconds;
}

}  // namespace

double octavo_measure_peak(int32_t type, int32_t threads) {
    return with_type(type, [&](auto number) { return measure_peak<decltype(number)>(threads); });
}
