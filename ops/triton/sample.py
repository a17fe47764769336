"""Sampling: a program per row turns logits into a token, equal to ``ops/reference/sampling.py`` bit for bit.

Nothing is sorted. The filters keep the tokens above a boundary, which is searched for among the logits' bits, read as
integers: a pass over the row counts tokens and sums units above several pivots at once. As soon as few tokens are left,
they are copied together, and the rest of the search reads these alone. Sums and counts are integers, so their order
does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.reference.sampling import EXP2, MAX_VOCAB_SIZE, STREAM_SAMPLE
from ops.triton.catalog import Case, meta
from ops.triton.configs import Config, power_of_two
from ops.triton.launch import launch, result, row_stride, scratch, target

_LARGEST_CHUNK = 1024
MOST_KEPT = 1024
"""Tokens that are copied together."""
OK, NOT_FINITE, NOTHING_LEFT = 0, 1, 2
"""What became of a row."""
FORBID, BIAS, PENALTY, CHANGE = range(4)
"""Kinds of edits, in the order in which they are made: see ``Edits``."""
NUM_KINDS = 4

_MINUS_INFINITY = tl.constexpr(float("-inf"))
_INFINITY = tl.constexpr(float("inf"))
_LEAST_KEY = tl.constexpr(-(2**31))
_NUM_PIVOTS = tl.constexpr(4)
_LOG2_E = tl.constexpr(1.4426950408889634)
_FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)
_C5, _C4, _C3, _C2, _C1 = (tl.constexpr(coefficient) for coefficient in EXP2)


# ---------------------------------------------------------------------------------------------------------
# weights: the definitions of the reference, operation by operation


@triton.jit
def token_weights(x, largest, scale):
    """``exp((x - largest) / temperature)``: see ``ops.reference.sampling.token_weights``."""
    z = tl.maximum((x - largest) * scale, -64.0)
    whole = (z + 12582912.0) - 12582912.0  # half to even
    f = z - whole
    power = f * _C5 + _C4
    power = power * f + _C3
    power = power * f + _C2
    power = power * f + _C1
    power = power * f + 1.0
    return power * ((whole.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def units_of(weights):
    """Weights in units of 2^-42, int64, rounded half to even."""
    y = weights * 4398046511104.0
    return tl.where(y < 8388608.0, (y + 8388608.0) - 8388608.0, y).to(tl.int64)


@triton.jit
def keys_of(x):
    """Integers in the order of the numbers; both zeros are the same."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _logit_of(key):
    """Inverse of ``keys_of``."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def scan_row(logits_ptr, vocab_size, CHUNK: tl.constexpr):
    """The largest logit of a row, the first token that has it, and whether a logit is NaN or infinite."""
    lane = tl.arange(0, CHUNK)
    largest = tl.full([], _MINUS_INFINITY, tl.float32)
    token = tl.full([], 0, tl.int32)
    is_bad = tl.full([], 0, tl.int32)
    for base in range(0, vocab_size, CHUNK):
        x = tl.load(logits_ptr + base + lane, mask=base + lane < vocab_size, other=_MINUS_INFINITY)
        is_bad = tl.maximum(is_bad, tl.max(((x != x) | (x == _INFINITY)).to(tl.int32), 0))
        here = tl.max(x, 0)
        if here > largest:
            largest = here
            token = base + tl.min(tl.where(x == here, lane, CHUNK), 0)
    return largest, token, is_bad


@triton.jit
def _first_scan(
    raw_ptr, logits_ptr, words_ptr, mask_row, vocab_size,
    HAS_RAW: tl.constexpr, HAS_MASK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Like ``scan_row``, of logits of which a mask leaves a part, and whether the unprocessed logits are numbers."""
    lane = tl.arange(0, CHUNK)
    largest = tl.full([], _MINUS_INFINITY, tl.float32)
    raw_largest = tl.full([], _MINUS_INFINITY, tl.float32)
    token = tl.full([], 0, tl.int32)
    is_bad = tl.full([], 0, tl.int32)
    for base in range(0, vocab_size, CHUNK):
        known = base + lane < vocab_size
        raw = tl.load(raw_ptr + base + lane, mask=known, other=_MINUS_INFINITY)
        is_bad = tl.maximum(is_bad, tl.max(((raw != raw) | (raw == _INFINITY)).to(tl.int32), 0))
        raw_largest = tl.maximum(raw_largest, tl.max(raw, 0))
        x = raw
        if HAS_RAW:
            x = tl.load(logits_ptr + base + lane, mask=known, other=_MINUS_INFINITY)
        if HAS_MASK:
            if mask_row >= 0:
                word = tl.load(words_ptr + (base + lane) // 32, mask=known, other=0)
                x = tl.where(((word >> ((base + lane) % 32)) & 1) != 0, x, _MINUS_INFINITY)
                tl.store(logits_ptr + base + lane, x, mask=known)
        here = tl.max(x, 0)
        if here > largest:
            largest = here
            token = base + tl.min(tl.where(x == here, lane, CHUNK), 0)
    if raw_largest == _MINUS_INFINITY:
        is_bad = tl.full([], 1, tl.int32)
    return largest, token, is_bad


# ---------------------------------------------------------------------------------------------------------
# the search for the boundary


@triton.jit
def _relevant(source, base, count, largest, scale, min_p, CHUNK: tl.constexpr):
    """Keys and units of a part of a row. A token that min-p leaves out has the least key and no units."""
    lane = tl.arange(0, CHUNK)
    known = base + lane < count
    x = tl.load(source + base + lane, mask=known, other=_MINUS_INFINITY)
    weights = token_weights(x, largest, scale)
    kept = known & (weights >= min_p)
    return tl.where(kept, keys_of(x), _LEAST_KEY), tl.where(kept, units_of(weights), 0)


@triton.jit
def _above(source, count, pivots, largest, scale, min_p, CHUNK: tl.constexpr):
    """How many tokens have at least the key of each pivot, and their units."""
    counts = tl.zeros([_NUM_PIVOTS], tl.int32)
    sums = tl.zeros([_NUM_PIVOTS], tl.int64)
    for base in range(0, count, CHUNK):
        keys, units = _relevant(source, base, count, largest, scale, min_p, CHUNK)
        is_above = keys[None, :] >= pivots[:, None]
        counts += tl.sum(is_above.to(tl.int32), 1)
        sums += tl.sum(tl.where(is_above, units[None, :], 0), 1)
    return counts, sums


@triton.jit
def floor_key(largest, scale):
    """A key that no token with units is at or below."""
    return keys_of(largest - 45.0 / scale).to(tl.int64) - 1


@triton.jit
def _pivots(lo, hi, is_first, largest, scale):
    """Keys to try between two others: always the lowest; at first by guess, then at equal distances."""
    index = tl.arange(0, _NUM_PIVOTS)
    guesses = keys_of(largest - 36.0 * tl.exp2(index.to(tl.float32) * -1.3) / scale).to(tl.int64)
    even = lo + (hi - lo) * (index + 1) // (_NUM_PIVOTS + 1)
    pivots = tl.where(is_first, guesses, even)
    pivots = tl.minimum(tl.maximum(pivots, lo + 1), hi - 1)
    return tl.where(index == 0, lo + 1, pivots).to(tl.int32)


@triton.jit
def find_boundary(
    source, count, kept_ptr, kept_ids_ptr, lo, goal, by_units, largest, scale, min_p,
    CHUNK: tl.constexpr, MOST_KEPT: tl.constexpr,
):  # fmt: skip
    """The largest key above or at which there are ``goal`` tokens, or units; ``lo`` if there are not so many above it.

    Once at most ``MOST_KEPT`` tokens can be kept, they are copied together.

    Returns:
        The key, how many tokens are above it and their units; where the logits are by now, and how many.
    """
    start = lo
    hi = keys_of(largest).to(tl.int64) + 1
    num_low = count
    num_above = tl.full([], 0, tl.int32)
    units_above = tl.full([], 0, tl.int64)
    while hi - lo > 1:
        pivots = _pivots(lo, hi, (lo == start) & (num_above == 0), largest, scale)
        counts, sums = _above(source, count, pivots, largest, scale, min_p, CHUNK)
        is_enough = tl.where(by_units, sums, counts.to(tl.int64)) >= goal
        lo = tl.maximum(lo, tl.max(tl.where(is_enough, pivots.to(tl.int64), lo), 0))
        hi = tl.minimum(hi, tl.min(tl.where(is_enough, hi, pivots.to(tl.int64)), 0))
        num_low = tl.minimum(num_low, tl.min(tl.where(is_enough, counts, num_low), 0))
        num_above = tl.maximum(num_above, tl.max(tl.where(is_enough, 0, counts), 0))
        units_above = tl.maximum(units_above, tl.max(tl.where(is_enough, 0, sums), 0))
        if (count > MOST_KEPT) & (num_low <= MOST_KEPT):
            place = 0
            for base in range(0, count, CHUNK):
                keys, _ = _relevant(source, base, count, largest, scale, min_p, CHUNK)
                kept = (keys >= lo).to(tl.int32)
                where = place + tl.cumsum(kept, 0) - kept
                lane = base + tl.arange(0, CHUNK)
                tl.store(kept_ptr + where, tl.load(source + lane, mask=kept != 0, other=0.0), mask=kept != 0)
                tl.store(kept_ids_ptr + where, lane, mask=kept != 0)
                place += tl.sum(kept, 0)
            tl.debug_barrier()
            source = kept_ptr
            count = num_low
    return lo, num_above, units_above, source, count


@triton.jit
def _mass(source, count, floor, largest, scale, min_p, CHUNK: tl.constexpr):
    """The units of all tokens above a key."""
    mass = tl.full([], 0, tl.int64)
    for base in range(0, count, CHUNK):
        keys, units = _relevant(source, base, count, largest, scale, min_p, CHUNK)
        mass += tl.sum(tl.where(keys > floor, units, 0), 0)
    return mass


@triton.jit
def _pick(source, count, boundary, ties, goal, largest, scale, min_p, CHUNK: tl.constexpr):
    """The first token at which the running sum of the kept tokens' units exceeds ``goal``."""
    lane = tl.arange(0, CHUNK)
    running = tl.full([], 0, tl.int64)
    num_ties = tl.full([], 0, tl.int64)
    place = tl.full([], -1, tl.int32)
    base = tl.full([], 0, tl.int32)
    while (base < count) & (place < 0):
        keys, units = _relevant(source, base, count, largest, scale, min_p, CHUNK)
        is_tie = (keys == boundary).to(tl.int64)
        rank = num_ties + tl.cumsum(is_tie, 0)
        units = tl.where((keys > boundary) | ((is_tie != 0) & (rank <= ties)), units, 0)
        total = tl.sum(units, 0)
        if running + total > goal:
            place = base + tl.min(tl.where(running + tl.cumsum(units, 0) > goal, lane, CHUNK), 0)
        running += total
        num_ties += tl.sum(is_tie, 0)
        base += CHUNK
    return place


@triton.jit
def _drawn(
    source, count, kept_ptr, kept_ids_ptr, largest, temperature, top_k, top_p, min_p, number,
    CHUNK: tl.constexpr, MOST_KEPT: tl.constexpr,
):  # fmt: skip
    """The token that a number in units of 2^-53 draws."""
    scale = tl.full([], _LOG2_E, tl.float64) / temperature.to(tl.float64)
    scale = tl.minimum(scale, tl.full([], _FLOAT32_MAX, tl.float64)).to(tl.float32)
    vocab_size = count
    floor = floor_key(largest, scale)
    boundary = floor
    ties = tl.full([], 0, tl.int64)
    has_top_k = (top_k > 0) & (top_k < vocab_size)
    mass = tl.full([], 0, tl.int64)
    if has_top_k == 0:
        mass = _mass(source, count, floor, largest, scale, min_p, CHUNK)
    for by_units in range(2):
        goal = top_k.to(tl.int64)
        is_used = has_top_k
        if by_units == 1:
            is_used = top_p < 1.0
            goal = tl.maximum(tl.ceil(top_p.to(tl.float64) * mass.to(tl.float64)).to(tl.int64), 1)
        if is_used:
            boundary, num_above, units_above, source, count = find_boundary(
                source, count, kept_ptr, kept_ids_ptr, tl.where(by_units == 1, boundary - 1, floor), goal,
                by_units == 1, largest, scale, min_p, CHUNK, MOST_KEPT,
            )  # fmt: skip
            tied = units_of(token_weights(_logit_of(boundary.to(tl.int32)), largest, scale))
            ties = tl.where(boundary > floor, goal - num_above, 0)
            if by_units == 1:
                ties = (goal - units_above + tied - 1) // tl.maximum(tied, 1)
            mass = units_above + ties * tied
    goal = tl.umulhi(number.to(tl.uint64) << 11, mass.to(tl.uint64)).to(tl.int64)
    place = _pick(source, count, boundary, ties, goal, largest, scale, min_p, CHUNK)
    token = place
    if count < vocab_size:
        token = tl.load(kept_ids_ptr + place)
    return token


# ---------------------------------------------------------------------------------------------------------
# the kernel


@triton.jit
def _edit(logits_ptr, ids_ptr, values_ptr, begin, end, KIND: tl.constexpr):
    """Edits of one kind of a row: see ``Edits``."""
    for base in range(begin, end, 512):
        index = base + tl.arange(0, 512)
        known = index < end
        place = logits_ptr + tl.load(ids_ptr + index, mask=known, other=0)
        value = tl.load(values_ptr + index, mask=known, other=1.0)
        x = tl.load(place, mask=known, other=0.0)
        if KIND == 0:
            x = tl.full([512], _MINUS_INFINITY, tl.float32)
        elif KIND == 1:
            x = x + value
        elif KIND == 2:
            x = tl.where(x > 0.0, tl.div_rn(x, value), x * value)
        else:
            x = x - value
        tl.store(place, x, mask=known)
    tl.debug_barrier()


@triton.jit
def _edited(logits, ids_ptr, values_ptr, bounds, first, last, vocab_size, CHUNK: tl.constexpr):
    """Makes all edits of a row; see ``scan_row`` for the result."""
    tl.debug_barrier()
    bias, penalty, change = tl.load(bounds + 1), tl.load(bounds + 2), tl.load(bounds + 3)
    _edit(logits, ids_ptr, values_ptr, first, bias, 0)
    _edit(logits, ids_ptr, values_ptr, bias, penalty, 1)
    _edit(logits, ids_ptr, values_ptr, penalty, change, 2)
    _edit(logits, ids_ptr, values_ptr, change, last, 3)
    return scan_row(logits, vocab_size, CHUNK)


@triton.jit
def _number(seed, counter, STREAM: tl.constexpr):
    """The random number of a token in units of 2^-53: see ``ops.reference.sampling.uniform``."""
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    stream = tl.full([], STREAM, tl.uint32)
    first, second, _, _ = tl.philox(seed, low, high, stream, tl.full([], 0, tl.uint32))
    bits = (first.to(tl.uint64) << 21) ^ (second.to(tl.uint64) >> 11)
    return (bits & 0x1FFFFFFFFFFFFF).to(tl.int64)


@triton.jit(do_not_specialize=["vocab_size", "logits_stride", "raw_stride", "params_stride"])
def sample_kernel(
    logits_ptr, raw_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, numbers_ptr, seeds_ptr, counters_ptr,
    bitmask_ptr, mask_rows_ptr, edit_ids_ptr, edit_values_ptr, edit_bounds_ptr, kept_ptr, kept_ids_ptr, tokens_ptr,
    status_ptr, vocab_size, logits_stride, raw_stride, params_stride, mask_stride,
    STREAM: tl.constexpr, COUNTS_ON: tl.constexpr, CHUNK: tl.constexpr, MOST_KEPT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    logits = logits_ptr + row.to(tl.int64) * logits_stride
    HAS_RAW: tl.constexpr = raw_ptr is not None
    raw = logits
    if HAS_RAW:
        raw = raw_ptr + row.to(tl.int64) * raw_stride
    HAS_MASK: tl.constexpr = bitmask_ptr is not None
    mask_row = row * 0 - 1
    words = bitmask_ptr
    if HAS_MASK:
        mask_row = tl.load(mask_rows_ptr + row)
        words = bitmask_ptr + mask_row.to(tl.int64) * mask_stride
    largest, token, is_bad = _first_scan(raw, logits, words, mask_row, vocab_size, HAS_RAW, HAS_MASK, CHUNK)
    if edit_bounds_ptr is not None:
        bounds = edit_bounds_ptr + row * 5
        first, last = tl.load(bounds), tl.load(bounds + 4)
        if (last > first) & (is_bad == 0):
            largest, token, is_bad = _edited(
                logits, edit_ids_ptr, edit_values_ptr, bounds, first, last, vocab_size, CHUNK
            )
    status = tl.where(is_bad != 0, 1, tl.where(largest == _MINUS_INFINITY, 2, tl.where(largest == _INFINITY, 1, 0)))
    params = row * params_stride
    temperature = tl.load(temperature_ptr + params)
    if status != 0:
        token = tl.full([], 0, tl.int32)
    elif temperature > 0.0:
        tl.debug_barrier()  # logits may have changed
        if numbers_ptr is not None:
            number = (tl.load(numbers_ptr + row) * 9007199254740992.0).to(tl.int64)
        else:
            number = _number(tl.load(seeds_ptr + row), tl.load(counters_ptr + row), STREAM)
        token = _drawn(
            logits, vocab_size, kept_ptr + row * MOST_KEPT, kept_ids_ptr + row * MOST_KEPT, largest,
            temperature, tl.load(top_k_ptr + params), tl.load(top_p_ptr + params), tl.load(min_p_ptr + params),
            number, CHUNK, MOST_KEPT,
        )  # fmt: skip
    tl.store(tokens_ptr + row, token.to(tl.int64))
    if status_ptr is not None:
        tl.store(status_ptr + row, status)
    if COUNTS_ON:
        counter = tl.load(counters_ptr + row)
        tl.debug_barrier()  # all warps have read it
        tl.store(counters_ptr + row, counter + 1)


@dataclass(frozen=True)
class Edits:
    """Changes of logits, row by row. Each has a token and a number; within a kind, no token is named twice."""

    token_ids: Tensor
    """int32 [any]."""
    values: Tensor
    """float32 [any]. FORBID: not read. BIAS: is added. PENALTY: divides positive logits and multiplies others. CHANGE:
    is subtracted."""
    bounds: Tensor
    """int32 [rows, NUM_KINDS + 1]: where each kind of a row begins, and where the row ends."""


@dataclass(frozen=True)
class Mask:
    """Tokens that some rows may take. All others become minus infinity."""

    bitmask: Tensor
    """int32 [any, ceil(vocab_size / 32)], a set bit allows the token."""
    rows: Tensor
    """int32 [rows]: row of ``bitmask``; -1: all tokens are allowed."""


@dataclass(frozen=True)
class Filters:
    """What rows ask for; the columns may be those of one table."""

    temperature: Tensor
    """float32 [rows], 0: the largest logit."""
    top_k: Tensor
    """int32 [rows]."""
    top_p: Tensor
    """float32 [rows]."""
    min_p: Tensor
    """float32 [rows]."""


@dataclass(frozen=True)
class Randomness:
    """What a row's random number is made of."""

    seeds: Tensor
    """int64 [rows]: the bits of the seed."""
    counters: Tensor
    """int64 [rows]: index of the token in the output."""
    counts_on: bool = False
    """Leaves the next index in ``counters``."""


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    numbers: Tensor,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The op ``sample``. Logits are not changed."""
    tokens = result(out, (logits.shape[0],), torch.int64, logits)
    _launch(logits, None, Filters(temperature, top_k, top_p, min_p), numbers, None, None, None, tokens, None)
    return tokens


def sample_rows(
    logits: Tensor,
    filters: Filters,
    randomness: Randomness,
    *,
    raw: Tensor | None = None,
    mask: Mask | None = None,
    edits: Edits | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Sampling as a whole: mask, edits, filters, random numbers.

    Args:
        logits: float32 [rows, vocab_size]; changed in place.
        filters: The filters.
        randomness: Of each row's random number.
        raw: The model's logits, float32 of the same shape. None: they are ``logits``.
        mask: Tokens that rows may take.
        edits: Changes that follow the mask.
        out: int64 [rows] and int32 [rows], for the results; None: new memory.

    Returns:
        The tokens, int64 [rows], 0 where there is none, and int32 [rows]: OK, NOT_FINITE if the model's logits or the
        largest one in the end are not finite numbers, NOTHING_LEFT if all are minus infinity in the end.
    """
    rows = logits.shape[0]
    tokens = result(out and out[0], (rows,), torch.int64, logits)
    status = result(out and out[1], (rows,), torch.int32, logits)
    _launch(logits, raw, filters, None, randomness, mask, edits, tokens, status)
    return tokens, status


def _launch(
    logits: Tensor,
    raw: Tensor | None,
    filters: Filters,
    numbers: Tensor | None,
    randomness: Randomness | None,
    mask: Mask | None,
    edits: Edits | None,
    tokens: Tensor,
    status: Tensor | None,
) -> None:
    rows, vocab_size = logits.shape
    assert logits.dtype == torch.float32 and vocab_size <= MAX_VOCAB_SIZE
    params = (filters.temperature, filters.top_k, filters.top_p, filters.min_p)
    stride = params[0].stride(0)
    assert all(column.stride(0) == stride or rows == 1 for column in params), "filters are columns of one table"
    kept, kept_ids = kept_memory(rows, logits.device)
    args = {
        "logits_ptr": logits,
        "raw_ptr": raw,
        "temperature_ptr": filters.temperature,
        "top_k_ptr": filters.top_k,
        "top_p_ptr": filters.top_p,
        "min_p_ptr": filters.min_p,
        "numbers_ptr": numbers,
        "seeds_ptr": None if randomness is None else randomness.seeds,
        "counters_ptr": None if randomness is None else randomness.counters,
        "bitmask_ptr": None if mask is None else mask.bitmask,
        "mask_rows_ptr": None if mask is None else mask.rows,
        "edit_ids_ptr": None if edits is None else edits.token_ids,
        "edit_values_ptr": None if edits is None else edits.values,
        "edit_bounds_ptr": None if edits is None else edits.bounds,
        "kept_ptr": kept,
        "kept_ids_ptr": kept_ids,
        "tokens_ptr": tokens,
        "status_ptr": status,
        "vocab_size": vocab_size,
        "logits_stride": row_stride(logits),
        "raw_stride": 0 if raw is None else row_stride(raw),
        "params_stride": stride,
        "mask_stride": 0 if mask is None else row_stride(mask.bitmask),
    }
    constants = {"MOST_KEPT": MOST_KEPT, "STREAM": STREAM_SAMPLE}
    constants["COUNTS_ON"] = randomness is not None and randomness.counts_on
    launch(sample_kernel, (rows,), args, config(vocab_size), **constants)


def config(vocab_size: int) -> Config:
    """How many tokens a program looks at together. On AMD one per thread: more take too many scalar registers."""
    chunk = min(power_of_two(vocab_size, 128), _LARGEST_CHUNK if target().backend == "cuda" else 512)
    return Config(chunk // 64, 1, (("CHUNK", chunk),))


def kept_memory(rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Memory for the tokens that programs copy together: logits and ids, MOST_KEPT per row."""
    size = rows * MOST_KEPT
    logits = scratch.get("sample.logits", size, torch.float32, device)
    return logits, scratch.get("sample.ids", size, torch.int32, device)


def step_bytes(rows: int) -> int:
    """Bytes of ``kept_memory``."""
    return rows * MOST_KEPT * 8


def cases() -> Iterator[Case]:
    """Calls whose kernels are checked ahead of time."""
    rows, vocab_size = 16, 151936

    def plain() -> None:
        column, numbers = _floats(rows), meta(rows, dtype=torch.float64)
        sample(_floats(rows, vocab_size), column, meta(rows, dtype=torch.int32), column, column, numbers)

    yield Case("op", plain, is_exact=True)
    for name in ("plain", "mask", "edits", "raw"):
        yield Case(name, partial(_sample_meta, name, rows, vocab_size), is_exact=True)


def _floats(*shape: int) -> Tensor:
    return meta(*shape, dtype=torch.float32)


def _sample_meta(name: str, rows: int, vocab_size: int) -> None:
    """A call of ``sample_rows`` with options, on tensors without data."""
    table = meta(rows, 4, dtype=torch.int32)
    numbers = table.view(torch.float32)
    filters = Filters(numbers[:, 0], table[:, 1], numbers[:, 2], numbers[:, 3])
    randomness = Randomness(meta(rows, dtype=torch.int64), meta(rows, dtype=torch.int64))
    mask = Mask(meta(rows, vocab_size // 32, dtype=torch.int32), meta(rows, dtype=torch.int32))
    edits = Edits(meta(99, dtype=torch.int32), _floats(99), meta(rows, NUM_KINDS + 1, dtype=torch.int32))
    sample_rows(
        _floats(rows, vocab_size),
        filters,
        randomness,
        raw=_floats(rows, vocab_size) if name == "raw" else None,
        mask=mask if name == "mask" else None,
        edits=edits if name == "edits" else None,
    )
