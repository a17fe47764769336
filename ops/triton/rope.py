"""Rotary embedding, alone and together with what surrounds it: norms of heads before, writing K and V after."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.triton.catalog import Case, meta
from ops.triton.configs import Config, power_of_two
from ops.triton.launch import launch, result, row_stride
from ops.triton.norm import sum_of_squares

_TILE = 1024
"""Numbers of a program: whole heads."""


@triton.jit
def _angles(cos_sin_ptr, position, column, ROTARY: tl.constexpr, DTYPE: tl.constexpr):
    """Cosines and sines of a position [1, columns], rounded as the models were trained."""
    mask = column < ROTARY // 2
    row = cos_sin_ptr + position.to(tl.int64) * ROTARY
    cos = tl.load(row + column, mask=mask, other=0.0).to(DTYPE).to(tl.float32)
    sin = tl.load(row + ROTARY // 2 + column, mask=mask, other=0.0).to(DTYPE).to(tl.float32)
    return cos[None, :], sin[None, :]


@triton.jit
def _heads(
    base, places, mask, factor, weight_ptr, columns, column_mask, offset,
    HAS_NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, ROUND_FIRST: tl.constexpr,
):  # fmt: skip
    """Columns of heads in float32, normalised if asked for and rounded to their type."""
    dtype = base.dtype.element_ty
    x = tl.load(base + places, mask=mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        x = x * factor
        if HAS_WEIGHT:
            weight = tl.load(weight_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
            if ROUND_FIRST:
                x = x.to(dtype).to(tl.float32) * weight
            else:
                x = x * (offset + weight)
        x = x.to(dtype).to(tl.float32)
    return x


@triton.jit
def _turn(
    base, out, out_head_stride, head, heads, cos_sin_ptr, position, weight_ptr, eps, offset,
    DIM: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, ROUND_FIRST: tl.constexpr, HEADS_TILE: tl.constexpr, DIM_TILE: tl.constexpr,
    HALF_TILE: tl.constexpr, REST_TILE: tl.constexpr,
):  # fmt: skip
    """Normalises and rotates heads, rounding to the type of ``base`` wherever torch would."""
    dtype = base.dtype.element_ty
    mask = (head < heads)[:, None]
    start = (head * DIM)[:, None]
    out_start = (head * out_head_stride)[:, None]
    factor = 0.0
    if HAS_NORM:
        column = tl.arange(0, DIM_TILE)
        x = tl.load(base + start + column[None, :], mask=mask & (column < DIM)[None, :], other=0.0).to(tl.float32)
        factor = tl.rsqrt(sum_of_squares(x, HEADS_TILE, DIM_TILE) / DIM + eps)[:, None]
    pair = tl.arange(0, HALF_TILE)
    is_pair = pair < ROTARY // 2
    first = 2 * pair if INTERLEAVED else pair
    second = 2 * pair + 1 if INTERLEAVED else pair + ROTARY // 2
    both = mask & is_pair[None, :]
    a = _heads(
        base, start + first[None, :], both, factor, weight_ptr, first, is_pair, offset,
        HAS_NORM, HAS_WEIGHT, ROUND_FIRST,
    )  # fmt: skip
    b = _heads(
        base, start + second[None, :], both, factor, weight_ptr, second, is_pair, offset,
        HAS_NORM, HAS_WEIGHT, ROUND_FIRST,
    )  # fmt: skip
    cos, sin = _angles(cos_sin_ptr, position, pair, ROTARY, dtype)
    turned = (a * cos).to(dtype).to(tl.float32) - (b * sin).to(dtype).to(tl.float32)
    other = (b * cos).to(dtype).to(tl.float32) + (a * sin).to(dtype).to(tl.float32)
    tl.store(out + out_start + first[None, :], turned.to(dtype), mask=both)
    tl.store(out + out_start + second[None, :], other.to(dtype), mask=both)
    if ROTARY < DIM:
        column = ROTARY + tl.arange(0, REST_TILE)
        rest = column < DIM
        x = _heads(
            base, start + column[None, :], mask & rest[None, :], factor, weight_ptr, column, rest, offset,
            HAS_NORM, HAS_WEIGHT, ROUND_FIRST,
        )  # fmt: skip
        tl.store(out + out_start + column[None, :], x.to(dtype), mask=mask & rest[None, :])


@triton.jit
def rotary_kernel(
    x_ptr, positions_ptr, cos_sin_ptr, out_ptr, heads, x_stride, out_stride,
    DIM: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEADS_TILE: tl.constexpr, DIM_TILE: tl.constexpr, HALF_TILE: tl.constexpr, REST_TILE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS_TILE + tl.arange(0, HEADS_TILE)
    position = tl.load(positions_ptr + token)
    _turn(
        x_ptr + token * x_stride, out_ptr + token * out_stride, DIM, head, heads, cos_sin_ptr, position, None, 0.0, 0.0,
        DIM, ROTARY, INTERLEAVED, False, False, False, HEADS_TILE, DIM_TILE, HALF_TILE, REST_TILE,
    )  # fmt: skip


def rotary_embedding(
    x: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    head_dim: int,
    interleaved: bool = False,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The op ``rotary_embedding``."""
    out = result(out, tuple(x.shape), x.dtype, x)
    heads = x.shape[1] // head_dim
    tile, config = _tile(heads, head_dim, cos_sin.shape[1])
    args = {
        "x_ptr": x,
        "positions_ptr": positions,
        "cos_sin_ptr": cos_sin,
        "out_ptr": out,
        "heads": heads,
        "x_stride": row_stride(x),
        "out_stride": row_stride(out),
    }
    grid = (x.shape[0], triton.cdiv(heads, tile["HEADS_TILE"]))
    launch(rotary_kernel, grid, args, config, DIM=head_dim, ROTARY=cos_sin.shape[1], INTERLEAVED=interleaved, **tile)
    return out


