"""Collectives of ranks that have memory of their own: something else moves the data, kernels here do the arithmetic.

``Transport.exchange`` puts the ranks' tensors one after the other, and nothing more: whatever algorithm it uses, it
decides no bit. Sums are taken in the order of the ranks, in float32, and rounded once. A row of a table is chosen by
its bits, since adding a zero would change one: -0.0 + 0.0 is 0.0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, partial
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.collective import Transport
from ops.triton.catalog import Case, meta
from ops.triton.configs import Config
from ops.triton.launch import call, launch, result, row_stride, scratch

_COLUMNS = 1024
_CONFIG = Config(4, 1, (("COLUMNS_TILE", _COLUMNS),))
MOST_EXCHANGED = 8 << 20
"""Bytes of sums that a rank gets at once from all."""
_BITS = {2: torch.int16, 4: torch.int32}
"""Integers by the size of a number."""


@triton.jit
def shard_ids_kernel(ids_ptr, out_ptr, is_here_ptr, first, count, length, TILE: tl.constexpr):
    item = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row = tl.load(ids_ptr + item, mask=item < length, other=0) - first
    is_here = (row >= 0) & (row < count)
    tl.store(out_ptr + item, tl.where(is_here, row, 0), mask=item < length)
    tl.store(is_here_ptr + item, is_here.to(tl.int8), mask=item < length)


@triton.jit
def pack_rows_kernel(x_ptr, is_here_ptr, out_ptr, width, x_stride, out_stride, COLUMNS_TILE: tl.constexpr):
    """Rows one after the other; those that are not here are zeros."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS_TILE + tl.arange(0, COLUMNS_TILE)
    x = tl.load(x_ptr + row * x_stride + column, mask=column < width, other=0)
    if is_here_ptr is not None:
        x = tl.where(tl.load(is_here_ptr + row) != 0, x, tl.zeros_like(x))
    tl.store(out_ptr + row * out_stride + column, x, mask=column < width)


