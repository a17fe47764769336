"""Rows and columns by number: embeddings, the rows that need logits, columns in another order or side by side."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.triton.catalog import Case, meta
from ops.triton.configs import Config
from ops.triton.launch import launch, result, row_stride

_COLUMNS = 1024


@triton.jit
def gather_rows_kernel(x_ptr, rows_ptr, out_ptr, width, x_stride, out_stride, COLUMNS_TILE: tl.constexpr):
    to = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS_TILE + tl.arange(0, COLUMNS_TILE)
    row = tl.load(rows_ptr + to).to(tl.int64)
    x = tl.load(x_ptr + row * x_stride + column, mask=column < width, other=0.0)
    tl.store(out_ptr + to * out_stride + column, x, mask=column < width)


@triton.jit
def select_columns_kernel(x_ptr, columns_ptr, out_ptr, width, x_stride, out_stride, COLUMNS_TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    to = tl.program_id(1) * COLUMNS_TILE + tl.arange(0, COLUMNS_TILE)
    column = tl.load(columns_ptr + to, mask=to < width, other=0)
    x = tl.load(x_ptr + row * x_stride + column, mask=to < width, other=0.0)
    tl.store(out_ptr + row * out_stride + to, x, mask=to < width)


@triton.jit
def copy_kernel(x_ptr, out_ptr, width, x_stride, out_stride, COLUMNS_TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS_TILE + tl.arange(0, COLUMNS_TILE)
    x = tl.load(x_ptr + row * x_stride + column, mask=column < width, other=0.0)
    tl.store(out_ptr + row * out_stride + column, x, mask=column < width)


def gather_rows(x: Tensor, rows: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The op ``gather_rows``."""
    out = result(out, (len(rows), x.shape[1]), x.dtype, rows)
    args = {"x_ptr": x, "rows_ptr": rows, "out_ptr": out, "width": x.shape[1]}
    args |= {"x_stride": row_stride(x), "out_stride": row_stride(out)}
    _launch(gather_rows_kernel, out, args)
    return out


def select_columns(x: Tensor, columns: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The op ``select_columns``."""
    out = result(out, (len(x), len(columns)), x.dtype, x)
    args = {"x_ptr": x, "columns_ptr": columns, "out_ptr": out, "width": len(columns)}
    args |= {"x_stride": row_stride(x), "out_stride": row_stride(out)}
    _launch(select_columns_kernel, out, args)
    return out


def concat(x: Tensor, y: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The op ``concat``, in two launches."""
    out = result(out, (len(x), x.shape[1] + y.shape[1]), x.dtype, x)
    for each, part in ((x, out[:, : x.shape[1]]), (y, out[:, x.shape[1] :])):
        args = {"x_ptr": each, "out_ptr": part, "width": each.shape[1]}
        args |= {"x_stride": row_stride(each), "out_stride": row_stride(part)}
        _launch(copy_kernel, part, args)
    return out


def _launch(kernel: object, out: Tensor, args: dict[str, object]) -> None:
    rows, width = out.shape
    config = Config(4, 1, (("COLUMNS_TILE", _COLUMNS),))
    launch(kernel, (rows, triton.cdiv(width, _COLUMNS)), args, config)


def cases() -> Iterator[Case]:
    """Calls for the catalogue."""
    ids, rows = meta(64, dtype=torch.int32), meta(16, dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        yield Case(f"embedding {name}", partial(gather_rows, meta(128256, 4096, dtype=dtype), ids))
        yield Case(f"rows {name}", partial(gather_rows, meta(64, 4096, dtype=dtype), rows))
    yield Case("two of 4096", partial(concat, meta(64, 4096), meta(64, 4096)))
    order = meta(4096, dtype=torch.int64)
    yield Case("columns", partial(select_columns, meta(64, 4096), order), min_load=2)
