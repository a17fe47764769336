"""The short causal convolution over the tokens of each request."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.metadata import AttentionMetadata
from ops.triton import catalog
from ops.triton.catalog import Case
from ops.triton.configs import Config, power_of_two
from ops.triton.launch import launch, result, row_stride

_CONFIG = Config(4, 1, (("COLUMNS_TILE", 1024),))


@triton.jit
def write_inputs_kernel(
    gate_ptr, x_ptr, cache_ptr, slots_ptr, width, gate_stride, x_stride, COLUMNS_TILE: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS_TILE + tl.arange(0, COLUMNS_TILE)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot >= 0:
        mask = column < width
        gate = tl.load(gate_ptr + token * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + token * x_stride + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(cache_ptr + slot * width + column, (gate * x).to(cache_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_reqs", "table_stride"])
def short_conv_kernel(
    gate_ptr, weight_ptr, bias_ptr, cache_ptr, starts_ptr, lengths_ptr, table_ptr, out_ptr,
    num_reqs, width, gate_stride, table_stride, out_stride,
    LENGTH: tl.constexpr, BLOCK_SIZE: tl.constexpr, HAS_BIAS: tl.constexpr, REQS_TILE: tl.constexpr,
    COLUMNS_TILE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS_TILE + tl.arange(0, COLUMNS_TILE)
    mask = column < width
    dtype = out_ptr.dtype.element_ty
    req = tl.arange(0, REQS_TILE)
    ends = tl.load(starts_ptr + 1 + req, mask=req < num_reqs, other=2147483647)
    row = tl.sum((ends <= token).to(tl.int32), 0)
    if row < num_reqs:
        position = tl.load(lengths_ptr + row) - tl.load(starts_ptr + row + 1) + token
        total = tl.zeros([COLUMNS_TILE], tl.float32)
        for step in tl.static_range(LENGTH):
            before = position - (LENGTH - 1) + step
            block = tl.load(table_ptr + row * table_stride + before // BLOCK_SIZE, mask=before >= 0, other=0)
            entry = block.to(tl.int64) * BLOCK_SIZE + before % BLOCK_SIZE
            x = tl.load(
                cache_ptr + entry * width + column, mask=column < tl.where(before >= 0, width, 0), other=0.0
            ).to(tl.float32)
            total += x * tl.load(weight_ptr + step * width + column, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            total += tl.load(bias_ptr + column, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + token.to(tl.int64) * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
        value = (gate * total.to(dtype).to(tl.float32)).to(dtype)
        tl.store(out_ptr + token.to(tl.int64) * out_stride + column, value, mask=mask)


def short_conv(
    gate_in: Tensor,
    gate_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache: Tensor,
    meta: AttentionMetadata,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The op ``short_conv``, in two launches. Tokens without a request are left out."""
    out = result(out, tuple(x.shape), x.dtype, x)
    tokens, width = x.shape
    assert cache.is_contiguous() and weight.is_contiguous()
    grid = (tokens, triton.cdiv(width, dict(_CONFIG.tile)["COLUMNS_TILE"]))
    inputs = {"gate_ptr": gate_in, "x_ptr": x, "cache_ptr": cache, "slots_ptr": meta.slot_mapping, "width": width}
    inputs |= {"gate_stride": row_stride(gate_in), "x_stride": row_stride(x)}
    launch(write_inputs_kernel, grid, inputs, _CONFIG)
    args: dict[str, Any] = {
        "gate_ptr": gate_out,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "cache_ptr": cache,
        "starts_ptr": meta.query_start_loc,
        "lengths_ptr": meta.seq_lens,
        "table_ptr": meta.block_table,
        "out_ptr": out,
        "num_reqs": meta.num_reqs,
        "width": width,
        "gate_stride": row_stride(gate_out),
        "table_stride": meta.block_table.stride(0),
        "out_stride": row_stride(out),
    }
    constants = {"LENGTH": weight.shape[0], "BLOCK_SIZE": meta.block_size, "HAS_BIAS": bias is not None}
    launch(short_conv_kernel, grid, args, _CONFIG, **constants, REQS_TILE=power_of_two(meta.num_reqs))
    return out


def cases() -> Iterator[Case]:
    """Calls for the catalogue."""
    tokens, width, size = 64, 2048, 16
    lengths = catalog.meta(17, dtype=torch.int32)
    step = AttentionMetadata(
        lengths,
        catalog.meta(16, dtype=torch.int32),
        catalog.meta(16, 64, dtype=torch.int32),
        catalog.meta(tokens, dtype=torch.int64),
        size,
    )
    x, cache = catalog.meta(tokens, width), catalog.meta(128, size, width)
    yield Case(f"{width}", partial(short_conv, x, x, x, catalog.meta(3, width), None, cache, step))
    yield Case(f"{width} bias", partial(short_conv, x, x, x, catalog.meta(3, width), catalog.meta(width), cache, step))
