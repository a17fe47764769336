"""Steps that verify drafts before the host knows how many of the last ones were accepted.

The device keeps two things of each slot: the position of its newest token, and its last tokens, from the one before the
newest on: ``tokens[slot, i]`` is at ``newest[slot] - 1 + i``, and from ``i`` = 2 on these are drafts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.triton.catalog import Case, meta
from ops.triton.configs import Config
from ops.triton.launch import launch

_CONFIG = Config(4, 1, (("TILE", 128),))
_ALONE = Config(1, 1, ())


@triton.jit
def settle_kernel(
    firsts_ptr, counts_ptr, slots_ptr, rows_ptr, ids_ptr, positions_ptr, sampled_ptr, status_ptr, newest_ptr,
    tokens_ptr, accepted_ptr, tokens_stride,
):  # fmt: skip
    row = tl.program_id(0)
    first, count, slot = tl.load(firsts_ptr + row), tl.load(counts_ptr + row), tl.load(slots_ptr + row).to(tl.int64)
    begin = tl.load(rows_ptr + first)
    accepted = row * 0
    holds = accepted == 0
    for index in range(count - 1):
        draft = tl.load(ids_ptr + begin + index + 1).to(tl.int64)
        token, status = tl.load(sampled_ptr + first + index), tl.load(status_ptr + first + index)
        holds = holds & (draft == token) & (status == 0)
        accepted += holds.to(tl.int32)
    tl.store(accepted_ptr + row, accepted)
    tl.store(newest_ptr + slot, tl.load(positions_ptr + begin) + accepted + 1)
    tl.store(tokens_ptr + slot * tokens_stride, tl.load(ids_ptr + begin + accepted))
    tl.store(tokens_ptr + slot * tokens_stride + 1, tl.load(sampled_ptr + first + accepted).to(tl.int32))


@dataclass(frozen=True)
class Samples:
    """The samples of a step's rows, those of a row one after the other. All int32 [rows that sample]."""

    firsts: Tensor
    """The first one of each row."""
    counts: Tensor
    slots: Tensor
    """Each slot at most once."""


def settle(
    samples: Samples,
    rows: Tensor,
    ids: Tensor,
    positions: Tensor,
    sampled: tuple[Tensor, Tensor],
    newest: Tensor,
    tokens: Tensor,
    accepted: Tensor,
) -> None:
    """Accepts the drafts up to the first that is not the token sampled in its place, or whose row failed there.

    Args:
        samples: The rows that sample.
        rows: int64 [samples]: the token of the step behind which each sample is.
        ids: int32 [tokens]: the step's tokens, drafts included.
        positions: int32 [tokens].
        sampled: int64 [samples], the tokens, and int32 [samples], 0 where there is one.
        newest: int32 [slots], and
        tokens: int32 [slots, 2 or more]: what is kept of each slot, but for drafts.
        accepted: int32 [rows that sample]: how many are accepted.
    """
    args = {
        "firsts_ptr": samples.firsts,
        "counts_ptr": samples.counts,
        "slots_ptr": samples.slots,
        "rows_ptr": rows,
        "ids_ptr": ids,
        "positions_ptr": positions,
        "sampled_ptr": sampled[0],
        "status_ptr": sampled[1],
        "newest_ptr": newest,
        "tokens_ptr": tokens,
        "accepted_ptr": accepted,
        "tokens_stride": tokens.stride(0),
    }
    launch(settle_kernel, (len(samples.slots),), args, _ALONE)


@triton.jit(do_not_specialize=["offset", "tokens_stride"])
def go_on_kernel(
    slots_ptr, starts_ptr, newest_ptr, tokens_ptr, ids_ptr, positions_ptr, lens_ptr, offset, shift, tokens_stride,
    TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot >= 0:
        begin, end = tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)
        first = tl.load(newest_ptr + slot) + offset
        tl.store(lens_ptr + row, first + end - begin)
        for start in range(0, end - begin, TILE):
            index = start + tl.arange(0, TILE)
            mask = index < end - begin
            tl.store(positions_ptr + begin + index, first + index, mask=mask)
            token = tl.load(tokens_ptr + slot * tokens_stride + 1 + offset + shift + index, mask=mask, other=0)
            tl.store(ids_ptr + begin + index, token, mask=mask)


