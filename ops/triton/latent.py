"""Latent attention, and the products of heads with matrices of their own that surround it.

A token's row in the cache is the key of all heads, and its first columns are their value: they are read once for both.
Parts, work list and online softmax are those of ``attention.py``, with all heads as the group of one KV head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ops.metadata import AttentionMetadata, AttentionShape, KVLayout
from ops.packed import Weight
from ops.triton import attention, attention_tiles, configs, experts, gemm, rope
from ops.triton.attention import PlannedAttention, plan_attention
from ops.triton.catalog import Case, meta
from ops.triton.configs import TARGETS, Config, power_of_two
from ops.triton.launch import launch, result, row_stride, scratch, target

MAX_RANK = 512
"""Columns of a latent at most."""
_HEADS_TILE = 16


def unsupported(shape: AttentionShape, dtype: torch.dtype) -> str | None:
    """The reason why the kernels cannot compute such a layer, or None if they can."""
    if dtype == torch.float32 and target().max_shared < attention_tiles.FLOAT32_SHARED:
        return "latent attention in float32 needs a GPU with more shared memory; use --dtype bfloat16"
    if shape.v_dim > MAX_RANK:
        return f"latents of {shape.v_dim} numbers are not supported; at most {MAX_RANK}"
    return None


# ---------------------------------------------------------------------------------------------------------
# products of heads


@triton.jit(do_not_specialize=["M"])
def heads_gemm_kernel(
    w_ptr, weights_ptr, x_ptr, out_ptr, M, N, K, segment_size, w_stride, x_stride, out_stride, head_dim,
    SEGMENTS: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """As ``gemm_kernel``, head by head. ``weights_ptr``: how many times 16 bytes a head's are from the first one's."""
    head = tl.program_id(1)
    tiles_n = tl.cdiv(N, TILE_N)
    tile_m, tile_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    own_m = tl.arange(0, TILE_M)
    own_n = tl.arange(0, TILE_N)
    own_k = tl.arange(0, TILE_K)
    m = tile_m * TILE_M + own_m
    n = tile_n * TILE_N + own_n
    w_base = experts._moved(w_ptr, tl.load(weights_ptr + head)) + (tile_n * TILE_N).to(tl.int64) * w_stride
    w_offsets = own_n[:, None] * w_stride + own_k[None, :]
    x_base = x_ptr + (tile_m * TILE_M).to(tl.int64) * x_stride + head * head_dim
    x_offsets = own_m[:, None] * x_stride + own_k[None, :]
    total, total_up = gemm._sums(
        w_base, w_base, w_offsets, x_base, x_offsets, m, n, own_k, M, N, K, 0, segment_size,
        SEGMENTS, EVEN_N, EVEN_K, False, TILE_M, TILE_N, TILE_K,
    )  # fmt: skip
    gemm._finish(
        total, total_up, m, n, M, N, x_ptr, None, 0, out_ptr + head * N, out_stride, "none", False, False, False
    )


_distances = WeakTensorKeyDictionary()


def _distances_of(weights: Sequence[Tensor]) -> Tensor:
    """Where the weights of heads are, by the first one."""
    if weights[0].is_meta:
        return experts._distances(weights)
    if weights[0] not in _distances:
        _distances[weights[0]] = experts._distances(weights)
    found: Tensor = _distances[weights[0]]
    return found


def heads_linear(x: Tensor, weights: Sequence[Weight], head_dim: int, *, out: Tensor | None = None) -> Tensor:
    """The op ``heads_linear``, with the bits of a product per head."""
    tensors = [weight for weight in weights if isinstance(weight, Tensor)]
    assert len(tensors) == len(weights), "the matrices of heads are numbers"
    first = tensors[0]
    count, (n, k) = len(x), first.shape
    out = result(out, (count, len(weights) * n), x.dtype, x)
    segments = gemm.num_segments(n, k)
    # In loops over tiles of 8 rows, ptxas would let one product wait for the other.
    config = configs.gemm(target(), max(count, 16), k, x.dtype, segments, "none", False)
    tile = dict(config.tile)
    args = {
        "w_ptr": first,
        "weights_ptr": _distances_of(tensors),
        "x_ptr": x,
        "out_ptr": out,
        "M": count,
        "N": n,
        "K": k,
        "segment_size": gemm.segment_size(k, segments),
        "w_stride": row_stride(first),
        "x_stride": row_stride(x),
        "out_stride": row_stride(out),
        "head_dim": head_dim,
    }
    tiles = triton.cdiv(count, tile["TILE_M"]) * triton.cdiv(n, tile["TILE_N"])
    even = {"EVEN_N": n % tile["TILE_N"] == 0, "EVEN_K": k % tile["TILE_K"] == 0}
    launch(heads_gemm_kernel, (tiles, len(weights)), args, config, SEGMENTS=segments, **even)
    return out


# ---------------------------------------------------------------------------------------------------------
# rotation, and writing the cache


@triton.jit
def _turned(base, first, second, mask, cos, sin):
    """Pairs of columns after the rotation, rounded wherever torch would."""
    dtype = base.dtype.element_ty
    a = tl.load(base + first, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(base + second, mask=mask, other=0.0).to(tl.float32)
    one = (a * cos).to(dtype).to(tl.float32) - (b * sin).to(dtype).to(tl.float32)
    other = (b * cos).to(dtype).to(tl.float32) + (a * sin).to(dtype).to(tl.float32)
    return one.to(dtype), other.to(dtype)


@triton.jit(do_not_specialize=["num_tokens"])
def latent_rope_kernel(
    q_ptr, latents_ptr, k_ptr, positions_ptr, cos_sin_ptr, slots_ptr, cache_ptr, out_ptr,
    num_tokens, heads, q_stride, latents_stride, k_stride,
    HEAD: tl.constexpr, RANK: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEADS_TILE: tl.constexpr, BLOCK_TILE: tl.constexpr, DIM_TILE: tl.constexpr, HALF_TILE: tl.constexpr,
):  # fmt: skip
    """Programs along the second axis: tiles of query heads, and a last one that writes a token's row of the cache.

    The first token of a block zeroes what this step leaves of the block.
    """
    DIM: tl.constexpr = RANK + ROTARY
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, HALF_TILE)
    is_pair = (pair < ROTARY // 2)[None, :]
    first = (2 * pair if INTERLEAVED else pair)[None, :]
    second = (2 * pair + 1 if INTERLEAVED else pair + ROTARY // 2)[None, :]
    cos, sin = rope._angles(cos_sin_ptr, tl.load(positions_ptr + token), pair, ROTARY, q_ptr.dtype.element_ty)
    if tl.program_id(1) * HEADS_TILE < heads:
        head = (tl.program_id(1) * HEADS_TILE + tl.arange(0, HEADS_TILE))[:, None]
        mask = (head < heads) & is_pair
        place = head * HEAD + (HEAD - ROTARY)
        one, other = _turned(q_ptr + token * q_stride, place + first, place + second, mask, cos, sin)
        out = out_ptr + token * heads * ROTARY + head * ROTARY
        tl.store(out + first, one, mask=mask)
        tl.store(out + second, other, mask=mask)
    else:
        slot = tl.load(slots_ptr + token).to(tl.int64)
        if slot >= 0:
            column = tl.arange(0, DIM_TILE)
            row = cache_ptr + slot * DIM
            latent = tl.load(latents_ptr + token * latents_stride + column, mask=column < RANK, other=0.0)
            tl.store(row + column, latent, mask=column < RANK)
            one, other = _turned(k_ptr + token * k_stride, first, second, is_pair, cos, sin)
            tl.store(row + RANK + first, one, mask=is_pair)
            tl.store(row + RANK + second, other, mask=is_pair)
            if slot % BLOCK_SIZE == 0:
                # Programs of this launch write the block's next tokens: those whose slots follow this one's.
                after = tl.arange(0, BLOCK_TILE)
                others = tl.load(slots_ptr + token + after, mask=token + after < num_tokens, other=-1)
                last = tl.max(tl.where((others == slot + after) & (after < BLOCK_SIZE), after, 0), 0)
                for free in range(last + 1, BLOCK_SIZE):
                    tl.store(row + free * DIM + column, tl.zeros_like(latent), mask=column < DIM)


# ---------------------------------------------------------------------------------------------------------
# attention


@triton.jit
def _attend(
    q, q_rope, cache_ptr, table, position, begin, end, first_part, last_part, scale,
    RANK: tl.constexpr, ROTARY: tl.constexpr, RANK_TILE: tl.constexpr, ROTARY_TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """See ``attention._attend``."""
    total_max = tl.full([ROWS], float("-inf"), tl.float32)
    total_units = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, RANK_TILE], tl.float32)
    for part in range(first_part, last_part):
        largest = tl.full([ROWS], float("-inf"), tl.float32)
        units = tl.zeros([ROWS], tl.float32)
        sums = tl.zeros([ROWS, RANK_TILE], tl.float32)
        part_begin = tl.maximum(part * PART, begin // STEP * STEP)
        part_end = tl.minimum(part * PART + PART, end)
        for base in range(part_begin, part_end, STEP):
            token = base + tl.arange(0, STEP)
            known = tl.minimum(tl.maximum(token, begin), end - 1)
            block = tl.load(table + known // BLOCK_SIZE).to(tl.int64)
            place = (block * BLOCK_SIZE + known % BLOCK_SIZE) * (RANK + ROTARY)
            latents = attention._load_rows(cache_ptr, place, RANK, RANK_TILE)
            turned = attention._load_rows(cache_ptr + RANK, place, ROTARY, ROTARY_TILE)
            products = tl.dot(q, tl.trans(latents), input_precision="ieee")
            products = tl.dot(q_rope, tl.trans(turned), products, input_precision="ieee")
            largest, units, sums = attention._step_of_part(
                products, latents, position, position, largest, units, sums, position, token, position, position, 0,
                end, scale, 0.0, 0, True, False, False, False, False,
            )  # fmt: skip
        total_max, total_units, total = attention._merged(total_max, total_units, total, largest, units, sums)
    return total_max, total_units, total


@triton.jit
def latent_attention_kernel(
    q_ptr, q_rope_ptr, cache_ptr, out_ptr, items_ptr, count_ptr, starts_ptr, lengths_ptr, table_ptr,
    partial_ptr, state_ptr, arrivals_ptr, q_stride, out_stride, table_stride, scale,
    HEADS: tl.constexpr, RANK: tl.constexpr, ROTARY: tl.constexpr, RANK_TILE: tl.constexpr, ROTARY_TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, IS_SPLIT: tl.constexpr,
):  # fmt: skip
    """As ``attention_kernel``. ``q_rope_ptr`` [tokens, HEADS * ROTARY] is contiguous, and rotated."""
    for index in range(tl.program_id(0), tl.load(count_ptr), tl.num_programs(0)):
        item = items_ptr + index * 4
        row, tile, own_part = tl.load(item), tl.load(item + 1), tl.load(item + 2)
        start = tl.load(starts_ptr + row)
        num_queries = tl.load(starts_ptr + row + 1) - start
        length = tl.load(lengths_ptr + row)
        rows = tile * ROWS + tl.arange(0, ROWS)
        query = rows // HEADS
        is_real = query < num_queries
        token = (start + tl.minimum(query, num_queries - 1)).to(tl.int64)
        head = rows % HEADS
        q = attention._load_rows(q_ptr, token * q_stride + head * RANK, RANK, RANK_TILE)
        q_rope = attention._load_rows(q_rope_ptr, (token * HEADS + head) * ROTARY, ROTARY, ROTARY_TILE)
        end = tl.minimum(length, length - num_queries + (tile * ROWS + ROWS - 1) // HEADS + 1)
        first_part, last_part = 0, tl.cdiv(end, PART)
        if IS_SPLIT:
            if own_part >= 0:
                first_part, last_part = own_part, own_part + 1
        total_max, units, total = _attend(
            q, q_rope, cache_ptr, table_ptr + row.to(tl.int64) * table_stride, length - num_queries + query,
            0, end, first_part, last_part, scale, RANK, ROTARY, RANK_TILE, ROTARY_TILE, BLOCK_SIZE, PART, ROWS, STEP,
        )  # fmt: skip
        is_done = own_part < 0
        if IS_SPLIT:
            if own_part >= 0:
                is_done, total_max, units, total = attention._complete(
                    partial_ptr, state_ptr, arrivals_ptr, tl.load(item + 3), 0, is_real, total_max, units, total,
                    own_part, tl.cdiv(length, PART), tl.minimum(ROWS, num_queries * HEADS - tile * ROWS),
                    1, RANK, RANK_TILE, ROWS,
                )  # fmt: skip
        if is_done:
            out = out_ptr + token * out_stride + head * RANK
            attention._finish(out, total_max, units, total, total_max, is_real, 1.0, False, False, RANK, RANK_TILE)


def latent_attention(
    q: Tensor,
    q_rope: Tensor,
    latents: Tensor,
    k_rope: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    kv_cache: tuple[Tensor],
    meta: AttentionMetadata,
    shape: AttentionShape,
    layout: KVLayout = "heads",
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The op ``latent_attention``, on a cache [num_blocks, 1, block_size, head_dim]."""
    assert layout == "heads", f"these kernels do not read a cache in the layout {layout!r}"
    (cache,) = kv_cache
    assert cache.is_contiguous() and cache.dtype == q.dtype
    out = result(out, (q.shape[0], shape.out_width), q.dtype, q)
    turned = _turn(q_rope, latents, k_rope, positions, cos_sin, cache, meta, shape)
    work = meta.work if isinstance(meta, PlannedAttention) else plan_attention(meta, shape, cache.dtype)
    for items in (work.split, work.whole):
        if items is None:
            continue
        is_split = items is work.split
        args: dict[str, Any] = {"q_ptr": q, "q_rope_ptr": turned, "cache_ptr": cache, "out_ptr": out}
        args |= {"items_ptr": items, "count_ptr": work.counts[:1] if is_split else work.counts[1:]}
        args |= {"starts_ptr": meta.query_start_loc, "lengths_ptr": meta.seq_lens, "table_ptr": meta.block_table}
        args |= attention._partial_results(q, meta, shape, of_parts=is_split)
        args |= {"q_stride": row_stride(q), "out_stride": row_stride(out)}
        args |= {"table_stride": row_stride(meta.block_table), "scale": shape.scale * attention.LOG2_E}
        tile = attention_tiles.split_tile if is_split else attention_tiles.whole_tile
        rows, warps, stages = tile(shape, cache.dtype)
        launch(
            latent_attention_kernel,
            (min(len(items), attention.PROGRAMS),),
            args,
            Config(warps, stages, (("ROWS", rows), ("STEP", attention_tiles.step_of(shape, cache.dtype)))),
            IS_SPLIT=is_split,
            PART=attention_tiles.PART,
            HEADS=shape.num_heads,
            BLOCK_SIZE=meta.block_size,
            **_sizes(shape),
        )
    return out


