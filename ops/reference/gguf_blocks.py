"""The blocks of GGUF files in plain torch: integer codes with scales and minimums (ggml-common.h of llama.cpp).

Each function takes blocks, uint8 [..., bytes of a block], and returns their numbers as ``Codes``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ops.reference.small_floats import E2M1_DOUBLED, E2M1_OFFSET, e2m1_codes, halved_power

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


BLOCK_VALUES = {
    "IQ4_NL": IQ4_VALUES,
    "IQ4_XS": IQ4_VALUES,
    "MXFP4": tuple(sign * number for sign in (1, -1) for number in E2M1_DOUBLED),
}
"""What codes of 4 bits stand for in types that have a table."""


@dataclass(frozen=True)
class Codes:
    """Numbers ``scales * (codes - offsets) + minimums``, in this order of rounding to float32; products come first."""

    codes: Tensor
    """uint8 [..., columns], or float32 if they are no integers."""
    scales: Tensor
    """float32 [..., groups], each for as many consecutive columns (the last group may be shorter)."""
    offset: int = 0
    zeros: Tensor | None = None
    """float32 [..., groups], instead of ``offset``."""
    minimums: Tensor | None = None
    """float32 [..., groups]."""
    group_size: int = 0
    """Columns of a group; 0: all groups have equally many."""


@dataclass(frozen=True)
class BlockFormat:
    """A type of GGUF."""

    columns: int
    """Of a block."""
    num_bytes: int
    decode: Callable[[Tensor], Codes]


def _half(blocks: Tensor, first: int) -> Tensor:
    """A float16 field as float32 [..., 1]."""
    return blocks[..., first : first + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """The low halves of all bytes, then the high ones."""
    return torch.cat([packed & 15, packed >> 4], dim=-1)


def _bits(packed: Tensor, shifts: tuple[int, ...], mask: int) -> Tensor:
    """The fields at these shifts, one after the other: [..., n] -> [..., shifts * n]."""
    return torch.cat([packed >> shift & mask for shift in shifts], dim=-1)


def _fifth_bits(packed: Tensor) -> Tensor:
    """Bits of 4 bytes in order, as 16s: [..., 4] -> [..., 32]."""
    return (packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1).flatten(-2) << 4


def _q4_0(blocks: Tensor) -> Codes:
    return Codes(_nibbles(blocks[..., 2:]), _half(blocks, 0), offset=8)


def _q4_1(blocks: Tensor) -> Codes:
    return Codes(_nibbles(blocks[..., 4:]), _half(blocks, 0), minimums=_half(blocks, 2))


def _q5_0(blocks: Tensor) -> Codes:
    return Codes(_nibbles(blocks[..., 6:]) | _fifth_bits(blocks[..., 2:6]), _half(blocks, 0), offset=16)


def _q5_1(blocks: Tensor) -> Codes:
    codes = _nibbles(blocks[..., 8:]) | _fifth_bits(blocks[..., 4:8])
    return Codes(codes, _half(blocks, 0), minimums=_half(blocks, 2))


def _q8_0(blocks: Tensor) -> Codes:
    return Codes(blocks[..., 2:] ^ 128, _half(blocks, 0), offset=128)


def _iq4_codes(packed: Tensor) -> Tensor:
    table = torch.tensor(IQ4_VALUES, dtype=torch.int16, device=packed.device) + 128
    return table.to(torch.uint8)[_nibbles(packed).long()]


def _iq4_nl(blocks: Tensor) -> Codes:
    return Codes(_iq4_codes(blocks[..., 2:]), _half(blocks, 0), offset=128)


def _iq4_xs(blocks: Tensor) -> Codes:
    high = blocks[..., 2:4]
    low = blocks[..., 4:8]
    low_bits = torch.stack([low & 15, low >> 4], dim=-1).flatten(-2)
    high_bits = torch.stack([high >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(-2)
    scales = (low_bits | high_bits << 4).float() - 32
    codes = _iq4_codes(blocks[..., 8:].unflatten(-1, (8, 16))).flatten(-2)
    return Codes(codes, _half(blocks, 0) * scales, offset=128)


def _mxfp4(blocks: Tensor) -> Codes:
    return Codes(e2m1_codes(_nibbles(blocks[..., 1:])), halved_power(blocks[..., :1]), offset=E2M1_OFFSET)


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The 8 scales and 8 minimums of 6 bits in 12 bytes of Q4_K and Q5_K."""
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:12]
    scales = torch.cat([first & 63, third & 15 | first >> 6 << 4], dim=-1)
    minimums = torch.cat([second & 63, third >> 4 | second >> 6 << 4], dim=-1)
    return scales, minimums


