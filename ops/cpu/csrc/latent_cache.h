// The cache of latent attention: one row per token, which is the key of all heads, and in its first columns also their
// value (DeepSeek V2, arXiv:2405.04434, section 2.1, in the absorbed form).
//
// It is stored once, as K is (kv_cache.h): the right factor of the scores. While its numbers are in the cache, those of
// a split are transposed to the right factor of the weighted sum. So that this costs little beside the products, a tile
// has more rows than one product: all of them, usually the heads of a token, share what is read and transposed.
#pragma once

#include <cstring>

#include "heads.h"
#include "kv_cache.h"
#include "transpose.h"

#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

namespace octavo {

// About this many rows share what is read and transposed.
constexpr int kLatentRows = 48;

// Rows of a left factor that may be more than one product takes. Each sum is that of `dot`, however rows are divided.
template <class Number>
class ManyRows {
public:
    ManyRows(int most_rows, int most_blocks, Scratch& scratch)
        : numbers_(scratch.take<LeftOf<Number>>(static_cast<size_t>(most_rows) * most_blocks * kBlock)) {}

    void resize(int rows, int blocks) {
        rows_ = rows;
        blocks_ = blocks;
    }

    LeftOf<Number>* at(int row, int block) { return numbers_ + (block * rows_ + row) * kBlock; }

    void set(int row, const float* x, int64_t stride) {
        for (int k = 0; k < blocks_; ++k)
            for (int i = 0; i < kBlock; i += kLanes) store(at(row, k) + i, load(x + k * stride + i));
    }

    // sums[r][0..31] = row r * right. What the first product prefetches, the others need not.
    void multiply(Right<Number> right, float* sums) const {
        const int parts = blocks_of(rows_, kRows<Number>);
        for (int part = 0; part < parts; ++part) {
            const int begin = rows_ * part / parts, end = rows_ * (part + 1) / parts;
            const Left<Number> left = {numbers_ + begin * kBlock, kBlock, static_cast<int64_t>(rows_) * kBlock};
            dot(end - begin, left, right, blocks_, sums + begin * kColumns);
            right.fetch = {};
            right.next = nullptr;
        }
    }

private:
    LeftOf<Number>* numbers_;
    int rows_ = 0;
    int blocks_ = 0;
};

// Turns a block of a right factor whose columns are tokens into one whose columns are the other dimension.
inline void transpose_block(const float* block, float* target) {
    constexpr int64_t kRowBytes = kColumns * sizeof(float);
    transpose(block, kRowBytes, target, kRowBytes, kBlock, kColumns);
}

inline void transpose_block(const Float16* block, Float16* target) {
    for (int i = 0; i < kBlock; ++i)
        for (int j = 0; j < kColumns; ++j) target[j * kColumns + i] = block[i * kColumns + j];
}

// Numbers of two tokens and two dimensions are 64 bits: the inner two change places, and then the words are transposed.
inline void transpose_block(const BFloat16* block, BFloat16* target) {
    constexpr int kWords = 8;  // of a line: 16 columns with two k each
    constexpr int kLine = kStepElements;
    for (int tokens = 0; tokens < 2; ++tokens) {
        for (int dims = 0; dims < 2; ++dims) {
            const BFloat16* source = block + tokens * kHalfElements<BFloat16> + dims * kWords * kLine;
            BFloat16* lines = target + dims * kHalfElements<BFloat16> + tokens * kWords * kLine;
#if defined(__AVX512BW__)
            const __m512i swap = _mm512_set4_epi32(0x0f0e0b0a, 0x0d0c0908, 0x07060302, 0x05040100);
            __m512i row[kWords], pair[kWords], four[kWords];
            for (int i = 0; i < kWords; ++i) row[i] = _mm512_shuffle_epi8(_mm512_loadu_si512(source + i * kLine), swap);
            for (int i = 0; i < kWords; i += 2) {
                pair[i] = _mm512_unpacklo_epi64(row[i], row[i + 1]);
                pair[i + 1] = _mm512_unpackhi_epi64(row[i], row[i + 1]);
            }
            for (int i = 0; i < kWords; i += 4) {
                for (int j = 0; j < 2; ++j) {  // even and odd lanes of 128 bits of two rows each
                    four[i + j] = _mm512_shuffle_i64x2(pair[i + j], pair[i + 2 + j], 0x88);
                    four[i + 2 + j] = _mm512_shuffle_i64x2(pair[i + j], pair[i + 2 + j], 0xdd);
                }
            }
            for (int j = 0; j < 2; ++j) {  // words j, j + 4 from the even lanes, j + 2, j + 6 from the odd ones
                _mm512_storeu_si512(lines + j * kLine, _mm512_shuffle_i64x2(four[j], four[4 + j], 0x88));
                _mm512_storeu_si512(lines + (j + 4) * kLine, _mm512_shuffle_i64x2(four[j], four[4 + j], 0xdd));
                _mm512_storeu_si512(lines + (j + 2) * kLine, _mm512_shuffle_i64x2(four[2 + j], four[6 + j], 0x88));
                _mm512_storeu_si512(lines + (j + 6) * kLine, _mm512_shuffle_i64x2(four[2 + j], four[6 + j], 0xdd));
            }
#else
            uint64_t words[kWords][kWords];
            std::memcpy(words, source, sizeof words);
            for (int i = 0; i < kWords; ++i) {
                uint64_t line[kWords];
                for (int j = 0; j < kWords; ++j) {
                    const uint64_t word = words[j][i];
                    line[j] = (word & 0xffff00000000ffff) | (word & 0xffff0000) << 16 | (word >> 16 & 0xffff0000);
                }
                std::memcpy(lines + i * kLine, line, sizeof line);
            }
#endif
        }
    }
}

// A cache in the type of the activations.
template <class Type>
class LatentCache {
public:
    using T = Type;
    using Rows = ManyRows<T>;
    using Stored = T;
    static constexpr bool kIsInteger = false;
    static constexpr bool kHasGroups = false;

