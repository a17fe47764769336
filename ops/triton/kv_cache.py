"""Writes K and V to a paged cache [num_blocks, num_kv_heads, block_size, head_dim].

A head's part of a block is one run of memory, so attention reads it with few, wide loads.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.metadata import KV_CODES, AttentionMetadata
from ops.triton.catalog import Case, meta
from ops.triton.configs import Config, power_of_two
from ops.triton.launch import launch, row_stride

TOKENS_TILE = 4
"""Tokens of a program."""


@triton.jit
def _store_tokens(
    x_ptr, x_stride, cache_ptr, token, slot, is_written, num_free,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, LARGEST: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Stores tokens [tokens] in their slots, and zeros in the ``num_free`` slots after each."""
    column = tl.arange(0, TILE)
    mask = is_written[:, None] & (column < HEADS * DIM)[None, :]
    x = tl.load(x_ptr + (token.to(tl.int64) * x_stride)[:, None] + column[None, :], mask=mask, other=0.0)
    place = (slot // BLOCK_SIZE * HEADS * BLOCK_SIZE + slot % BLOCK_SIZE) * DIM
    place = cache_ptr + place[:, None] + (column // DIM * BLOCK_SIZE * DIM + column % DIM)[None, :]
    dtype = cache_ptr.dtype.element_ty
    if LARGEST > 0:  # of a cache in fp8
        wide = x.to(tl.float32)
        wide = tl.where(wide > LARGEST, LARGEST, tl.where(wide < -LARGEST, -LARGEST, wide))
        tl.store(place, wide.to(dtype), mask=mask)
    else:
        tl.store(place, x, mask=mask)
    nothing = tl.zeros(x.shape, tl.float32).to(dtype)
    for free in range(1, tl.max(num_free, 0) + 1):
        tl.store(place + free * DIM, nothing, mask=mask & (free <= num_free)[:, None])


@triton.jit(do_not_specialize=["num_tokens"])
def write_kv_kernel(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, slots_ptr, num_tokens, k_stride, v_stride,
    HEADS: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, LARGEST: tl.constexpr,
    TOKENS_TILE: tl.constexpr, K_TILE: tl.constexpr, V_TILE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS_TILE + tl.arange(0, TOKENS_TILE)
    slot = tl.load(slots_ptr + token, mask=token < num_tokens, other=-1)
    is_written = slot >= 0
    place = slot % BLOCK_SIZE
    # What follows the step's last token in a block is free if the step began the block.
    after = tl.load(slots_ptr + token + 1, mask=token + 1 < num_tokens, other=-1)
    first = tl.load(slots_ptr + token - place, mask=is_written & (place <= token), other=-1)
    is_last = (after != slot + 1) | (place == BLOCK_SIZE - 1)
    num_free = tl.where(is_written & is_last & (first == slot - place), BLOCK_SIZE - 1 - place, 0)
    _store_tokens(
        k_ptr, k_stride, k_cache_ptr, token, slot, is_written, num_free, HEADS, K_DIM, BLOCK_SIZE, LARGEST, K_TILE
    )  # fmt: skip
    _store_tokens(
        v_ptr, v_stride, v_cache_ptr, token, slot, is_written, num_free, HEADS, V_DIM, BLOCK_SIZE, LARGEST, V_TILE
    )  # fmt: skip


def write_kv(k: Tensor, v: Tensor, kv_cache: tuple[Tensor, Tensor], meta: AttentionMetadata) -> None:
    """Writes K and V of a step's tokens to the slots in ``slot_mapping``; those of slot -1 are left out.

    The first token of a block zeroes what the step's tokens leave of it, so that nothing of an earlier owner remains.

    Args:
        k: [num_tokens, num_kv_heads * head_dim].
        v: [num_tokens, num_kv_heads * v_head_dim].
        kv_cache: K and V, written in place.
        meta: The step.
    """
    keys, values = kv_cache
    assert keys.is_contiguous() and values.is_contiguous()
    num_tokens = meta.slot_mapping.shape[0]
    heads, block_size = keys.shape[1:3]
    k_dim, v_dim = keys.shape[3], values.shape[3]
    args = {
        "k_ptr": k,
        "v_ptr": v,
        "k_cache_ptr": keys,
        "v_cache_ptr": values,
        "slots_ptr": meta.slot_mapping,
        "num_tokens": num_tokens,
        "k_stride": row_stride(k),
        "v_stride": row_stride(v),
    }
    tile = {"K_TILE": power_of_two(heads * k_dim), "V_TILE": power_of_two(heads * v_dim)}
    warps = min(max(TOKENS_TILE * max(tile.values()) // 1024, 1), 8)
    launch(
        write_kv_kernel,
        (triton.cdiv(num_tokens, TOKENS_TILE),),
        args,
        Config(warps, 1, (("TOKENS_TILE", TOKENS_TILE),)),
        HEADS=heads,
        K_DIM=k_dim,
        V_DIM=v_dim,
        BLOCK_SIZE=block_size,
        LARGEST=KV_CODES.get(keys.dtype, 0.0),
        **tile,
    )


def cases() -> Iterator[Case]:
    """Calls whose kernels are checked ahead of time."""
    for dtype, heads, dim in ((torch.bfloat16, 8, 128), (torch.bfloat16, 3, 64), (torch.float32, 4, 80)):
        tokens, blocks, size = 512, 256, 32
        cache = meta(blocks, heads, size, dim, dtype=dtype)
        x = meta(tokens, heads * dim, dtype=dtype)
        lengths = meta(17, dtype=torch.int32)
        step = AttentionMetadata(lengths, lengths[1:], lengths.view(1, 17), meta(tokens, dtype=torch.int64), size)
        name = f"{heads}x{dim} {str(dtype).removeprefix('torch.')}"
        yield Case(name, partial(write_kv, x, x, (cache, cache), step))
        if dtype == torch.bfloat16:
            small = meta(blocks, heads, size, dim, dtype=torch.float8_e5m2)
            yield Case(f"{name} fp8", partial(write_kv, x, x, (small, small), step))