def _with_minimums(blocks: Tensor, codes: Tensor, first: int, scales: Tensor, minimums: Tensor) -> Codes:
    """K-quants with a scale and a minimum for all their groups, float16 at ``first``."""
    return Codes(codes, _half(blocks, first) * scales.float(), minimums=-(_half(blocks, first + 2) * minimums.float()))


def _q4_k(blocks: Tensor) -> Codes:
    codes = _nibbles(blocks[..., 16:].unflatten(-1, (4, 32))).flatten(-2)
    return _with_minimums(blocks, codes, 0, *_six_bits(blocks[..., 4:16]))


def _q5_k(blocks: Tensor) -> Codes:
    low = _nibbles(blocks[..., 48:].unflatten(-1, (4, 32))).flatten(-2)
    codes = low | _bits(blocks[..., 16:48], tuple(range(8)), 1) << 4
    return _with_minimums(blocks, codes, 0, *_six_bits(blocks[..., 4:16]))


def _q6_k(blocks: Tensor) -> Codes:
    low = _nibbles(blocks[..., :128].unflatten(-1, (2, 64)))
    high = _bits(blocks[..., 128:192].unflatten(-1, (2, 32)), (0, 2, 4, 6), 3)
    scales = blocks[..., 192:208].contiguous().view(torch.int8).float()
    return Codes((low | high << 4).flatten(-2), _half(blocks, 208) * scales, offset=32)


def _q2_k(blocks: Tensor) -> Codes:
    codes = _bits(blocks[..., 16:80].unflatten(-1, (2, 32)), (0, 2, 4, 6), 3).flatten(-2)
    return _with_minimums(blocks, codes, 80, blocks[..., :16] & 15, blocks[..., :16] >> 4)


def _q3_k(blocks: Tensor) -> Codes:
    low = _bits(blocks[..., 32:96].unflatten(-1, (2, 32)), (0, 2, 4, 6), 3).flatten(-2)
    high = _bits(blocks[..., :32], tuple(range(8)), 1)
    packed = blocks[..., 96:108]
    scales = _nibbles(packed[..., :8]) | _bits(packed[..., 8:], (0, 2, 4, 6), 3) << 4
    return Codes(low | high << 2, _half(blocks, 108) * (scales.float() - 32), offset=4)


BLOCK_FORMATS = {
    "Q4_0": BlockFormat(32, 18, _q4_0),
    "Q4_1": BlockFormat(32, 20, _q4_1),
    "Q5_0": BlockFormat(32, 22, _q5_0),
    "Q5_1": BlockFormat(32, 24, _q5_1),
    "Q8_0": BlockFormat(32, 34, _q8_0),
    "Q2_K": BlockFormat(256, 84, _q2_k),
    "Q3_K": BlockFormat(256, 110, _q3_k),
    "Q4_K": BlockFormat(256, 144, _q4_k),
    "Q5_K": BlockFormat(256, 176, _q5_k),
    "Q6_K": BlockFormat(256, 210, _q6_k),
    "IQ4_NL": BlockFormat(32, 18, _iq4_nl),
    "IQ4_XS": BlockFormat(256, 136, _iq4_xs),
    "MXFP4": BlockFormat(32, 17, _mxfp4),
}
"""By GGUF's names."""


def decode_blocks(rows: Tensor, name: str) -> Codes:
    """The numbers of rows, uint8 [rows, bytes of a row], of a type of GGUF."""
    kind = BLOCK_FORMATS[name]
    blocks = kind.decode(rows.unflatten(-1, (-1, kind.num_bytes)))
    minimums = None if blocks.minimums is None else blocks.minimums.flatten(-2)
    return Codes(blocks.codes.flatten(-2), blocks.scales.flatten(-2), blocks.offset, None, minimums)
