"""Writes K and V to a paged cache [num_blocks, num_kv_heads, block_size, head_dim].

A head's part of a block is one run of memory, so attention reads it with few, wide loads. In int8, the codes of its
tokens are followed by their scales in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.metadata import KV_CODES, SCALE_BYTES, AttentionMetadata
from ops.triton.catalog import Case, meta
from ops.triton.configs import Config, power_of_two
from ops.triton.launch import launch, row_stride

TOKENS_TILE = 4
"""Tokens of a program."""
_ROUND = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding it rounds to integers, ties to even."""


@triton.jit
def _slots(slots_ptr, num_tokens, TOKENS_TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """A program's tokens and their slots, whether they are written, and how many slots after each are free."""
    token = tl.program_id(0) * TOKENS_TILE + tl.arange(0, TOKENS_TILE)
    slot = tl.load(slots_ptr + token, mask=token < num_tokens, other=-1)
    is_written = slot >= 0
    place = slot % BLOCK_SIZE
    # What follows the step's last token in a block is free if the step began the block.
    after = tl.load(slots_ptr + token + 1, mask=token + 1 < num_tokens, other=-1)
    first = tl.load(slots_ptr + token - place, mask=is_written & (place <= token), other=-1)
    is_last = (after != slot + 1) | (place == BLOCK_SIZE - 1)
    num_free = tl.where(is_written & is_last & (first == slot - place), BLOCK_SIZE - 1 - place, 0)
    return token, slot, is_written, num_free


@triton.jit
def _store_tokens(
    x_ptr, x_stride, cache_ptr, token, slot, is_written, num_free, divisor, DIVIDES: tl.constexpr,
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
        if DIVIDES:
            wide = tl.div_rn(wide, tl.zeros_like(wide) + divisor)
        wide = tl.where(wide > LARGEST, LARGEST, tl.where(wide < -LARGEST, -LARGEST, wide))
        tl.store(place, wide.to(dtype), mask=mask)
    else:
        tl.store(place, x, mask=mask)
    nothing = tl.zeros(x.shape, tl.float32).to(dtype)
    for free in range(1, tl.max(num_free, 0) + 1):
        tl.store(place + free * DIM, nothing, mask=mask & (free <= num_free)[:, None])


@triton.jit(do_not_specialize=["num_tokens"])
def write_kv_kernel(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, slots_ptr, num_tokens, k_stride, v_stride, k_divisor, v_divisor,
    DIVIDES: tl.constexpr,
    HEADS: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, LARGEST: tl.constexpr,
    TOKENS_TILE: tl.constexpr, K_TILE: tl.constexpr, V_TILE: tl.constexpr,
):  # fmt: skip
    token, slot, is_written, num_free = _slots(slots_ptr, num_tokens, TOKENS_TILE, BLOCK_SIZE)
    _store_tokens(
        k_ptr, k_stride, k_cache_ptr, token, slot, is_written, num_free, k_divisor, DIVIDES, HEADS, K_DIM, BLOCK_SIZE,
        LARGEST, K_TILE,
    )  # fmt: skip
    _store_tokens(
        v_ptr, v_stride, v_cache_ptr, token, slot, is_written, num_free, v_divisor, DIVIDES, HEADS, V_DIM, BLOCK_SIZE,
        LARGEST, V_TILE,
    )  # fmt: skip


@triton.jit
def _store_codes(
    x_ptr, x_stride, cache_ptr, scales_ptr, token, slot, is_written, num_free, divisor,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Stores one head of tokens in 8 bits, as ``ops/reference/kv_codes.py`` does, bit for bit."""
    head = tl.program_id(1)
    column = tl.arange(0, TILE)
    mask = is_written[:, None] & (column < DIM)[None, :]
    place = (token.to(tl.int64) * x_stride + head * DIM)[:, None] + column[None, :]
    x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    x = tl.div_rn(x, tl.zeros_like(x) + divisor)
    size = tl.abs(x)
    is_finite = tl.min((size < float("inf")).to(tl.int32), 1) == 1
    scale = tl.div_rn(tl.max(size, 1), 127.0).to(tl.bfloat16)
    wide = scale.to(tl.float32)
    is_coded = is_finite & (wide > 0)
    codes = tl.div_rn(x, tl.zeros_like(x) + tl.where(is_coded, wide, 1.0)[:, None])
    codes = tl.minimum(tl.maximum((codes + _ROUND) - _ROUND, -127.0), 127.0)
    codes = tl.where(is_coded[:, None], codes, 0.0).to(tl.int32).to(tl.int8)
    scale = tl.where(is_finite, wide, float("nan")).to(tl.bfloat16)
    part = (slot // BLOCK_SIZE * HEADS + head) * BLOCK_SIZE
    inner = slot % BLOCK_SIZE
    codes_at = cache_ptr + (part * (DIM + 2) + inner * DIM)[:, None] + column[None, :]
    scales_at = scales_ptr + part * (DIM // 2 + 1) + BLOCK_SIZE * DIM // 2 + inner
    tl.store(codes_at, codes, mask=mask)
    tl.store(scales_at, scale, mask=is_written)
    for free in range(1, tl.max(num_free, 0) + 1):
        is_free = free <= num_free
        tl.store(codes_at + free * DIM, tl.zeros_like(codes), mask=mask & is_free[:, None])
        tl.store(scales_at + free, tl.zeros_like(scale), mask=is_written & is_free)


@triton.jit(do_not_specialize=["num_tokens"])
def write_codes_kernel(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, k_scales_ptr, v_scales_ptr, slots_ptr, num_tokens, k_stride, v_stride,
    k_divisor, v_divisor,
    HEADS: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TOKENS_TILE: tl.constexpr, K_TILE: tl.constexpr, V_TILE: tl.constexpr,
):  # fmt: skip
    """As ``write_kv_kernel``, in int8; programs along the second axis: heads."""
    token, slot, is_written, num_free = _slots(slots_ptr, num_tokens, TOKENS_TILE, BLOCK_SIZE)
    _store_codes(
        k_ptr, k_stride, k_cache_ptr, k_scales_ptr, token, slot, is_written, num_free, k_divisor, HEADS, K_DIM,
        BLOCK_SIZE, K_TILE,
    )  # fmt: skip
    _store_codes(
        v_ptr, v_stride, v_cache_ptr, v_scales_ptr, token, slot, is_written, num_free, v_divisor, HEADS, V_DIM,
        BLOCK_SIZE, V_TILE,
    )  # fmt: skip


def scales_of(cache: Tensor) -> Tensor | None:
    """A cache in int8 as bfloat16, as kernels read its scales; None of one that has none."""
    return cache.view(torch.bfloat16) if cache.dtype == torch.int8 else None


def write_kv(
    k: Tensor,
    v: Tensor,
    kv_cache: tuple[Tensor, Tensor],
    meta: AttentionMetadata,
    divisors: tuple[float, float] = (1.0, 1.0),
) -> None:
    """Writes K and V of a step's tokens to the slots in ``slot_mapping``; those of slot -1 are left out.

    The first token of a block zeroes what the step's tokens leave of it, so that nothing of an earlier owner remains.

    Args:
        k: [num_tokens, num_kv_heads * head_dim].
        v: [num_tokens, num_kv_heads * v_head_dim].
        kv_cache: K and V, written in place.
        meta: The step.
        divisors: By which K and V are divided before they become codes.
    """
    keys, values = kv_cache
    assert keys.is_contiguous() and values.is_contiguous()
    num_tokens = meta.slot_mapping.shape[0]
    heads, block_size = keys.shape[1:3]
    is_coded = keys.dtype == torch.int8
    assert divisors == (1.0, 1.0) or keys.dtype in KV_CODES
    k_dim, v_dim = (cache.shape[3] - (SCALE_BYTES if is_coded else 0) for cache in kv_cache)
    args = {
        "k_ptr": k,
        "v_ptr": v,
        "k_cache_ptr": keys,
        "v_cache_ptr": values,
        "slots_ptr": meta.slot_mapping,
        "num_tokens": num_tokens,
        "k_stride": row_stride(k),
        "v_stride": row_stride(v),
        "k_divisor": divisors[0],
        "v_divisor": divisors[1],
    }
    width = 1 if is_coded else heads
    tile = {"K_TILE": power_of_two(width * k_dim), "V_TILE": power_of_two(width * v_dim)}
    warps = min(max(TOKENS_TILE * max(tile.values()) // 1024, 1), 8)
    config = Config(warps, 1, (("TOKENS_TILE", TOKENS_TILE),))
    sizes = {"HEADS": heads, "K_DIM": k_dim, "V_DIM": v_dim, "BLOCK_SIZE": block_size}
    programs = triton.cdiv(num_tokens, TOKENS_TILE)
    if is_coded:
        args |= {"k_scales_ptr": scales_of(keys), "v_scales_ptr": scales_of(values)}
        launch(write_codes_kernel, (programs, heads), args, config, **sizes, **tile)
        return
    options = {"DIVIDES": divisors != (1.0, 1.0), "LARGEST": KV_CODES.get(keys.dtype, 0.0)}
    launch(write_kv_kernel, (programs,), args, config, **sizes, **options, **tile)


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
            yield Case(f"{name} fp8 scaled", partial(write_kv, x, x, (small, small), step, (0.5, 2.0)))
            codes = meta(blocks, heads, size, dim + SCALE_BYTES, dtype=torch.int8)
            yield Case(f"{name} int8", partial(write_kv, x, x, (codes, codes), step), is_exact=True)
