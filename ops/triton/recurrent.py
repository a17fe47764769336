"""Recurrences in the place of attention: the gated delta rule and Mamba-2, token by token.

The first launch computes the convolution, a second one the states, of which a program keeps a tile in registers. Each
program goes through the step's requests in order, since one may begin with a block that an earlier one fills. So it
reads only what it has written itself, and no number depends on how a request is divided into steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.metadata import AttentionMetadata, AttentionShape
from ops.triton import catalog
from ops.triton.catalog import Case
from ops.triton.configs import Config, power_of_two
from ops.triton.launch import launch, result, row_stride, scratch, target
from ops.triton.pointwise import activate

MAX_LENGTH = 4
"""Of a convolution."""
_CONV = Config(4, 1, (("COLUMNS_TILE", 256),))


@triton.jit
def _reached(column, width, BEFORE: tl.constexpr, LENGTH: tl.constexpr):
    """The columns, if the convolution looks so many tokens back."""
    return column < (width if BEFORE < LENGTH else 0)


@triton.jit
def _weights(weight_ptr, column, width, BEFORE: tl.constexpr, LENGTH: tl.constexpr):
    """The convolution's weights of the token so many before, or 0."""
    place = weight_ptr + (LENGTH - 1 - BEFORE) * width + column
    return tl.load(place, mask=_reached(column, width, BEFORE, LENGTH), other=0.0).to(tl.float32)