def _turn(
    q_rope: Tensor,
    latents: Tensor,
    k_rope: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    cache: Tensor,
    meta: AttentionMetadata,
    shape: AttentionShape,
) -> Tensor:
    """Writes the step's rows of the cache. Returns the rotated columns of the queries, in memory that is used again."""
    tokens, heads, rotary = len(q_rope), shape.num_heads, shape.head_dim - shape.v_dim
    name = f"latent queries {q_rope.dtype}"
    turned = scratch.get(name, tokens * heads * rotary, q_rope.dtype, q_rope.device)
    args: dict[str, Any] = {"q_ptr": q_rope, "latents_ptr": latents, "k_ptr": k_rope, "positions_ptr": positions}
    args |= {"cos_sin_ptr": cos_sin, "slots_ptr": meta.slot_mapping, "cache_ptr": cache, "out_ptr": turned}
    args |= {"num_tokens": tokens, "heads": heads, "q_stride": row_stride(q_rope)}
    args |= {"latents_stride": row_stride(latents), "k_stride": row_stride(k_rope)}
    launch(
        latent_rope_kernel,
        (tokens, triton.cdiv(heads, _HEADS_TILE) + 1),
        args,
        Config(2, 1),
        HEAD=q_rope.shape[1] // heads,
        RANK=shape.v_dim,
        ROTARY=rotary,
        INTERLEAVED=shape.rotates_pairs,
        BLOCK_SIZE=meta.block_size,
        HEADS_TILE=_HEADS_TILE,
        BLOCK_TILE=power_of_two(meta.block_size),
        DIM_TILE=power_of_two(shape.head_dim),
        HALF_TILE=power_of_two(rotary // 2),
    )
    return turned


def _sizes(shape: AttentionShape) -> dict[str, int]:
    """Sizes of a row of the cache, and of their tiles."""
    rotary = shape.head_dim - shape.v_dim
    return {
        "RANK": shape.v_dim,
        "ROTARY": rotary,
        "RANK_TILE": power_of_two(shape.v_dim, 16),
        "ROTARY_TILE": power_of_two(rotary, 16),
    }


def cases() -> Iterator[Case]:
    """Calls whose kernels are checked ahead of time: those of DeepSeek-V3 and of V2-Lite."""
    tokens, requests, blocks, block_size = 512, 16, 256, 32
    starts, lengths, table = (
        meta(*size, dtype=torch.int32) for size in ((requests + 1,), (requests,), (requests, blocks))
    )
    step = AttentionMetadata(starts, lengths, table, meta(tokens, dtype=torch.int64), block_size)
    positions, angles = meta(tokens, dtype=torch.int32), meta(4096, 64, dtype=torch.float32)
    large = frozenset(name for name, each in TARGETS.items() if each.max_shared >= attention_tiles.FLOAT32_SHARED)
    for heads, dtype in ((128, torch.bfloat16), (16, torch.bfloat16), (16, torch.float16), (16, torch.float32)):
        shape = AttentionShape(heads, 1, 576, 0.07, v_head_dim=512, kind="latent", rotates_pairs=True)
        q, q_rope = meta(tokens, heads * 512, dtype=dtype), meta(tokens, heads * 192, dtype=dtype)
        latents, k_rope = meta(tokens, 512, dtype=dtype), meta(tokens, 64, dtype=dtype)
        cache = meta(blocks, 1, block_size, 576, dtype=dtype)
        name = f"{heads} heads {str(dtype).removeprefix('torch.')}"
        call = partial(latent_attention, q, q_rope, latents, k_rope, positions, angles, (cache,), step, shape)
        targets = large if dtype == torch.float32 else None
        yield Case(name, call, min_load=2, family=name, targets=targets)
        if dtype == torch.bfloat16:
            for size, (n, k, head_dim) in {"keys": (512, 128, 192), "values": (128, 512, 512)}.items():
                weights = tuple(meta(n, k) for _ in range(heads))
                for m in (8, 64, 512):
                    x = meta(m, heads * head_dim)
                    call = partial(heads_linear, x, weights, head_dim)
                    yield Case(f"{size} {heads} heads m={m}", call, True, family="bf16")
