"""Products of weights in FP8 (E4M3) with activations rounded to FP8, a scale for each row.

Tensor cores of some GPUs keep few digits of sums of FP8, so a sum of 128 columns is added to float32 before the next
one begins (DeepSeek-AI, arXiv:2412.19437). Groups of columns that share a scale are as long, or a whole row.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.packed import Encoding, Segment
from ops.triton import gemm
from ops.triton.catalog import Case, meta
from ops.triton.codes import Layout
from ops.triton.configs import TARGETS, Config, Target
from ops.triton.gemm import PLAIN, Epilogue
from ops.triton.per_token import launch_product, places_of_tile, quantized_rows

COLUMNS = 128
"""Columns whose products a tensor core adds up, and of a group of weights."""
LEAST_CAPABILITY = 89


def has_products(target: Target) -> bool:
    """Whether a GPU multiplies numbers in E4M3."""
    return target.capability >= LEAST_CAPABILITY


TARGETS_WITH_PRODUCTS = frozenset(name for name, each in TARGETS.items() if has_products(each))
"""Names of targets."""


@triton.jit
def _scales(pointer, row, start, groups, GROUPED: tl.constexpr):
    """The scales of some rows of a weight for the columns from ``start`` on, float32 [n, 1]."""
    place = row
    if GROUPED:
        place = row.to(tl.int64) * groups + start // 128
    return tl.load(pointer + place).to(tl.float32)[:, None]


@triton.jit
def scaled_sums(
    w_places, up_places, w_scale_ptr, x_places, x_scale_places, x_mask, row, N, padded,
    GROUPED: tl.constexpr, GATED: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """As ``per_token.scaled_sums``. ``GROUPED``: weights have a scale for each 128 columns."""
    groups = padded // 128
    total = tl.zeros([TILE_N, TILE_M], tl.float32)
    total_up = tl.zeros([TILE_N, TILE_M], tl.float32)
    for start in range(0, padded, TILE_K):
        x = tl.trans(tl.load(x_places + start))
        w = tl.load(w_places + start).to(tl.float8e4nv, bitcast=True)
        sums = tl.dot(w, x, tl.zeros([TILE_N, TILE_M], tl.float32))
        if GROUPED:
            sums = sums * _scales(w_scale_ptr, row, start, groups, True)
        total += sums
        if GATED:
            up = tl.load(up_places + start).to(tl.float8e4nv, bitcast=True)
            sums_up = tl.dot(up, x, tl.zeros([TILE_N, TILE_M], tl.float32))
            if GROUPED:
                sums_up = sums_up * _scales(w_scale_ptr, row + N, start, groups, True)
            total_up += sums_up
    x_scale = tl.load(x_scale_places, mask=x_mask, other=0.0)[None, :]
    if GROUPED:
        total = total * x_scale
        total_up = total_up * x_scale
    else:
        total = total * (_scales(w_scale_ptr, row, 0, groups, False) * x_scale)
        if GATED:
            total_up = total_up * (_scales(w_scale_ptr, row + N, 0, groups, False) * x_scale)
    return total, total_up


@triton.jit(do_not_specialize=["M"])
def fp8_gemm_kernel(
    w_ptr, w_scale_ptr, x_ptr, x_scale_ptr, bias_ptr, residual_ptr, out_ptr, M, N, padded, residual_stride, out_stride,
    GROUPED: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, GROUP: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """As ``per_token_gemm_kernel``."""
    m, n, row, x_places, w_places, up_places = places_of_tile(w_ptr, x_ptr, M, N, padded, GROUP, TILE_M, TILE_N, TILE_K)
    total, total_up = scaled_sums(
        w_places, up_places, w_scale_ptr, x_places, x_scale_ptr + m, m < M, row, N, padded, GROUPED, GATED,
        TILE_M, TILE_N, TILE_K,
    )  # fmt: skip
    gemm._finish(
        total, total_up, m, n, M, N, bias_ptr, residual_ptr, residual_stride, out_ptr, out_stride,
        ACTIVATION, GATED, HAS_BIAS, HAS_RESIDUAL,
    )  # fmt: skip


def product(codes: Tensor, scales: Tensor, segment: Segment, k: int, epilogue: Epilogue, out: Tensor) -> None:
    """As ``per_token.product``."""
    layout = Layout(segment.rows, k, segment.encoding)
    assert layout.format == "fp8_e4m3" and layout.group_size in (0, COLUMNS), "codes in FP8 with scales of 128 columns"
    config = config_of(len(out), is_gated=epilogue.is_gated)
    is_grouped = layout.group_size > 0
    launch_product(fp8_gemm_kernel, config, codes, scales, segment, layout, epilogue, out, GROUPED=is_grouped)


def config_of(rows: int, *, is_gated: bool) -> Config:
    """Tiles for so many rows. A sum is that of 128 columns after the other, whatever is chosen here."""
    tile_m = next((size for size in (16, 32, 64) if rows <= size), 64 if is_gated else 128)
    tile_n = 64 if tile_m < 128 else 128
    return Config(8 if tile_m == 128 else 4, 3, (("TILE_M", tile_m), ("TILE_N", tile_n), ("TILE_K", COLUMNS)))


def cases() -> Iterator[Case]:
    """Calls for the catalogue."""
    targets = TARGETS_WITH_PRODUCTS
    e4m3 = torch.float8_e4m3fn
    yield Case("4096 fp8", partial(quantized_rows, meta(64, 4096), 4096, None, e4m3), targets=targets)
    gated = Epilogue(activation="silu", is_gated=True)
    for name, size, n, epilogue in (
        ("rows", 4096, 4096, PLAIN),
        ("blocks", COLUMNS, 4096, PLAIN),
        ("gated", 4096, 8192, gated),
    ):
        encoding = Encoding("fp8_e4m3", size, torch.float32)
        segment = Segment(meta(Layout(n, 4096, encoding).num_bytes, dtype=torch.uint8), n, encoding)
        for m in (8, 64, 512):
            rows = (meta(m, 4096, dtype=e4m3), meta(m, dtype=torch.float32))
            call = partial(product, *rows, segment, 4096, epilogue, meta(m, 4096))
            yield Case(f"{name} m={m}", call, True, family="fp8", targets=targets)
