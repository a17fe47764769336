"""Products with quantised weights, whose numbers are restored in registers; and rows of quantised tables.

Numbers are those of the references, bit for bit; the order of sums is that of ``gemm.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.packed import Encoding, QuantizedWeight, Segment
from ops.triton import configs, fp8, gemm, per_token
from ops.triton.catalog import Case, meta
from ops.triton.codes import COLUMNS, Layout, numbers
from ops.triton.configs import Config
from ops.triton.gemm import PLAIN, Epilogue
from ops.triton.launch import launch, result, row_stride, target

Product = Callable[[Segment, int, Epilogue, Tensor], None]
"""Multiplies activations with a segment of a weight of so many columns, to the tensor."""
ROUNDED: dict[str, tuple[torch.dtype, Callable[[Tensor, Tensor, Segment, int, Epilogue, Tensor], None]]] = {
    "int8_per_token": (torch.int8, per_token.product),
    "fp8_per_token": (torch.float8_e4m3fn, fp8.product),
}
"""Activations that are rounded before they are multiplied: to what, and by what then."""


@triton.jit
def _weights(
    low_ptr, high_ptr, scale_ptr, shift_ptr, super_ptr, super_shift_ptr, table_ptr, n, up, start, COLUMNS,
    GATED: tl.constexpr, BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, SHIFT: tl.constexpr, OFFSET: tl.constexpr,
    HAS_SUPER: tl.constexpr, HAS_TABLE: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """The numbers of rows ``n``, and those of rows ``up`` if the product is gated."""
    w = numbers(
        low_ptr, high_ptr, scale_ptr, shift_ptr, super_ptr, super_shift_ptr, table_ptr, n, start, COLUMNS,
        BITS, GROUP_SIZE, SHIFT, OFFSET, HAS_SUPER, HAS_TABLE, TILE_N, TILE_K, DTYPE,
    )  # fmt: skip
    w_up = w
    if GATED:
        w_up = numbers(
            low_ptr, high_ptr, scale_ptr, shift_ptr, super_ptr, super_shift_ptr, table_ptr, up, start, COLUMNS,
            BITS, GROUP_SIZE, SHIFT, OFFSET, HAS_SUPER, HAS_TABLE, TILE_N, TILE_K, DTYPE,
        )  # fmt: skip
    return w, w_up


@triton.jit
def _sums(
    low_ptr, high_ptr, scale_ptr, shift_ptr, super_ptr, super_shift_ptr, table_ptr, x_base, x_offsets, m, n, up,
    own_k, M, K, COLUMNS, segment, segment_size, SEGMENTS: tl.constexpr, EVEN_K: tl.constexpr, GATED: tl.constexpr,
    BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, SHIFT: tl.constexpr, OFFSET: tl.constexpr,
    HAS_SUPER: tl.constexpr, HAS_TABLE: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """As ``gemm._sums``; ``n`` and ``up`` are the rows of the weight.

    A step restores the weights of the next one. So they are values of the loop, which the compiler keeps in shared
    memory; from registers, it could not have several products in flight.
    """
    dtype = x_base.dtype.element_ty
    total = tl.zeros([TILE_N, TILE_M], tl.float32)
    total_up = tl.zeros([TILE_N, TILE_M], tl.float32)
    for step in range(SEGMENTS):
        begin = (segment + step) * segment_size
        end = tl.minimum(begin + segment_size, K)
        # The last step reads its own weights again, from the L2 cache.
        last = begin + tl.maximum(tl.cdiv(end - begin, TILE_K) - 1, 0) * TILE_K
        sums = tl.zeros([TILE_N, TILE_M], tl.float32)
        sums_up = tl.zeros([TILE_N, TILE_M], tl.float32)
        w, w_up = _weights(
            low_ptr, high_ptr, scale_ptr, shift_ptr, super_ptr, super_shift_ptr, table_ptr, n, up,
            tl.minimum(begin, COLUMNS - TILE_K), COLUMNS,
            GATED, BITS, GROUP_SIZE, SHIFT, OFFSET, HAS_SUPER, HAS_TABLE, TILE_N, TILE_K, dtype,
        )  # fmt: skip
        for start in range(begin, end, TILE_K):
            x = tl.trans(gemm._load_rows(x_base + start + x_offsets, m, start + own_k, M, end, EVEN_K))
            sums = tl.dot(w, x, sums, input_precision="ieee")
            if GATED:
                sums_up = tl.dot(w_up, x, sums_up, input_precision="ieee")
            w, w_up = _weights(
                low_ptr, high_ptr, scale_ptr, shift_ptr, super_ptr, super_shift_ptr, table_ptr, n, up,
                tl.minimum(start + TILE_K, last), COLUMNS,
                GATED, BITS, GROUP_SIZE, SHIFT, OFFSET, HAS_SUPER, HAS_TABLE, TILE_N, TILE_K, dtype,
            )  # fmt: skip
        if SEGMENTS == 1:
            total = sums
            total_up = sums_up
        else:
            total += sums
            total_up += sums_up
    return total, total_up


@triton.jit(do_not_specialize=["M"])
def quantized_gemm_kernel(
    low_ptr, high_ptr, scale_ptr, shift_ptr, super_ptr, super_shift_ptr, table_ptr,
    x_ptr, bias_ptr, residual_ptr, rows_ptr, out_ptr, partial_ptr, counter_ptr,
    M, N, K, COLUMNS, segment_size, x_stride, residual_stride, out_stride,
    SEGMENTS: tl.constexpr, SPLIT: tl.constexpr, EVEN_K: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_ROWS: tl.constexpr, GROUP: tl.constexpr,
    BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, SHIFT: tl.constexpr, OFFSET: tl.constexpr,
    HAS_SUPER: tl.constexpr, HAS_TABLE: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """As ``gemm_kernel``. Rows beyond the weight repeat its last one."""
    tiles_m = tl.cdiv(M, TILE_M)
    tile_m, tile_n, segment = gemm._tile_of(tiles_m, tl.cdiv(N, TILE_N), SEGMENTS, SPLIT, GROUP)
    own_m = tl.arange(0, TILE_M)
    own_n = tl.arange(0, TILE_N)
    own_k = tl.arange(0, TILE_K)
    m = tile_m * TILE_M + own_m
    n = tile_n * TILE_N + own_n
    row = tl.minimum(n, N - 1)
    if HAS_ROWS:
        x_base = x_ptr
        token = tl.load(rows_ptr + m, mask=m < M, other=0).to(tl.int32)
        x_offsets = token[:, None] * x_stride + own_k[None, :]
    else:
        x_base = x_ptr + (tile_m * TILE_M).to(tl.int64) * x_stride
        x_offsets = own_m[:, None] * x_stride + own_k[None, :]
    OWN_SEGMENTS: tl.constexpr = 1 if SPLIT else SEGMENTS
    total, total_up = _sums(
        low_ptr, high_ptr, scale_ptr, shift_ptr, super_ptr, super_shift_ptr, table_ptr, x_base, x_offsets, m, row,
        row + N, own_k, M, K, COLUMNS, segment, segment_size, OWN_SEGMENTS, EVEN_K, GATED, BITS, GROUP_SIZE, SHIFT,
        OFFSET, HAS_SUPER, HAS_TABLE, TILE_M, TILE_N, TILE_K,
    )  # fmt: skip
    is_done = True
    if SPLIT:
        tile = tile_n * tiles_m + tile_m
        places = own_n[:, None] * TILE_M + own_m[None, :]
        is_done = gemm._is_last(
            partial_ptr, counter_ptr, tile, segment, places, total, total_up, SEGMENTS, GATED, TILE_M * TILE_N
        )
    if is_done:
        if SPLIT:
            total, total_up = gemm._merged(partial_ptr, counter_ptr, tile, places, SEGMENTS, GATED, TILE_M, TILE_N)
        gemm._finish(
            total, total_up, m, n, M, N, bias_ptr, residual_ptr, residual_stride, out_ptr, out_stride,
            ACTIVATION, GATED, HAS_BIAS, HAS_RESIDUAL,
        )  # fmt: skip


def matmul(
    x: Tensor,
    weight: QuantizedWeight,
    epilogue: Epilogue = PLAIN,
    *,
    rows: Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """As ``gemm.matmul``. Only weights of one segment can be gated.

    Raises:
        NotImplementedError: Activations would be rounded to 8 bits.
    """
    count, n = (len(x) if rows is None else len(rows)), weight.shape[0] // (2 if epilogue.is_gated else 1)
    assert len(weight.segments) == 1 or not epilogue.is_gated
    out = result(out, (count, n), dtype or x.dtype, x)
    product = _product_with(x, weight, rows, config)
    first = 0
    for segment in weight.segments:
        end = first + (n if epilogue.is_gated else segment.rows)
        own = epilogue.part(first, end) if len(weight.segments) > 1 else epilogue
        product(segment, weight.shape[1], own, out[:, first:end])
        first = end
    return out


def _product_with(x: Tensor, weight: QuantizedWeight, rows: Tensor | None, config: Config | None) -> Product:
    """What multiplies the activations, in the form that the weight asks for."""
    if weight.activations == "float":
        return partial(_product, x, rows=rows, config=config)
    if weight.activations not in ROUNDED:
        raise NotImplementedError(
            f"GPUs multiply quantised weights with activations in float, not {weight.activations} "
            "(--quantized-activations float)"
        )
    dtype, product = ROUNDED[weight.activations]
    padded = Layout(1, weight.shape[1], weight.segments[0].encoding).padded
    return partial(product, *per_token.quantized_rows(x, padded, rows, dtype))


def _product(
    x: Tensor,
    segment: Segment,
    k: int,
    epilogue: Epilogue,
    out: Tensor,
    *,
    rows: Tensor | None = None,
    config: Config | None = None,
) -> None:
    layout = Layout(segment.rows, k, segment.encoding)
    count, n = out.shape
    segments = gemm.num_segments(segment.rows, k)
    if config is None:
        config = configs.quantized_gemm(target(), count, x.dtype, layout.bits, epilogue.is_gated)
    args: dict[str, Any] = layout.arguments(segment.data)
    args |= {"x_ptr": x, "bias_ptr": epilogue.bias, "residual_ptr": epilogue.residual, "rows_ptr": rows, "out_ptr": out}
    args |= {"M": count, "N": n, "K": k, "COLUMNS": layout.padded, "segment_size": gemm.segment_size(k, segments)}
    args |= {"x_stride": row_stride(x), "out_stride": row_stride(out)}
    args["residual_stride"] = 0 if epilogue.residual is None else row_stride(epilogue.residual)
    even_k = k % dict(config.tile)["TILE_K"] == 0
    gemm.launch_product(
        quantized_gemm_kernel, args, config, segments, epilogue, x.device, **layout.constants(), EVEN_K=even_k
    )


@triton.jit
def embedding_kernel(
    low_ptr, high_ptr, scale_ptr, shift_ptr, super_ptr, super_shift_ptr, table_ptr, ids_ptr, out_ptr,
    first, rows, width, COLUMNS, out_stride,
    BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, SHIFT: tl.constexpr, OFFSET: tl.constexpr,
    HAS_SUPER: tl.constexpr, HAS_TABLE: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """Rows of one segment of a table: those of other segments are left alone."""
    to = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * TILE_K
    row = tl.load(ids_ptr + to).to(tl.int32) - first
    if (row >= 0) & (row < rows):
        dtype = out_ptr.dtype.element_ty
        values = numbers(
            low_ptr, high_ptr, scale_ptr, shift_ptr, super_ptr, super_shift_ptr, table_ptr,
            row + tl.arange(0, 1), start, COLUMNS,
            BITS, GROUP_SIZE, SHIFT, OFFSET, HAS_SUPER, HAS_TABLE, 1, TILE_K, dtype,
        )  # fmt: skip
        column = (start + tl.arange(0, TILE_K))[None, :]
        tl.store(out_ptr + to * out_stride + column, values, mask=column < width)


def embedding(ids: Tensor, weight: QuantizedWeight, *, out: Tensor | None = None) -> Tensor:
    """The op ``embedding`` of a quantised table."""
    width = weight.shape[1]
    out = result(out, (len(ids), width), weight.dtype, ids)
    first = 0
    for segment in weight.segments:
        layout = Layout(segment.rows, width, segment.encoding)
        args: dict[str, Any] = layout.arguments(segment.data)
        args |= {"ids_ptr": ids, "out_ptr": out, "first": first, "rows": segment.rows, "width": width}
        args |= {"COLUMNS": layout.padded, "out_stride": row_stride(out)}
        config = Config(1, 1, (("TILE_K", COLUMNS),))
        launch(embedding_kernel, (len(ids), layout.padded // COLUMNS), args, config, **layout.constants())
        first += segment.rows
    return out


def empty(encoding: Encoding, rows: int, columns: int) -> QuantizedWeight:
    """A weight without data, as an argument of a case."""
    layout = Layout(rows, columns, encoding)
    data = meta(layout.num_bytes, dtype=torch.uint8)
    return QuantizedWeight((Segment(data, rows, encoding),), (rows, columns), False, torch.bfloat16, "float")


_ENCODINGS = {
    "int4 of 128": Encoding("int4", 128, torch.float16),
    "int4 zeros": Encoding("int4", 128, torch.float16, "zeros"),
    "int8 rows": Encoding("int8", 4096, torch.bfloat16),
    "fp8 rows": Encoding("fp8_e4m3", 4096, torch.float32),
    "mxfp4": Encoding("mxfp4", 32, torch.float8_e8m0fnu),
    **{name: Encoding(name) for name in ("Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")},
}


def cases() -> Iterator[Case]:
    """Calls for the catalogue."""
    options: dict[str, Any] = {"needs_tensor_cores": True, "min_load": 1, "family": "quantised"}
    for name, encoding in _ENCODINGS.items():
        weight = empty(encoding, 4096, 4096)
        for m in (8, 64, 512):
            yield Case(f"{name} m={m}", partial(matmul, meta(m, 4096), weight), **options)
        yield Case(name, partial(embedding, meta(64, dtype=torch.int32), weight), min_load=1)
    weight = empty(Encoding("Q4_K"), 28672, 4096)
    for m in (16, 512):
        gated = Epilogue(activation="silu", is_gated=True)
        yield Case(f"Q4_K gated m={m}", partial(matmul, meta(m, 4096), weight, gated), **options)
