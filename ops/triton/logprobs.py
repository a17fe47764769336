"""Log probabilities: a program per row finds the most likely tokens, a token's rank and the sum of all weights.

The host takes the logarithms; see ``executor/sampling/logprobs.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.reference.sampling import MAX_VOCAB_SIZE
from ops.triton.catalog import Case, meta
from ops.triton.configs import Config, power_of_two
from ops.triton.launch import launch, result, row_stride
from ops.triton.sample import (
    MOST_KEPT,
    config,
    find_boundary,
    kept_memory,
    keys_of,
    scan_row,
    token_weights,
    units_of,
)

_MINUS_INFINITY = tl.constexpr(float("-inf"))
_LOG2_E = tl.constexpr(1.4426950216293335)
"""The factor of weights at temperature 1, in float32."""


@triton.jit
def _sum_and_rank(logits, vocab_size, largest, chosen, CHUNK: tl.constexpr):
    """The units of all tokens, and how many logits are above one."""
    lane = tl.arange(0, CHUNK)
    units = tl.full([], 0, tl.int64)
    rank = tl.full([], 0, tl.int64)
    for base in range(0, vocab_size, CHUNK):
        known = base + lane < vocab_size
        x = tl.load(logits + base + lane, mask=known, other=_MINUS_INFINITY)
        units += tl.sum(tl.where(known, units_of(token_weights(x, largest, _LOG2_E)), 0), 0)
        rank += tl.sum((x > chosen).to(tl.int64), 0)
    return units, rank


@triton.jit(do_not_specialize=["vocab_size", "stride"])
def weight_sum_kernel(logits_ptr, sums_ptr, vocab_size, stride, CHUNK: tl.constexpr):
    row = tl.program_id(0)
    logits = logits_ptr + row.to(tl.int64) * stride
    largest, _, _ = scan_row(logits, vocab_size, CHUNK)
    units, _ = _sum_and_rank(logits, vocab_size, largest, largest, CHUNK)
    tl.store(sums_ptr + row, units)


def weight_sum(logits: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The op ``weight_sum``."""
    rows, vocab_size = logits.shape
    assert logits.dtype == torch.float32 and vocab_size <= MAX_VOCAB_SIZE
    sums = result(out, (rows,), torch.int64, logits)
    args = {"logits_ptr": logits, "sums_ptr": sums, "vocab_size": vocab_size, "stride": row_stride(logits)}
    launch(weight_sum_kernel, (rows,), args, config(vocab_size))
    return sums


@triton.jit
def _most_likely(
    logits, vocab_size, largest, most, kept_ptr, kept_ids_ptr, ids_ptr,
    CHUNK: tl.constexpr, MOST_KEPT: tl.constexpr,
):  # fmt: skip
    """Stores the ids of the ``most`` largest logits, ties by lowest id, in ascending order."""
    lo = tl.full([], -(2**31), tl.int64)
    boundary, num_above, _, source, count = find_boundary(
        logits, vocab_size, kept_ptr, kept_ids_ptr, lo, most.to(tl.int64), False, largest, _LOG2_E, 0.0,
        CHUNK, MOST_KEPT,
    )  # fmt: skip
    ties = most - num_above
    place = tl.full([], 0, tl.int32)
    num_ties = tl.full([], 0, tl.int32)
    for base in range(0, count, CHUNK):
        lane = base + tl.arange(0, CHUNK)
        known = lane < count
        keys = keys_of(tl.load(source + lane, mask=known, other=0.0))
        is_tie = (known & (keys == boundary)).to(tl.int32)
        rank = num_ties + tl.cumsum(is_tie, 0)
        is_kept = known & ((keys > boundary) | ((is_tie != 0) & (rank <= ties)))
        where = place + tl.cumsum(is_kept.to(tl.int32), 0) - 1
        token = lane
        if count < vocab_size:
            token = tl.load(kept_ids_ptr + lane, mask=is_kept, other=0)
        tl.store(ids_ptr + where, token.to(tl.int64), mask=is_kept)
        place += tl.sum(is_kept.to(tl.int32), 0)
        num_ties += tl.sum(is_tie, 0)


