"""Attention over a paged KV cache: decode, prefill and steps that mix them, with one kernel.

A context is cut into parts of ``PART`` tokens at fixed positions. Each part is summed on its own, in steps of fixed
size, and parts are merged in ascending order. Whether one program goes through all parts of a request or one program
each, how many queries share a tile, how a prompt was chunked: the bits are the same. Sums of weights count in integers,
as their order would depend on how a tile is spread over threads.

What is to be done is a list of items that a kernel makes on the device (``WorkList``), once per step and group of
layers. Nothing of it depends on numbers that the host must know, so it can be part of a graph.

Parts and the online softmax: Dao, FlashAttention-2 (arXiv:2307.08691), and Flash-Decoding. Lists of items: Ye et al.,
FlashInfer (arXiv:2501.01005).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.metadata import AttentionMetadata, AttentionShape, KVLayout, stored_size
from ops.triton import attention_tiles, library
from ops.triton.attention_tiles import (
    FLOAT32_SHARED,
    SPLIT_ROWS,
    group_of,
    is_split,
    split_parts,
    split_queries,
    split_tile,
    step_of,
    whole_tile,
    window_of,
)
from ops.triton.catalog import Case, meta
from ops.triton.configs import TARGETS, Config, power_of_two
from ops.triton.kv_cache import scales_of, write_kv
from ops.triton.launch import launch, result, row_stride, scratch

PROGRAMS = 1024
"""Programs at most; each takes every so many items."""
ITEM = 4
"""Numbers of an item: row, tile of the row, part (-1: all), place of its partial results."""

LOG2_E = math.log2(math.e)
_UNITS = tl.constexpr(4194304.0)
"""Units of a weight of 1: the spacing of float32 between 2 and 4 is 2^-22."""
_MINUS_INFINITY = tl.constexpr(float("-inf"))


# ---------------------------------------------------------------------------------------------------------
# what is to be done


@dataclass(frozen=True)
class WorkList:
    """What the attention of a step consists of. Its memory may be used again by the next step."""

    split: Tensor
    """int32 [any, ITEM]: items of rows with few queries, one for each of their parts."""
    whole: Tensor | None
    """int32 [any, ITEM]: items of rows with many, one for each tile. None: there are no such rows."""
    counts: Tensor
    """int32 [2]: the number of items of each list."""

    @property
    def num_bytes(self) -> int:
        """Memory that the lists take."""
        return sum(each.nbytes for each in (self.split, self.whole, self.counts) if each is not None)


@dataclass
class PlannedAttention(AttentionMetadata):
    """Metadata of a step whose work list is made. Without one, ``paged_attention`` makes it itself."""

    work: WorkList


def planned(meta: AttentionMetadata, shape: AttentionShape, dtype: torch.dtype) -> PlannedAttention:
    """A step's metadata with its work list, for the layers of a group."""
    return PlannedAttention(
        meta.query_start_loc,
        meta.seq_lens,
        meta.block_table,
        meta.slot_mapping,
        meta.block_size,
        plan_attention(meta, shape, dtype),
    )


