"""Weights in the layout of a device's kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ops.collective import Communicator

QuantizedActivations = Literal["float", "int8", "int8_per_token", "fp8_per_token"]
"""What quantised weights are multiplied with: activations as they are, rounded to int8, 32 columns or a whole row at a
time, or a whole row to FP8 (E4M3)."""


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight [out_features, in_features] that only the kernels of its device can read."""

    data: Tensor
    """One-dimensional, in the weight's dtype, padded."""
    shape: tuple[int, int]
    paired: bool
    """The two halves of the rows are interleaved, so that one product yields both the gate and up projections of an
    MLP."""

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        return self.data.device


Shift = Literal["none", "zeros", "minimums"]
RowScale = Literal["none", "factor", "divisor"]


@dataclass(frozen=True)
class Encoding:
    """How the numbers of quantised rows are written.

    Blocks of GGUF are named as there (``Q4_K``). ``int4`` and ``int8`` are codes with a scale for each group of
    columns: ``scale * (code - zero)``, or ``scale * code + minimum``. Without either, codes count from 8 or 128. The
    other formats (``FLOAT_FORMATS``) are codes of floating-point numbers: ``scale * value``.
    """

    format: str
    group_size: int = 0
    """Columns that share a scale; 0: as the format of blocks defines it."""
    scale_dtype: torch.dtype | None = None
    """Dtype of the groups' scales and minimums."""
    shift: Shift = "none"
    """What else each group has: a zero (uint8), or a minimum."""
    row_scale: RowScale = "none"
    """Whether a float32 number for each row multiplies or divides the scales of its groups."""


@dataclass(frozen=True, eq=False)
class RowSource:
    """Rows that are made when they are packed, so that never all of them are in memory unpacked."""

    device: torch.device
    rows: int
    make: Callable[[int, int], Tensor]
    """Takes the first row and the end of the rows; returns uint8 [rows, bytes of a row] as of ``pack_segment``."""


@dataclass(frozen=True, eq=False)
class Segment:
    """Consecutive rows of a quantised weight in one encoding."""

    data: Tensor
    """uint8. Of the reference: [rows, bytes of a row]; kernels have a one-dimensional layout of their own."""
    rows: int
    encoding: Encoding

    @property
    def is_packed(self) -> bool:
        """Whether only the kernels of its device can read it."""
        return self.data.dim() == 1


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A quantised weight [out_features, in_features], made by ``pack_blocks``, ``pack_groups`` or
    ``pack_floats``."""

    segments: tuple[Segment, ...]
    shape: tuple[int, int]
    paired: bool
    """As of ``PackedWeight``; there is only one segment then."""
    dtype: torch.dtype
    """Of the activations."""
    activations: QuantizedActivations

    @property
    def device(self) -> torch.device:
        return self.segments[0].data.device

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The memory that the weight occupies."""
        return tuple(segment.data for segment in self.segments)


Weight = Tensor | PackedWeight | QuantizedWeight


@dataclass(frozen=True)
class SwiGLUOAI:
    """The gated activation of gpt-oss: ``(up + 1) * gate * sigmoid(alpha * gate)``, with the gate limited to at most
    ``limit`` first, and up to plus and minus that."""

    alpha: float = 1.702
    limit: float = 7.0


GatedActivation = Literal["silu", "gelu", "gelu_tanh"] | SwiGLUOAI
"""What a gated MLP makes of the results of gate and up."""


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """The experts of a layer: MLPs of equal shape."""

    gate_up: tuple[Weight, ...]
    """[2 * inner, hidden] of each expert, gate first, as ``linear`` takes them; [inner, hidden] without gates."""
    down: tuple[Weight, ...]
    """[hidden, inner] of each expert."""
    gate_up_bias: tuple[Tensor, ...] | None
    """[2 * inner] of each expert; [inner] without gates."""
    down_bias: tuple[Tensor, ...] | None
    """[hidden] of each expert."""
    activation: GatedActivation | Literal["relu2"]
    """relu2: there are no gates (Nemotron-H)."""
    top_k: int
    """Most experts of a token."""
    scales_input: bool = False
    """Weights of experts multiply their inputs, not their results (Llama 4)."""
    communicator: Communicator | None = None
    """Connects ranks that share the experts, and of which each has some rows of all weights; None: there is one."""
    inner_widths: tuple[int, ...] = ()
    """Columns of the results of gates that each rank makes."""
    gate_up_orders: tuple[Tensor, ...] | None = None
    """int64 [hidden] of each expert: the columns of its inputs in the order of the weight's; None: as they are."""
    down_orders: tuple[Tensor, ...] | None = None
    """int64 [inner], likewise."""

    @property
    def is_gated(self) -> bool:
        """Whether an expert computes ``down(act(gate(x)) * up(x))``, and not ``down(act(up(x)))``."""
        return self.activation != "relu2"

    @property
    def has_orders(self) -> bool:
        """Whether experts have their columns in orders of their own."""
        return self.gate_up_orders is not None or self.down_orders is not None


GROUP = 32
"""Columns that share a scale, of rows that are quantised while they are loaded."""


def tree_sum(x: Tensor) -> Tensor:
    """The sums over a last dimension of a power of two, which is left with one element: halves are added."""
    while x.shape[-1] > 1:
        first, second = x.chunk(2, dim=-1)
        x = first + second
    return x


def shares_in_groups(importance: Tensor) -> Tensor:
    """What columns [columns] count in their groups, [groups, 32]: 1 in all."""
    groups = importance.unflatten(0, (-1, GROUP))
    shares: Tensor = groups / tree_sum(groups)
    return shares