def go_on(
    slots: Tensor,
    starts: Tensor,
    newest: Tensor,
    tokens: Tensor,
    ids: Tensor,
    positions: Tensor,
    seq_lens: Tensor,
    *,
    offset: int = 0,
    shift: int = 0,
) -> None:
    """Rows that go on from where their slots are by now.

    Args:
        slots: int32 [rows]; -1: the row is left alone.
        starts: int32 [rows + 1]: the tokens of each row.
        newest: int32 [slots], and
        tokens: int32 [slots, any]: what is kept of each slot.
        ids: int32 [tokens], and
        positions: int32 [tokens], and
        seq_lens: int32 [rows]: are written.
        offset: Position of the first token of each row, from the newest one of its slot on.
        shift: What is computed at a position is this many tokens behind it.
    """
    args = {
        "slots_ptr": slots,
        "starts_ptr": starts,
        "newest_ptr": newest,
        "tokens_ptr": tokens,
        "ids_ptr": ids,
        "positions_ptr": positions,
        "lens_ptr": seq_lens,
        "offset": offset,
        "shift": shift,
        "tokens_stride": tokens.stride(0),
    }
    launch(go_on_kernel, (len(slots),), args, _CONFIG)


@triton.jit(do_not_specialize=["tokens_stride"])
def shadow_kernel(
    slots_ptr, starts_ptr, last_ptr, newest_ptr, tokens_ptr, model_starts_ptr, model_ids_ptr, model_positions_ptr,
    ids_ptr, positions_ptr, lens_ptr, logits_rows_ptr, shift, tokens_stride, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    begin, end = tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)
    model_begin, model_end = tl.load(model_starts_ptr + row * 2), tl.load(model_starts_ptr + row * 2 + 1)
    first = tl.load(model_positions_ptr + model_begin)
    tl.store(lens_ptr + row, first + end - begin)
    newest = first + 1073741824  # behind all
    if slot >= 0:
        newest = tl.load(newest_ptr + slot)
        tl.store(logits_rows_ptr + tl.load(last_ptr + row), (begin + newest - shift - first).to(tl.int64))
    for start in range(0, end - begin, TILE):
        index = start + tl.arange(0, TILE)
        mask = index < end - begin
        tl.store(positions_ptr + begin + index, first + index, mask=mask)
        place = model_begin + index + shift
        token = tl.load(ids_ptr + begin + index, mask=mask, other=0)
        token = tl.where(place < model_end, tl.load(model_ids_ptr + place, mask=place < model_end, other=0), token)
        late = first + index + shift - newest + 1
        is_late = mask & (late >= 0) & (late < 2)
        token = tl.where(is_late, tl.load(tokens_ptr + slot * tokens_stride + late, mask=is_late, other=0), token)
        tl.store(ids_ptr + begin + index, token, mask=mask)


@dataclass(frozen=True)
class ModelRows:
    """What the model has computed in a step."""

    bounds: Tensor
    """int32 [rows, 2]: the first token of each row, and the one behind its last."""
    ids: Tensor
    """int32 [tokens]."""
    positions: Tensor
    """int32 [tokens]."""


