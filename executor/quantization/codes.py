"""The forms to which quantised checkpoints are unpacked: codes with a scale for each group of columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import ops
from executor.layers.parameter import Part

ROWS = 256
"""Rows dequantised at a time."""
BLOCK = 32
"""Groups of so many columns, or a multiple, have kernels."""
FP8_COLUMNS = 128
"""Likewise of weights in FP8 that are multiplied with activations in FP8."""


# ---------------------------------------------------------------------------------------------------------
# integers


@dataclass(frozen=True)
class Groups:
    """A weight ``scales * (codes - zeros)`` [rows, columns]."""

    codes: Tensor
    """uint8 [rows, columns]."""
    scales: Tensor
    """float32 [rows, groups]."""
    zeros: Tensor
    """uint8 [rows, groups]."""
    group_of: Tensor
    """int64 [columns]: the group of each column."""
    bits: int
    asks_for_int8: bool = False
    """Whether the checkpoint was made for activations in 8 bits with a scale for each row."""

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for weights whose rows can be packed together."""
        return (4 if self.bits < 8 else 8, self.scales.shape[1])

    @property
    def is_symmetric(self) -> bool:
        return bool((self.zeros == 1 << self.bits - 1).all())

    @property
    def is_per_token(self) -> bool:
        """Whether activations are rounded row by row."""
        return self.asks_for_int8 and self.bits == 8 and self.scales.shape[1] == 1 and self.is_symmetric

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight, exact in float32 and rounded once."""
        out = torch.empty(self.codes.shape, dtype=dtype)
        for first in range(0, len(out), ROWS):
            rows = slice(first, first + ROWS)
            codes = self.codes[rows].to(torch.int16) - self.zeros[rows].to(torch.int16)[:, self.group_of]
            out[rows] = codes * self.scales[rows][:, self.group_of]
        return out


def smallest_dtype(scales: Tensor) -> Tensor:
    """Scales in the smallest dtype that has the same numbers."""
    for dtype in (torch.float16, torch.bfloat16):
        small = scales.to(dtype)
        if torch.equal(small.float(), scales):
            return small
    return scales


# ---------------------------------------------------------------------------------------------------------
# floating-point numbers


@dataclass(frozen=True)
class Floats:
    """A weight ``scales * values`` [rows, columns], of the values that codes of 4 or 8 bits stand for."""

    codes: Tensor
    """uint8 [rows, columns]."""
    scales: Tensor
    """[rows, groups], of a type that the format has."""
    format: str
    """As of ``ops.pack_floats``, and so are the other fields."""
    group_size: int
    row_scales: Tensor | None = None
    divides: bool = False

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight, computed in float32 and rounded once."""
        out = torch.empty(self.codes.shape, dtype=dtype)
        for rows, numbers in self._numbers():
            out[rows] = numbers
        return out

    @property
    def kind(self) -> tuple[object, ...]:
        """As of ``Groups``."""
        return (self.format, self.group_size, self.scales.dtype, self.divides)

    @property
    def has_integers(self) -> bool:
        """Whether the values are multiples of one half, so that activations may be rounded to 8 bits."""
        return self.format in ("mxfp4", "nvfp4")

    @property
    def has_fp8_products(self) -> bool:
        """Whether activations may be rounded to FP8."""
        is_row = self.group_size >= self.codes.shape[1]
        return self.format == "fp8_e4m3" and (is_row or self.group_size % FP8_COLUMNS == 0)

    @property
    def has_kernel(self) -> bool:
        return self.has_integers or self.group_size >= self.codes.shape[1] or self.group_size % BLOCK == 0

    def _numbers(self) -> Iterator[tuple[slice, Tensor]]:
        """Some rows at a time, and their numbers in float32."""
        columns = self.codes.shape[1]
        group_of = torch.arange(columns) // self.group_size
        for first in range(0, len(self.codes), ROWS):
            rows = slice(first, first + ROWS)
            scales = self.scales[rows].float()
            if self.row_scales is not None:
                own = self.row_scales[rows, None]
                scales = scales / own if self.divides else scales * own
            yield rows, ops.float_values(self.codes[rows], self.format) * scales[:, group_of]