@triton.jit
def _block(table, position, BLOCK_SIZE: tl.constexpr):
    return tl.load(table + position // BLOCK_SIZE).to(tl.int64)


@triton.jit
def _has_past(begin, end, first):
    """Whether a request has tokens in this step, and earlier ones."""
    return tl.where(begin < end, first, 0) > 0


@triton.jit(do_not_specialize=["num_reqs", "table_stride"])
def conv_kernel(
    x_ptr, weight_ptr, bias_ptr, cache_ptr, starts_ptr, lengths_ptr, table_ptr, out_ptr,
    num_reqs, width, state_size, x_stride, table_stride,
    LENGTH: tl.constexpr, BLOCK_SIZE: tl.constexpr, COLUMNS_TILE: tl.constexpr,
):  # fmt: skip
    """A tile of columns of the convolution of all tokens, after SiLU, and its last inputs into the cache."""
    column = tl.program_id(0) * COLUMNS_TILE + tl.arange(0, COLUMNS_TILE)
    mask = column < width
    own = _weights(weight_ptr, column, width, 0, LENGTH)
    weight_1 = _weights(weight_ptr, column, width, 1, LENGTH)
    weight_2 = _weights(weight_ptr, column, width, 2, LENGTH)
    weight_3 = _weights(weight_ptr, column, width, 3, LENGTH)
    bias = tl.zeros([COLUMNS_TILE], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, mask=mask, other=0.0).to(tl.float32)
    for row in range(num_reqs):
        begin, end = tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)
        first = tl.load(lengths_ptr + row) - (end - begin)
        table = table_ptr + tl.full([], row, tl.int64) * table_stride
        past = cache_ptr + _block(table, tl.maximum(first - 1, 0), BLOCK_SIZE) * state_size + column
        known = tl.where(_has_past(begin, end, first), width, 0)
        before_1 = tl.load(past + (LENGTH - 2) * width, mask=_reached(column, known, 1, LENGTH), other=0.0)
        before_2 = tl.load(past + (LENGTH - 3) * width, mask=_reached(column, known, 2, LENGTH), other=0.0)
        before_3 = tl.load(past + (LENGTH - 4) * width, mask=_reached(column, known, 3, LENGTH), other=0.0)
        for token in range(begin, end):
            x = tl.load(x_ptr + tl.full([], token, tl.int64) * x_stride + column, mask=mask, other=0.0).to(tl.float32)
            total = before_3 * weight_3 + before_2 * weight_2 + before_1 * weight_1 + x * own
            value = activate(total + bias, "silu").to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + tl.full([], token, tl.int64) * width + column, value, mask=mask)
            before_3 = before_2
            before_2 = before_1
            before_1 = x
            position = first + token - begin
            if (token == end - 1) | ((position + 1) % BLOCK_SIZE == 0):
                kept = cache_ptr + _block(table, position, BLOCK_SIZE) * state_size + column
                tl.store(kept + (LENGTH - 2) * width, before_1, mask=_reached(column, width, 1, LENGTH))
                tl.store(kept + (LENGTH - 3) * width, before_2, mask=_reached(column, width, 2, LENGTH))
                tl.store(kept + (LENGTH - 4) * width, before_3, mask=_reached(column, width, 3, LENGTH))


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), exact to the last digits also where it is small (Kahan)."""
    e = tl.exp(tl.minimum(x, 20.0))
    u = 1.0 + e
    return tl.where(x > 20.0, x, tl.where(u == 1.0, e, tl.log(u) * e / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _unit(x):
    """A vector of length 1."""
    return x * tl.rsqrt(tl.sum(x * x, 0) + 1e-6)


@triton.jit(do_not_specialize=["num_reqs", "table_stride"])
def delta_kernel(
    mixed_ptr, beta_ptr, step_ptr, decay_ptr, step_bias_ptr, cache_ptr, starts_ptr, lengths_ptr, table_ptr, out_ptr,
    num_reqs, width, state_size, past_size, beta_stride, step_stride, table_stride, out_stride, scale,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, TILED: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, DIM_TILE: tl.constexpr, COLUMNS_TILE: tl.constexpr,
):  # fmt: skip
    """A tile of columns of a head's states, and of its results."""
    head = tl.program_id(0)
    key_head = head % KEY_HEADS if TILED else head // (HEADS // KEY_HEADS)
    dim = tl.arange(0, DIM_TILE)
    column = tl.program_id(1) * COLUMNS_TILE + tl.arange(0, COLUMNS_TILE)
    is_dim, is_column = dim < DIM, column < V_DIM
    mask = is_dim[:, None] & is_column[None, :]
    places = past_size + ((head * DIM + dim) * V_DIM)[:, None] + column[None, :]
    decay, step_bias = tl.load(decay_ptr + head), tl.load(step_bias_ptr + head)
    for row in range(num_reqs):
        begin, end = tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)
        first = tl.load(lengths_ptr + row) - (end - begin)
        table = table_ptr + tl.full([], row, tl.int64) * table_stride
        block = _block(table, tl.maximum(first - 1, 0), BLOCK_SIZE)
        known = is_column[None, :] & (dim < tl.where(_has_past(begin, end, first), DIM, 0))[:, None]
        state = tl.load(cache_ptr + block * state_size + places, mask=known, other=0.0)
        for token in range(begin, end):
            own = mixed_ptr + tl.full([], token, tl.int64) * width
            q = _unit(tl.load(own + key_head * DIM + dim, mask=is_dim, other=0.0).to(tl.float32)) * scale
            k = _unit(tl.load(own + (KEY_HEADS + key_head) * DIM + dim, mask=is_dim, other=0.0).to(tl.float32))
            v = tl.load(own + 2 * KEY_HEADS * DIM + head * V_DIM + column, mask=is_column, other=0.0).to(tl.float32)
            step = tl.load(step_ptr + tl.full([], token, tl.int64) * step_stride + head).to(tl.float32)
            beta = tl.load(beta_ptr + tl.full([], token, tl.int64) * beta_stride + head).to(tl.float32)
            state = state * tl.exp(decay * _softplus(step + step_bias))
            change = (v - tl.sum(state * k[:, None], 0)) * (1.0 / (1.0 + tl.exp(-beta)))
            state = state + k[:, None] * change[None, :]
            value = tl.sum(state * q[:, None], 0).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + tl.full([], token, tl.int64) * out_stride + head * V_DIM + column, value, mask=is_column)
            position = first + token - begin
            if (token == end - 1) | ((position + 1) % BLOCK_SIZE == 0):
                tl.store(cache_ptr + _block(table, position, BLOCK_SIZE) * state_size + places, state, mask=mask)