def shadow(
    slots: Tensor,
    starts: Tensor,
    last: Tensor,
    newest: Tensor,
    tokens: Tensor,
    model: ModelRows,
    ids: Tensor,
    positions: Tensor,
    seq_lens: Tensor,
    logits_rows: Tensor,
    *,
    shift: int = 0,
) -> None:
    """Rows in which a second model computes what the model has computed, and the tokens that were sampled then.

    Args:
        slots: int32 [rows]; -1: the row has not sampled.
        starts: int32 [rows + 1]: the tokens of each row, as many as the model's or one more.
        last: int32 [rows]: the place in ``logits_rows`` of each row that has sampled.
        newest: int32 [slots], and
        tokens: int32 [slots, 2 or more]: what is kept of each slot.
        model: The model's rows.
        ids: int32 [tokens]: are written where the model's rows, or samples, say what they are.
        positions: int32 [tokens], and
        seq_lens: int32 [rows], and
        logits_rows: int64 [rows that have sampled]: the tokens whose logits follow the newest token; are written.
        shift: What is computed at a position is this many tokens behind it.
    """
    args = {
        "slots_ptr": slots,
        "starts_ptr": starts,
        "last_ptr": last,
        "newest_ptr": newest,
        "tokens_ptr": tokens,
        "model_starts_ptr": model.bounds,
        "model_ids_ptr": model.ids,
        "model_positions_ptr": model.positions,
        "ids_ptr": ids,
        "positions_ptr": positions,
        "lens_ptr": seq_lens,
        "logits_rows_ptr": logits_rows,
        "shift": shift,
        "tokens_stride": tokens.stride(0),
    }
    launch(shadow_kernel, (len(slots),), args, _CONFIG)


@triton.jit(do_not_specialize=["table_stride"])
def map_kernel(
    slots_ptr, starts_ptr, positions_ptr, table_ptr, table_rows_ptr, out_ptr, block_size, table_stride,
    TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    if tl.load(slots_ptr + row) >= 0:
        table_row = row.to(tl.int64)
        if table_rows_ptr is not None:
            table_row = tl.load(table_rows_ptr + row).to(tl.int64)
        begin, end = tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)
        for start in range(begin, end, TILE):
            index = start + tl.arange(0, TILE)
            position = tl.load(positions_ptr + index, mask=index < end, other=0)
            place = table_ptr + table_row * table_stride + position // block_size
            block = tl.load(place, mask=index < end, other=0).to(tl.int64)
            tl.store(out_ptr + index, block * block_size + position % block_size, mask=index < end)


def map_slots(
    slots: Tensor, starts: Tensor, positions: Tensor, table: Tensor, rows: Tensor | None, block_size: int, out: Tensor
) -> None:
    """Where K and V of rows go.

    Args:
        slots: int32 [rows]; -1: the row is left alone.
        starts: int32 [rows + 1]: the tokens of each row.
        positions: int32 [tokens].
        table: int32 [any, max_blocks].
        rows: int32 [rows]: the row of ``table`` of each; None: they are the same.
        block_size: Tokens per block.
        out: int64 [tokens]: is written.
    """
    args = {
        "slots_ptr": slots,
        "starts_ptr": starts,
        "positions_ptr": positions,
        "table_ptr": table,
        "table_rows_ptr": rows,
        "out_ptr": out,
        "block_size": block_size,
        "table_stride": table.stride(0),
    }
    launch(map_kernel, (len(slots),), args, _CONFIG)


def cases() -> Iterator[Case]:
    """See ``catalog``."""
    long, short, starts = meta(64, dtype=torch.int64), meta(64, dtype=torch.int32), meta(65, dtype=torch.int32)
    table = meta(64, 64, dtype=torch.int32)
    samples, model = Samples(short, short, short), ModelRows(meta(64, 2, dtype=torch.int32), short, short)
    yield Case("settle", lambda: settle(samples, long, short, short, (long, short), short, table, short))
    yield Case("go on", lambda: go_on(short, starts, short, table, short, short, short))
    yield Case("shadow", lambda: shadow(short, starts, short, short, table, model, short, short, short, long, shift=1))
    yield Case("slots", lambda: map_slots(short, starts, short, table, short, 32, long))
    yield Case("slots of rows", lambda: map_slots(short, starts, short, table, None, 32, long))
