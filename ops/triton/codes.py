"""Quantised weights as the kernels read them: planes of codes, then what turns them into numbers.

A row's numbers are ``scale * (value(code) - zero) + minimum``, in float32 and in this order, as in the references.
Codes have 4 bits, 6 (a plane of 4 and one of 2) or 8; ``value`` is the code itself or an entry of a table. A scale, a
zero and a minimum belong to 16 columns or more. Scales of k-quants are small integers, times a number for 256 columns.
Rows are padded to whole tiles; padding has the scale 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

import ops
from ops.packed import Encoding, RowSource, Segment

COLUMNS = 256
"""Rows are padded to a multiple of this."""
_ALIGNMENT = 16
_BITS = {
    "Q4_0": 4,
    "Q4_1": 4,
    "Q5_0": 6,
    "Q5_1": 6,
    "Q8_0": 8,
    "Q2_K": 4,
    "Q3_K": 4,
    "Q4_K": 4,
    "Q5_K": 6,
    "Q6_K": 6,
    "IQ4_NL": 4,
    "IQ4_XS": 4,
    "MXFP4": 4,
    "int4": 4,
    "int8": 8,
    "fp8_e4m3": 8,
    "nf4": 4,
    "fp4": 4,
    "mxfp4": 4,
    "nvfp4": 4,
}
_SUPER = {"Q2_K": (80, 82), "Q3_K": (108, 0), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208, 0), "IQ4_XS": (0, 0)}
"""K-quants: where a block has the factor (float16) of its scales and, unless 0 as well, that of its minimums."""
_BLOCK_BYTES = {"Q2_K": 84, "Q3_K": 110, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210, "IQ4_XS": 136}
_MINIMUMS = frozenset({"Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K"})
_GROUPS = {"Q2_K": 16, "Q3_K": 16, "Q6_K": 16, "nvfp4": 16}
"""Columns that share a scale, where there are not 32."""
_OFFSETS = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 128, "Q3_K": 4, "Q6_K": 32, "int4": 8, "int8": 128}
_TABLES = frozenset({"IQ4_NL", "IQ4_XS", "MXFP4", "fp8_e4m3", "nf4", "fp4", "mxfp4", "nvfp4"})


@dataclass(frozen=True)
class Layout:
    """Where a segment has what."""

    rows: int
    columns: int
    encoding: Encoding

    @property
    def format(self) -> str:
        return self.encoding.format

    @property
    def bits(self) -> int:
        """Of a code."""
        return _BITS[self.format]

    @property
    def padded(self) -> int:
        """Columns of a row, with padding."""
        return -(-self.columns // COLUMNS) * COLUMNS

    @property
    def group_size(self) -> int:
        """Columns that share a scale; 0: all of a row."""
        size = self.encoding.group_size or _GROUPS.get(self.format, 32)
        if size >= self.columns:
            return 0
        return math.gcd(size, 128)

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return self.padded // self.group_size if self.group_size else 1

    @property
    def has_super(self) -> bool:
        return self.format in _SUPER

    @property
    def has_table(self) -> bool:
        """Whether a table has the values of codes."""
        return self.format in _TABLES

    @property
    def shift(self) -> str:
        """``offset``, ``zeros`` or ``minimums``."""
        if self.format in _MINIMUMS or self.encoding.shift == "minimums":
            return "minimums"
        return "zeros" if self.encoding.shift == "zeros" else "offset"

    @property
    def offset(self) -> int:
        return 0 if self.shift != "offset" else _OFFSETS.get(self.format, 0)

    @property
    def scale_dtype(self) -> torch.dtype:
        if self.has_super:
            return torch.int8
        if self.format in ("mxfp4", "MXFP4"):
            return torch.bfloat16
        if self.format == "nvfp4":
            return torch.float32
        return self.encoding.scale_dtype or torch.float16

    @cached_property
    def fields(self) -> dict[str, tuple[int, int, torch.dtype]]:
        """First byte, elements and type of each field."""
        rows, padded = self.rows, self.padded
        wanted = {"low": (rows * padded * min(self.bits, 8) // 8, torch.uint8)}
        if self.bits == 6:
            wanted = {"low": (rows * padded // 2, torch.uint8), "high": (rows * padded // 4, torch.uint8)}
        wanted["scale"] = (rows * self.groups, self.scale_dtype)
        if self.shift != "offset":
            wanted["shift"] = (rows * self.groups, torch.uint8 if self.shift == "zeros" else self.scale_dtype)
        if self.has_super:
            wanted["super"] = (rows * padded // COLUMNS, torch.float16)
            if self.shift == "minimums":
                wanted["super_shift"] = (rows * padded // COLUMNS, torch.float16)
        if self.has_table:
            wanted["table"] = (1 << self.bits, torch.float32)
        places, start = {}, 0
        for name, (size, dtype) in wanted.items():
            places[name] = (start, size, dtype)
            start += -(-size * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        return places

    @property
    def num_bytes(self) -> int:
        return max(start + -(-size * dtype.itemsize // 16) * 16 for start, size, dtype in self.fields.values())

    def view(self, data: Tensor, name: str) -> Tensor | None:
        """A field of a segment's memory; None if it has no such field."""
        if name not in self.fields:
            return None
        start, size, dtype = self.fields[name]
        return data[start : start + size * dtype.itemsize].view(dtype)

    def arguments(self, data: Tensor) -> dict[str, Any]:
        """Parameters of kernels that read a segment."""
        names = ("low", "high", "scale", "shift", "super", "super_shift", "table")
        return {f"{name}_ptr": self.view(data, name) for name in names}

    def constants(self) -> dict[str, Any]:
        """Constants of kernels that read a segment."""
        return {
            "BITS": self.bits,
            "GROUP_SIZE": self.group_size,
            "SHIFT": self.shift,
            "OFFSET": self.offset,
            "HAS_SUPER": self.has_super,
            "HAS_TABLE": self.has_table,
        }