@triton.jit(do_not_specialize=["num_reqs", "table_stride"])
def mamba_kernel(
    mixed_ptr, step_ptr, gate_ptr, decay_ptr, skip_ptr, step_bias_ptr, cache_ptr, starts_ptr, lengths_ptr, table_ptr,
    out_ptr, num_reqs, width, state_size, past_size, step_stride, gate_stride, table_stride, out_stride, least, most,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, DIM_TILE: tl.constexpr, COLUMNS_TILE: tl.constexpr,
):  # fmt: skip
    """A tile of columns of a head's states, and of its results."""
    head = tl.program_id(0)
    group = head // (HEADS // GROUPS)
    dim = tl.arange(0, DIM_TILE)
    column = tl.program_id(1) * COLUMNS_TILE + tl.arange(0, COLUMNS_TILE)
    is_dim, is_column = dim < DIM, column < V_DIM
    mask = is_dim[:, None] & is_column[None, :]
    places = past_size + ((head * DIM + dim) * V_DIM)[:, None] + column[None, :]
    decay, skip, step_bias = tl.load(decay_ptr + head), tl.load(skip_ptr + head), tl.load(step_bias_ptr + head)
    for row in range(num_reqs):
        begin, end = tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)
        first = tl.load(lengths_ptr + row) - (end - begin)
        table = table_ptr + tl.full([], row, tl.int64) * table_stride
        block = _block(table, tl.maximum(first - 1, 0), BLOCK_SIZE)
        known = is_column[None, :] & (dim < tl.where(_has_past(begin, end, first), DIM, 0))[:, None]
        state = tl.load(cache_ptr + block * state_size + places, mask=known, other=0.0)
        for token in range(begin, end):
            own = mixed_ptr + tl.full([], token, tl.int64) * width
            x = tl.load(own + head * V_DIM + column, mask=is_column, other=0.0).to(tl.float32)
            b = tl.load(own + HEADS * V_DIM + group * DIM + dim, mask=is_dim, other=0.0).to(tl.float32)
            c = tl.load(own + HEADS * V_DIM + (GROUPS + group) * DIM + dim, mask=is_dim, other=0.0).to(tl.float32)
            step = tl.load(step_ptr + tl.full([], token, tl.int64) * step_stride + head).to(tl.float32)
            time = tl.minimum(tl.maximum(_softplus(step + step_bias), least), most)
            state = state * tl.exp(decay * time) + b[:, None] * (x * time)[None, :]
            value = tl.sum(state * c[:, None], 0) + skip * x
            if gate_ptr is not None:
                gate = gate_ptr + tl.full([], token, tl.int64) * gate_stride + head * V_DIM + column
                value = value * activate(tl.load(gate, mask=is_column, other=0.0).to(tl.float32), "silu")
            value = value.to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + tl.full([], token, tl.int64) * out_stride + head * V_DIM + column, value, mask=is_column)
            position = first + token - begin
            if (token == end - 1) | ((position + 1) % BLOCK_SIZE == 0):
                tl.store(cache_ptr + _block(table, position, BLOCK_SIZE) * state_size + places, state, mask=mask)


def _step_arguments(cache: Tensor, meta: AttentionMetadata) -> dict[str, Any]:
    """The requests of a step, and the cache."""
    assert cache.is_contiguous() and cache.dtype == torch.float32
    return {
        "cache_ptr": cache,
        "starts_ptr": meta.query_start_loc,
        "lengths_ptr": meta.seq_lens,
        "table_ptr": meta.block_table,
        "num_reqs": meta.num_reqs,
        "state_size": cache.shape[1],
        "table_stride": row_stride(meta.block_table),
    }


def _convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, cache: Tensor, meta: AttentionMetadata, length: int
) -> Tensor:
    """The convolution's results, in memory that is used again."""
    if length > MAX_LENGTH:
        raise NotImplementedError(f"GPUs do not run convolutions over {length} tokens; at most {MAX_LENGTH}")
    assert weight.is_contiguous()
    tokens, width = x.shape
    mixed = scratch.get(f"recurrent {x.dtype}", tokens * width, x.dtype, x.device)
    args = _step_arguments(cache, meta) | {"x_ptr": x, "weight_ptr": weight, "bias_ptr": bias, "out_ptr": mixed}
    args |= {"width": width, "x_stride": row_stride(x)}
    grid = (triton.cdiv(width, dict(_CONV.tile)["COLUMNS_TILE"]),)
    launch(conv_kernel, grid, args, _CONV, LENGTH=length, BLOCK_SIZE=meta.block_size)
    return mixed


def _launch_states(kernel: Any, args: dict[str, Any], shape: AttentionShape, block_size: int, **constants: Any) -> None:
    # Each without spills.
    tile = min(32 if 80 <= target().capability < 90 else 16, power_of_two(shape.v_dim))
    launch(
        kernel,
        (shape.num_heads, triton.cdiv(shape.v_dim, tile)),
        args,
        Config(4, 1, (("COLUMNS_TILE", tile),)),
        HEADS=shape.num_heads,
        DIM=shape.head_dim,
        V_DIM=shape.v_dim,
        BLOCK_SIZE=block_size,
        DIM_TILE=power_of_two(shape.head_dim),
        **constants,
    )


