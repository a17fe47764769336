"""The first launches of a step: what the host knew when it planned the step meets what only the device knows.

Slot tables live on the device: the tokens sampled last, and the blocks of each request.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.triton.catalog import Case, meta
from ops.triton.configs import Config
from ops.triton.launch import launch

_CONFIG = Config(4, 1, (("TILE", 256),))


@triton.jit(do_not_specialize=["count"])
def scatter_kernel(table_ptr, places_ptr, values_ptr, count, TILE: tl.constexpr):
    item = tl.program_id(0) * TILE + tl.arange(0, TILE)
    place = tl.load(places_ptr + item, mask=item < count, other=-1)
    value = tl.load(values_ptr + item, mask=item < count, other=0)
    tl.store(table_ptr + place, value.to(table_ptr.dtype.element_ty), mask=place >= 0)


def scatter(table: Tensor, places: Tensor, values: Tensor) -> None:
    """``table[places[i]] = values[i]`` for each place that is not negative. No place occurs twice.

    Args:
        table: int32 [any].
        places: int64 [count].
        values: int32 or int64 [count] or more.
    """
    args = {"table_ptr": table, "places_ptr": places, "values_ptr": values, "count": len(places)}
    launch(scatter_kernel, (triton.cdiv(len(places), 256),), args, _CONFIG)


@triton.jit(do_not_specialize=["count"])
def complete_kernel(ids_ptr, places_ptr, table_ptr, out_ptr, count, TILE: tl.constexpr):
    item = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = item < count
    place = tl.load(places_ptr + item, mask=mask, other=-1)
    known = tl.load(ids_ptr + item, mask=mask, other=0)
    late = tl.load(table_ptr + place, mask=place >= 0, other=0)
    tl.store(out_ptr + item, tl.where(place < 0, known, late), mask=mask)


def complete(ids: Tensor, places: Tensor, table: Tensor, out: Tensor) -> None:
    """``ids``, or ``table[places]`` where a place is not negative. All are int32 [count], but for the table and the
    places, int64 [count]."""
    args = {"ids_ptr": ids, "places_ptr": places, "table_ptr": table, "out_ptr": out, "count": len(ids)}
    launch(complete_kernel, (triton.cdiv(len(ids), 256),), args, _CONFIG)


@triton.jit(do_not_specialize=["block_size", "table_stride", "out_stride"])
def block_rows_kernel(
    table_ptr, slots_ptr, lens_ptr, out_ptr, block_size, table_stride, out_stride, TILE: tl.constexpr
):
    row = tl.program_id(0)
    num_blocks = tl.cdiv(tl.load(lens_ptr + row), block_size)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    for start in range(0, num_blocks, TILE):
        place = start + tl.arange(0, TILE)
        blocks = (slot + place).to(tl.int32)
        if table_ptr is not None:
            blocks = tl.load(table_ptr + slot * table_stride + place, mask=place < num_blocks, other=0)
        tl.store(out_ptr + row.to(tl.int64) * out_stride + place, blocks, mask=place < num_blocks)


def block_rows(table: Tensor | None, slots: Tensor, seq_lens: Tensor, block_size: int, out: Tensor) -> None:
    """The blocks of each row's context, in the order of the rows.

    Args:
        table: int32 [slots, max_blocks]; None: blocks follow each other.
        slots: int32 [rows]; without a table, the first block of each row.
        seq_lens: int32 [rows]; 0: the row is left alone.
        block_size: Tokens per block.
        out: int32 [rows, max_blocks]; the rest of a row is left alone.
    """
    args = {
        "table_ptr": table,
        "slots_ptr": slots,
        "lens_ptr": seq_lens,
        "out_ptr": out,
        "block_size": block_size,
        "table_stride": 0 if table is None else table.stride(0),
        "out_stride": out.stride(0),
    }
    launch(block_rows_kernel, (len(slots),), args, _CONFIG)


def cases() -> Iterator[Case]:
    """See ``catalog``."""
    long, short = meta(256, dtype=torch.int64), meta(256, dtype=torch.int32)
    table = meta(256, 4096, dtype=torch.int32)
    yield Case("tokens", lambda: scatter(short, long, long))
    yield Case("blocks", lambda: scatter(table, long, short))
    yield Case("ids", lambda: complete(short, long, short, short))
    yield Case("rows", lambda: block_rows(table, short, short, 32, table))
    yield Case("rows without a table", lambda: block_rows(None, short, short, 32, table))
