"""Products of 8-bit weights with activations rounded to 8 bits, a scale for each row.

They are sums of integers, exact in any order; results are those of the references, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.metadata import KV_CODES
from ops.packed import Encoding, Segment
from ops.triton import gemm
from ops.triton.catalog import Case, meta
from ops.triton.codes import Layout
from ops.triton.configs import Config
from ops.triton.gemm import PLAIN, Epilogue
from ops.triton.launch import launch, row_stride, scratch, target

SMALLEST = 2.0**-100
"""Rows whose largest number is smaller count as zero, as in the references."""
_CHUNK = 1024
_ROUND = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding it rounds to integers, ties to even."""


@triton.jit
def quantize_rows_kernel(
    x_ptr, rows_ptr, codes_ptr, scales_ptr, K, padded, x_stride,
    SMALLEST: tl.constexpr, LARGEST: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A program per row: its codes, of which LARGEST is the largest, padded with zeros, and its scale; NaN if a number
    is not finite."""
    dtype: tl.constexpr = codes_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    source = row
    if rows_ptr is not None:
        source = tl.load(rows_ptr + row)
    largest = tl.zeros([CHUNK], tl.float32)
    strange = tl.zeros([CHUNK], tl.int32)
    for start in range(0, K, CHUNK):
        column = start + tl.arange(0, CHUNK)
        x = tl.load(x_ptr + source * x_stride + column, mask=column < K, other=0.0).to(tl.float32)
        size = tl.abs(x)
        strange = strange | (size < float("inf")).to(tl.int32) ^ 1
        largest = tl.maximum(largest, size)
    most = tl.max(largest, 0)
    is_finite = tl.max(strange, 0) == 0
    is_zero = most < SMALLEST
    divisor = tl.where(is_zero | (is_finite == 0), 1.0, most)
    inverse = tl.div_rn(LARGEST, divisor)
    scale = tl.where(is_zero, 0.0, tl.div_rn(most, LARGEST))
    tl.store(scales_ptr + row, tl.where(is_finite, scale, float("nan")))
    for start in range(0, padded, CHUNK):
        column = start + tl.arange(0, CHUNK)
        x = tl.load(x_ptr + source * x_stride + column, mask=column < K, other=0.0).to(tl.float32)
        scaled = tl.where(is_finite & (is_zero == 0), x * inverse, 0.0)
        if dtype == tl.int8:
            codes = ((scaled + _ROUND) - _ROUND).to(tl.int32).to(tl.int8)
        else:
            codes = tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST).to(dtype)
        tl.store(codes_ptr + row * padded + column, codes, mask=column < padded)


@triton.jit
def _signed(pointers):
    """Codes that count from 128, as int8; two's complement needs no arithmetic but the first bit's change."""
    return (tl.load(pointers) ^ 128).to(tl.int8, bitcast=True)


@triton.jit
def scaled_sums(
    w_places, up_places, w_scale_ptr, x_places, x_scale_places, x_mask, row, N, padded,
    GROUPED: tl.constexpr, GATED: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """A tile of products, float32 [n, m]: the rows of weights at ``row``, and if gated those N further, with rows of
    codes. Scales are read at the end, as registers are few before."""
    sums = tl.zeros([TILE_N, TILE_M], tl.int32)
    sums_up = tl.zeros([TILE_N, TILE_M], tl.int32)
    for start in range(0, padded, TILE_K):
        x = tl.trans(tl.load(x_places + start))
        sums = tl.dot(_signed(w_places + start), x, sums, out_dtype=tl.int32)
        if GATED:
            sums_up = tl.dot(_signed(up_places + start), x, sums_up, out_dtype=tl.int32)
    x_scale = tl.load(x_scale_places, mask=x_mask, other=0.0)[None, :]
    total = sums.to(tl.float32) * (tl.load(w_scale_ptr + row).to(tl.float32)[:, None] * x_scale)
    total_up = total
    if GATED:
        total_up = sums_up.to(tl.float32) * (tl.load(w_scale_ptr + row + N).to(tl.float32)[:, None] * x_scale)
    return total, total_up


@triton.jit
def places_of_tile(
    w_ptr, x_ptr, M, N, padded,
    GROUP: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """A program's tile: its rows and columns of the result, the rows of the weight, and where the first columns of the
    codes, of these rows and of those N further are. Rows beyond the weight repeat its last one."""
    tiles_m = tl.cdiv(M, TILE_M)
    tile_m, tile_n, _segment = gemm._tile_of(tiles_m, tl.cdiv(N, TILE_N), 1, False, GROUP)
    own_k = tl.arange(0, TILE_K)
    m = tile_m * TILE_M + tl.arange(0, TILE_M)
    n = tile_n * TILE_N + tl.arange(0, TILE_N)
    row = tl.minimum(n, N - 1)
    x_places = x_ptr + (tl.minimum(m, M - 1).to(tl.int64) * padded)[:, None] + own_k[None, :]
    w_places = w_ptr + (row.to(tl.int64) * padded)[:, None] + own_k[None, :]
    up_places = w_ptr + ((row + N).to(tl.int64) * padded)[:, None] + own_k[None, :]
    return m, n, row, x_places, w_places, up_places


@triton.jit(do_not_specialize=["M"])
def per_token_gemm_kernel(
    w_ptr, w_scale_ptr, x_ptr, x_scale_ptr, bias_ptr, residual_ptr, out_ptr, M, N, padded, residual_stride, out_stride,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    GROUP: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """Rows are ``padded`` codes on both sides, whole tiles."""
    m, n, row, x_places, w_places, up_places = places_of_tile(w_ptr, x_ptr, M, N, padded, GROUP, TILE_M, TILE_N, TILE_K)
    total, total_up = scaled_sums(
        w_places, up_places, w_scale_ptr, x_places, x_scale_ptr + m, m < M, row, N, padded, False, GATED,
        TILE_M, TILE_N, TILE_K,
    )  # fmt: skip
    gemm._finish(
        total, total_up, m, n, M, N, bias_ptr, residual_ptr, residual_stride, out_ptr, out_stride,
        ACTIVATION, GATED, HAS_BIAS, HAS_RESIDUAL,
    )  # fmt: skip


def quantized_rows(
    x: Tensor, padded: int, rows: Tensor | None, dtype: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor]:
    """Rows of ``x`` in 8 bits, in ``dtype`` [rows, padded], and their scales, float32 [rows]. The next call overwrites
    both."""
    count = len(x) if rows is None else len(rows)
    codes = scratch.get(f"per token codes {dtype}", count * padded, dtype, x.device)
    scales = scratch.get("per token scales", count, torch.float32, x.device)
    args = {"x_ptr": x, "rows_ptr": rows, "codes_ptr": codes, "scales_ptr": scales, "K": x.shape[1]}
    args |= {"padded": padded, "x_stride": row_stride(x)}
    config = Config(4, 1, (("CHUNK", _CHUNK),))
    launch(quantize_rows_kernel, (count,), args, config, SMALLEST=SMALLEST, LARGEST=KV_CODES[dtype])
    return codes, scales


def product(codes: Tensor, scales: Tensor, segment: Segment, k: int, epilogue: Epilogue, out: Tensor) -> None:
    """The product of ``quantized_rows`` with a segment, to ``out`` [rows, n]."""
    layout = Layout(segment.rows, k, segment.encoding)
    assert layout.padded * 127 * 128 < 1 << 31, "sums fit 32 bits"
    assert layout.bits == 8 and not layout.group_size and layout.offset == 128, "codes with a scale for each row"
    config = config_of(len(out), is_gated=epilogue.is_gated)
    launch_product(per_token_gemm_kernel, config, codes, scales, segment, layout, epilogue, out)


def launch_product(
    kernel: Any,
    config: Config,
    codes: Tensor,
    scales: Tensor,
    segment: Segment,
    layout: Layout,
    epilogue: Epilogue,
    out: Tensor,
    **choices: Any,
) -> None:
    """Launches a kernel that multiplies ``quantized_rows`` with a segment."""
    count, n = out.shape
    tile = dict(config.tile)
    args: dict[str, Any] = {
        "w_ptr": layout.view(segment.data, "low"),
        "w_scale_ptr": layout.view(segment.data, "scale"),
    }
    args |= {"x_ptr": codes, "x_scale_ptr": scales, "bias_ptr": epilogue.bias, "residual_ptr": epilogue.residual}
    args |= {"out_ptr": out, "M": count, "N": n, "padded": layout.padded, "out_stride": row_stride(out)}
    args["residual_stride"] = 0 if epilogue.residual is None else row_stride(epilogue.residual)
    launch(
        kernel,
        (triton.cdiv(count, tile["TILE_M"]) * triton.cdiv(n, tile["TILE_N"]),),
        args,
        config,
        ACTIVATION=epilogue.activation,
        GATED=epilogue.is_gated,
        HAS_BIAS=epilogue.bias is not None,
        HAS_RESIDUAL=epilogue.residual is not None,
        GROUP=gemm.GROUP,
        **choices,
    )


def config_of(rows: int, *, is_gated: bool) -> Config:
    """Tiles for so many rows. Sums are exact, so no choice here decides bits."""
    tile_m = next((size for size in (16, 32, 64) if rows <= size), 128)
    tile_n = 64 if tile_m < 64 or is_gated else 128
    stages = 2 if target().backend == "hip" else 3
    return Config(8 if tile_m == 128 else 4, stages, (("TILE_M", tile_m), ("TILE_N", tile_n), ("TILE_K", 128)))


def cases() -> Iterator[Case]:
    """Calls for the catalogue."""
    encoding = Encoding("int8", 4096, torch.bfloat16)
    yield Case("4096", partial(quantized_rows, meta(64, 4096), 4096, None))
    for name, n, epilogue in (("plain", 4096, PLAIN), ("gated", 8192, Epilogue(activation="silu", is_gated=True))):
        segment = Segment(meta(Layout(n, 4096, encoding).num_bytes, dtype=torch.uint8), n, encoding)
        for m in (8, 64, 512):
            rows = (meta(m, 4096, dtype=torch.int8), meta(m, dtype=torch.float32))
            call = partial(product, *rows, segment, 4096, epilogue, meta(m, 4096))
            yield Case(f"{name} m={m}", call, True, min_load=2)
