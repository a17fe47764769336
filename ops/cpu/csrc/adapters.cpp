// Products of rows with the A of their adapters.
#include "adapters.h"

#include "linear.h"

namespace octavo {

namespace {

// Rows of A that are computed together; they lie side by side, block by block of 32 columns.
constexpr int kRanks = 4;

// Rows of x that pass by them together.
constexpr int kRowsPerTile = 4;
#if defined(__AVX512F__)
constexpr int kRowsAtOnce = 4;
#else
constexpr int kRowsAtOnce = 1;
#endif

// With fewer tiles than this per thread, each is split into parts of A.
constexpr int kTilesPerThread = 4;
constexpr int kPartsOfA = 4;

// How far ahead A is prefetched.
constexpr uintptr_t kAheadBytes = 4096;

template <class T>
Vec add_products(const T* x, const T* a, Vec sum) {
#if defined(__AVX512BF16__)
    if constexpr (kIsBFloat16<T>)
        return {_mm512_dpbf16_ps(sum.v, (__m512bh)_mm512_loadu_si512(x), (__m512bh)_mm512_loadu_si512(a))};
#endif
    return fma(load(x + kLanes), load(a + kLanes), fma(load(x), load(a), sum));
}

// Products of some rows with `kRanks` rows of A. Each is summed by itself, in lanes, so neighbours do not matter.
template <class T, int kNumRows>
void project(const T* x, int64_t padded, const T* a, const float* factors, float* const* out) {
    Vec sums[kNumRows][kRanks];
    for (int r = 0; r < kNumRows; ++r)
        for (int j = 0; j < kRanks; ++j) sums[r][j] = zero();
    for (int64_t k = 0; k < padded; k += kBlock, a += kRanks * kBlock) {
        for (int j = 0; j < kRanks; ++j) {
            prefetch(address_of(a + j * kBlock) + kAheadBytes);
            for (int r = 0; r < kNumRows; ++r)
                sums[r][j] = add_products(x + r * padded + k, a + j * kBlock, sums[r][j]);
        }
    }
    for (int r = 0; r < kNumRows; ++r)
        for (int j = 0; j < kRanks; ++j) out[r][j] = sum(sums[r][j]) * factors[j];
}

// The rows of a step with one adapter, and how they are divided.
struct Share {
    const OctavoAdapter* adapter;
    const int64_t* rows;
    int count;

    int tiles() const { return adapter && adapter->rank ? blocks_of(count, kRowsPerTile) : 0; }
};

Share share_of(const OctavoLinear& op, const OctavoAdapterRows& rows, int index) {
    const int begin = rows.starts[index];
    return {op.adapters[rows.adapters[index]], rows.rows + begin, rows.starts[index + 1] - begin};
}

template <class T>
void project_tile(const OctavoLinear& op, const OctavoStep& step, const Share& share, int tile, const Range& groups,
                  T* staged, T* normed, float* projected, int64_t stride) {
    const int columns = op.weight.columns;
    const int64_t padded = static_cast<int64_t>(blocks_of(columns, kBlock)) * kBlock;
    const int begin = tile * kRowsPerTile, count = std::min(kRowsPerTile, share.count - begin);
    for (int r = 0; r < count; ++r) {
        const T* x = read_row<T>(op, step, static_cast<int>(share.rows[begin + r]), normed);
        std::memcpy(static_cast<void*>(staged + r * padded), x, static_cast<size_t>(columns) * sizeof(T));
    }
    const T* a = static_cast<const T*>(share.adapter->a);
    for (int group = groups.begin; group < groups.end; ++group) {
        const T* part = a + group * padded * kRanks;
        const float* factors = share.adapter->factors + group * kRanks;
        float* out[kRowsPerTile];
        for (int r = 0; r < count; ++r) out[r] = projected + share.rows[begin + r] * stride + group * kRanks;
        if (kRowsAtOnce == kRowsPerTile && count == kRowsPerTile) {
            project<T, kRowsPerTile>(staged, padded, part, factors, out);
            continue;
        }
        for (int r = 0; r < count; ++r) project<T, 1>(staged + r * padded, padded, part, factors, out + r);
    }
}

template <class T>
void project_all(const OctavoLinear& op, const OctavoStep& step, const OctavoAdapterRows& rows, const Team& team,
                 float* projected, int64_t stride) {
    const size_t padded = static_cast<size_t>(blocks_of(op.weight.columns, kBlock)) * kBlock;
    const Scratch::Mark mark = team.scratch.mark();
    T* staged = team.scratch.take<T>(kRowsPerTile * padded);
    std::memset(static_cast<void*>(staged), 0, kRowsPerTile * padded * sizeof(T));
    T* normed = op.norm ? team.scratch.take<T>(padded) : nullptr;
    int tiles = 0;
    for (int i = 0; i < rows.num_adapters; ++i) tiles += share_of(op, rows, i).tiles();
    const int parts = tiles < kTilesPerThread * team.size ? kPartsOfA : 1;
    team.each(tiles * parts, team.size, [&](int item, int) {
        int tile = item / parts, index = 0;
        Share share = share_of(op, rows, index);
        while (tile >= share.tiles()) {
            tile -= share.tiles();
            share = share_of(op, rows, ++index);
        }
        const Range groups = octavo::share(share.adapter->rank / kRanks, item % parts, parts);
        if (groups.begin < groups.end)
            project_tile<T>(op, step, share, tile, groups, staged, normed, projected, stride);
    });
    team.scratch.release(mark);
}

template <class T>
void project_some_of(const OctavoLinear& op, const OctavoStep& step, const Range& rows, const int32_t* of_row,
                     const Team& team, float* projected, int64_t stride) {
    const size_t padded = static_cast<size_t>(blocks_of(op.weight.columns, kBlock)) * kBlock;
    const Scratch::Mark mark = team.scratch.mark();
    T* staged = team.scratch.take<T>(padded);
    std::memset(static_cast<void*>(staged), 0, padded * sizeof(T));
    for (int64_t row = rows.begin; row < rows.end; ++row) {
        const OctavoAdapter* adapter = of_row[row] ? op.adapters[of_row[row]] : nullptr;
        const Share share = {adapter, &row, 1};
        if (share.tiles())
            project_tile<T>(op, step, share, 0, {0, adapter->rank / kRanks}, staged, nullptr, projected, stride);
    }
    team.scratch.release(mark);
}

}  // namespace

int64_t projected_stride(const OctavoLinear& op, const OctavoAdapterRows& rows) {
    int most = 0;
    for (int i = 0; i < rows.num_adapters; ++i) {
        const OctavoAdapter* adapter = op.adapters[rows.adapters[i]];
        if (adapter) most = std::max(most, adapter->rank);
    }
    return most;
}

bool replaces_weight(const OctavoLinear& op, const OctavoAdapterRows& rows) {
    for (int i = 0; i < rows.num_adapters; ++i) {
        const OctavoAdapter* adapter = op.adapters[rows.adapters[i]];
        if (adapter && adapter->weight) return true;
    }
    return false;
}

void project_rows(const OctavoLinear& op, const OctavoStep& step, const OctavoAdapterRows& rows, const Team& team,
                  float* projected, int64_t stride) {
    with_type(op.type, [&](auto number) { project_all<decltype(number)>(op, step, rows, team, projected, stride); });
}

void project_some(const OctavoLinear& op, const OctavoStep& step, const Range& rows, const int32_t* of_row,
                  const Team& team, float* projected, int64_t stride) {
    with_type(op.type,
              [&](auto number) { project_some_of<decltype(number)>(op, step, rows, of_row, team, projected, stride); });
}

}  // namespace octavo