def gated_delta(
    qkv: Tensor,
    beta: Tensor,
    step: Tensor,
    conv_weight: Tensor,
    decay: Tensor,
    step_bias: Tensor,
    cache: Tensor,
    meta: AttentionMetadata,
    shape: AttentionShape,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The op ``gated_delta``, in two launches. Tokens without a request are left out."""
    out = result(out, (len(qkv), shape.out_width), qkv.dtype, qkv)
    mixed = _convolved(qkv, conv_weight, None, cache, meta, shape.conv_length)
    width = qkv.shape[1]
    args = _step_arguments(cache, meta) | {"mixed_ptr": mixed, "beta_ptr": beta, "step_ptr": step, "out_ptr": out}
    args |= {"decay_ptr": decay, "step_bias_ptr": step_bias, "width": width, "scale": shape.head_dim**-0.5}
    args |= {"past_size": (shape.conv_length - 1) * width, "beta_stride": row_stride(beta)}
    args |= {"step_stride": row_stride(step), "out_stride": row_stride(out)}
    constants = {"KEY_HEADS": shape.num_kv_heads, "TILED": shape.has_tiled_heads}
    _launch_states(delta_kernel, args, shape, meta.block_size, **constants)
    return out


def mamba(
    x: Tensor,
    step: Tensor,
    gate: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    decay: Tensor,
    skip: Tensor,
    step_bias: Tensor,
    cache: Tensor,
    meta: AttentionMetadata,
    shape: AttentionShape,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The op ``mamba``, in two launches. Tokens without a request are left out."""
    out = result(out, (len(x), shape.out_width), x.dtype, x)
    mixed = _convolved(x, conv_weight, conv_bias, cache, meta, shape.conv_length)
    width = x.shape[1]
    args = _step_arguments(cache, meta) | {"mixed_ptr": mixed, "step_ptr": step, "gate_ptr": gate, "out_ptr": out}
    args |= {"decay_ptr": decay, "skip_ptr": skip, "step_bias_ptr": step_bias, "width": width}
    args |= {"past_size": (shape.conv_length - 1) * width, "step_stride": row_stride(step)}
    args |= {"gate_stride": 0 if gate is None else row_stride(gate), "out_stride": row_stride(out)}
    args |= {"least": shape.step_limits[0], "most": shape.step_limits[1]}
    _launch_states(mamba_kernel, args, shape, meta.block_size, GROUPS=shape.num_kv_heads)
    return out


def cases() -> Iterator[Case]:
    """Calls for the catalogue: layers of Qwen3-Next and of Mamba-2."""
    tokens, requests = 64, 16
    starts, lengths = catalog.meta(requests + 1, dtype=torch.int32), catalog.meta(requests, dtype=torch.int32)
    table, slots = catalog.meta(requests, 64, dtype=torch.int32), catalog.meta(tokens, dtype=torch.int64)
    meta = AttentionMetadata(starts, lengths, table, slots, 32)
    numbers = partial(catalog.meta, dtype=torch.float32)
    shape = AttentionShape(32, 16, 128, 1.0, v_head_dim=128, sliding_window=2, kind="gated_delta", conv_length=4)
    width = 2 * 16 * 128 + 32 * 128
    cache, heads = numbers(128, 3 * width + 32 * 128 * 128), catalog.meta(tokens, 32)
    x, weight = catalog.meta(tokens, width), catalog.meta(4, width)
    call = partial(gated_delta, x, heads, heads, weight, numbers(32), numbers(32), cache, meta, shape)
    yield Case("gated delta", call, min_load=2)
    shape = AttentionShape(64, 1, 128, 1.0, v_head_dim=64, sliding_window=2, kind="mamba", conv_length=4)
    width = 64 * 64 + 2 * 128
    cache, heads = numbers(128, 3 * width + 64 * 128 * 64), catalog.meta(tokens, 64)
    x, gate, weight = catalog.meta(tokens, width), catalog.meta(tokens, 64 * 64), numbers(4, width)
    vectors = (numbers(64), numbers(64), numbers(64))
    for name, given in {"mamba": gate, "mamba without a gate": None}.items():
        yield Case(
            name, partial(mamba, x, heads, given, weight, numbers(width), *vectors, cache, meta, shape), min_load=2
        )
