"""Mixtures of experts: the products of all experts in two launches, whatever tokens each one gets.

Which tokens an expert has is only known on the device, so a launch has programs for any distribution, and those without
work end at once. Products are those of ``gemm.py``; a token's results are added in the order of its experts, in
float32. No number of a token depends on others: neither on how many an expert has, nor on their order.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.adapters import ExpertAdapters
from ops.metadata import AdapterRows
from ops.packed import Encoding, ExpertWeights, QuantizedActivations, QuantizedWeight, SwiGLUOAI
from ops.triton import configs, fp8, gemm, per_token, pointwise, quantized
from ops.triton.catalog import Case, meta
from ops.triton.codes import Layout
from ops.triton.configs import Config, power_of_two
from ops.triton.launch import launch, result, row_stride, scratch, target

MOST_TOKENS = 4096
"""Tokens whose results are in memory at the same time."""
_COLUMNS = 1024
_LISTED = 256


@triton.jit(do_not_specialize=["tokens"])
def expert_lists_kernel(
    routed_ptr, lists_ptr, places_ptr, counts_ptr, tokens, routed_stride, EXPERTS: tl.constexpr, TILE: tl.constexpr
):
    """A program per expert lists its tokens in ascending order, and notes the place of each in the list."""
    expert = tl.program_id(0)
    count = expert * 0
    for base in range(0, tokens, TILE):
        token = base + tl.arange(0, TILE)
        weight = tl.load(routed_ptr + token.to(tl.int64) * routed_stride + expert, mask=token < tokens, other=0.0)
        is_chosen = (weight > 0) | (weight < 0)  # not if it is not a number
        ones = is_chosen.to(tl.int32)
        place = count + tl.cumsum(ones, 0) - 1
        tl.store(lists_ptr + expert.to(tl.int64) * tokens + place, token, mask=is_chosen)
        tl.store(places_ptr + token.to(tl.int64) * EXPERTS + expert, place, mask=is_chosen)
        count += tl.sum(ones, 0)
    tl.store(counts_ptr + expert, count)


@triton.jit
def _item(counts_ptr, item, EXPERTS: tl.constexpr, EXPERTS_TILE: tl.constexpr, TILE_M: tl.constexpr):
    """The expert of a tile (EXPERTS or more: there is no such tile), its place there, and the expert's rows: how many,
    and those of all experts before."""
    expert = tl.arange(0, EXPERTS_TILE)
    count = tl.load(counts_ptr + expert, mask=expert < EXPERTS, other=0)
    tiles = tl.cdiv(count, TILE_M)
    ends = tl.cumsum(tiles, 0)
    own = tl.sum((ends <= item).to(tl.int32), 0)
    tile_m = item - tl.sum(tl.where(expert == own, ends - tiles, 0), 0)
    M = tl.sum(tl.where(expert == own, count, 0), 0)
    return own, tile_m, M, tl.sum(tl.where(expert < own, count, 0), 0).to(tl.int64)


@triton.jit
def _rows_of(x_ptr, lists_ptr, own, tokens, m, M, first, own_k, x_stride, GATHERS: tl.constexpr):
    """Where the rows of an expert are, and the offsets of a tile of them."""
    x_base = x_ptr
    if GATHERS:
        token = tl.load(lists_ptr + own.to(tl.int64) * tokens + m, mask=m < M, other=0)
        x_offsets = token[:, None] * x_stride + own_k[None, :]
    else:
        x_base = x_ptr + first * x_stride
        x_offsets = m[:, None] * x_stride + own_k[None, :]
    return x_base, x_offsets


@triton.jit(do_not_specialize=["tokens"])
def expert_gemm_kernel(
    w_ptr, weights_ptr, bias_ptr, biases_ptr, x_ptr, lists_ptr, counts_ptr, out_ptr, tokens, N, K, segment_size,
    w_stride, x_stride, out_stride, GATHERS: tl.constexpr, EXPERTS: tl.constexpr, EXPERTS_TILE: tl.constexpr,
    SEGMENTS: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """As ``gemm_kernel``. Results lie expert by expert; ``GATHERS``: the rows of x are tokens, else they lie likewise.

    ``w_ptr`` and ``bias_ptr`` are those of the first expert; ``weights_ptr`` and ``biases_ptr`` say how many times 16
    bytes from there those of all others are.
    """
    tiles_n = tl.cdiv(N, TILE_N)
    tile_n = tl.program_id(0) % tiles_n
    own, tile_m, M, first = _item(counts_ptr, tl.program_id(0) // tiles_n, EXPERTS, EXPERTS_TILE, TILE_M)
    if own < EXPERTS:
        own_n = tl.arange(0, TILE_N)
        own_k = tl.arange(0, TILE_K)
        m = tile_m * TILE_M + tl.arange(0, TILE_M)
        n = tile_n * TILE_N + own_n
        w_base = _moved(w_ptr, tl.load(weights_ptr + own)) + (tile_n * TILE_N).to(tl.int64) * w_stride
        w_offsets = own_n[:, None] * w_stride + own_k[None, :]
        up_base = w_base + tl.full([], N, tl.int64) * w_stride
        x_base, x_offsets = _rows_of(x_ptr, lists_ptr, own, tokens, m, M, first, own_k, x_stride, GATHERS)
        total, total_up = gemm._sums(
            w_base, up_base, w_offsets, x_base, x_offsets, m, n, own_k, M, N, K, 0, segment_size,
            SEGMENTS, EVEN_N, EVEN_K, GATED, TILE_M, TILE_N, TILE_K,
        )  # fmt: skip
        bias = x_ptr
        if biases_ptr is not None:
            bias = _moved(bias_ptr, tl.load(biases_ptr + own))
        gemm._finish(
            total, total_up, m, n, M, N, bias, None, 0, out_ptr + first * out_stride, out_stride,
            ACTIVATION, GATED, biases_ptr is not None, False,
        )  # fmt: skip


@triton.jit
def _moved(pointer, distance):
    """A pointer so many times 16 bytes further."""
    return pointer + distance * (128 // pointer.dtype.element_ty.primitive_bitwidth)


@triton.jit
def _moved_field(pointer, distance):
    """Likewise of a field that not all formats have."""
    result = pointer
    if pointer is not None:
        result = _moved(pointer, distance)
    return result


@triton.jit(do_not_specialize=["tokens"])
def quantized_expert_gemm_kernel(
    low_ptr, high_ptr, scale_ptr, shift_ptr, super_ptr, super_shift_ptr, table_ptr, weights_ptr, bias_ptr, biases_ptr,
    x_ptr, lists_ptr, counts_ptr, out_ptr, tokens, N, K, COLUMNS, segment_size, x_stride, out_stride,
    GATHERS: tl.constexpr, EXPERTS: tl.constexpr, EXPERTS_TILE: tl.constexpr, SEGMENTS: tl.constexpr,
    EVEN_K: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, SHIFT: tl.constexpr, OFFSET: tl.constexpr,
    HAS_SUPER: tl.constexpr, HAS_TABLE: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """As ``expert_gemm_kernel``, with the weights of ``quantized_gemm_kernel``. All have the first one's table."""
    tiles_n = tl.cdiv(N, TILE_N)
    own, tile_m, M, first = _item(counts_ptr, tl.program_id(0) // tiles_n, EXPERTS, EXPERTS_TILE, TILE_M)
    if own < EXPERTS:
        own_k = tl.arange(0, TILE_K)
        m = tile_m * TILE_M + tl.arange(0, TILE_M)
        n = (tl.program_id(0) % tiles_n) * TILE_N + tl.arange(0, TILE_N)
        row = tl.minimum(n, N - 1)
        x_base, x_offsets = _rows_of(x_ptr, lists_ptr, own, tokens, m, M, first, own_k, x_stride, GATHERS)
        distance = tl.load(weights_ptr + own)
        total, total_up = quantized._sums(
            _moved(low_ptr, distance), _moved_field(high_ptr, distance), _moved(scale_ptr, distance),
            _moved_field(shift_ptr, distance), _moved_field(super_ptr, distance),
            _moved_field(super_shift_ptr, distance), table_ptr, x_base, x_offsets, m, row, row + N, own_k, M, K,
            COLUMNS, 0, segment_size, SEGMENTS, EVEN_K, GATED, BITS, GROUP_SIZE, SHIFT, OFFSET, HAS_SUPER, HAS_TABLE,
            TILE_M, TILE_N, TILE_K,
        )  # fmt: skip
        bias = x_ptr
        if biases_ptr is not None:
            bias = _moved(bias_ptr, tl.load(biases_ptr + own))
        gemm._finish(
            total, total_up, m, n, M, N, bias, None, 0, out_ptr + first * out_stride, out_stride,
            ACTIVATION, GATED, biases_ptr is not None, False,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def rounded_expert_gemm_kernel(
    w_ptr, w_scale_ptr, weights_ptr, bias_ptr, biases_ptr, x_ptr, x_scale_ptr, lists_ptr, counts_ptr, out_ptr,
    tokens, N, padded, out_stride, GATHERS: tl.constexpr, EXPERTS: tl.constexpr, EXPERTS_TILE: tl.constexpr,
    GROUPED: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """As ``expert_gemm_kernel``, with the products of ``per_token_gemm_kernel`` or ``fp8_gemm_kernel``."""
    tiles_n = tl.cdiv(N, TILE_N)
    own, tile_m, M, first = _item(counts_ptr, tl.program_id(0) // tiles_n, EXPERTS, EXPERTS_TILE, TILE_M)
    if own < EXPERTS:
        own_k = tl.arange(0, TILE_K)
        m = tile_m * TILE_M + tl.arange(0, TILE_M)
        n = (tl.program_id(0) % tiles_n) * TILE_N + tl.arange(0, TILE_N)
        row = tl.minimum(n, N - 1)
        source = first + tl.minimum(m, M - 1)
        if GATHERS:
            source = tl.load(lists_ptr + own.to(tl.int64) * tokens + m, mask=m < M, other=0).to(tl.int64)
        x_places = x_ptr + (source * padded)[:, None] + own_k[None, :]
        distance = tl.load(weights_ptr + own)
        w_base = _moved(w_ptr, distance)
        w_places = w_base + (row.to(tl.int64) * padded)[:, None] + own_k[None, :]
        up_places = w_base + ((row + N).to(tl.int64) * padded)[:, None] + own_k[None, :]
        w_scales = _moved(w_scale_ptr, distance)
        if x_ptr.dtype.element_ty == tl.int8:
            total, total_up = per_token.scaled_sums(
                w_places, up_places, w_scales, x_places, x_scale_ptr + source, m < M, row, N, padded, False, GATED,
                TILE_M, TILE_N, TILE_K,
            )  # fmt: skip
        else:
            total, total_up = fp8.scaled_sums(
                w_places, up_places, w_scales, x_places, x_scale_ptr + source, m < M, row, N, padded, GROUPED, GATED,
                TILE_M, TILE_N, TILE_K,
            )  # fmt: skip
        bias = out_ptr
        if biases_ptr is not None:
            bias = _moved(bias_ptr, tl.load(biases_ptr + own))
        gemm._finish(
            total, total_up, m, n, M, N, bias, None, 0, out_ptr + first * out_stride, out_stride,
            ACTIVATION, GATED, biases_ptr is not None, False,
        )  # fmt: skip


@triton.jit
def _choices(routed_ptr, places_ptr, counts_ptr, token, routed_stride, EXPERTS: tl.constexpr, TILE: tl.constexpr):
    """All experts, the weight of each for a token, whether it is chosen, and the row of its result."""
    expert = tl.arange(0, TILE)
    known = expert < EXPERTS
    weight = tl.load(routed_ptr + token * routed_stride + expert, mask=known, other=0.0)
    is_chosen = (weight > 0) | (weight < 0)
    count = tl.load(counts_ptr + expert, mask=known, other=0)
    place = tl.load(places_ptr + token * EXPERTS + expert, mask=is_chosen, other=0) + tl.cumsum(count, 0) - count
    return expert, weight, is_chosen, place


@triton.jit
def expert_inputs_kernel(
    x_ptr, routed_ptr, places_ptr, counts_ptr, out_ptr, width, x_stride, routed_stride,
    EXPERTS: tl.constexpr, EXPERTS_TILE: tl.constexpr, TOP_K: tl.constexpr, COLUMNS_TILE: tl.constexpr,
):  # fmt: skip
    """A token times the weight of each of its experts, to where the expert's rows are."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS_TILE + tl.arange(0, COLUMNS_TILE)
    mask = column < width
    expert, weight, is_left, place = _choices(
        routed_ptr, places_ptr, counts_ptr, token, routed_stride, EXPERTS, EXPERTS_TILE
    )
    x = tl.load(x_ptr + token * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    for _ in range(TOP_K):
        own = tl.min(tl.where(is_left, expert, EXPERTS_TILE), 0)
        row = tl.sum(tl.where(expert == own, place, 0), 0).to(tl.int64)
        factor = tl.sum(tl.where(expert == own, weight, 0.0), 0)
        is_real = column * 0 + own < EXPERTS
        tl.store(out_ptr + row * width + column, (x * factor).to(out_ptr.dtype.element_ty), mask=mask & is_real)
        is_left = is_left & (expert != own)


@triton.jit
def expert_sums_kernel(
    results_ptr, routed_ptr, places_ptr, counts_ptr, shared_ptr, gate_ptr, out_ptr, width, routed_stride, shared_stride,
    gate_stride, out_stride,
    EXPERTS: tl.constexpr, EXPERTS_TILE: tl.constexpr, TOP_K: tl.constexpr, IS_WEIGHTED: tl.constexpr,
    COLUMNS_TILE: tl.constexpr,
):  # fmt: skip
    """A token's results times their weights (``IS_WEIGHTED``: they are already), in the order of its experts."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS_TILE + tl.arange(0, COLUMNS_TILE)
    mask = column < width
    expert, weight, is_left, place = _choices(
        routed_ptr, places_ptr, counts_ptr, token, routed_stride, EXPERTS, EXPERTS_TILE
    )
    if IS_WEIGHTED:
        weight = tl.where(is_left, 1.0, 0.0)
    total = tl.zeros([COLUMNS_TILE], tl.float32)
    for _ in range(TOP_K):
        own = tl.min(tl.where(is_left, expert, EXPERTS_TILE), 0)
        row = tl.sum(tl.where(expert == own, place, 0), 0).to(tl.int64)
        factor = tl.sum(tl.where(expert == own, weight, 0.0), 0)
        is_real = column * 0 + own < EXPERTS
        value = tl.load(results_ptr + row * width + column, mask=mask & is_real, other=0.0)
        total = tl.where(is_real, tl.fma(value, tl.zeros_like(value) + factor, total), total)
        is_left = is_left & (expert != own)
    if shared_ptr is not None:
        value = tl.load(shared_ptr + token * shared_stride + column, mask=mask, other=0.0).to(tl.float32)
        factor = 1.0
        if gate_ptr is not None:
            factor = 1.0 / (1.0 + tl.exp(-tl.load(gate_ptr + token * gate_stride)))
        total = tl.fma(value, tl.zeros_like(value) + factor, total)
    tl.store(out_ptr + token * out_stride + column, total.to(out_ptr.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------------------------------------------------
# launches


class _Distances:
    """Of the weights and biases of a layer's experts from those of the first one, on the device."""

    def __init__(self, weights: ExpertWeights) -> None:
        self.gate_up = _distances(weights.gate_up)
        self.down = _distances(weights.down)
        self.gate_up_bias = None if weights.gate_up_bias is None else _distances(weights.gate_up_bias)
        self.down_bias = None if weights.down_bias is None else _distances(weights.down_bias)


_known: weakref.WeakKeyDictionary[ExpertWeights, _Distances] = weakref.WeakKeyDictionary()


def _distances(weights: Sequence[Any]) -> Tensor:
    """int64 [weights], in units of 16 bytes."""
    tensors = [each.segments[0].data if isinstance(each, QuantizedWeight) else each for each in weights]
    places = [0 if tensor.is_meta else tensor.data_ptr() for tensor in tensors]
    assert all((place - places[0]) % 16 == 0 for place in places), "memory of weights is aligned"
    distances = [(place - places[0]) // 16 for place in places]
    return scratch.keep(torch.tensor(distances, dtype=torch.int64, device=tensors[0].device))


def _check(weights: ExpertWeights) -> None:
    """Refuses experts that there are no kernels for."""
    if weights.has_orders:
        raise NotImplementedError(
            "GPUs do not multiply with experts quantised by GPTQ with desc_act yet (--quantization none converts them)"
        )
    for each in (weights.gate_up, weights.down):
        formats = {_format(weight) for weight in each}
        if len(formats) > 1 or len(formats.pop()) > 1:
            raise NotImplementedError(
                "GPUs do not multiply with experts in several formats yet (--quantization none converts them)"
            )
        kinds = {weight.activations for weight in each if isinstance(weight, QuantizedWeight)}
        if len(kinds) > 1 or kinds - {"float", *quantized.ROUNDED}:
            raise NotImplementedError(
                f"GPUs do not multiply quantised experts with activations in {' and '.join(sorted(kinds))} "
                "(--quantized-activations float)"
            )


def _format(weight: Any) -> tuple[Encoding | torch.dtype, ...]:
    """How the rows of a weight are written."""
    if isinstance(weight, QuantizedWeight):
        return tuple(segment.encoding for segment in weight.segments)
    return (weight.dtype,)


def experts(
    x: Tensor,
    routed: Tensor,
    weights: ExpertWeights,
    shared: Tensor | None = None,
    shared_gate: Tensor | None = None,
    adapters: ExpertAdapters | None = None,
    rows: AdapterRows | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The op ``experts``, in four launches for each MOST_TOKENS tokens, or five if weights multiply the inputs.

    Raises:
        NotImplementedError: There are no kernels for such experts.
    """
    if adapters is not None:
        raise NotImplementedError("GPUs do not compute with adapters of experts yet")
    out = result(out, tuple(x.shape), x.dtype, x)
    if weights not in _known:
        _check(weights)
        _known[weights] = _Distances(weights)
    for begin in range(0, len(x), MOST_TOKENS):
        part = slice(begin, begin + MOST_TOKENS)
        own, gate = (None if each is None else each[part] for each in (shared, shared_gate))
        _experts(x[part], routed[part], weights, own, gate, out[part])
    return out


def _experts(
    x: Tensor, routed: Tensor, weights: ExpertWeights, shared: Tensor | None, gate: Tensor | None, out: Tensor
) -> None:
    tokens, count = routed.shape
    hidden, inner = weights.down[0].shape
    rows = tokens * weights.top_k
    lists, places = (scratch.get(f"experts.{name}", tokens * count, torch.int32, x.device) for name in ("a", "b"))
    counts = scratch.get("experts.counts", count, torch.int32, x.device)
    args: dict[str, Any] = {"routed_ptr": routed, "routed_stride": row_stride(routed), "places_ptr": places}
    args["counts_ptr"] = counts
    listing = Config(4, 1, (("TILE", _LISTED),))
    launch(expert_lists_kernel, (count,), args | {"lists_ptr": lists, "tokens": tokens}, listing, EXPERTS=count)
    known = _known[weights]
    middle = scratch.get(f"experts.inner {x.dtype}", rows * inner, x.dtype, x.device)[: rows * inner].view(rows, inner)
    results = scratch.get("experts.results", rows * hidden, torch.float32, x.device)[: rows * hidden].view(rows, hidden)
    gemm_args = {"lists_ptr": lists, "counts_ptr": counts, "tokens": tokens}
    gate_up = {"weights_ptr": known.gate_up, "biases_ptr": known.gate_up_bias, "bias_ptr": None}
    down = {"weights_ptr": known.down, "biases_ptr": known.down_bias, "bias_ptr": None}
    if weights.gate_up_bias is not None and weights.down_bias is not None:
        gate_up["bias_ptr"], down["bias_ptr"] = weights.gate_up_bias[0], weights.down_bias[0]
    tile = Config(4, 1, (("COLUMNS_TILE", _COLUMNS),))
    choice = {"EXPERTS": count, "EXPERTS_TILE": power_of_two(count), "TOP_K": weights.top_k}
    grid = (tokens, triton.cdiv(hidden, _COLUMNS))
    if weights.scales_input:
        name = f"experts.inputs {x.dtype}"
        inputs = scratch.get(name, rows * hidden, x.dtype, x.device)[: rows * hidden].view(rows, hidden)
        own = {"x_ptr": x, "out_ptr": inputs, "width": hidden, "x_stride": row_stride(x)}
        launch(expert_inputs_kernel, grid, args | own, tile, **choice)
        x = inputs
    first = Follower(pointwise.kernel_name(weights.activation), weights.is_gated)
    _product(x, weights.gate_up[0], middle, gemm_args | gate_up, count, first, gathers=not weights.scales_input)
    _product(middle, weights.down[0], results, gemm_args | down, count, Follower(), gathers=False)
    args |= {"results_ptr": results, "shared_ptr": shared, "gate_ptr": gate, "out_ptr": out, "width": hidden}
    args |= {"shared_stride": 0 if shared is None else row_stride(shared), "out_stride": row_stride(out)}
    args["gate_stride"] = 0 if gate is None else row_stride(gate)
    launch(expert_sums_kernel, grid, args, tile, **choice, IS_WEIGHTED=weights.scales_input)


@dataclass(frozen=True)
class Follower:
    """What follows a product of experts."""

    activation: str = "none"
    """As kernels call it."""
    is_gated: bool = False


def _product(
    x: Tensor,
    weight: Any,
    out: Tensor,
    args: dict[str, Any],
    count: int,
    follower: Follower,
    *,
    gathers: bool,
) -> None:
    """One projection of all experts. ``gathers``: rows of x are tokens; each expert's are listed."""
    rows, n, k = *out.shape, x.shape[1]
    segments = gemm.num_segments(weight.shape[0], k)
    is_gated = follower.is_gated
    usual = max(1, rows // count)
    is_tight = _is_tight(follower, gathers=gathers)
    constants: dict[str, Any] = {}
    given = args | {"x_ptr": x, "out_ptr": out, "N": n, "K": k, "segment_size": gemm.segment_size(k, segments)}
    given |= {"x_stride": row_stride(x), "out_stride": row_stride(out)}
    if isinstance(weight, QuantizedWeight) and weight.activations != "float":
        _rounded_product(x, weight, out, args, count, follower, gathers=gathers)
        return
    if isinstance(weight, QuantizedWeight):
        (segment,) = weight.segments
        layout = Layout(segment.rows, k, segment.encoding)
        # Numbers from a table take registers as well.
        is_looked_up = is_gated and layout.has_table
        usual = min(usual, 32) if is_tight or is_looked_up else usual
        config = configs.quantized_gemm(target(), usual, x.dtype, layout.bits, is_gated)
        if is_tight:
            config = replace(config, num_warps=8)
        if is_looked_up:
            tile = dict(config.tile) | {"TILE_K": 32 if is_tight else 64}
            config = replace(config, tile=tuple(tile.items()))
        given |= {**layout.arguments(segment.data), "COLUMNS": layout.padded}
        kernel, constants = quantized_expert_gemm_kernel, layout.constants()
    else:
        usual = min(usual, 64) if is_tight else usual
        config = configs.gemm(target(), usual, k, x.dtype, segments, follower.activation, is_gated, True)
        if is_tight and not is_gated and dict(config.tile)["TILE_M"] == 64:
            config = replace(config, num_warps=8)
        given |= {"w_ptr": weight, "w_stride": row_stride(weight)}
        kernel, constants = expert_gemm_kernel, {"EVEN_N": n % dict(config.tile)["TILE_N"] == 0}
    tile = dict(config.tile)
    items = min(rows, rows // tile["TILE_M"] + count)
    launch(
        kernel,
        (items * triton.cdiv(n, tile["TILE_N"]),),
        given,
        config,
        GATHERS=gathers,
        EXPERTS=count,
        EXPERTS_TILE=power_of_two(count),
        SEGMENTS=segments,
        EVEN_K=k % tile["TILE_K"] == 0,
        ACTIVATION=follower.activation,
        GATED=is_gated,
        **constants,
    )


def _is_tight(follower: Follower, *, gathers: bool) -> bool:
    """Whether registers are few: two tiles of sums, or the addresses of rows, are all in registers without wgmma."""
    return (follower.is_gated or gathers) and target().backend == "cuda" and not target().has_wgmma


def _rounded_product(
    x: Tensor,
    weight: QuantizedWeight,
    out: Tensor,
    args: dict[str, Any],
    count: int,
    follower: Follower,
    *,
    gathers: bool,
) -> None:
    """As ``_product``, with activations rounded to 8 bits: a token's once for all its experts."""
    (rows, n), (segment,) = out.shape, weight.segments
    layout = Layout(segment.rows, x.shape[1], segment.encoding)
    dtype, _ = quantized.ROUNDED[weight.activations]
    codes, scales = per_token.quantized_rows(x, layout.padded, None, dtype)
    choose = per_token.config_of if dtype == torch.int8 else fp8.config_of
    usual, is_tight = max(1, rows // count), _is_tight(follower, gathers=gathers)
    config = choose(min(usual, 32) if is_tight else usual, is_gated=follower.is_gated)
    if is_tight and usual > 16:
        config = replace(config, num_warps=8)
    tile = dict(config.tile)
    given = args | {"x_ptr": codes, "x_scale_ptr": scales, "out_ptr": out, "N": n, "padded": layout.padded}
    given |= {"w_ptr": layout.view(segment.data, "low"), "w_scale_ptr": layout.view(segment.data, "scale")}
    items = min(rows, rows // tile["TILE_M"] + count)
    launch(
        rounded_expert_gemm_kernel,
        (items * triton.cdiv(n, tile["TILE_N"]),),
        given | {"out_stride": row_stride(out)},
        config,
        GATHERS=gathers,
        EXPERTS=count,
        EXPERTS_TILE=power_of_two(count),
        GROUPED=layout.group_size > 0,
        ACTIVATION=follower.activation,
        GATED=follower.is_gated,
    )


def cases() -> Iterator[Case]:
    """Calls for the catalogue."""
    shapes = {"8 of 128": (2048, 768, 128, 8), "2 of 8": (4096, 14336, 8, 2)}
    for name, (hidden, inner, count, top_k) in shapes.items():
        weights = ExpertWeights(
            (meta(2 * inner, hidden),) * count, (meta(hidden, inner),) * count, None, None, "silu", top_k
        )
        for tokens in (8, 512, 4096):
            x, routed = meta(tokens, hidden), meta(tokens, count, dtype=torch.float32)
            yield Case(f"{name} m={tokens}", partial(experts, x, routed, weights, x), min_load=4, family="bf16")
    for name, encoding in {"int4 of 128": Encoding("int4", 128, torch.float16), "Q4_K": Encoding("Q4_K")}.items():
        gate_up, down = (quantized.empty(encoding, *shape) for shape in ((1536, 2048), (2048, 768)))
        weights = ExpertWeights((gate_up,) * 128, (down,) * 128, None, None, "silu", 8)
        for tokens in (8, 1024):
            x, routed = meta(tokens, 2048), meta(tokens, 128, dtype=torch.float32)
            yield Case(f"{name} m={tokens}", partial(experts, x, routed, weights), min_load=1, family="quantised")
    kinds: dict[str, tuple[Encoding, QuantizedActivations]] = {
        "fp8 blocks": (Encoding("fp8_e4m3", fp8.COLUMNS, torch.float32), "fp8_per_token"),
        "fp8 rows": (Encoding("fp8_e4m3", 4096, torch.float32), "fp8_per_token"),
        "int8 rows": (Encoding("int8", 4096, torch.bfloat16), "int8_per_token"),
    }
    for name, (encoding, activations) in kinds.items():
        targets = None if activations == "int8_per_token" else fp8.TARGETS_WITH_PRODUCTS
        rounded = [
            tuple(replace(quantized.empty(encoding, *shape), activations=activations) for _ in range(128))
            for shape in ((1536, 2048), (2048, 768))
        ]
        weights = ExpertWeights(rounded[0], rounded[1], None, None, "silu", 8)
        for tokens in (8, 1024):
            x, routed = meta(tokens, 2048), meta(tokens, 128, dtype=torch.float32)
            call = partial(experts, x, routed, weights)
            yield Case(f"{name} m={tokens}", call, min_load=2, family=name, targets=targets)
    yield from _cases_of_families()


def _cases_of_families() -> Iterator[Case]:
    """Experts that differ: those of gpt-oss, of Llama 4, and without gates."""
    mxfp4 = Encoding("mxfp4", 32, torch.float8_e8m0fnu)
    gate_up, down = (quantized.empty(mxfp4, *shape) for shape in ((5760, 2880), (2880, 2880)))
    biases = (meta(5760),) * 32, (meta(2880),) * 32
    of_gpt_oss = ExpertWeights((gate_up,) * 32, (down,) * 32, *biases, SwiGLUOAI(), 4)
    plain = (meta(16384, 5120),) * 16, (meta(5120, 8192),) * 16
    of_llama4 = ExpertWeights(*plain, None, None, "silu", 1, scales_input=True)
    without_gates = (meta(1856, 2688),) * 128, (meta(2688, 1856),) * 128
    others = ExpertWeights(*without_gates, None, None, "relu2", 6)
    kinds = {"gpt-oss": (of_gpt_oss, 2880), "llama 4": (of_llama4, 5120), "relu2": (others, 2688)}
    for name, (weights, hidden) in kinds.items():
        family, least = ("quantised", 1) if weights is of_gpt_oss else ("bf16", 4)
        for tokens in (8, 2048):
            x, routed = meta(tokens, hidden), meta(tokens, len(weights.down), dtype=torch.float32)
            call = partial(experts, x, routed, weights)
            yield Case(f"{name} m={tokens}", call, min_load=least, family=family)