def _tile(heads: int, head_dim: int, rotary_dim: int) -> tuple[dict[str, int], Config]:
    """The sizes of a program's tiles, and its configuration."""
    dim = power_of_two(head_dim)
    heads_tile = min(max(1, _TILE // dim), power_of_two(heads))
    tile = {
        "HEADS_TILE": heads_tile,
        "DIM_TILE": dim,
        "HALF_TILE": power_of_two(rotary_dim // 2),
        "REST_TILE": power_of_two(max(1, head_dim - rotary_dim)),
    }
    return tile, Config(min(max(heads_tile * dim // 512, 1), 4), 1)


@dataclass(frozen=True)
class HeadNorm:
    """The RMS norm of each head before it is rotated; see the op ``rms_norm``."""

    weight: Tensor | None
    eps: float
    offset: float = 0.0
    round_first: bool = True


@triton.jit
def _write_kv(
    k_base, v_ptr, k_cache_ptr, v_cache_ptr, slots_ptr, token, num_tokens, v_stride, cos_sin_ptr, position,
    weight_ptr, eps, offset, HEADS: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr, ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK_SIZE: tl.constexpr, HAS_NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    ROUND_FIRST: tl.constexpr, KV_TILE: tl.constexpr, BLOCK_TILE: tl.constexpr, DIM_TILE: tl.constexpr,
    V_TILE: tl.constexpr, HALF_TILE: tl.constexpr, REST_TILE: tl.constexpr,
):  # fmt: skip
    """Writes a token's K and V to its slot. The first token of a block zeroes what this step leaves of the block."""
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot >= 0:
        block = slot // BLOCK_SIZE
        place = slot % BLOCK_SIZE
        head = tl.arange(0, KV_TILE)
        column = tl.arange(0, V_TILE)
        k_block = k_cache_ptr + block * (HEADS * BLOCK_SIZE * DIM)
        v_block = v_cache_ptr + block * (HEADS * BLOCK_SIZE * V_DIM)
        _turn(
            k_base, k_block + place * DIM, BLOCK_SIZE * DIM, head, HEADS, cos_sin_ptr, position, weight_ptr, eps,
            offset, DIM, ROTARY, INTERLEAVED, HAS_NORM, HAS_WEIGHT, ROUND_FIRST, KV_TILE, DIM_TILE, HALF_TILE,
            REST_TILE,
        )  # fmt: skip
        mask = (head < HEADS)[:, None] & (column < V_DIM)[None, :]
        v = tl.load(v_ptr + token * v_stride + (head * V_DIM)[:, None] + column[None, :], mask=mask, other=0.0)
        v_places = (head * (BLOCK_SIZE * V_DIM))[:, None] + column[None, :]
        tl.store(v_block + place * V_DIM + v_places, v, mask=mask)
        if place == 0:
            # Programs of this launch write the block's next tokens: those whose slots follow this one's.
            after = tl.arange(0, BLOCK_TILE)
            others = tl.load(slots_ptr + token + after, mask=token + after < num_tokens, other=-1)
            last = tl.max(tl.where((others == slot + after) & (after < BLOCK_SIZE), after, 0), 0)
            dim = tl.arange(0, DIM_TILE)
            k_places = (head * (BLOCK_SIZE * DIM))[:, None] + dim[None, :]
            k_mask = (head < HEADS)[:, None] & (dim < DIM)[None, :]
            nothing = tl.zeros([KV_TILE, DIM_TILE], k_cache_ptr.dtype.element_ty)
            for free in range(last + 1, BLOCK_SIZE):
                tl.store(k_block + free * DIM + k_places, nothing, mask=k_mask)
                tl.store(v_block + free * V_DIM + v_places, tl.zeros_like(v), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def rope_kv_kernel(
    q_ptr, k_ptr, v_ptr, positions_ptr, q_cos_sin_ptr, k_cos_sin_ptr, q_weight_ptr, k_weight_ptr, slots_ptr,
    k_cache_ptr, v_cache_ptr, out_ptr, num_tokens, q_heads, q_stride, k_stride, v_stride, out_stride,
    q_eps, q_offset, k_eps, k_offset,
    HEADS: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, Q_NORM: tl.constexpr, Q_WEIGHT: tl.constexpr, Q_ROUND: tl.constexpr,
    K_NORM: tl.constexpr, K_WEIGHT: tl.constexpr, K_ROUND: tl.constexpr,
    HEADS_TILE: tl.constexpr, KV_TILE: tl.constexpr, BLOCK_TILE: tl.constexpr, DIM_TILE: tl.constexpr,
    V_TILE: tl.constexpr, HALF_TILE: tl.constexpr, REST_TILE: tl.constexpr,
):  # fmt: skip
    """Programs along the second axis: tiles of query heads, and a last one for K and V."""
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + token)
    if tl.program_id(1) * HEADS_TILE < q_heads:
        head = tl.program_id(1) * HEADS_TILE + tl.arange(0, HEADS_TILE)
        _turn(
            q_ptr + token * q_stride, out_ptr + token * out_stride, DIM, head, q_heads, q_cos_sin_ptr, position,
            q_weight_ptr, q_eps, q_offset,
            DIM, ROTARY, INTERLEAVED, Q_NORM, Q_WEIGHT, Q_ROUND, HEADS_TILE, DIM_TILE, HALF_TILE,
            REST_TILE,
        )  # fmt: skip
    else:
        _write_kv(
            k_ptr + token * k_stride, v_ptr, k_cache_ptr, v_cache_ptr, slots_ptr, token, num_tokens, v_stride,
            k_cos_sin_ptr, position, k_weight_ptr, k_eps, k_offset, HEADS, DIM, V_DIM, ROTARY, INTERLEAVED, BLOCK_SIZE,
            K_NORM, K_WEIGHT, K_ROUND, KV_TILE, BLOCK_TILE, DIM_TILE, V_TILE, HALF_TILE, REST_TILE,
        )  # fmt: skip


def rope_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    q_cos_sin: Tensor,
    k_cos_sin: Tensor,
    slot_mapping: Tensor,
    kv_cache: tuple[Tensor, Tensor],
    *,
    q_norm: HeadNorm | None = None,
    k_norm: HeadNorm | None = None,
    interleaved: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Normalises and rotates the heads of q and k, and writes k and v to the cache: four ops in one launch.

    Args:
        q: [num_tokens, num_heads * head_dim].
        k: [num_tokens, num_kv_heads * head_dim].
        v: [num_tokens, num_kv_heads * v_head_dim].
        positions: int32 or int64 [num_tokens].
        q_cos_sin: As of ``rotary_embedding``, for q.
        k_cos_sin: Likewise for k.
        slot_mapping: int64 [num_tokens]; -1: the token is padding, nothing is written.
        kv_cache: K and V [num_blocks, num_kv_heads, block_size, dim], written in place.
        q_norm: Norm of q's heads before the rotation.
        k_norm: Norm of k's heads before the rotation.
        interleaved: As of ``rotary_embedding``.
        out: Like ``q``.

    Returns:
        The queries to attend with.
    """
    out = result(out, tuple(q.shape), q.dtype, q)
    keys, values = kv_cache
    assert keys.is_contiguous() and values.is_contiguous() and keys.dtype == k.dtype
    head_dim, rotary_dim = keys.shape[3], q_cos_sin.shape[1]
    heads = q.shape[1] // head_dim
    tile, config = _tile(heads, head_dim, rotary_dim)
    args: dict[str, Any] = {"q_ptr": q, "k_ptr": k, "v_ptr": v, "k_cache_ptr": keys, "v_cache_ptr": values}
    args |= {"positions_ptr": positions, "q_cos_sin_ptr": q_cos_sin, "k_cos_sin_ptr": k_cos_sin}
    args |= {"slots_ptr": slot_mapping, "out_ptr": out, "num_tokens": len(q), "q_heads": heads}
    args |= {"q_stride": row_stride(q), "k_stride": row_stride(k), "v_stride": row_stride(v)}
    args["out_stride"] = row_stride(out)
    constants = _cache_constants(keys, values) | {"ROTARY": rotary_dim, "INTERLEAVED": interleaved}
    for name, norm in (("q", q_norm), ("k", k_norm)):
        _add_norm(name, norm, args, constants)
    grid = (len(q), triton.cdiv(heads, tile["HEADS_TILE"]) + 1)
    launch(rope_kv_kernel, grid, args, config, **constants, **tile)
    return out


def _cache_constants(keys: Tensor, values: Tensor) -> dict[str, Any]:
    """Constants of a cache."""
    _, heads, block_size, head_dim = keys.shape
    v_dim = values.shape[3]
    sizes = {"HEADS": heads, "DIM": head_dim, "V_DIM": v_dim, "BLOCK_SIZE": block_size}
    tiles = {"KV_TILE": heads, "BLOCK_TILE": block_size, "V_TILE": v_dim}
    return sizes | {name: power_of_two(size) for name, size in tiles.items()}


def _add_norm(name: str, norm: HeadNorm | None, args: dict[str, Any], constants: dict[str, Any]) -> None:
    """Adds a norm to the kernel's arguments."""
    norm_or_none = norm or HeadNorm(None, 0.0)
    constants[f"{name.upper()}_NORM"] = norm is not None
    constants[f"{name.upper()}_WEIGHT"] = norm_or_none.weight is not None
    constants[f"{name.upper()}_ROUND"] = norm_or_none.round_first
    args[f"{name}_weight_ptr"] = norm_or_none.weight
    args[f"{name}_eps"] = norm_or_none.eps
    args[f"{name}_offset"] = norm_or_none.offset


def cases() -> Iterator[Case]:
    """Calls for the catalogue."""
    tokens, blocks, size = 512, 256, 32
    positions, slots = meta(tokens, dtype=torch.int32), meta(tokens, dtype=torch.int64)
    shapes = ((32, 8, 128, 128), (9, 3, 64, 64), (32, 32, 80, 32), (32, 8, 96, 96), (8, 4, 256, 256), (32, 2, 128, 64))
    for heads, kv_heads, dim, rotary in shapes:
        q, k, table = meta(tokens, heads * dim), meta(tokens, kv_heads * dim), meta(4096, rotary, dtype=torch.float32)
        cache = meta(blocks, kv_heads, size, dim)
        norm = HeadNorm(meta(dim), 1e-6)
        name = f"{heads}/{kv_heads} heads of {dim}"
        call = partial(rope_kv, q, k, k, positions, table, table, slots, (cache, cache))
        # A tile of few heads has fewer numbers than a warp could load at once.
        yield Case(name, call, min_load=2)
        yield Case(f"{name} norm", partial(call, q_norm=norm, k_norm=norm), min_load=2)
        yield Case(name, partial(rotary_embedding, q, positions, table, dim), min_load=2)
    q, table = meta(tokens, 32 * 128), meta(4096, 128, dtype=torch.float32)
    yield Case("interleaved", partial(rotary_embedding, q, positions, table, 128, True), min_load=2)