def new_work_list(
    shape: AttentionShape,
    dtype: torch.dtype,
    num_tokens: int,
    num_rows: int,
    context: int,
    like: Tensor,
    *,
    has_prefill: bool = True,
) -> WorkList:
    """Memory for the lists of any step with at most so many tokens and rows.

    Args:
        shape: Of the layers.
        dtype: Of K and V.
        num_tokens: Tokens of the step.
        num_rows: Requests of the step.
        context: The longest context, in tokens.
        like: A tensor of the device.
        has_prefill: Whether a row may have more than ``split_queries``.
    """
    group = group_of(shape)
    has_prefill = has_prefill or not is_split(shape)
    tokens = min(num_tokens, num_rows * split_queries(shape)) if has_prefill else num_tokens
    tiles = triton.cdiv(tokens * group, SPLIT_ROWS) + num_rows
    split = tiles + min(
        tiles * triton.cdiv(context, attention_tiles.PART), split_parts(shape) * (2 + group // SPLIT_ROWS)
    )
    whole = triton.cdiv(num_tokens * group, whole_tile(shape, dtype)[0]) + num_rows
    sizes = (split, whole if has_prefill else 0)
    items = [like.new_empty((size, ITEM), dtype=torch.int32) for size in sizes]
    return WorkList(items[0], items[1] if has_prefill else None, like.new_empty(2, dtype=torch.int32))


def plan_attention(
    meta: AttentionMetadata, shape: AttentionShape, dtype: torch.dtype, out: WorkList | None = None
) -> WorkList:
    """Makes the work list of a step.

    Args:
        meta: The step. Rows without tokens are allowed.
        shape: Of the group's layers.
        dtype: Of K and V.
        out: Memory for the list, of ``new_work_list``; None: allocates it.
    """
    num_rows, num_tokens = meta.num_reqs, meta.slot_mapping.shape[0]
    context = meta.block_table.shape[1] * meta.block_size
    if out is None:
        has_prefill = num_tokens != num_rows
        out = new_work_list(shape, dtype, num_tokens, num_rows, context, meta.seq_lens, has_prefill=has_prefill)
    args = {
        "starts_ptr": meta.query_start_loc,
        "lengths_ptr": meta.seq_lens,
        "split_ptr": out.split,
        "whole_ptr": out.whole,
        "counts_ptr": out.counts,
        "num_rows": num_rows,
    }
    launch(
        work_list_kernel,
        (num_rows,),
        args,
        Config(4, 1),
        GROUP=group_of(shape),
        SPLIT_QUERIES=split_queries(shape) if out.whole is not None else 1 << 30,
        SPLIT_ROWS=SPLIT_ROWS,
        WHOLE_ROWS=whole_tile(shape, dtype)[0],
        MAX_SLOTS=split_parts(shape) * group_of(shape),
        PART=attention_tiles.PART,
        WINDOW=window_of(shape),
        CAUSAL=shape.causal,
        ROWS_TILE=power_of_two(num_rows, 16),
    )
    return out


@triton.jit
def _first_visible(length, num_queries, first_query, WINDOW: tl.constexpr):
    """The first token that queries from ``first_query`` on attend to."""
    if WINDOW == 0:
        return length * 0
    if WINDOW < 0:
        return (length - num_queries + first_query) // -WINDOW * -WINDOW
    return tl.maximum(length - num_queries + first_query - WINDOW + 1, 0)


@triton.jit
def _store_items(item, row, tile, part, place, is_item):
    tl.store(item, tl.zeros_like(tile) + row, mask=is_item)
    tl.store(item + 1, tile, mask=is_item)
    tl.store(item + 2, part, mask=is_item)
    tl.store(item + 3, place, mask=is_item)


@triton.jit(do_not_specialize=["num_rows"])
def work_list_kernel(
    starts_ptr, lengths_ptr, split_ptr, whole_ptr, counts_ptr, num_rows,
    GROUP: tl.constexpr, SPLIT_QUERIES: tl.constexpr, SPLIT_ROWS: tl.constexpr, WHOLE_ROWS: tl.constexpr,
    MAX_SLOTS: tl.constexpr, PART: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, ROWS_TILE: tl.constexpr,
):  # fmt: skip
    # A program per row. Each counts the items of all rows, to know where its own begin.
    own = tl.program_id(0)
    row = tl.arange(0, ROWS_TILE)
    known = row < num_rows
    start = tl.load(starts_ptr + row, mask=known, other=0)
    num_queries = tl.load(starts_ptr + row + 1, mask=known, other=0) - start
    length = tl.load(lengths_ptr + row, mask=known, other=0)
    has_queries = known & (num_queries > 0)
    is_split = has_queries & (num_queries <= SPLIT_QUERIES)
    parts = tl.cdiv(length, PART) - _first_visible(length, num_queries, 0, WINDOW) // PART
    slots = tl.where(is_split & (parts > 1), num_queries * GROUP * parts, 0)
    ends = tl.cumsum(slots, 0)
    parts = tl.where((parts > 1) & (ends <= MAX_SLOTS), parts, 1)
    split = tl.where(is_split, tl.cdiv(num_queries * GROUP, SPLIT_ROWS) * parts, 0)
    whole = tl.where(has_queries & (num_queries > SPLIT_QUERIES), tl.cdiv(num_queries * GROUP, WHOLE_ROWS), 0)

    is_own = row == own
    own_parts = tl.sum(tl.where(is_own, parts, 0), 0)
    own_place = tl.sum(tl.where(is_own, ends - slots, 0), 0)
    own_queries = tl.sum(tl.where(is_own, num_queries, 0), 0)
    own_length = tl.sum(tl.where(is_own, length, 0), 0)
    first_part = _first_visible(own_length, own_queries, 0, WINDOW) // PART
    begin = tl.sum(tl.where(row < own, split, 0), 0)
    count = tl.sum(tl.where(is_own, split, 0), 0)
    for base in range(0, count, 64):
        index = base + tl.arange(0, 64)
        tile = index // own_parts
        part = tl.where(own_parts > 1, first_part + index % own_parts, -1)
        place = own_place + tile * SPLIT_ROWS * own_parts
        _store_items(split_ptr + (begin + index) * 4, own, tile, part, place, index < count)
    if whole_ptr is not None:
        begin = tl.sum(tl.where(row < own, whole, 0), 0)
        count = tl.sum(tl.where(is_own, whole, 0), 0)
        for base in range(0, count, 64):
            index = base + tl.arange(0, 64)
            tile = count - 1 - index  # the last tiles see most
            _store_items(whole_ptr + (begin + index) * 4, own, tile, tl.zeros_like(index) - 1, tile, index < count)
    if own == 0:
        tl.store(counts_ptr, tl.sum(split, 0))
        tl.store(counts_ptr + 1, tl.sum(whole, 0))


# ---------------------------------------------------------------------------------------------------------
# attention


@triton.jit
def _load_rows(ptr, offsets, DIM: tl.constexpr, TILE: tl.constexpr):
    """Vectors of DIM numbers at ``offsets`` [any]: [any, TILE], filled up with zeros."""
    dim = tl.arange(0, TILE)
    place = ptr + offsets[:, None] + dim[None, :]
    if DIM == TILE:
        return tl.load(place)
    return tl.load(place, mask=(dim < DIM)[None, :], other=0.0)


@triton.jit
def _merged(total_max, total_units, total, part_max, part_units, part):
    """The sums of a context and of its next part. Nothing changes if the part has no visible token."""
    largest = tl.maximum(total_max, part_max)
    origin = tl.where(largest == _MINUS_INFINITY, 0.0, largest)
    old = tl.exp2(total_max - origin)
    new = tl.exp2(part_max - origin)
    units = total_units * old + part_units * new
    return largest, units, total * old[:, None] + part * new[:, None]


@triton.jit
def _step_of_part(
    products, v, k_scales, v_scales, largest, units, sums, position, token, slopes, biases, reach, end, scale, cap,
    WINDOW: tl.constexpr, CAUSAL: tl.constexpr, HAS_CAP: tl.constexpr, HAS_SLOPES: tl.constexpr,
    HAS_BIASES: tl.constexpr, HAS_SCALES: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: adds the tokens ``token`` with their products of q and k, and their ``v``, to
    the sums of a part."""
    scores = products
    if HAS_SCALES:
        scores = scores * k_scales[None, :]
    scores = scores * scale
    if HAS_CAP:
        scores = cap - 2.0 * cap / (tl.exp2(scores) + 1.0)
    distance = position[:, None] - token[None, :]
    if HAS_SLOPES:
        scores = scores - slopes[:, None] * distance.to(tl.float32)
    if HAS_BIASES:
        # No place is beyond the row of a head; what tokens that nobody sees get does not matter.
        place = tl.minimum(tl.maximum(reach - distance, 0), 2 * reach - 1)
        scores = scores + tl.load(biases[:, None] + place) * 1.4426950408889634
    if WINDOW < 0:  # in one comparison: masks take registers
        place = position % -WINDOW
        is_visible = (place[:, None] - distance).to(tl.uint32, bitcast=True) <= place.to(tl.uint32)[:, None]
    elif CAUSAL:
        is_visible = distance >= 0
        if WINDOW > 0:
            is_visible = is_visible & (distance < WINDOW)
    else:
        is_visible = (token < end)[None, :]
        if WINDOW > 0:  # likewise
            near = position[:, None] - tl.where(token < end, token, 1 << 30)[None, :] + (WINDOW - 1)
            is_visible = near.to(tl.uint32, bitcast=True) < 2 * WINDOW - 1
    scores = tl.where(is_visible, scores, _MINUS_INFINITY)
    before = largest
    largest = tl.maximum(before, tl.max(scores, 1))
    origin = tl.where(largest == _MINUS_INFINITY, 0.0, largest)
    weights = tl.exp2(scores - origin[:, None])
    factor = tl.exp2(before - origin)
    # In the bits of float32 between 2 and 3, weights are integers.
    counted = (weights + 2.0).to(tl.int32, bitcast=True) - 0x40000000
    units = units * factor + tl.sum(counted, 1).to(tl.float32)
    if HAS_SCALES:
        if v.dtype == tl.float16:  # small weights times small scales would leave its range
            v = (v.to(tl.float32) * v_scales[:, None]).to(tl.float16)
        else:
            weights = weights * v_scales[None, :]
    sums = tl.dot(weights.to(v.dtype), v, sums * factor[:, None], input_precision="ieee")
    return largest, units, sums


@triton.jit
def _attend(
    q, k_ptr, v_ptr, k_scales_ptr, v_scales_ptr, table, head, position, slopes, biases, reach, begin, end, first_part,
    last_part, scale, cap,
    KV_HEADS: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr, K_TILE: tl.constexpr, V_TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_SLOPES: tl.constexpr, HAS_BIASES: tl.constexpr, HAS_SCALES: tl.constexpr, PART: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The sums of some parts of a context, of which the tokens from ``begin`` to ``end`` are visible to the tile."""
    total_max = tl.full([ROWS], _MINUS_INFINITY, tl.float32)
    total_units = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, V_TILE], tl.float32)
    for part in range(first_part, last_part):
        largest = tl.full([ROWS], _MINUS_INFINITY, tl.float32)
        units = tl.zeros([ROWS], tl.float32)
        sums = tl.zeros([ROWS, V_TILE], tl.float32)
        part_begin = tl.maximum(part * PART, begin // STEP * STEP)
        part_end = tl.minimum(part * PART + PART, end)
        for base in range(part_begin, part_end, STEP):
            token = base + tl.arange(0, STEP)
            # In place of tokens that nobody sees, one that is there is read: memory without an owner may hold NaN.
            known = tl.minimum(tl.maximum(token, begin), end - 1)
            block = tl.load(table + known // BLOCK_SIZE).to(tl.int64)
            part_of_head = (block * KV_HEADS + head) * BLOCK_SIZE
            inner = known % BLOCK_SIZE
            # Numbers of a cache in 8 bits are exact in the type of the queries.
            if HAS_SCALES:  # the scales of a head's part of a block follow its codes
                k = _load_rows(k_ptr, part_of_head * (K_DIM + 2) + inner * K_DIM, K_DIM, K_TILE).to(q.dtype)
                v = _load_rows(v_ptr, part_of_head * (V_DIM + 2) + inner * V_DIM, V_DIM, V_TILE).to(q.dtype)
                k_at = part_of_head * (K_DIM // 2 + 1) + BLOCK_SIZE * K_DIM // 2 + inner
                v_at = part_of_head * (V_DIM // 2 + 1) + BLOCK_SIZE * V_DIM // 2 + inner
                k_scales = tl.load(k_scales_ptr + k_at).to(tl.float32)
                v_scales = tl.load(v_scales_ptr + v_at).to(tl.float32)
            else:
                k = _load_rows(k_ptr, (part_of_head + inner) * K_DIM, K_DIM, K_TILE).to(q.dtype)
                v = _load_rows(v_ptr, (part_of_head + inner) * V_DIM, V_DIM, V_TILE).to(q.dtype)
                k_scales = known
                v_scales = known
            products = tl.dot(q, tl.trans(k), input_precision="ieee")
            largest, units, sums = _step_of_part(
                products, v, k_scales, v_scales, largest, units, sums, position, token, slopes, biases, reach, end,
                scale, cap, WINDOW, CAUSAL, HAS_CAP, HAS_SLOPES, HAS_BIASES, HAS_SCALES,
            )  # fmt: skip
        total_max, total_units, total = _merged(total_max, total_units, total, largest, units, sums)
    return total_max, total_units, total


@triton.jit
def _merge_all(
    partial_ptr, state_ptr, kept, is_real, distance, num_parts,
    V_DIM: tl.constexpr, V_TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Merges parts, whose sums are ``distance`` rows apart from ``kept`` [rows] on."""
    total_max = tl.full([ROWS], _MINUS_INFINITY, tl.float32)
    units = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, V_TILE], tl.float32)
    dim = tl.arange(0, V_TILE)
    mask = is_real[:, None] & (dim < V_DIM)[None, :]
    for _ in range(num_parts):
        # Other programs have written them: not from this processor's own cache.
        part_max = tl.load(state_ptr + kept * 2, mask=is_real, other=_MINUS_INFINITY, cache_modifier=".cg")
        part_units = tl.load(state_ptr + kept * 2 + 1, mask=is_real, other=0.0, cache_modifier=".cg")
        place = partial_ptr + (kept * V_DIM)[:, None] + dim[None, :]
        part = tl.load(place, mask=mask, other=0.0, cache_modifier=".cg")
        total_max, units, total = _merged(total_max, units, total, part_max, part_units, part)
        kept += distance
    return total_max, units, total


@triton.jit
def _complete(
    partial_ptr, state_ptr, arrivals_ptr, place, head, is_real, total_max, units, total, part, num_parts, num_rows,
    KV_HEADS: tl.constexpr, V_DIM: tl.constexpr, V_TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Stores the sums of a part. Whether those of all parts are stored by now, and if so, the sums of all."""
    first = ((place + tl.arange(0, ROWS)) * KV_HEADS + head).to(tl.int64)
    kept = first + part * num_rows * KV_HEADS
    dim = tl.arange(0, V_TILE)
    mask = is_real[:, None] & (dim < V_DIM)[None, :]
    tl.store(partial_ptr + (kept * V_DIM)[:, None] + dim[None, :], total, mask=mask)
    tl.store(state_ptr + kept * 2, total_max, mask=is_real)
    tl.store(state_ptr + kept * 2 + 1, units, mask=is_real)
    # All warps have stored before the program counts as arrived.
    tl.debug_barrier()
    arrivals = arrivals_ptr + place * KV_HEADS + head
    is_last = tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") == num_parts - 1
    if is_last:
        tl.store(arrivals, 0)  # for the next launch
        total_max, units, total = _merge_all(
            partial_ptr, state_ptr, first, is_real, num_rows * KV_HEADS, num_parts, V_DIM, V_TILE, ROWS
        )
    return is_last, total_max, units, total


@triton.jit
def _finish(
    out, total_max, units, total, sinks, is_real, out_scale,
    HAS_SINKS: tl.constexpr, MAY_SEE_NOTHING: tl.constexpr, V_DIM: tl.constexpr, V_TILE: tl.constexpr,
):  # fmt: skip
    """Divides by the sum of weights and stores a tile of results at ``out`` [rows]."""
    if HAS_SINKS:
        largest = tl.maximum(total_max, sinks)
        factor = tl.exp2(total_max - largest)
        units = units * factor + tl.exp2(sinks - largest) * _UNITS
        total = total * factor[:, None]
    if MAY_SEE_NOTHING:
        units = tl.where(units == 0.0, 1.0, units)
    factor = 4194304.0 / units * out_scale
    # Adding zero makes the sign of zeros independent of how many empty parts were merged.
    total = total * factor[:, None] + 0.0
    dim = tl.arange(0, V_TILE)
    mask = is_real[:, None] & (dim < V_DIM)[None, :]
    tl.store(out[:, None] + dim[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _of_heads(slopes_ptr, biases_ptr, heads, reach):
    """The slopes of heads, and where their biases are; whatever else, if there are none."""
    slopes = heads
    if slopes_ptr is not None:
        slopes = tl.load(slopes_ptr + heads)
    biases = heads
    if biases_ptr is not None:
        biases = biases_ptr + heads * (2 * reach)
    return slopes, biases


@triton.jit
def _visible_range(
    length, num_queries, first_query, last_query,
    WINDOW: tl.constexpr, CAUSAL: tl.constexpr, IS_SPLIT: tl.constexpr,
):  # fmt: skip
    """The position of a row's first query, and the tokens that some of its queries see: the first and the end."""
    first = length - num_queries
    if not CAUSAL:  # queries beyond the context attend to others without being attended to
        first = tl.maximum(first, 0)
    end = length
    if CAUSAL:
        end = tl.minimum(length, first + last_query + 1)
    elif WINDOW > 0 and not IS_SPLIT:  # few queries gain nothing, and AMD's scalar registers are few
        end = tl.minimum(length, first + last_query + WINDOW)
    return first, _first_visible(length, num_queries, first_query, WINDOW), end


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, k_scales_ptr, v_scales_ptr, out_ptr, items_ptr, count_ptr, starts_ptr, lengths_ptr, table_ptr,
    sinks_ptr, slopes_ptr, biases_ptr, partial_ptr, state_ptr, arrivals_ptr, reach, q_stride, out_stride, table_stride,
    scale, cap, out_scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr, K_TILE: tl.constexpr,
    V_TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_CAP: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, IS_SPLIT: tl.constexpr,
):  # fmt: skip
    # Rows of a tile are queries times the heads that share a KV head. ``scale`` makes scores exponents of 2; with a
    # cap, it makes them the exponent in the hyperbolic tangent, and ``cap`` makes its result an exponent of 2.
    HAS_SINKS: tl.constexpr = sinks_ptr is not None
    HAS_SLOPES: tl.constexpr = slopes_ptr is not None
    HAS_BIASES: tl.constexpr = biases_ptr is not None
    HAS_SCALES: tl.constexpr = k_scales_ptr is not None
    MAY_SEE_NOTHING: tl.constexpr = WINDOW > 0 and not CAUSAL
    for index in range(tl.program_id(0), tl.load(count_ptr) * KV_HEADS, tl.num_programs(0)):
        head = index % KV_HEADS
        item = items_ptr + (index // KV_HEADS) * 4
        row, tile, own_part = tl.load(item), tl.load(item + 1), tl.load(item + 2)
        start = tl.load(starts_ptr + row)
        num_queries = tl.load(starts_ptr + row + 1) - start
        length = tl.load(lengths_ptr + row)
        rows = tile * ROWS + tl.arange(0, ROWS)
        query = rows // GROUP
        is_real = query < num_queries
        token = (start + tl.minimum(query, num_queries - 1)).to(tl.int64)
        heads = head * GROUP + rows % GROUP
        q = _load_rows(q_ptr, token * q_stride + heads * K_DIM, K_DIM, K_TILE)
        slopes, biases = _of_heads(slopes_ptr, biases_ptr, heads, reach)
        first, begin, end = _visible_range(
            length, num_queries, tile * ROWS // GROUP, (tile * ROWS + ROWS - 1) // GROUP, WINDOW, CAUSAL, IS_SPLIT
        )
        first_part, last_part = begin // PART, tl.cdiv(end, PART)
        if IS_SPLIT:
            if own_part >= 0:
                first_part, last_part = own_part, own_part + 1
        total_max, units, total = _attend(
            q, k_ptr, v_ptr, k_scales_ptr, v_scales_ptr, table_ptr + row.to(tl.int64) * table_stride, head,
            first + query, slopes, biases, reach, begin, end, first_part, last_part, scale, cap, KV_HEADS, K_DIM,
            V_DIM, K_TILE, V_TILE, BLOCK_SIZE, WINDOW, CAUSAL, HAS_CAP, HAS_SLOPES, HAS_BIASES, HAS_SCALES, PART, ROWS,
            STEP,
        )  # fmt: skip

        is_done = own_part < 0
        if IS_SPLIT:
            if own_part >= 0:
                parts_begin = _first_visible(length, num_queries, 0, WINDOW) // PART
                is_done, total_max, units, total = _complete(
                    partial_ptr, state_ptr, arrivals_ptr, tl.load(item + 3), head, is_real, total_max, units, total,
                    own_part - parts_begin, tl.cdiv(length, PART) - parts_begin,
                    tl.minimum(ROWS, num_queries * GROUP - tile * ROWS), KV_HEADS, V_DIM, V_TILE, ROWS,
                )  # fmt: skip
        if is_done:
            sinks = total_max
            if HAS_SINKS:
                sinks = tl.load(sinks_ptr + heads).to(tl.float32) * 1.4426950408889634
            out = out_ptr + token * out_stride + heads * V_DIM
            _finish(out, total_max, units, total, sinks, is_real, out_scale, HAS_SINKS, MAY_SEE_NOTHING, V_DIM, V_TILE)


def paged_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    kv_cache: tuple[Tensor, Tensor],
    meta: AttentionMetadata,
    shape: AttentionShape,
    layout: KVLayout = "heads",
    sinks: Tensor | None = None,
    biases: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The op ``paged_attention``, on caches [num_blocks, num_kv_heads, block_size, stored_size(head_dim)]. In int8, a
    head's part of a block has the codes of all tokens, then their scales."""
    assert layout == "heads", f"these kernels do not read a cache in the layout {layout!r}"
    if k is not None and v is not None:
        write_kv(k, v, kv_cache, meta, (shape.k_scale, shape.v_scale))
    out = result(out, (q.shape[0], shape.out_width), q.dtype, q)
    if isinstance(meta, library.LibraryStep):
        library.attend(q, kv_cache, meta, out)
        return out
    work = meta.work if isinstance(meta, PlannedAttention) else plan_attention(meta, shape, kv_cache[0].dtype)
    for items in (work.split if is_split(shape) else None, work.whole):
        if items is not None:
            _launch(q, kv_cache, meta, shape, (sinks, biases), out, work, items)
    return out


def _launch(
    q: Tensor,
    kv_cache: tuple[Tensor, Tensor],
    meta: AttentionMetadata,
    shape: AttentionShape,
    learned: tuple[Tensor | None, Tensor | None],
    out: Tensor,
    work: WorkList,
    items: Tensor,
) -> None:
    """Launches the kernel for one of a step's lists. ``learned``: sinks and biases."""
    keys, values = kv_cache
    sinks, biases = learned
    assert keys.is_contiguous() and values.is_contiguous()
    of_parts = items is work.split
    args = {
        "q_ptr": q,
        "k_ptr": keys,
        "v_ptr": values,
        "k_scales_ptr": scales_of(keys),
        "v_scales_ptr": scales_of(values),
        "out_ptr": out,
        "items_ptr": items,
        "count_ptr": work.counts[:1] if of_parts else work.counts[1:],
        "starts_ptr": meta.query_start_loc,
        "lengths_ptr": meta.seq_lens,
        "table_ptr": meta.block_table,
        "sinks_ptr": sinks,
        "slopes_ptr": _slopes(shape.alibi_slopes, q.device),
        "biases_ptr": biases,
        "reach": 0 if biases is None else biases.shape[1] // 2,
        **_partial_results(q, meta, shape, of_parts=of_parts),
        "q_stride": row_stride(q),
        "out_stride": row_stride(out),
        "table_stride": row_stride(meta.block_table),
        **_factors(shape),
        "out_scale": shape.v_scale,
    }
    rows, warps, stages = split_tile(shape, keys.dtype) if of_parts else whole_tile(shape, keys.dtype)
    launch(
        attention_kernel,
        (min(len(items) * shape.num_kv_heads, PROGRAMS),),
        args,
        Config(warps, stages, (("ROWS", rows), ("STEP", step_of(shape, keys.dtype)))),
        KV_HEADS=shape.num_kv_heads,
        GROUP=group_of(shape),
        K_DIM=shape.head_dim,
        V_DIM=shape.v_dim,
        K_TILE=power_of_two(shape.head_dim, 16),
        V_TILE=power_of_two(shape.v_dim, 16),
        BLOCK_SIZE=meta.block_size,
        WINDOW=window_of(shape),
        CAUSAL=shape.causal,
        HAS_CAP=bool(shape.logit_softcap),
        PART=attention_tiles.PART,
        IS_SPLIT=of_parts,
    )


def _partial_results(
    q: Tensor, meta: AttentionMetadata, shape: AttentionShape, *, of_parts: bool
) -> dict[str, Tensor | None]:
    """Memory for the results of parts, and counters of those that are done."""
    if not of_parts:
        return {"partial_ptr": None, "state_ptr": None, "arrivals_ptr": None}
    parts = triton.cdiv(meta.block_table.shape[1] * meta.block_size, attention_tiles.PART)
    slots = group_of(shape) * min(q.shape[0] * parts, split_parts(shape))
    size = slots * shape.num_kv_heads
    return {
        "partial_ptr": scratch.get("attention.partial", size * shape.v_dim, torch.float32, q.device),
        "state_ptr": scratch.get("attention.state", size * 2, torch.float32, q.device),
        "arrivals_ptr": scratch.get("attention.arrivals", size, torch.int32, q.device),
    }


def _factors(shape: AttentionShape) -> dict[str, float]:
    """What makes scores exponents of 2: see ``attention_kernel``."""
    scale = shape.scale * shape.k_scale
    if not shape.logit_softcap:
        return {"scale": scale * LOG2_E, "cap": 0.0}
    return {"scale": scale / shape.logit_softcap * 2 * LOG2_E, "cap": shape.logit_softcap * LOG2_E}


@lru_cache
def _slopes(slopes: tuple[float, ...] | None, device: torch.device) -> Tensor | None:
    """Slopes of ALiBi, for scores that are exponents of 2. Uploaded once, when a layer first runs."""
    if slopes is None:
        return None
    return torch.tensor([slope * LOG2_E for slope in slopes], dtype=torch.float32, device=device)


def cases() -> Iterator[Case]:
    """Calls whose kernels are checked ahead of time."""
    kinds = {
        "64": AttentionShape(9, 3, 64, 0.125),
        "80": AttentionShape(32, 32, 80, 0.1),
        "96": AttentionShape(32, 32, 96, 0.1),
        "128": AttentionShape(32, 8, 128, 0.09),
        "128 window": AttentionShape(32, 8, 128, 0.09, sliding_window=4096),
        "64 window sinks": AttentionShape(64, 8, 64, 0.125, sliding_window=128, has_sinks=True),
        "256 cap": AttentionShape(8, 4, 256, 0.0625, logit_softcap=50.0),
        "128 chunks": AttentionShape(40, 8, 128, 0.09, sliding_window=8192, is_chunked=True),
        "128 alibi": AttentionShape(32, 32, 128, 0.09, alibi_slopes=(0.5,) * 32),
        "192/128": AttentionShape(16, 16, 192, 0.07, v_head_dim=128),
        "64 both ways": AttentionShape(12, 12, 64, 0.125, causal=False),
        "64 both ways window": AttentionShape(12, 12, 64, 0.125, causal=False, sliding_window=65),
        "64 both ways biases": AttentionShape(12, 12, 64, 0.125, causal=False, has_biases=True),
        "72 both ways": AttentionShape(16, 16, 72, 0.12, causal=False),
        "80 both ways": AttentionShape(16, 16, 80, 0.11, causal=False),
    }
    for name, shape in kinds.items():
        yield _case(name, shape, torch.bfloat16)
    yield _case("128", kinds["128"], torch.float16)
    nvidia = frozenset(name for name, each in TARGETS.items() if each.backend == "cuda")
    fp8 = frozenset(name for name, each in TARGETS.items() if each.capability >= 89)
    for name in ("64", "128", "256 cap"):
        yield replace(_case(name, kinds[name], torch.bfloat16, torch.float8_e4m3fn), targets=fp8)
        coded = _case(name, kinds[name], torch.bfloat16, torch.int8)
        yield replace(coded, targets=nvidia if kinds[name].head_dim > 128 else None)
    yield _case("128", kinds["128"], torch.float16, torch.int8)
    yield _case("64", kinds["64"], torch.float32)
    yield _case("128", kinds["128"], torch.float32)
    yield replace(_case("256 cap", kinds["256 cap"], torch.float32), targets=nvidia)
    wide = AttentionShape(8, 1, 512, 1.0)
    yield _case("512", wide, torch.bfloat16)
    roomy = frozenset(name for name in nvidia if TARGETS[name].max_shared >= FLOAT32_SHARED)
    yield replace(_case("512", wide, torch.float32), targets=roomy)
    yield replace(_case("512", wide, torch.bfloat16, torch.int8), targets=nvidia)
    yield replace(_case("512", wide, torch.bfloat16, torch.float8_e4m3fn), targets=fp8)


def _case(name: str, shape: AttentionShape, dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> Case:
    """A step of prompts and one of decoding: three launches."""
    tokens, rows, blocks, block_size = 512, 16, 256, 32
    starts, lengths, table = (meta(*size, dtype=torch.int32) for size in ((rows + 1,), (rows,), (rows, blocks)))
    step = AttentionMetadata(starts, lengths, table, meta(tokens, dtype=torch.int64), block_size)
    cache = tuple(
        meta(blocks, shape.num_kv_heads, block_size, stored_size(dim, kv_dtype or dtype), dtype=kv_dtype or dtype)
        for dim in (shape.head_dim, shape.v_dim)
    )
    q = meta(tokens, shape.q_width, dtype=dtype)
    sinks = meta(shape.num_heads, dtype=dtype) if shape.has_sinks else None
    biases = meta(shape.num_heads, 1024, dtype=torch.float32) if shape.has_biases else None

    def call() -> Tensor:
        return paged_attention(q, None, None, (cache[0], cache[1]), step, shape, "heads", sinks, biases)

    types = [dtype] if kv_dtype is None else [kv_dtype] if dtype == torch.bfloat16 else [dtype, kv_dtype]
    name = " ".join([name, *(str(each).removeprefix("torch.") for each in types)])
    return Case(name, call, min_load=2 if sinks is not None or kv_dtype == torch.int8 else 4, family=name)
