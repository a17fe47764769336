"""Embedding lookup, linear layers, activations and row selection."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.dispatch import Spec, StepInput, Value, like_first, op
from ops.packed import GatedActivation, PackedWeight, QuantizedWeight, SwiGLUOAI, Weight
from ops.reference import quantized

Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "sigmoid"]
"""relu2: the square of relu; quick_gelu: ``x * sigmoid(1.702 * x)``."""


@op(lambda ids, weight: Spec(ids.spec.rows, weight.shape[1], weight.dtype))
def embedding(ids: Tensor, weight: Weight) -> Tensor:
    """Rows of an embedding table.

    Args:
        ids: int32 or int64 [num_tokens].
        weight: [vocab_size, hidden_size], packed or not, quantised or not.

    Returns:
        [num_tokens, hidden_size] in the table's dtype.
    """
    if isinstance(weight, QuantizedWeight):
        return quantized.embedding(ids, weight)
    return F.embedding(ids, plain(weight))


@op(lambda x, weight, bias=None: Spec(x.spec.rows, weight.shape[0], x.spec.dtype))
def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, accumulated in float32 and rounded once.

    Args:
        x: [rows, in_features].
        weight: [out_features, in_features], as returned by ``pack_linear`` or by one of the functions that make a
            ``QuantizedWeight``.
        bias: [out_features] or None.

    Returns:
        [rows, out_features] in the type of ``x``.
    """
    if isinstance(weight, QuantizedWeight):
        return quantized.linear(x, weight, bias)
    return F.linear(x, plain(weight), bias)


@op(lambda x, weight, bias=None: Spec(x.spec.rows, weight.shape[0], torch.float32))
def logits(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` as float32 [rows, vocab_size].

    Kernels return their float32 accumulators; the reference rounds to the dtype of ``x`` on the way, as torch does.
    """
    if isinstance(weight, QuantizedWeight):
        return quantized.logits(x, weight, bias)
    return F.linear(x, plain(weight), bias).float()


@op(like_first)
def add(x: Tensor, y: Tensor) -> Tensor:
    """``x + y``, both [rows, width] of one dtype, or ``y`` [width] broadcast over the rows."""
    return torch.add(x, y)


@op(lambda x, y: Spec(x.spec.rows, x.spec.width + y.spec.width, x.spec.dtype))
def concat(x: Tensor, y: Tensor) -> Tensor:
    """The columns of x [rows, width], then those of y [rows, other width], in the same dtype."""
    return torch.cat((x, y), -1)


@op(like_first)
def multiply(x: Tensor, y: Tensor) -> Tensor:
    """``x * y``, element by element."""
    return x * y


@op(like_first)
def scale(x: Tensor, factor: float) -> Tensor:
    """``x * factor`` [rows, width], in float32 and rounded once."""
    return x * factor


@op(like_first)
def softcap(x: Tensor, cap: float) -> Tensor:
    """``cap * tanh(x / cap)``: limits x, float32 [rows, width], to the range of plus and minus ``cap``."""
    return torch.tanh(x / cap) * cap


@op(like_first)
def clip(x: Tensor, limit: float) -> Tensor:
    """x [rows, width] limited to the range of plus and minus ``limit``, which is rounded to the dtype of ``x``."""
    return x.clamp(-limit, limit)


@op(lambda x, activation: Spec(x.spec.rows, x.spec.width // 2, x.spec.dtype))
def act_and_mul(x: Tensor, activation: GatedActivation) -> Tensor:
    """``act(x[:, :half]) * x[:, half:]``: the gated activation of an MLP.

    Args:
        x: [rows, 2 * width].
        activation: Of the first half, whose result is rounded; ``SwiGLUOAI`` also changes the second.
    """
    gate, up = x.chunk(2, dim=-1)
    if isinstance(activation, SwiGLUOAI):
        limited = gate.float().clamp(max=activation.limit)
        active = (limited * torch.sigmoid(activation.alpha * limited)).to(x.dtype)
        return (active * (up.float().clamp(-activation.limit, activation.limit) + 1)).to(x.dtype)
    return _activate(gate, activation) * up


@op(like_first)
def activation(x: Tensor, kind: Activation) -> Tensor:
    """An elementwise activation function, rounded once."""
    return _activate(x, kind)


def _activate(x: Tensor, kind: str) -> Tensor:
    if kind == "silu":
        return F.silu(x)
    if kind == "relu":
        return F.relu(x)
    if kind == "relu2":
        return F.relu(x).square()
    if kind == "sigmoid":
        return torch.sigmoid(x)
    if kind == "quick_gelu":
        wide = x.double() if x.dtype == torch.float64 else x.float()
        return (wide * torch.sigmoid(1.702 * wide)).to(x.dtype)
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


@op(lambda x, rows: Spec("samples", x.spec.width, x.spec.dtype))
def gather_rows(x: Tensor, rows: Tensor | StepInput) -> Tensor:
    """Selects the rows whose logits are needed.

    Args:
        x: [num_tokens, width].
        rows: int64 [num_samples].
    """
    assert isinstance(rows, Tensor)
    return x[rows]


@op(lambda x, columns: Spec(x.spec.rows, len(columns), x.spec.dtype))
def select_columns(x: Tensor, columns: Tensor) -> Tensor:
    """Columns of ``x`` [rows, width] in another order.

    Args:
        x: [rows, width].
        columns: int64 [selected].
    """
    return x[:, columns]


@op(lambda weight, paired=False: Spec("", weight.shape[1], weight.dtype))
def pack_linear(weight: Tensor, paired: bool = False) -> Tensor | PackedWeight:
    """Converts a linear weight to the layout that this device's ``linear`` reads. The reference returns it unchanged.

    Args:
        weight: [out_features, in_features].
        paired: ``act_and_mul`` follows, so its two factors may be computed side by side.
    """
    return weight


@op(lambda weight: Spec("", weight.shape[1], weight.dtype))
def unpack_linear(weight: Tensor | PackedWeight) -> Tensor:
    """The inverse of ``pack_linear``: [out_features, in_features]."""
    return plain(weight)


def plain(weight: Weight) -> Tensor:
    """The weight as a tensor. It must not be packed, since only the kernels that packed it can read it."""
    assert isinstance(weight, Tensor), "a packed weight needs the kernels of its device"
    return weight


__all__ = [
    "Value",
    "act_and_mul",
    "activation",
    "add",
    "clip",
    "embedding",
    "gather_rows",
    "linear",
    "logits",
    "pack_linear",
    "scale",
    "select_columns",
    "softcap",
    "unpack_linear",
]
