// Low-rank adapters of linear layers (LoRA; Hu et al., arXiv:2106.09685). Rows of one step may have different ones.
//
// Before the product with the weight, each row is multiplied with its adapter's A, and kept in float32. The product
// with B joins the row's sums while these are in registers, so the sums of rows without an adapter are what they are
// without this file.
#pragma once

#include "packed.h"
#include "team.h"

namespace octavo {

// The adapters of an op's rows, and their products with A.
struct Adapted {
    const OctavoAdapter* const* adapters;  // by number
    const int32_t* of_row;                 // number of each row's adapter; 0: none
    const float* projected;                // [rows][stride]
    int64_t stride;
    bool is_replaced;  // the rows are multiplied with their adapters' own weights
};

// Prefetches as much of B for the next block of columns as the current one has read.
template <class T>
void prefetch_next(const OctavoAdapter& adapter, int half, int count) {
    const int next = half + 2;
    if (next >= adapter.num_halves) return;
    const uintptr_t begin = address_of(static_cast<const T*>(adapter.b) + adapter.halves[next].offset);
    const int64_t bytes = static_cast<int64_t>(count) * kLanes * static_cast<int64_t>(sizeof(T));
    for (int64_t offset = 0; offset < bytes; offset += kCacheLineBytes)
        prefetch_l1(begin + static_cast<uintptr_t>(offset));
}

// Adds what a row's adapter contributes to its sums with a block of 32 columns.
template <class T>
void adapt(const Adapted& adapted, int block, int64_t row, float* sums) {
    const OctavoAdapter* adapter = adapted.of_row[row] ? adapted.adapters[adapted.of_row[row]] : nullptr;
    if (!adapter) return;                                             // nor if it leaves this layer alone
    if ((adapter->weight != nullptr) != adapted.is_replaced) return;  // these rows are computed again
    for (int i = 0; i < 2; ++i) {
        const int half = 2 * block + i;
        const OctavoAdapterHalf& part = adapter->halves[half];
        const T* b = static_cast<const T*>(adapter->b) + part.offset;
        const float* x = adapted.projected + row * adapted.stride + part.first;
        prefetch_next<T>(*adapter, half, part.count);
        Vec even = load(sums + i * kLanes), odd = zero();
        for (int k = 0; k + 1 < part.count; k += 2) {
            even = fma(splat(x[k]), load(b + k * kLanes), even);
            odd = fma(splat(x[k + 1]), load(b + (k + 1) * kLanes), odd);
        }
        if (part.count % 2) even = fma(splat(x[part.count - 1]), load(b + (part.count - 1) * kLanes), even);
        Vec result = even + odd;
        if (adapter->magnitude) result = result * load(adapter->magnitude + half * kLanes);
        if (adapter->bias) result = result + load(adapter->bias + half * kLanes);
        store(sums + i * kLanes, result);
    }
}

// The adapters of an op's rows in a step; null: no row has one.
inline const OctavoAdapterRows* adapter_rows(const OctavoLinear& op, const OctavoStep& step) {
    if (!op.adapters) return nullptr;
    const OctavoAdapterRows& rows = step.adapters[op.rows];
    return rows.num_adapters ? &rows : nullptr;
}

// Floats of a row's product with A, in any of the step's adapters.
int64_t projected_stride(const OctavoLinear& op, const OctavoAdapterRows& rows);
// Whether an adapter of the step has a weight of its own in this layer.
bool replaces_weight(const OctavoLinear& op, const OctavoAdapterRows& rows);
// The products with A of all rows that have an adapter, into `projected` [rows][stride]. The threads share the work and
// must meet before they read the result.
void project_rows(const OctavoLinear& op, const OctavoStep& step, const OctavoAdapterRows& rows, const Team& team,
                  float* projected, int64_t stride);

// The same for some rows of a tile, by this thread alone. `of_row`: their adapters, from row 0 on.
void project_some(const OctavoLinear& op, const OctavoStep& step, const Range& rows, const int32_t* of_row,
                  const Team& team, float* projected, int64_t stride);

}  // namespace octavo
