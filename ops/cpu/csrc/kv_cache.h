// The layout of the KV cache: that of packed weights, so that attention can multiply with it in place.
//
// A unit is 32 tokens of a KV head. Its K is packed like a weight with 32 rows (the tokens) and head_dim columns: the
// right factor of the scores. Its V is packed like a weight with v_head_dim rows and 32 columns (the tokens): the right
// factor of the weighted sum. Head sizes are zero-padded to multiples of 32; a block is a whole number of units:
//   K [block][kv_head][block_size / 32][head_dim / 32][32 x 32]
//   V [block][kv_head][block_size / 32][v_head_dim / 32][32 x 32]
#pragma once

#include <cstring>

#include "packed.h"
#include "team.h"

namespace octavo {

constexpr int kUnit = kBlock;  // tokens

// Tokens of a split: a part of the context with its own softmax.
constexpr int kSplit = 256;
constexpr int kSplitUnits = kSplit / kUnit;

// How many blocks of 32 x 32 numbers are prefetched ahead of those being read: enough for the time of a softmax.
template <class Stored>
constexpr int kBlocksAhead = sizeof(Stored) == 1 ? 16 : 8;

// Rows of a left factor, as [blocks][rows][32].
template <class Number>
class NumberRows {
public:
    NumberRows(int most_rows, int most_blocks, Scratch& scratch)
        : numbers_(scratch.take<LeftOf<Number>>(static_cast<size_t>(most_rows) * most_blocks * kBlock)) {}

    void resize(int rows, int blocks) {
        rows_ = rows;
        blocks_ = blocks;
    }

    LeftOf<Number>* at(int row, int block) { return numbers_ + (block * rows_ + row) * kBlock; }

    // The blocks of x lie `stride` apart.
    void set(int row, const float* x, int64_t stride) {
        for (int k = 0; k < blocks_; ++k)
            for (int i = 0; i < kBlock; i += kLanes) store(at(row, k) + i, load(x + k * stride + i));
    }

    // sums[r][0..31] = row r * right.
    void multiply(const Right<Number>& right, float* sums) const {
        dot(rows_, Left<Number>{numbers_, kBlock, static_cast<int64_t>(rows_) * kBlock}, right, blocks_, sums);
    }

    int blocks() const { return blocks_; }

private:
    LeftOf<Number>* numbers_;
    int rows_ = 0;
    int blocks_ = 0;
};

// A cache in the type of the activations.
template <class Type>
class KVCache {
public:
    using T = Type;
    using Rows = NumberRows<T>;
    using Stored = T;
    static constexpr bool kIsInteger = false;
    static constexpr bool kHasGroups = false;              // of columns with scales of their own
    static constexpr int kValueElements = kBlockElements;  // of a block of V

    KVCache(const OctavoAttention& op, int block_size, Scratch&)
        : num_kv_heads(op.num_kv_heads),
          head_dim(blocks_of(op.head_dim, kBlock) * kBlock),
          v_head_dim(blocks_of(op.v_head_dim, kBlock) * kBlock),
          block_size(block_size),
          keys_(static_cast<T*>(op.k_cache)),
          values_(static_cast<T*>(op.v_cache)) {}

    // The unit that holds the token at an offset in a block.
    T* keys_of(int64_t block, int head, int place) const { return unit_of(keys_, head_dim, block, head, place); }
    T* values_of(int64_t block, int head, int place) const { return unit_of(values_, v_head_dim, block, head, place); }

    // Writes a token's head.
    void write(int64_t block, int head, int place, const T* k, int k_size, const T* v, int v_size) const {
        T* keys = keys_of(block, head, place);
        T* values = values_of(block, head, place);
        if (place == 0) {  // nothing of an earlier owner remains
            std::memset(keys, 0, static_cast<size_t>(block_size) * head_dim * sizeof(T));
            std::memset(values, 0, static_cast<size_t>(block_size) * v_head_dim * sizeof(T));
        }
        T* column = keys + packed_offset<T>(row(place % kUnit), 0);
        for (int i = 0; i < k_size; i += kBlock, column += kBlockElements) write_column(column, k + i, k_size - i);
        for (int i = 0; i < v_size; i += kLanes) {
            T* target = values + value_offset(place, i);
            for (int j = 0; j < kLanes && i + j < v_size; ++j) target[j * kPair<T>] = v[i + j];
        }
    }

    // Prefetches what `write` will write to.
    void prefetch_place(int64_t block, int head, int place) const {
        const T* column = keys_of(block, head, place) + packed_offset<T>(row(place % kUnit), 0);
        for (int i = 0; i < head_dim; i += kPair<T>)
            prefetch(address_of(column + i / kBlock * kBlockElements + i % kBlock / kPair<T> * kStepElements));
        const T* values = values_of(block, head, place);
        for (int i = 0; i < v_head_dim; i += kLanes) prefetch(address_of(values + value_offset(place, i)));
    }

    // sums[r][0..31] = row r of x * the right factor that its blocks make. While each is read, the one kBlocksAhead
    // after it is prefetched.
    void multiply(const Rows& x, const T* const* blocks, float* sums) const {
        x.multiply({nullptr, 0, blocks, {0, kCacheLineBytes}, blocks + kBlocksAhead<T>}, sums);
    }

    const int num_kv_heads;
    const int head_dim;    // padded
    const int v_head_dim;  // padded
    const int block_size;

private:
    T* unit_of(T* cache, int dim, int64_t block, int head, int place) const {
        return cache + ((block * num_kv_heads + head) * block_size + place / kUnit * kUnit) * dim;
    }
    static int64_t value_offset(int place, int i) {
        return static_cast<int64_t>(i / kColumns) * kBlockElements + packed_offset<T>(row(i % kColumns), place % kUnit);
    }
    static PackedRow row(int index) { return {0, index / kLanes, index % kLanes}; }

    // Some of a token's K, up to a block.
    static void write_column(T* column, const T* k, int size) {
        if (size >= kBlock) {
            for (int i = 0; i < kBlock; i += kPair<T>, column += kStepElements)
                std::memcpy(column, k + i, kPair<T> * sizeof(T));
            return;
        }
        for (int i = 0; i < size; ++i) column[i / kPair<T> * kStepElements + i % kPair<T>] = k[i];
    }

    T* keys_;
    T* values_;
};

}  // namespace octavo