def pack_segment(rows: Tensor | RowSource, encoding: Encoding, columns: int, paired: bool = False) -> Segment:
    """The op ``pack_segment``."""
    if isinstance(rows, RowSource):
        rows = rows.make(0, rows.rows)
    layout = Layout(len(rows), columns, encoding)
    data = torch.zeros(layout.num_bytes, dtype=torch.uint8, device=rows.device)
    found = ops.decode(rows, encoding, columns)
    codes, table = _values(rows, found, layout)
    if table is not None:
        _fill(layout, data, "table", table)
    codes = F.pad(codes, (0, layout.padded - columns))
    if layout.bits == 8:
        _fill(layout, data, "low", codes)
    else:
        _fill(layout, data, "low", codes[:, 0::2] & 15 | (codes[:, 1::2] & 15) << 4)
    if layout.bits == 6:
        high = codes >> 4
        _fill(layout, data, "high", high[:, 0::4] | high[:, 1::4] << 2 | high[:, 2::4] << 4 | high[:, 3::4] << 6)
    scales, shifts = found.scales, found.minimums if found.zeros is None else found.zeros
    if layout.has_super:
        scales, shifts = _small(rows, layout, data, scales, shifts)
    size = found.group_size or -(-columns // found.scales.shape[1])
    _fill(layout, data, "scale", _regrouped(scales, size, layout))
    if shifts is not None:
        _fill(layout, data, "shift", _regrouped(shifts, size, layout))
    return Segment(data, len(rows), encoding)


def _fill(layout: Layout, data: Tensor, name: str, values: Tensor) -> None:
    view = layout.view(data, name)
    assert view is not None
    view.copy_(values.reshape(-1))


def _values(rows: Tensor, found: Any, layout: Layout) -> tuple[Tensor, Tensor | None]:
    """Codes as they are stored, and the values that they stand for; None: themselves."""
    if layout.format not in _TABLES:
        return found.codes, None
    count = 1 << layout.bits
    every = torch.arange(count, dtype=torch.uint8, device=rows.device)
    if layout.format in ("fp8_e4m3", "nf4", "fp4"):
        return rows[:, : layout.columns], ops.float_values(every, layout.format)
    if layout.format in ("mxfp4", "nvfp4"):
        values = ops.float_values(every, layout.format) * 2
        return rows[:, : layout.columns], values
    values = torch.tensor(ops.BLOCK_VALUES[layout.format], device=rows.device)
    places = torch.zeros(256, dtype=torch.uint8, device=rows.device)
    places[(values + found.offset).long()] = every
    return places[found.codes.long()], values.float()


def _small(
    rows: Tensor, layout: Layout, data: Tensor, scales: Tensor, minimums: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Scales and minimums of k-quants as the integers that they are made of; stores their factors."""
    blocks = rows.unflatten(1, (-1, _BLOCK_BYTES[layout.format]))
    results: list[Tensor | None] = []
    for name, first, values in zip(("super", "super_shift"), _SUPER[layout.format], (scales, minimums), strict=True):
        if values is None:
            results.append(None)
            continue
        factors = blocks[..., first : first + 2].contiguous().view(torch.float16).squeeze(-1)
        if name == "super_shift":
            factors = -factors
        _fill(layout, data, name, factors)
        each = factors.float().repeat_interleave(values.shape[1] // factors.shape[1], dim=1)
        results.append(torch.where(each == 0, 0.0, values / each).round())
    assert results[0] is not None
    return results[0], results[1]


def _regrouped(values: Tensor, size: int, layout: Layout) -> Tensor:
    """Values of groups of ``size`` columns as those of the layout's groups, with zeros for padding."""
    if not layout.group_size:
        return values
    spread = values.repeat_interleave(size // layout.group_size, dim=1)[:, : layout.groups]
    return F.pad(spread, (0, layout.groups - spread.shape[1]))


# ---------------------------------------------------------------------------------------------------------
# in kernels


@triton.jit
def _scaled(pointer, super_pointer, n, start, COLUMNS, GROUP_SIZE: tl.constexpr, GROUPS: tl.constexpr,
            HAS_SUPER: tl.constexpr):  # fmt: skip
    """Scales or minimums of a tile [n, groups] in float32."""
    if GROUP_SIZE == 0:
        values = tl.load(pointer + n)[:, None].to(tl.float32)
    else:
        group = start // GROUP_SIZE + tl.arange(0, GROUPS)
        row = n.to(tl.int64)[:, None]
        values = tl.load(pointer + row * (COLUMNS // GROUP_SIZE) + group[None, :]).to(tl.float32)
        if HAS_SUPER:
            block = (group * GROUP_SIZE // 256)[None, :]
            values = tl.load(super_pointer + row * (COLUMNS // 256) + block).to(tl.float32) * values
    return values


@triton.jit
def _codes(low_ptr, high_ptr, n, start, COLUMNS, BITS: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr):
    """The codes of a tile [n, k], uint8."""
    row = n.to(tl.int64)[:, None]
    if BITS == 8:
        codes = tl.load(low_ptr + row * COLUMNS + start + tl.arange(0, TILE_K)[None, :])
    else:
        packed = tl.load(low_ptr + row * (COLUMNS // 2) + start // 2 + tl.arange(0, TILE_K // 2)[None, :])
        codes = tl.reshape(tl.join(packed & 15, packed >> 4), [TILE_N, TILE_K])
        if BITS == 6:
            high = tl.load(high_ptr + row * (COLUMNS // 4) + start // 4 + tl.arange(0, TILE_K // 4)[None, :])
            even = tl.join((high & 3) << 4, ((high >> 4) & 3) << 4)
            odd = tl.join(((high >> 2) & 3) << 4, (high >> 6) << 4)
            codes = codes | tl.reshape(tl.join(even, odd), [TILE_N, TILE_K])
    return codes


@triton.jit
def numbers(
    low_ptr, high_ptr, scale_ptr, shift_ptr, super_ptr, super_shift_ptr, table_ptr, n, start, COLUMNS,
    BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, SHIFT: tl.constexpr, OFFSET: tl.constexpr,
    HAS_SUPER: tl.constexpr, HAS_TABLE: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """The numbers of rows ``n`` from column ``start`` on, [TILE_N, TILE_K], rounded to a type."""
    codes = _codes(low_ptr, high_ptr, n, start, COLUMNS, BITS, TILE_N, TILE_K)
    if HAS_TABLE:
        values = tl.load(table_ptr + codes.to(tl.int32))
    else:
        values = codes.to(tl.float32)
    SIZE: tl.constexpr = TILE_K if GROUP_SIZE == 0 or GROUP_SIZE > TILE_K else GROUP_SIZE
    GROUPS: tl.constexpr = TILE_K // SIZE
    values = tl.reshape(values, [TILE_N, GROUPS, SIZE])
    if SHIFT == "zeros":
        zero = _scaled(shift_ptr, None, n, start, COLUMNS, GROUP_SIZE, GROUPS, False)
        values = values - zero[:, :, None]
    elif OFFSET != 0:
        values = values - OFFSET
    values = values * _scaled(scale_ptr, super_ptr, n, start, COLUMNS, GROUP_SIZE, GROUPS, HAS_SUPER)[:, :, None]
    if SHIFT == "minimums":
        minimum = _scaled(shift_ptr, super_shift_ptr, n, start, COLUMNS, GROUP_SIZE, GROUPS, HAS_SUPER)
        values = values + minimum[:, :, None]
    return tl.reshape(values, [TILE_N, TILE_K]).to(DTYPE)
