// Packing of quantised weights. The formats of the source: ggml-common.h of llama.cpp, and ops/reference/quantized.py.
#include "quantized.h"

#include "kernels.h"

namespace octavo {

namespace {

// Each format: how to read the codes of 32 columns, and the scales of one row into the header of 32 rows. A format of
// GGUF has blocks; `index` is a block of 32 columns among those of one.

void split_nibbles(const uint8_t* packed, uint8_t* codes) {
    for (int i = 0; i < 16; ++i) {
        codes[i] = packed[i] & 15;
        codes[i + 16] = packed[i] >> 4;
    }
}

void add_fifth_bits(const uint8_t* packed, uint8_t* codes) {
    uint32_t bits;
    std::memcpy(&bits, packed, sizeof bits);
    for (int i = 0; i < kBlock; ++i) codes[i] |= static_cast<uint8_t>((bits >> i & 1) << 4);
}

// Half of the bytes of 64 columns.
void half_of_bytes(const uint8_t* packed, int index, uint8_t* codes) {
    for (int i = 0; i < kBlock; ++i) codes[i] = packed[i] >> 4 * (index % 2) & 15;
}

// Fields of two bits: four blocks of columns share 32 bytes.
uint8_t pair_at(const uint8_t* packed, int index, int i) { return packed[index / 4 * 32 + i] >> 2 * (index % 4) & 3; }

// Codes of 32 columns.
void read_codes(const QuantizedLayout& layout, const uint8_t* row, int k, uint8_t* codes) {
    const int index = k % kSuperBlocks;
    const int super = k / kSuperBlocks;
    const uint8_t* block;
    switch (layout.encoding.format) {
        case kQ4_0:
        case kIQ4_NL:
            return split_nibbles(row + k * 18 + 2, codes);
        case kQ4_1:
            return split_nibbles(row + k * 20 + 4, codes);
        case kQ5_0:
            split_nibbles(row + k * 22 + 6, codes);
            return add_fifth_bits(row + k * 22 + 2, codes);
        case kQ5_1:
            split_nibbles(row + k * 24 + 8, codes);
            return add_fifth_bits(row + k * 24 + 4, codes);
        case kQ8_0:
            for (int i = 0; i < kBlock; ++i) codes[i] = row[k * 34 + 2 + i] ^ 128;
            return;
        case kQ2_K:
            for (int i = 0; i < kBlock; ++i) codes[i] = pair_at(row + super * 84 + 16, index, i);
            return;
        case kQ3_K:
            block = row + super * 110;
            for (int i = 0; i < kBlock; ++i)
                codes[i] = static_cast<uint8_t>(pair_at(block + 32, index, i) | (block[i] >> index & 1) << 2);
            return;
        case kQ4_K:
            return half_of_bytes(row + super * 144 + 16 + index / 2 * 32, index, codes);
        case kQ5_K:
            block = row + super * 176;
            half_of_bytes(block + 48 + index / 2 * 32, index, codes);
            for (int i = 0; i < kBlock; ++i) codes[i] |= static_cast<uint8_t>((block[16 + i] >> index & 1) << 4);
            return;
        case kQ6_K:
            block = row + super * 210;
            for (int i = 0; i < kBlock; ++i) {
                const int low = block[index / 4 * 64 + index % 2 * 32 + i] >> 4 * (index % 4 / 2) & 15;
                codes[i] = static_cast<uint8_t>(low | pair_at(block + 128, index, i) << 4);
            }
            return;
        case kIQ4_XS:
            return split_nibbles(row + super * 136 + 8 + index * 16, codes);
        case kBlocksOfMxfp4:
            return split_nibbles(row + k * 17 + 1, codes);
        default: {  // groups
            const int count = std::min(kBlock, layout.shape.columns - k * kBlock);
            std::memset(codes, 0, kBlock);
            std::memcpy(codes, row + k * kBlock, count);
            if (layout.encoding.format == kFp8E4M3)
                for (int i = 0; i < kBlock; ++i) codes[i] ^= kInvertedE4M3;
        }
    }
}

// Scales of the 8 blocks of a k-quant, and its minimums.
struct SuperIntegers {
    int8_t scales[2 * kSuperBlocks];
    uint8_t minimums[2 * kSuperBlocks];
    const uint8_t* scale;    // float16
    const uint8_t* minimum;  // float16 or null
};

SuperIntegers read_super(int32_t format, const uint8_t* row, int super) {
    SuperIntegers out = {};
    const uint8_t* block;
    switch (format) {
        case kQ2_K:
            block = row + super * 84;
            std::memcpy(out.scales, block, 16);  // with the minimums
            out.scale = block + 80;
            out.minimum = block + 82;
            return out;
        case kQ3_K:
            block = row + super * 110;
            for (int i = 0; i < 16; ++i) {
                const int low = block[96 + i % 8] >> 4 * (i / 8) & 15;
                const int high = block[104 + i % 4] >> 2 * (i / 4) & 3;
                out.scales[i] = static_cast<int8_t>((low | high << 4) - 32);
            }
            out.scale = block + 108;
            return out;
        case kQ6_K:
            block = row + super * 210;
            std::memcpy(out.scales, block + 192, 16);
            out.scale = block + 208;
            return out;
        case kIQ4_XS:
            block = row + super * 136;
            for (int i = 0; i < kSuperBlocks; ++i) {
                const int high = (block[2] | block[3] << 8) >> 2 * i & 3;
                out.scales[i] = static_cast<int8_t>(((block[4 + i / 2] >> 4 * (i % 2) & 15) | high << 4) - 32);
            }
            out.scale = block;
            return out;
        default:  // Q4_K, Q5_K
            block = row + super * (format == kQ4_K ? 144 : 176);
            for (int i = 0; i < 4; ++i) {
                const uint8_t first = block[4 + i], second = block[8 + i], third = block[12 + i];
                out.scales[i] = first & 63;
                out.scales[i + 4] = static_cast<int8_t>((third & 15) | first >> 6 << 4);
                out.minimums[i] = second & 63;
                out.minimums[i + 4] = static_cast<uint8_t>(third >> 4 | second >> 6 << 4);
            }
            out.scale = block;
            out.minimum = block + 2;
            return out;
    }
}

// Scales of one of 32 rows, into their header and before the codes of its blocks.
void pack_super(const QuantizedLayout& layout, const uint8_t* row, int k, int lane, const Cursor& at) {
    const SuperIntegers found = read_super(layout.encoding.format, row, k / kSuperBlocks);
    uint8_t* place = const_cast<uint8_t*>(at.header);
    std::memcpy(place + 2 * lane, found.scale, 2);
    place += 2 * kColumns;
    if (found.minimum) {
        std::memcpy(place + 2 * lane, found.minimum, 2);
        place += 2 * kColumns;
    }
    const int32_t format = layout.encoding.format;
    const int halves = format == kQ2_K || format == kQ3_K || format == kQ6_K ? 2 : 1;
    const int blocks = std::min(kSuperBlocks, layout.shape.column_blocks() - k);
    for (int block = 0; block < blocks; ++block) {
        if (layout.front_bytes)
            place = const_cast<uint8_t*>(at.codes) + block * layout.block_bytes - layout.front_bytes;
        for (int half = 0; half < halves; ++half, place += kColumns)
            place[lane] = static_cast<uint8_t>(found.scales[block * halves + half]);
        for (int half = 0; half < halves && found.minimum && format != kQ2_K; ++half, place += kColumns)
            place[lane] = found.minimums[block * halves + half];
    }
}

// Scales of one byte: of the two groups of a header, those of nvfp4 in one block, those of mxfp4 in two.
void pack_bytes(const QuantizedLayout& layout, const uint8_t* row, int k, int lane, uint8_t* header) {
    const bool is_grouped_row = is_grouped(layout.encoding.format);
    const int groups = blocks_of(layout.shape.columns, layout.encoding.group_size);
    const int first = k * kBlock / layout.encoding.group_size;
    for (int i = 0; i < 2 && first + i < groups; ++i)
        header[i * kColumns + lane] = is_grouped_row ? row[layout.shape.columns + first + i] : row[(first + i) * 17];
}

void pack_group(const QuantizedLayout& layout, const uint8_t* row, int k, int lane, uint8_t* header) {
    const OctavoEncoding& encoding = layout.encoding;
    const int bytes = scale_bytes(encoding.scale_type);
    if (bytes == 1) return pack_bytes(layout, row, k, lane, header);
    const int group = k / layout.header_blocks;
    const uint8_t* scale;
    const uint8_t* shift;
    int shift_bytes = bytes;
    if (is_grouped(encoding.format)) {
        const int groups = blocks_of(layout.shape.columns, encoding.group_size);
        scale = row + layout.shape.columns + group * bytes;
        if (encoding.shift == kZeros) shift_bytes = 1;
        shift = row + layout.shape.columns + groups * bytes + group * shift_bytes;
    } else {
        static constexpr int kBlockBytes[] = {18, 20, 22, 24, 34, 0, 0, 0, 0, 0, 18};
        scale = row + group * kBlockBytes[encoding.format];
        shift = scale + 2;
    }
    std::memcpy(header + lane * bytes, scale, bytes);
    if (encoding.shift) std::memcpy(header + kColumns * bytes + lane * shift_bytes, shift, shift_bytes);
}

// The rows' own scales, which follow those of groups.
void pack_row_scales(const QuantizedLayout& layout, const uint8_t* source, int64_t stride, int block, uint8_t* packed) {
    std::memset(packed, 0, layout.prefix_bytes);
    const int offset = layout.shape.columns + blocks_of(layout.shape.columns, layout.encoding.group_size);
    for (int half = 0; half < 2 && layout.prefix_bytes; ++half) {
        const int first = layout.shape.first_row(block, half);
        for (int lane = 0; lane < layout.shape.rows_in(block, half); ++lane)
            std::memcpy(packed + (half * kLanes + lane) * sizeof(float), source + (first + lane) * stride + offset,
                        sizeof(float));
    }
}

// Packs half a block: lines[i] holds columns 4 i to 4 i + 3 of its 16 rows.
void pack_half(int bits, const uint8_t (*lines)[kLineBytes], uint8_t* out) {
    if (bits == 8) {
        std::memcpy(out, lines, 8 * kLineBytes);
        return;
    }
    const auto field = [&](int line, int i, int shift, int mask) { return lines[line][i] >> shift & mask; };
    const int rest = bits >= 4 ? 4 : 0;  // bits that are packed last
    if (bits - rest >= 2) {
        for (int part = 0; part < 8; part += kLines, out += kLineBytes)
            for (int i = 0; i < kLineBytes; ++i) {
                int packed = 0;
                for (int line = 0; line < kLines; ++line) packed |= field(part + line, i, rest, 3) << 2 * line;
                out[i] = static_cast<uint8_t>(packed);
            }
    }
    if (bits % 2) {
        for (int i = 0; i < kLineBytes; ++i) {
            int packed = 0;
            for (int line = 0; line < 8; ++line) packed |= field(line, i, bits - 1, 1) << line;
            out[i] = static_cast<uint8_t>(packed);
        }
        out += kLineBytes;
    }
    if (bits >= 4) {
        for (int line = 0; line < kLines; ++line, out += kLineBytes)
            for (int i = 0; i < kLineBytes; ++i)
                out[i] = static_cast<uint8_t>(field(line, i, 0, 15) | field(line + kLines, i, 0, 15) << 4);
    }
}

int stored_bits(int32_t format) {
    switch (format) {
        case kQ2_K:
            return 2;
        case kQ3_K:
            return 3;
        case kQ5_0:
        case kQ5_1:
        case kQ5_K:
            return 5;
        case kQ6_K:
            return 6;
        case kQ8_0:
        case kInt8:
        case kFp8E4M3:
            return 8;
        default:
            return 4;
    }
}

// The scales of all blocks of a header: there may be fewer than 32 rows.
void clear_fronts(const QuantizedLayout& layout, int k, const Cursor& at) {
    uint8_t* front = const_cast<uint8_t*>(at.codes) - layout.front_bytes;
    const int blocks = std::min(layout.header_blocks, layout.shape.column_blocks() - k);
    for (int block = 0; block < blocks; ++block) std::memset(front + block * layout.block_bytes, 0, layout.front_bytes);
}

void pack_rows(const QuantizedLayout& layout, const uint8_t* source, int64_t stride, int block, uint8_t* packed) {
    const int bits = stored_bits(layout.encoding.format);
    pack_row_scales(layout, source, stride, block, packed);
    Cursor at = Cursor::at(layout, packed, 0);
    for (int k = 0; k < layout.shape.column_blocks(); ++k, at.next()) {
        uint8_t* header = const_cast<uint8_t*>(at.header);
        if (at.index == 0) std::memset(header, 0, layout.header_bytes);
        if (at.index == 0 && layout.front_bytes) clear_fronts(layout, k, at);
        for (int half = 0; half < 2; ++half) {
            uint8_t lines[8][kLineBytes];
            std::memset(lines, layout.encoding.format == kFp8E4M3 ? kInvertedE4M3 : 0, sizeof lines);
            const int first = layout.shape.first_row(block, half);
            for (int lane = 0; lane < layout.shape.rows_in(block, half); ++lane) {
                const uint8_t* row = source + (first + lane) * stride;
                uint8_t codes[kBlock];
                read_codes(layout, row, k, codes);
                for (int line = 0; line < 8; ++line) std::memcpy(lines[line] + 4 * lane, codes + 4 * line, 4);
                if (at.index) continue;
                const int column = half * kLanes + lane;
                if (is_super(layout.encoding.format))
                    pack_super(layout, row, k, column, at);
                else
                    pack_group(layout, row, k, column, header);
            }
            const int half_bytes = (layout.block_bytes - layout.front_bytes) / 2;
            pack_half(bits, lines, const_cast<uint8_t*>(at.codes) + half * half_bytes);
        }
    }
}

}  // namespace

}  // namespace octavo

using namespace octavo;

int64_t octavo_quantized_size(const OctavoEncoding* encoding, int32_t rows, int32_t columns, int32_t paired) {
    const QuantizedLayout layout(*encoding, rows, columns, paired != 0);
    return layout.shape.row_blocks() * layout.stride();
}

void octavo_pack_quantized(const OctavoEncoding* encoding, const void* source, int64_t stride, void* packed,
                           int32_t rows, int32_t columns, int32_t paired) {
    const QuantizedLayout layout(*encoding, rows, columns, paired != 0);
    const int blocks = layout.shape.row_blocks();
#pragma omp parallel for schedule(static)
    for (int block = 0; block < blocks; ++block)
        pack_rows(layout, static_cast<const uint8_t*>(source), stride, block,
                  static_cast<uint8_t*>(packed) + block * layout.stride());
}