@triton.jit(do_not_specialize=["vocab_size", "most", "stride", "out_stride"])
def logprobs_kernel(
    logits_ptr, rows_ptr, tokens_ptr, kept_ptr, kept_ids_ptr, ids_ptr, values_ptr, ranks_ptr, tops_ptr, sums_ptr,
    vocab_size, most, stride, out_stride, MOST_TILE: tl.constexpr, CHUNK: tl.constexpr, MOST_KEPT: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0)
    row = entry.to(tl.int64)
    if rows_ptr is not None:
        row = tl.load(rows_ptr + entry)
    logits = logits_ptr + row * stride
    token = tl.load(tokens_ptr + row)
    chosen = tl.load(logits + token)
    largest, _, is_bad = scan_row(logits, vocab_size, CHUNK)
    ids_ptr += entry.to(tl.int64) * out_stride
    values_ptr += entry.to(tl.int64) * out_stride
    tl.store(ids_ptr, token)
    tl.store(values_ptr, chosen)
    if (is_bad == 0) & (largest > _MINUS_INFINITY):
        units, rank = _sum_and_rank(logits, vocab_size, largest, chosen, CHUNK)
        tl.store(tops_ptr + entry, largest)
        tl.store(sums_ptr + entry, units)
        tl.store(ranks_ptr + entry, rank + 1)
        if MOST_TILE > 0:
            _most_likely(
                logits, vocab_size, largest, most, kept_ptr + entry * MOST_KEPT, kept_ids_ptr + entry * MOST_KEPT,
                ids_ptr + 1, CHUNK, MOST_KEPT,
            )  # fmt: skip
            tl.debug_barrier()
            lane = tl.arange(0, MOST_TILE)
            ids = tl.load(ids_ptr + 1 + lane, mask=lane < most, other=0)
            x = tl.load(logits + ids, mask=lane < most, other=0.0)
            order = (keys_of(x).to(tl.int64) << 32) | (0x7FFFFFFF - ids)
            order = tl.where(lane < most, order, tl.full([], -(2**63), tl.int64))
            order = tl.sort(order, descending=True)
            ids = 0x7FFFFFFF - (order & 0x7FFFFFFF)
            tl.debug_barrier()
            tl.store(ids_ptr + 1 + lane, ids, mask=lane < most)
            tl.store(values_ptr + 1 + lane, tl.load(logits + ids, mask=lane < most, other=0.0), mask=lane < most)
    else:
        tl.store(tops_ptr + entry, float("nan"))


def most_likely(
    logits: Tensor, tokens: Tensor, most: int, rows: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the log probabilities of some rows are made of.

    Args:
        logits: float32 [rows, vocab_size].
        tokens: int64 [rows]: a token of each row.
        most: Most likely tokens to report besides, at most MOST_KEPT and the vocabulary's size.
        rows: int64 [entries]: the rows to report. None: all.

    Returns:
        For each entry, ids int64 [entries, 1 + most] of the token and then of the most likely ones, ties by lowest id;
        their logits, float32; the token's rank, int64 [entries]; the largest logit, float32, NaN if the logits are not
        finite numbers, and then nothing else counts; and ``weight_sum``.
    """
    entries, vocab_size = len(tokens if rows is None else rows), logits.shape[1]
    assert logits.dtype == torch.float32 and most <= min(MOST_KEPT, vocab_size) and vocab_size <= MAX_VOCAB_SIZE
    ids = logits.new_empty((entries, 1 + most), dtype=torch.int64)
    values = logits.new_empty((entries, 1 + most), dtype=torch.float32)
    ranks, sums = (logits.new_empty(entries, dtype=torch.int64) for _ in range(2))
    tops = logits.new_empty(entries, dtype=torch.float32)
    kept, kept_ids = kept_memory(entries, logits.device)
    args = {
        "logits_ptr": logits,
        "rows_ptr": rows,
        "tokens_ptr": tokens,
        "kept_ptr": kept,
        "kept_ids_ptr": kept_ids,
        "ids_ptr": ids,
        "values_ptr": values,
        "ranks_ptr": ranks,
        "tops_ptr": tops,
        "sums_ptr": sums,
        "vocab_size": vocab_size,
        "most": most,
        "stride": row_stride(logits),
        "out_stride": 1 + most,
    }
    tile = power_of_two(most) if most else 0
    launch(logprobs_kernel, (entries,), args, _config(vocab_size), MOST_KEPT=MOST_KEPT, MOST_TILE=tile)
    return ids, values, ranks, tops, sums


def _config(vocab_size: int) -> Config:
    chunk = min(power_of_two(vocab_size, 128), 2048)
    return Config(max(chunk // 256, 1), 1, (("CHUNK", chunk),))


def cases() -> Iterator[Case]:
    """Calls whose kernels are checked ahead of time."""
    logits = meta(16, 151936, dtype=torch.float32)
    yield Case("151936", partial(weight_sum, logits), is_exact=True)
    tokens = meta(16, dtype=torch.int64)
    for most in (0, 20, 1000):
        yield Case(f"{most} of 151936", partial(most_likely, logits, tokens, most, tokens[:7]), is_exact=True)
