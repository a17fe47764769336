"""Ops on one number at a time, in float32 and rounded where the references round."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.packed import GatedActivation, SwiGLUOAI
from ops.triton.catalog import Case, meta
from ops.triton.configs import Config
from ops.triton.launch import launch, result, row_stride

_CONFIG = Config(num_warps=4, num_stages=1, tile=(("COLUMNS_TILE", 1024),))


@triton.jit
def tanh(x):
    """Exact to the last digits; neither end overflows."""
    small = x - x * x * x * (1.0 / 3.0)
    return tl.where(tl.abs(x) < 0.01, small, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def activate(x, KIND: tl.constexpr):
    """An activation function of float32 numbers, unrounded."""
    if KIND == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif KIND == "relu":
        y = tl.maximum(x, 0.0)
    elif KIND == "relu2":
        y = tl.maximum(x, 0.0)
        y = y * y
    elif KIND == "sigmoid":
        y = 1.0 / (1.0 + tl.exp(-x))
    elif KIND == "quick_gelu":
        y = x / (1.0 + tl.exp(-1.702 * x))
    elif KIND == "gelu_tanh":
        y = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    else:
        tl.static_assert(KIND == "gelu")
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return y


def kernel_name(activation: GatedActivation | str) -> str:
    """What kernels call a gated activation: its name, then its numbers."""
    return f"swiglu {activation.alpha} {activation.limit}" if isinstance(activation, SwiGLUOAI) else activation


@triton.constexpr_function
def _is_swiglu(kind: str) -> bool:
    return kind.startswith("swiglu ")


@triton.constexpr_function
def _number(kind: str, index: int) -> float:
    return float(kind.split()[1 + index])


@triton.jit
def gated(gate, up, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """``act(gate) * up``, rounded after each of the two. All in float32."""
    if _is_swiglu(KIND):
        ALPHA: tl.constexpr = _number(KIND, 0)
        LIMIT: tl.constexpr = _number(KIND, 1)
        gate = tl.where(gate > LIMIT, LIMIT, gate)  # what is not a number stays so
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up)) + 1.0
        active = gate / (1.0 + tl.exp(-ALPHA * gate))
    else:
        active = activate(gate, KIND)
    return active.to(DTYPE).to(tl.float32) * up


@triton.jit
def pointwise_kernel(
    x_ptr,
    y_ptr,
    out_ptr,
    width,
    x_stride,
    y_stride,
    out_stride,
    parameter,
    OP: tl.constexpr,
    COLUMNS_TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS_TILE + tl.arange(0, COLUMNS_TILE)
    mask = column < width
    dtype = out_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    if OP == "add" or OP == "multiply":
        y = tl.load(y_ptr + row * y_stride + column, mask=mask, other=0.0).to(tl.float32)
        if OP == "add":
            z = x + y
        elif OP == "multiply":
            z = x * y
    elif OP == "scale":
        z = x * parameter
    elif OP == "softcap":
        z = tanh(x / parameter) * parameter
    elif OP == "clip":
        limit = tl.full([COLUMNS_TILE], parameter, tl.float32).to(dtype).to(tl.float32)
        z = tl.where(x != x, x, tl.minimum(tl.maximum(x, -limit), limit))
    else:
        z = activate(x, OP)
    tl.store(out_ptr + row * out_stride + column, z.to(dtype), mask=mask)


@triton.jit
def act_and_mul_kernel(
    x_ptr,
    out_ptr,
    width,
    x_stride,
    out_stride,
    KIND: tl.constexpr,
    COLUMNS_TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS_TILE + tl.arange(0, COLUMNS_TILE)
    mask = column < width
    dtype = out_ptr.dtype.element_ty
    gate = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + width + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_stride + column, gated(gate, up, KIND, dtype).to(dtype), mask=mask)


def _pointwise(op: str, x: Tensor, y: Tensor | None, parameter: float, out: Tensor | None) -> Tensor:
    out = result(out, tuple(x.shape), x.dtype, x)
    rows, width = x.shape
    args = {
        "x_ptr": x,
        "y_ptr": y,
        "out_ptr": out,
        "width": width,
        "x_stride": row_stride(x),
        "y_stride": 0 if y is None or y.dim() == 1 else row_stride(y),
        "out_stride": row_stride(out),
        "parameter": parameter,
    }
    launch(pointwise_kernel, _grid(rows, width), args, _CONFIG, OP=op)
    return out


def _grid(rows: int, width: int) -> tuple[int, int]:
    return rows, triton.cdiv(width, dict(_CONFIG.tile)["COLUMNS_TILE"])


def add(x: Tensor, y: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The op ``add``."""
    return _pointwise("add", x, y, 0.0, out)


def multiply(x: Tensor, y: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The op ``multiply``."""
    return _pointwise("multiply", x, y, 0.0, out)


def scale(x: Tensor, factor: float, *, out: Tensor | None = None) -> Tensor:
    """The op ``scale``."""
    return _pointwise("scale", x, None, float(factor), out)


def softcap(x: Tensor, cap: float, *, out: Tensor | None = None) -> Tensor:
    """The op ``softcap``."""
    return _pointwise("softcap", x, None, float(cap), out)


def clip(x: Tensor, limit: float, *, out: Tensor | None = None) -> Tensor:
    """The op ``clip``."""
    return _pointwise("clip", x, None, float(limit), out)


def activation(x: Tensor, kind: str, *, out: Tensor | None = None) -> Tensor:
    """The op ``activation``."""
    return _pointwise(kind, x, None, 0.0, out)


def act_and_mul(x: Tensor, activation: GatedActivation | str, *, out: Tensor | None = None) -> Tensor:
    """The op ``act_and_mul``."""
    rows, width = x.shape[0], x.shape[1] // 2
    out = result(out, (rows, width), x.dtype, x)
    args = {"x_ptr": x, "out_ptr": out, "width": width, "x_stride": row_stride(x), "out_stride": row_stride(out)}
    launch(act_and_mul_kernel, _grid(rows, width), args, _CONFIG, KIND=kernel_name(activation))
    return out


def cases() -> Iterator[Case]:
    """Calls for the catalogue."""
    x, logits = meta(16, 4096), meta(16, 128256, dtype=torch.float32)
    calls: dict[str, Any] = {
        "add": partial(add, x, x),
        "add a row": partial(add, x, meta(4096)),
        "multiply": partial(multiply, x, x),
        "scale": partial(scale, x, 0.5),
        "scale logits": partial(scale, logits, 0.5),
        "softcap": partial(softcap, logits, 30.0),
        "clip": partial(clip, x, 8.0),
    }
    for kind in ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2"):
        calls[kind] = partial(activation, x, kind)
    gated_kinds: dict[str, GatedActivation] = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_tanh"}
    for name, each in (gated_kinds | {"swiglu": SwiGLUOAI()}).items():
        calls[f"gated {name}"] = partial(act_and_mul, x, each)
    for name, call in calls.items():
        yield Case(name, call)
