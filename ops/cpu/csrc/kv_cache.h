// The layout of the KV cache: that of packed weights, so that attention can multiply with it in place.
//
// A unit is 32 tokens of a KV head. Its K is packed like a weight with 32 rows (the tokens) and head_dim columns: the
// right factor of the scores. Its V is packed like a weight with v_head_dim rows and 32 columns (the tokens): the right
// factor of the weighted sum. Head sizes are zero-padded to multiples of 32; a block is a whole number of units:
//   K [block][kv_head][block_size / 32][head_dim / 32][32 x 32]
//   V [block][kv_head][block_size / 32][v_head_dim / 32][32 x 32]
#pragma once

#include "packed.h"

namespace octavo {

constexpr int kUnit = kBlock;  // tokens

template <class T>
struct KVCache {
    T* keys;
    T* values;
    int num_kv_heads;
    int head_dim;    // padded
    int v_head_dim;  // padded
    int block_size;

    KVCache(const OctavoAttention& op, int block_size)
        : keys(static_cast<T*>(op.k_cache)),
          values(static_cast<T*>(op.v_cache)),
          num_kv_heads(op.num_kv_heads),
          head_dim(blocks_of(op.head_dim, kBlock) * kBlock),
          v_head_dim(blocks_of(op.v_head_dim, kBlock) * kBlock),
          block_size(block_size) {}

    // The unit that holds the token at an offset in a block.
    T* keys_of(int64_t block, int head, int place) const {
        return keys + ((block * num_kv_heads + head) * block_size + place / kUnit * kUnit) * head_dim;
    }
    T* values_of(int64_t block, int head, int place) const {
        return values + ((block * num_kv_heads + head) * block_size + place / kUnit * kUnit) * v_head_dim;
    }

    static int64_t key_offset(int place, int i) { return packed_offset<T>(row(place % kUnit), i); }
    static int64_t value_offset(int place, int i) {
        return static_cast<int64_t>(i / kColumns) * kBlockElements + packed_offset<T>(row(i % kColumns), place % kUnit);
    }

    // The right factor of a unit's scores. While it is read, `next` is prefetched.
    static Right<T> scores_of(const T* keys, const T* next) {
        return {keys, kBlockElements, nullptr, {address_of(next), kCacheLineBytes}};
    }
    // The right factor of the weighted sum of several units.
    static Right<T> sum_of(const T* const* values, const T* const* next) {
        return {nullptr, 0, values, {0, kCacheLineBytes}, next};
    }

private:
    static PackedRow row(int index) { return {0, index / kLanes, index % kLanes}; }
};

}  // namespace octavo
