"""Products with weights. Bits depend on the weight's shape alone: not on the number of rows, nor on the tiles.

``y[m, n] = sum over k of w[n, k] * x[m, k]``. Weights are the tensor core's first operand, so a tile of few rows wastes
nothing. K is cut into segments (``num_segments``), each summed from zero in ascending order; their sums are added in
ascending order as well. With few rows, each program computes a segment of a tile, and the last one to arrive adds them
up. With many, a program computes all segments of its tile. Either way, an element's sum is the same chain.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.triton import configs
from ops.triton.catalog import Case, meta
from ops.triton.configs import Config
from ops.triton.launch import launch, result, row_stride, scratch, target
from ops.triton.pointwise import activate, gated

GROUP = 8
"""Tiles of n whose programs run next to each other, tile of m by tile of m: they share what the L2 cache holds."""
MIN_SEGMENT = 512
"""Numbers along k that a segment has at least."""
MAX_SPLIT_PROGRAMS = 264
"""With more programs than this, two on each processor of a large card, segments need no programs of their own."""


@triton.jit
def _tile_of(tiles_m, tiles_n, SEGMENTS: tl.constexpr, SPLIT: tl.constexpr, GROUP: tl.constexpr):
    """The program's tile of m, its tile of n and its segment. Neighbours read the same weights."""
    program = tl.program_id(0)
    segment = 0
    if SPLIT:
        tile_m = program % tiles_m
        segment = (program // tiles_m) % SEGMENTS
        tile_n = program // (tiles_m * SEGMENTS)
    else:
        group = program // (GROUP * tiles_m)
        size = tl.minimum(tiles_n - group * GROUP, GROUP)
        rest = program % (GROUP * tiles_m)
        tile_n = group * GROUP + rest % size
        tile_m = rest // size
    return tile_m, tile_n, segment


@triton.jit
def _load_weight(pointers, n, k, N, end, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr):
    """A tile of weights [n, k]; zeros beyond the matrix."""
    if EVEN_N and EVEN_K:
        tile = tl.load(pointers)
    elif EVEN_N:
        tile = tl.load(pointers, mask=(k < end)[None, :], other=0.0)
    elif EVEN_K:
        tile = tl.load(pointers, mask=(n < N)[:, None], other=0.0)
    else:
        tile = tl.load(pointers, mask=(n < N)[:, None] & (k < end)[None, :], other=0.0)
    return tile


@triton.jit
def _load_rows(pointers, m, k, M, end, EVEN_K: tl.constexpr):
    """A tile of activations [m, k]; zeros beyond the matrix."""
    if EVEN_K:
        tile = tl.load(pointers, mask=(m < M)[:, None], other=0.0)
    else:
        tile = tl.load(pointers, mask=(m < M)[:, None] & (k < end)[None, :], other=0.0)
    return tile


@triton.jit
def _finish(
    total, total_up, m, n, M, N, bias_ptr, residual_ptr, residual_stride, out_ptr, out_stride,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Stores a tile of sums [n, m] after all that follows the product, rounded where the ops one by one round."""
    value = tl.trans(total)
    dtype = out_ptr.dtype.element_ty
    mask = (m < M)[:, None] & (n < N)[None, :]
    if HAS_BIAS:
        value += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if GATED:
        up = tl.trans(total_up)
        if HAS_BIAS:
            up += tl.load(bias_ptr + N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        value = gated(value.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32), ACTIVATION, dtype)
    elif ACTIVATION != "none":
        value = activate(value.to(dtype).to(tl.float32), ACTIVATION)
    rows = m.to(tl.int64)[:, None]
    if HAS_RESIDUAL:
        other = tl.load(residual_ptr + rows * residual_stride + n[None, :], mask=mask, other=0.0)
        value = value.to(dtype).to(tl.float32) + other.to(tl.float32)
    tl.store(out_ptr + rows * out_stride + n[None, :], value.to(dtype), mask=mask)


@triton.jit
def _sums(
    w_base, up_base, w_offsets, x_base, x_offsets, m, n, own_k, M, N, K, segment, segment_size,
    SEGMENTS: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, GATED: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """The sums of a tile [n, m] over SEGMENTS segments, and those of the second weights if it is gated."""
    total = tl.zeros([TILE_N, TILE_M], tl.float32)
    total_up = tl.zeros([TILE_N, TILE_M], tl.float32)
    for step in range(SEGMENTS):
        begin = (segment + step) * segment_size
        end = tl.minimum(begin + segment_size, K)
        sums = tl.zeros([TILE_N, TILE_M], tl.float32)
        sums_up = tl.zeros([TILE_N, TILE_M], tl.float32)
        for start in range(begin, end, TILE_K):
            k = start + own_k
            x = tl.trans(_load_rows(x_base + start + x_offsets, m, k, M, end, EVEN_K))
            w = _load_weight(w_base + start + w_offsets, n, k, N, end, EVEN_N, EVEN_K)
            sums = tl.dot(w, x, sums, input_precision="ieee")
            if GATED:
                up = _load_weight(up_base + start + w_offsets, n, k, N, end, EVEN_N, EVEN_K)
                sums_up = tl.dot(up, x, sums_up, input_precision="ieee")
        if SEGMENTS == 1:
            total = sums
            total_up = sums_up
        else:
            total += sums
            total_up += sums_up
    return total, total_up


@triton.jit
def _is_last(
    partial_ptr, counter_ptr, tile, segment, places, total, total_up,
    SEGMENTS: tl.constexpr, GATED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Stores a segment's sums; whether all others of the tile were stored before."""
    PARTS: tl.constexpr = 2 if GATED else 1
    own = partial_ptr + (tile.to(tl.int64) * SEGMENTS + segment) * (PARTS * SIZE)
    tl.store(own + places, total)
    if GATED:
        tl.store(own + SIZE + places, total_up)
    # All warps have stored before one of them says so.
    tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    return arrived == SEGMENTS - 1


@triton.jit
def _merged(
    partial_ptr, counter_ptr, tile, places,
    SEGMENTS: tl.constexpr, GATED: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """The sums of all segments, added in ascending order; the tile's counter is zero again."""
    PARTS: tl.constexpr = 2 if GATED else 1
    SIZE: tl.constexpr = TILE_M * TILE_N
    tl.store(counter_ptr + tile, 0)
    first = partial_ptr + tile.to(tl.int64) * (SEGMENTS * PARTS * SIZE)
    total = tl.zeros([TILE_N, TILE_M], tl.float32)
    total_up = tl.zeros([TILE_N, TILE_M], tl.float32)
    for segment in range(SEGMENTS):
        part = first + segment * (PARTS * SIZE)
        total += tl.load(part + places, cache_modifier=".cg")
        if GATED:
            total_up += tl.load(part + SIZE + places, cache_modifier=".cg")
    return total, total_up


@triton.jit(do_not_specialize=["M"])
def gemm_kernel(
    w_ptr, x_ptr, bias_ptr, residual_ptr, rows_ptr, out_ptr, partial_ptr, counter_ptr,
    M, N, K, segment_size, w_stride, x_stride, residual_stride, out_stride,
    SEGMENTS: tl.constexpr, SPLIT: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_ROWS: tl.constexpr, GROUP: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """``N`` are the result's columns; gated weights have twice as many rows, gates before the others."""
    tiles_m = tl.cdiv(M, TILE_M)
    tile_m, tile_n, segment = _tile_of(tiles_m, tl.cdiv(N, TILE_N), SEGMENTS, SPLIT, GROUP)
    own_m = tl.arange(0, TILE_M)
    own_n = tl.arange(0, TILE_N)
    own_k = tl.arange(0, TILE_K)
    m = tile_m * TILE_M + own_m
    n = tile_n * TILE_N + own_n
    # Offsets inside a tile fit 32 bits; where a tile starts may not.
    w_base = w_ptr + (tile_n * TILE_N).to(tl.int64) * w_stride
    w_offsets = own_n[:, None] * w_stride + own_k[None, :]
    up_base = w_base + tl.full([], N, tl.int64) * w_stride
    if HAS_ROWS:
        x_base = x_ptr
        token = tl.load(rows_ptr + m, mask=m < M, other=0).to(tl.int32)
        x_offsets = token[:, None] * x_stride + own_k[None, :]
    else:
        x_base = x_ptr + (tile_m * TILE_M).to(tl.int64) * x_stride
        x_offsets = own_m[:, None] * x_stride + own_k[None, :]
    OWN_SEGMENTS: tl.constexpr = 1 if SPLIT else SEGMENTS
    total, total_up = _sums(
        w_base, up_base, w_offsets, x_base, x_offsets, m, n, own_k, M, N, K, segment, segment_size,
        OWN_SEGMENTS, EVEN_N, EVEN_K, GATED, TILE_M, TILE_N, TILE_K,
    )  # fmt: skip
    is_done = True
    if SPLIT:
        tile = tile_n * tiles_m + tile_m
        places = own_n[:, None] * TILE_M + own_m[None, :]
        is_done = _is_last(
            partial_ptr, counter_ptr, tile, segment, places, total, total_up, SEGMENTS, GATED, TILE_M * TILE_N
        )
    if is_done:
        if SPLIT:
            total, total_up = _merged(partial_ptr, counter_ptr, tile, places, SEGMENTS, GATED, TILE_M, TILE_N)
        _finish(
            total, total_up, m, n, M, N, bias_ptr, residual_ptr, residual_stride, out_ptr, out_stride,
            ACTIVATION, GATED, HAS_BIAS, HAS_RESIDUAL,
        )  # fmt: skip


def num_segments(n: int, k: int) -> int:
    """Into how many segments k is cut: enough to give all processors of a large card work, however few rows there are.

    A promise on bits: it may depend on the weight's shape alone.
    """
    tiles = triton.cdiv(n, 64)
    wanted = 1 if tiles >= 128 else 2 if tiles >= 80 else 4 if tiles >= 40 else 8
    return max(1, min(wanted, k // MIN_SEGMENT))


def segment_size(k: int, segments: int) -> int:
    """Numbers along k in each segment but the last; whole tiles of all sizes."""
    return -(-k // (segments * 128)) * 128


@dataclass(frozen=True)
class Epilogue:
    """What a product does with its sums before it stores them, in this order."""

    bias: Tensor | None = None
    """[out_features]."""
    activation: str = "none"
    """As of the op ``activation``; of ``act_and_mul`` if ``is_gated``."""
    is_gated: bool = False
    """The result is ``act_and_mul`` of the product."""
    residual: Tensor | None = None
    """[rows, columns of the result], added at the end."""

    def part(self, first: int, end: int) -> Epilogue:
        """What follows the product of some rows of the weight."""
        bias = None if self.bias is None else self.bias[first:end]
        residual = None if self.residual is None else self.residual[:, first:end]
        return replace(self, bias=bias, residual=residual)


PLAIN = Epilogue()


def matmul(
    x: Tensor,
    weight: Tensor,
    epilogue: Epilogue = PLAIN,
    *,
    rows: Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """``x @ weight.T`` and what follows it, equal bit for bit to the ops one by one.

    Args:
        x: [rows, in_features].
        weight: [out_features, in_features].
        epilogue: What follows.
        rows: int64 [selected]: the product is of ``x[rows]``.
        dtype: Of the result, default as ``x``. float32: sums are not rounded.
        out: [rows, out_features], half as many columns if gated.
        config: Tiles, instead of those for this number of rows.
    """
    count, k = (len(x) if rows is None else len(rows)), x.shape[1]
    n = weight.shape[0] // 2 if epilogue.is_gated else weight.shape[0]
    assert weight.shape[1] == k and weight.dtype == x.dtype, f"{list(x.shape)} {x.dtype}, {list(weight.shape)}"
    out = result(out, (count, n), dtype or x.dtype, x)
    segments = num_segments(weight.shape[0], k)
    if config is None:
        config = configs.gemm(
            target(), count, k, x.dtype, segments, epilogue.activation, epilogue.is_gated, rows is not None
        )
    tile = dict(config.tile)
    args = _arguments(x, weight, epilogue, rows, out, segment_size(k, segments))
    even = {"EVEN_N": n % tile["TILE_N"] == 0, "EVEN_K": k % tile["TILE_K"] == 0}
    launch_product(gemm_kernel, args, config, segments, epilogue, x.device, **even)
    return out


def launch_product(
    kernel: Any,
    args: dict[str, Any],
    config: Config,
    segments: int,
    epilogue: Epilogue,
    device: torch.device,
    **constants: Any,
) -> None:
    """Launches a kernel of products, one program a tile and segment or one a tile, with the memory that it needs."""
    tile = dict(config.tile)
    tiles = triton.cdiv(args["M"], tile["TILE_M"]) * triton.cdiv(args["N"], tile["TILE_N"])
    split = segments > 1 and tiles < MAX_SPLIT_PROGRAMS
    args |= {"partial_ptr": None, "counter_ptr": None}
    if split:
        size = tiles * segments * tile["TILE_M"] * tile["TILE_N"] * (2 if epilogue.is_gated else 1)
        args["partial_ptr"] = scratch.get("gemm partials", size, torch.float32, device)
        args["counter_ptr"] = scratch.get("gemm counters", MAX_SPLIT_PROGRAMS, torch.int32, device)
    launch(
        kernel,
        (tiles * (segments if split else 1),),
        args,
        config,
        SEGMENTS=segments,
        SPLIT=split,
        ACTIVATION=epilogue.activation,
        GATED=epilogue.is_gated,
        HAS_BIAS=epilogue.bias is not None,
        HAS_RESIDUAL=epilogue.residual is not None,
        HAS_ROWS=args["rows_ptr"] is not None,
        GROUP=GROUP,
        **constants,
    )


def _arguments(
    x: Tensor, weight: Tensor, epilogue: Epilogue, rows: Tensor | None, out: Tensor, segment_size: int
) -> dict[str, Any]:
    return {
        "w_ptr": weight,
        "x_ptr": x,
        "bias_ptr": epilogue.bias,
        "residual_ptr": epilogue.residual,
        "rows_ptr": rows,
        "out_ptr": out,
        "M": out.shape[0],
        "N": out.shape[1],
        "K": x.shape[1],
        "segment_size": segment_size,
        "w_stride": row_stride(weight),
        "x_stride": row_stride(x),
        "residual_stride": 0 if epilogue.residual is None else row_stride(epilogue.residual),
        "out_stride": row_stride(out),
    }


SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336), "tiny": (576, 1536)}
"""Weights of the catalogue: those of an 8B model, and of a small one."""


def cases() -> Iterator[Case]:
    """Calls for the catalogue."""
    for name, (n, k) in SHAPES.items():
        for m in (8, 16, 32, 64, 128, 512, 2048):
            x, weight = meta(m, k), meta(n, k)
            epilogue = PLAIN
            if name == "gate_up":
                epilogue = Epilogue(activation="silu", is_gated=True)
            elif name in ("o", "down"):
                epilogue = Epilogue(residual=meta(m, n))
            yield Case(f"{name} m={m}", partial(matmul, x, weight, epilogue), True, family="bf16")
    for m in (8, 128, 512):
        x = meta(m, 4096)
        bias = Epilogue(meta(6144))
        yield Case(f"bias m={m}", partial(matmul, x, meta(6144, 4096), bias), True, min_load=2, family="bf16")
        yield Case(
            f"gelu m={m}", partial(matmul, x, meta(8192, 4096), Epilogue(activation="gelu")), True, family="bf16"
        )
        patches = partial(matmul, meta(m, 588), meta(1152, 588), Epilogue(meta(1152)))
        yield Case(f"patches m={m}", patches, True, min_load=2, family="bf16")
        half, rows = meta(m, 4096, dtype=torch.float16), meta(m, dtype=torch.int64)
        yield Case(f"fp16 m={m}", partial(matmul, half, meta(4096, 4096, dtype=torch.float16)), True, family="fp16")
        yield Case(f"logits m={m}", partial(matmul, x, meta(128256, 4096), dtype=torch.float32), True, family="bf16")
        yield Case(
            f"rows m={m}", partial(matmul, x, meta(128256, 4096), rows=rows, dtype=torch.float32), True, family="bf16"
        )
        wide = meta(m, 4096, dtype=torch.float32)
        yield Case(f"fp32 m={m}", partial(matmul, wide, meta(4096, 4096, dtype=torch.float32)), family="fp32")