@triton.jit
def join_columns_kernel(parts_ptr, starts_ptr, out_ptr, rows, part_width, out_stride, COLUMNS_TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    rank = tl.program_id(1)
    column = tl.program_id(2) * COLUMNS_TILE + tl.arange(0, COLUMNS_TILE)
    start = tl.load(starts_ptr + rank)
    width = tl.load(starts_ptr + rank + 1) - start
    part = tl.load(parts_ptr + (rank * rows + row) * part_width + column, mask=column < width, other=0)
    tl.store(out_ptr + row * out_stride + start + column, part, mask=column < width)


@triton.jit
def join_rows_kernel(
    parts_ptr, out_ptr, rows, width, out_stride, RANKS: tl.constexpr, IS_SUM: tl.constexpr, COLUMNS_TILE: tl.constexpr
):
    """The sum of the ranks' rows, or the bits that any of them has."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS_TILE + tl.arange(0, COLUMNS_TILE)
    mask = column < width
    own = parts_ptr + row * width + column
    total = tl.load(own, mask=mask, other=0)
    if IS_SUM:
        total = total.to(tl.float32)
    for rank in range(1, RANKS):
        part = tl.load(own + tl.cast(rank, tl.int64) * rows * width, mask=mask, other=0)
        if IS_SUM:
            total = total + part.to(tl.float32)
        else:
            total = total | part
    tl.store(out_ptr + row * out_stride + column, total.to(out_ptr.dtype.element_ty), mask=mask)


def _grid(rows: int, width: int) -> tuple[int, int]:
    return rows, triton.cdiv(width, _COLUMNS)


# ---------------------------------------------------------------------------------------------------------
# launchers


def shard_ids(
    ids: Tensor, first: int, count: int, *, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The op ``shard_ids``."""
    local, is_here = out or (torch.empty_like(ids), torch.empty_like(ids, dtype=torch.bool))
    args = {"ids_ptr": ids, "out_ptr": local, "is_here_ptr": is_here.view(torch.uint8), "first": first, "count": count}
    config = Config(4, 1, (("TILE", 256),))
    launch(shard_ids_kernel, (triton.cdiv(len(ids), 256),), args | {"length": len(ids)}, config)
    return local, is_here


def all_gather(x: Tensor, transport: Transport, widths: Sequence[int], *, out: Tensor | None = None) -> Tensor:
    """The op ``all_gather``: an exchange of parts that are as wide as the widest, and a launch that joins them."""
    assert x.shape[1] == widths[transport.rank]
    out = result(out, (len(x), sum(widths)), x.dtype, x)
    join_columns(_exchanged(x, transport, max(widths)), _starts(tuple(widths), x.device), out)
    return out


@cache
def _starts(widths: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [ranks + 1]: see ``join_columns``."""
    return scratch.keep(torch.tensor([0, *accumulate(widths)], dtype=torch.int32, device=device))


def join_columns(parts: Tensor, starts: Tensor, out: Tensor) -> None:
    """Joins the ranks' columns.

    Args:
        parts: [ranks, rows, columns].
        starts: int32 [ranks + 1]: the first column of each rank in the result, and the number of all.
        out: [rows, columns of all].
    """
    ranks, rows, width = parts.shape
    args = {"parts_ptr": parts, "starts_ptr": starts, "out_ptr": out, "rows": rows, "part_width": width}
    grid = (rows, ranks, triton.cdiv(width, _COLUMNS))
    launch(join_columns_kernel, grid, args | {"out_stride": row_stride(out)}, _CONFIG)


def all_reduce(x: Tensor, transport: Transport, *, out: Tensor | None = None) -> Tensor:
    """The op ``all_reduce``: an exchange and a launch. Of many rows, each rank adds a share, and then all exchange the
    sums: that moves less, and takes no more memory with more ranks. The bits are the same."""
    out = result(out, tuple(x.shape), x.dtype, x)
    if x.nbytes * transport.size <= MOST_EXCHANGED:
        join_rows(_exchanged(x, transport, x.shape[1]), out, is_sum=True)
        return out
    (rows, width), ranks = x.shape, transport.size
    share = triton.cdiv(rows, ranks)
    sent = _scratch("sent", x, ranks * share, width)
    received, own = _scratch("received", x, ranks * share, width), _scratch("own", x, share, width)
    pack_rows(x, sent)
    call(transport.swap, {"x": sent.view(ranks, share, width), "out": received.view(ranks, share, width)})
    join_rows(received.view(ranks, share, width), own, is_sum=True)
    call(transport.exchange, {"x": own, "out": received})
    pack_rows(received[:rows], out)
    return out


def select_rows(x: Tensor, transport: Transport, is_here: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The op ``select_rows``: a launch that clears the rows of others, an exchange, and a launch."""
    out = result(out, tuple(x.shape), x.dtype, x)
    bits = _BITS[x.itemsize]
    parts = _exchanged(x.view(bits), transport, x.shape[1], is_here)
    join_rows(parts, out.view(bits), is_sum=False)
    return out


def join_rows(parts: Tensor, out: Tensor, *, is_sum: bool) -> None:
    """Adds the ranks' rows in the order of the ranks, or joins their bits.

    Args:
        parts: [ranks, rows, width].
        out: [rows, width].
        is_sum: Add them.
    """
    ranks, rows, width = parts.shape
    args = {"parts_ptr": parts, "out_ptr": out, "rows": rows, "width": width, "out_stride": row_stride(out)}
    launch(join_rows_kernel, _grid(rows, width), args, _CONFIG, RANKS=ranks, IS_SUM=is_sum)


def pack_rows(x: Tensor, out: Tensor, is_here: Tensor | None = None) -> None:
    """Copies rows.

    Args:
        x: [rows, columns].
        out: As many rows and columns, or more.
        is_here: bool [rows]: those to copy; others become zeros. None: all.
    """
    flags = None if is_here is None else is_here.view(torch.uint8)
    args: dict[str, Any] = {"x_ptr": x, "is_here_ptr": flags, "out_ptr": out, "width": x.shape[1]}
    args |= {"x_stride": row_stride(x), "out_stride": row_stride(out)}
    launch(pack_rows_kernel, _grid(*x.shape), args, _CONFIG)


def _scratch(purpose: str, x: Tensor, rows: int, width: int) -> Tensor:
    """[rows, width] of the dtype of ``x``, which the next collective overwrites."""
    num_bytes = rows * width * x.itemsize
    memory = scratch.get(f"ranks.{purpose}", num_bytes, torch.uint8, x.device)
    return memory[:num_bytes].view(x.dtype).view(rows, width)


def _exchanged(x: Tensor, transport: Transport, width: int, is_here: Tensor | None = None) -> Tensor:
    """The tensors of all ranks, [ranks, rows, width], in memory that the next collective overwrites.

    Args:
        x: [rows, own columns].
        transport: Moves them.
        width: Columns of the widest.
        is_here: See ``pack_rows``.
    """
    rows, own = x.shape
    parts = _scratch("received", x, transport.size * rows, width)
    if is_here is not None or own < width or not x.is_contiguous():
        packed = _scratch("sent", x, rows, width)
        pack_rows(x, packed, is_here)
        x = packed
    if rows:
        call(transport.exchange, {"x": x, "out": parts})
    return parts.view(transport.size, rows, width)


def cases() -> Iterator[Case]:
    """Calls for the catalogue."""
    ids, is_here = meta(64, dtype=torch.int32), meta(64, dtype=torch.bool)
    yield Case("ids", partial(shard_ids, ids, 64128, 64128, out=(ids, is_here)))
    for ranks in (2, 8):
        parts, sums = meta(ranks, 64, 4096), meta(64, 4096)
        yield Case(f"sums of {ranks}", partial(join_rows, parts, sums, is_sum=True), is_exact=True)
        logits, starts = meta(ranks, 64, 16032, dtype=torch.float32), meta(ranks + 1, dtype=torch.int32)
        columns = meta(64, ranks * 16032, dtype=torch.float32)
        yield Case(f"columns of {ranks}", partial(join_columns, logits, starts, columns))
    rows = meta(2, 64, 4096, dtype=torch.int16)
    yield Case("rows", partial(join_rows, rows, rows[0], is_sum=False))
    yield Case("packed rows", partial(pack_rows, rows[0], rows[1], is_here), min_load=1)