def taken(tensor: Tensor, part: Part, dim: int) -> Tensor:
    """This rank's elements of one dimension of a whole tensor."""
    index = torch.empty(part.size, dtype=torch.int64)
    for each in part.ranges:
        first = each.offset - part.start
        index[first : first + each.size] = torch.arange(each.start, each.start + each.size)
    return tensor if torch.equal(index, torch.arange(part.full)) else tensor.index_select(dim, index)


# ---------------------------------------------------------------------------------------------------------
# packing


def with_kernels(sources: Sequence[Groups | Floats | Tensor]) -> list[Groups | Floats]:
    """The modules of a layer. Empty: one of them is not quantised, or has groups without kernels."""
    codes = [each for each in sources if isinstance(each, Groups) or (isinstance(each, Floats) and each.has_kernel)]
    return codes if len(codes) == len(sources) else []


def common_order(codes: Sequence[Groups | Floats]) -> Tensor | None:
    """An order in which the columns of each group follow one another, int64 [columns].

    None: there is none for all of them, or no kernel for groups of that size.
    """
    if not codes:
        return None
    natural = torch.arange(codes[0].codes.shape[1])
    orders = [_order(each.group_of) if isinstance(each, Groups) else natural for each in codes]
    first = orders[0]
    if first is None or not all(each is not None and torch.equal(each, first) for each in orders):
        return None
    return first


def _order(group_of: Tensor) -> Tensor | None:
    counts = group_of.bincount()
    if len(counts) > 1 and not (bool((counts == counts[0]).all()) and int(counts[0]) % BLOCK == 0):
        return None
    return group_of.argsort(stable=True)


def pack(
    run: Sequence[Groups | Floats],
    order: Tensor | None,
    dtype: torch.dtype,
    activations: ops.QuantizedActivations,
    paired: bool,
) -> ops.QuantizedWeight:
    """The rows of weights of one kind, one after the other.

    Args:
        run: Weights of equal ``kind``.
        order: Of the columns; None: as they are.
        dtype: Of the activations.
        activations: What the weight is multiplied with.
        paired: As of ``ops.pack_groups``.
    """
    groups = [each for each in run if isinstance(each, Groups)]
    if groups:
        return _pack_integers(groups, order, dtype, activations, paired)
    floats = [each for each in run if isinstance(each, Floats)]
    row_scales = [each.row_scales for each in floats if each.row_scales is not None]
    scales = torch.cat([each.scales for each in floats])
    return ops.pack_floats(
        [each.codes for each in floats],
        smallest_dtype(scales) if scales.dtype == torch.float32 else scales,
        torch.cat(row_scales) if row_scales else None,
        format=floats[0].format,
        group_size=min(floats[0].group_size, floats[0].codes.shape[1]),
        divides=floats[0].divides,
        dtype=dtype,
        activations=activations,
        paired=paired,
    )


def _pack_integers(
    groups: Sequence[Groups],
    order: Tensor | None,
    dtype: torch.dtype,
    activations: ops.QuantizedActivations,
    paired: bool,
) -> ops.QuantizedWeight:
    bits = 4 if groups[0].bits < 8 else 8
    is_symmetric = all(each.is_symmetric for each in groups)
    # Without zero points, codes of fewer bits move to the middle of the range.
    shifts = [(1 << bits - 1) - (1 << each.bits - 1) if is_symmetric else 0 for each in groups]
    codes = [each.codes + shift if shift else each.codes for each, shift in zip(groups, shifts, strict=True)]
    return ops.pack_groups(
        codes if order is None else [each[:, order] for each in codes],
        smallest_dtype(torch.cat([each.scales for each in groups])),
        None if is_symmetric else torch.cat([each.zeros for each in groups]),
        bits=bits,
        dtype=dtype,
        activations=activations,
        paired=paired,
    )