    LatentCache(const OctavoLatentAttention& op, int block_size, Scratch& scratch)
        : head_dim(blocks_of(op.attention.head_dim, kBlock) * kBlock),
          v_head_dim(blocks_of(op.attention.v_head_dim, kBlock) * kBlock),
          block_size(block_size),
          op_(op),
          rows_(static_cast<T*>(op.attention.k_cache)),
          values_(scratch.take<T>(static_cast<size_t>(kSplit) * v_head_dim)) {}

    // The unit that holds the token at an offset in a block.
    T* keys_of(int64_t block, int, int place) const {
        return rows_ + (block * block_size + place / kUnit * kUnit) * head_dim;
    }

    // A head of the queries as it is multiplied: with the latents, and then with the rotated columns.
    void stage_query(const OctavoStep& step, int token, int head, float* out) const {
        const OctavoAttention& op = op_.attention;
        join(static_cast<const T*>(op.q.data) + token * op.q.stride + head * op.v_head_dim,
             static_cast<const T*>(op_.q_rope.data) + token * op_.q_rope.stride +
                 static_cast<int64_t>(head + 1) * op_.q_rope_dim - rotary_dim(),
             position(step, token), out);
    }

    void write(const OctavoStep& step, int token) const {
        const OctavoAttention& op = op_.attention;
        const int64_t slot = step.groups[op.group].slot_mapping[token];
        const int place = static_cast<int>(slot % block_size);
        T* rows = keys_of(slot / block_size, 0, place);
        if (place == 0) std::memset(rows, 0, static_cast<size_t>(block_size) * head_dim * sizeof(T));
        float numbers[kMaxLatentDim];
        join(static_cast<const T*>(op.k.data) + token * op.k.stride,
             static_cast<const T*>(op_.k_rope.data) + token * op_.k_rope.stride, position(step, token), numbers);
        const PackedRow row = {0, place % kUnit / kLanes, place % kUnit % kLanes};
        for (int i = 0; i < op.head_dim; ++i) rows[packed_offset<T>(row, i)] = from_float<T>(numbers[i]);
    }

    // Prefetches what `write` will write to.
    void prefetch_place(int64_t block, int head, int place) const {
        const T* column =
            keys_of(block, head, place) + packed_offset<T>({0, place % kUnit / kLanes, place % kUnit % kLanes}, 0);
        for (int i = 0; i < head_dim; i += kPair<T>)
            prefetch(address_of(column + i / kBlock * kBlockElements + i % kBlock / kPair<T> * kStepElements));
    }

    // As of KVCache.
    void multiply(const Rows& x, const T* const* blocks, float* sums) const {
        x.multiply({nullptr, 0, blocks, {0, kCacheLineBytes}, blocks + kBlocksAhead<T>}, sums);
    }

    // Prepares a unit of a split for `multiply_values`.
    void transpose_unit(int unit, const T* const* blocks) const {
        for (int i = 0; i < v_head_dim / kBlock; ++i)
            transpose_block(blocks[i], values_ + (i * kSplitUnits + unit) * kBlockElements);
    }

    // sums[r][0..31] = row r of x * the values of 32 columns.
    void multiply_values(const Rows& x, int column, float* sums) const {
        x.multiply({values_ + column / kColumns * kSplitUnits * kBlockElements, kBlockElements}, sums);
    }

    const int head_dim;    // padded
    const int v_head_dim;  // padded
    const int block_size;

private:
    int rotary_dim() const { return op_.rope.rotary_dim; }
    int position(const OctavoStep& step, int token) const { return rotary_dim() ? step.positions[token] : 0; }

    void join(const T* latent, const T* rope, int position, float* out) const {
        const int rank = op_.attention.v_head_dim;
        for (int i = 0; i < rank; i += kLanes) store_first(out + i, load_first(latent + i, rank - i), rank - i);
        prepare_head(rope, rotary_dim(), op_.rope, position, head_dim - rank, out + rank);
    }

    const OctavoLatentAttention& op_;
    T* rows_;
    T* values_;  // [v_head_dim / 32][kSplitUnits][32 x 32]: right factors of a split
};

}  // namespace octavo
