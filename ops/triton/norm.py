"""Norms: a program keeps whole groups of columns in registers, so the order of sums depends on their size alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.triton import configs
from ops.triton.catalog import Case, meta
from ops.triton.configs import Config, power_of_two
from ops.triton.launch import launch, result, row_stride

_TILE = 1024
"""Numbers of a program with several small groups."""


@triton.jit
def sum_of_squares(x, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """Of each row of ``x`` [ROWS, SIZE] in float32: [ROWS]. Neighbours are added, then neighbouring sums.

    Rows up to the size of a head are normalised by several kernels, whose threads share them differently. This order is
    the same everywhere; that of ``tl.sum`` depends on the layout.
    """
    squares = x * x
    if SIZE > 256:
        total = tl.sum(squares, axis=1)
    else:
        if SIZE > 128:
            squares = _neighbours(squares, ROWS, 128)
        if SIZE > 64:
            squares = _neighbours(squares, ROWS, 64)
        if SIZE > 32:
            squares = _neighbours(squares, ROWS, 32)
        if SIZE > 16:
            squares = _neighbours(squares, ROWS, 16)
        if SIZE > 8:
            squares = _neighbours(squares, ROWS, 8)
        if SIZE > 4:
            squares = _neighbours(squares, ROWS, 4)
        if SIZE > 2:
            squares = _neighbours(squares, ROWS, 2)
        if SIZE > 1:
            first, second = tl.split(squares)
            total = first + second
        else:
            total = tl.sum(squares, axis=1)
    return total


@triton.jit
def _neighbours(x, ROWS: tl.constexpr, HALF: tl.constexpr):
    """``x`` [ROWS, 2 * HALF], each number added to its neighbour: [ROWS, HALF]."""
    first, second = tl.split(tl.reshape(x, [ROWS, HALF, 2]))
    return first + second


@triton.jit(do_not_specialize=["num_groups"])
def rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    sum_ptr,
    num_groups,
    x_stride,
    residual_stride,
    out_stride,
    sum_stride,
    eps,
    offset,
    SIZE: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_TILE: tl.constexpr,
    COLUMNS_TILE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0) * GROUPS_TILE + tl.arange(0, GROUPS_TILE)
    column = tl.arange(0, COLUMNS_TILE)
    row = (group // GROUPS).to(tl.int64)
    place = ((group % GROUPS) * SIZE)[:, None] + column[None, :]
    mask = (group < num_groups)[:, None] & (column < SIZE)[None, :]
    dtype = out_ptr.dtype.element_ty
    x = tl.load(x_ptr + (row * x_stride)[:, None] + place, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        other = tl.load(residual_ptr + (row * residual_stride)[:, None] + place, mask=mask, other=0.0)
        total = (x + other.to(tl.float32)).to(dtype)
        tl.store(sum_ptr + (row * sum_stride)[:, None] + place, total, mask=mask)
        x = total.to(tl.float32)
    mean = sum_of_squares(x, GROUPS_TILE, COLUMNS_TILE) / SIZE
    normed = x * tl.rsqrt(mean + eps)[:, None]
    if HAS_WEIGHT:
        # Each group loads the weight anew, from the L1 cache: with the layout of x, in pieces as large.
        own = (group % GROUPS * WEIGHT_STRIDE)[:, None] + column[None, :]
        weight = tl.load(weight_ptr + own, mask=mask, other=0.0).to(tl.float32)
        if ROUND_FIRST:
            normed = normed.to(dtype).to(tl.float32) * weight
        else:
            normed = normed * (offset + weight)
    tl.store(out_ptr + (row * out_stride)[:, None] + place, normed.to(dtype), mask=mask)


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    size: int | None = None,
    offset: float = 0.0,
    round_first: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """The op ``rms_norm``."""
    out = result(out, tuple(x.shape), x.dtype, x)
    _rms_norm(x, None, weight, eps, out, None, size, offset, round_first)
    return out


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    size: int | None = None,
    offset: float = 0.0,
    round_first: bool = True,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """``add(x, residual)``, and the ``rms_norm`` of that sum. ``out`` may be ``residual`` and ``x`` themselves."""
    total = result(out and out[0], tuple(x.shape), x.dtype, x)
    normed = result(out and out[1], tuple(x.shape), x.dtype, x)
    _rms_norm(x, residual, weight, eps, normed, total, size, offset, round_first)
    return total, normed


def _rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    out: Tensor,
    total: Tensor | None,
    size: int | None,
    offset: float,
    round_first: bool,
) -> None:
    assert offset == 0.0 or not round_first
    rows, width = x.shape
    size = size or (width if weight is None else len(weight))
    config, programs = _tile(rows, width, size)
    args = {
        "x_ptr": x,
        "residual_ptr": residual,
        "weight_ptr": weight,
        "out_ptr": out,
        "sum_ptr": total,
        "num_groups": rows * (width // size),
        "x_stride": row_stride(x),
        "residual_stride": 0 if residual is None else row_stride(residual),
        "out_stride": row_stride(out),
        "sum_stride": 0 if total is None else row_stride(total),
        "eps": eps,
        "offset": offset,
    }
    launch(
        rms_norm_kernel,
        (programs,),
        args,
        config,
        SIZE=size,
        WEIGHT_STRIDE=0 if weight is None or len(weight) == size else size,
        GROUPS=width // size,
        HAS_RESIDUAL=residual is not None,
        HAS_WEIGHT=weight is not None,
        ROUND_FIRST=round_first,
    )


def _tile(rows: int, width: int, size: int) -> tuple[Config, int]:
    """The configuration for groups of ``size`` columns, and the number of programs."""
    columns = power_of_two(size)
    groups = 1 if size == width else max(1, _TILE // columns)
    config = Config(configs.row(groups * columns), 1, (("GROUPS_TILE", groups), ("COLUMNS_TILE", columns)))
    return config, triton.cdiv(rows * (width // size), groups)


@triton.jit(do_not_specialize=["num_groups"])
def layer_norm_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_groups,
    x_stride,
    out_stride,
    weight_stride,
    bias_stride,
    eps,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_TILE: tl.constexpr,
    COLUMNS_TILE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0) * GROUPS_TILE + tl.arange(0, GROUPS_TILE)
    column = tl.arange(0, COLUMNS_TILE)
    row = (group // GROUPS).to(tl.int64)
    place = ((group % GROUPS) * SIZE)[:, None] + column[None, :]
    mask = (group < num_groups)[:, None] & (column < SIZE)[None, :]
    x = tl.load(x_ptr + (row * x_stride)[:, None] + place, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1) / SIZE
    x = tl.where(mask, x - mean[:, None], 0.0)
    variance = tl.sum(x * x, axis=1) / SIZE
    normed = x * tl.rsqrt(variance + eps)[:, None]
    if HAS_WEIGHT:
        own = ((group % GROUPS) * weight_stride)[:, None] + column[None, :]
        normed = normed * tl.load(weight_ptr + own, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        own = ((group % GROUPS) * bias_stride)[:, None] + column[None, :]
        normed = normed + tl.load(bias_ptr + own, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + (row * out_stride)[:, None] + place, normed.to(out_ptr.dtype.element_ty), mask=mask)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    size: int | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The op ``layer_norm``."""
    out = result(out, tuple(x.shape), x.dtype, x)
    rows, width = x.shape
    size = size or width
    config, programs = _tile(rows, width, size)
    args = {
        "x_ptr": x,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "out_ptr": out,
        "num_groups": rows * (width // size),
        "x_stride": row_stride(x),
        "out_stride": row_stride(out),
        "weight_stride": _group_stride(weight, size),
        "bias_stride": _group_stride(bias, size),
        "eps": eps,
    }
    has = {"HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None}
    launch(layer_norm_kernel, (programs,), args, config, SIZE=size, GROUPS=width // size, **has)
    return out


def _group_stride(values: Tensor | None, size: int) -> int:
    """Elements between the values of groups; 0 if all groups share them."""
    return 0 if values is None or len(values) == size else size


def cases() -> Iterator[Case]:
    """Calls for the catalogue."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for width in (576, 4096, 8192):
            x, weight = meta(16, width, dtype=dtype), meta(width, dtype=dtype)
            name = f"{width} {str(dtype).removeprefix('torch.')}"
            yield Case(name, partial(rms_norm, x, weight, 1e-5))
            if dtype == torch.bfloat16:
                yield Case(f"{name} offset", partial(rms_norm, x, weight, 1e-5, offset=1.0, round_first=False))
                yield Case(f"{name} sum", partial(add_rms_norm, x, x, weight, 1e-5))
                yield Case(name, partial(layer_norm, x, weight, weight, 1e-5))
    for head_dim in (64, 80, 96, 128, 256):
        heads, weight = meta(16, 8 * head_dim), meta(head_dim)
        yield Case(f"heads of {head_dim}", partial(rms_norm, heads, weight, 1e-5))
