"""Mamba-2 (Dao and Gu, arXiv:2405.21060), in the place of attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import ops
from executor.attention.base import MAMBA
from executor.base import ModelError
from executor.hf_config import HFConfig
from executor.input_batch import InputBatch
from executor.layers.attention import Attention
from executor.layers.context import ModelContext
from executor.layers.linear import ReplicatedLinear
from executor.layers.norm import RMSNorm
from executor.layers.parameter import Part, WeightParameter, Weights, single
from ops import AttentionShape

MAX_STATE_DIM = 256
"""Rows of a state that the kernels take."""


@dataclass(frozen=True)
class MambaSizes:
    """Sizes of a layer."""

    num_heads: int
    head_dim: int
    num_groups: int
    """Of heads that share B and C."""
    state_dim: int
    conv_length: int

    @property
    def inner(self) -> int:
        """Columns of x, and of the gate."""
        return self.num_heads * self.head_dim

    @property
    def parts(self) -> list[int]:
        """Columns of x, B and C."""
        return [self.inner, self.num_groups * self.state_dim, self.num_groups * self.state_dim]

    def shape(self, limits: tuple[float, float]) -> AttentionShape:
        """That of the recurrence, with bounds of its steps."""
        return AttentionShape(
            self.num_heads,
            self.num_groups,
            self.state_dim,
            1.0,
            v_head_dim=self.head_dim,
            sliding_window=2,
            kind=MAMBA,
            conv_length=self.conv_length,
            step_limits=limits,
        )

    @classmethod
    def of(cls, config: HFConfig, names: Sequence[str]) -> MambaSizes:
        """Reads the sizes.

        Args:
            config: The model's configuration.
            names: Of the fields, in the order of the attributes.

        Raises:
            ModelError: They do not fit together, or the kernels cannot compute them.
        """
        heads, _, groups, state, length = names
        result = cls(*map(config.size, names))
        if result.num_heads % result.num_groups:
            config.bad(groups, f"a divisor of {config.named(heads)} ({result.num_heads})")
        if result.state_dim > MAX_STATE_DIM:
            config.bad(state, f"at most {MAX_STATE_DIM}")
        if result.conv_length < 2:
            config.bad(length, "at least 2")
        return result


HYBRID_NAMES = ("mamba_n_heads", "mamba_d_head", "mamba_n_groups", "mamba_d_state", "mamba_d_conv")
"""The fields of Bamba, Falcon-H1 and Granite 4."""
HYBRID_DEFAULTS = {
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_state": 256,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_n_heads": 128,
    "mamba_proj_bias": False,
}


def hybrid_sizes(config: HFConfig, inner: int | None = None) -> MambaSizes:
    """The sizes of models with ``HYBRID_NAMES``.

    Args:
        config: The configuration.
        inner: Columns of x. Default: ``mamba_expand`` times the hidden size.
    """
    inner = config.size("mamba_expand") * config.hidden_size if inner is None else inner
    heads = config.size("mamba_n_heads")
    if inner % heads:
        config.bad("mamba_n_heads", f"a divisor of {inner}, the columns of all heads")
    if config.get("mamba_d_head") in (None, "auto"):
        config = config.replaced(mamba_d_head=inner // heads)
    if config.size("mamba_d_head") * heads != inner:
        config.bad("mamba_d_head", f"{inner // heads}, as {heads} heads have {inner} columns")
    return MambaSizes.of(config, HYBRID_NAMES)


def step_limits(config: HFConfig) -> tuple[float, float]:
    """``time_step_limit``, in which files write infinity in several ways."""
    given = config.get("time_step_limit")
    if given is None:
        return 0.0, math.inf
    limits = [math.inf if each == {"__float__": "Infinity"} else each for each in given] if type(given) is list else []
    numbers = [float(each) for each in limits if type(each) in (int, float)]
    if not len(numbers) == len(limits) == 2 or not 0 <= numbers[0] <= numbers[1]:
        config.bad("time_step_limit", "two numbers of at least 0, the lower one first")
    return numbers[0], numbers[1]


class StepWeights(Weights):
    """``A_log``, ``dt_bias`` and ``D`` [heads]: how fast a state is forgotten, and what passes by it."""

    A_log: nn.Parameter

    def __init__(self, context: ModelContext, heads: int) -> None:
        super().__init__()
        parts = single(Part.whole(heads))
        for name in ("A_log", "dt_bias", "D"):
            parameter = WeightParameter.empty(parts, dtype=torch.float32, device=context.device)
            self.register_parameter(name, parameter)
        self.decay: Tensor | None = None

    def pack(self) -> None:
        self.decay = -self.A_log.data.exp()


class ConvWeights(Weights):
    """``weight`` [length, columns] and ``bias`` [columns] or None, in float32."""

    weight: nn.Parameter

    def __init__(self, context: ModelContext, sizes: MambaSizes, *, bias: bool, factors: Sequence[float]) -> None:
        super().__init__()
        columns = single(Part.whole(sum(sizes.parts)))
        weight = single(Part.whole(sizes.conv_length), *columns[None])
        self.weight = WeightParameter.empty(weight, dtype=torch.float32, device=context.device)
        self.bias = WeightParameter.empty(columns, dtype=torch.float32, device=context.device) if bias else None
        self.sizes, self.factors = sizes, factors

    def pack(self) -> None:
        for part, factor in zip(self.weight.data.split(self.sizes.parts, dim=1), self.factors, strict=True):
            part.mul_(factor)


class Convolution(nn.Module):
    """The convolution of x, B and C, by the name that checkpoints have for it."""

    def __init__(self, context: ModelContext, sizes: MambaSizes, *, bias: bool, factors: Sequence[float]) -> None:
        super().__init__()
        self.weights = ConvWeights(context, sizes, bias=bias, factors=factors)


class Mamba2(nn.Module):
    """``out(norm(scan(conv(x, B, C)) * silu(z)))`` with z, x, B, C and the steps projected from the hidden states."""

    def __init__(
        self,
        context: ModelContext,
        sizes: MambaSizes,
        *,
        activation: str = "hidden_act",
        conv_bias: bool,
        in_bias: bool = False,
        out_bias: bool = False,
        has_norm: bool = True,
        norm_before_gate: bool = False,
        factors: Sequence[float] = (1.0, 1.0, 1.0, 1.0, 1.0),
        prefix: str,
    ) -> None:
        """Creates the layer.

        Args:
            context: The model's construction context. Its configuration has ``time_step_limit`` and ``rms_norm_eps``.
            sizes: Its sizes.
            activation: The field that names the activation.
            conv_bias: Whether the convolution has a bias.
            in_bias: Whether the first projection has.
            out_bias: Whether the last one has.
            has_norm: Whether there is a norm, of the heads of each group.
            norm_before_gate: Whether it comes before the gate.
            factors: Of z, x, B, C and the steps (muP).
            prefix: The layer's name in the model.

        Raises:
            ModelError: Several ranks would share the layer.
        """
        super().__init__()
        config = context.config
        if context.parallel.tp_size > 1:
            raise ModelError("--tensor-parallel-size must be 1 for models with recurrent layers")
        config.choice(activation, {"silu": None, "swish": None})
        inner, hidden = sizes.inner, config.hidden_size
        self.sizes = [inner, sum(sizes.parts), sizes.num_heads]
        self.gate_factor, *conv_factors, self.step_factor = factors
        self.in_proj = ReplicatedLinear(context, hidden, sum(self.sizes), bias=in_bias, prefix=f"{prefix}.in_proj")
        # A factor of the convolution's inputs is one of its weights.
        self.conv1d = Convolution(context, sizes, bias=conv_bias, factors=conv_factors)
        self.weights = StepWeights(context, sizes.num_heads)
        self.attn = Attention(context, sizes.shape(step_limits(config)))
        self.norm = None
        if has_norm:
            groups = sizes.num_groups
            size = inner // groups
            self.norm = RMSNorm(context, size, config.rms_norm_eps, num_weights=groups, round_first=False)
        self.norm_before_gate = norm_before_gate
        self.out_proj = ReplicatedLinear(context, inner, hidden, bias=out_bias, prefix=f"{prefix}.out_proj")

    def forward(self, hidden: Tensor, batch: InputBatch) -> Tensor:
        """``hidden`` [num_tokens, hidden_size] -> the same."""
        gate, x, step = self.in_proj(hidden, batch).split(self.sizes, dim=-1)
        gate, step = scaled(gate, self.gate_factor), scaled(step, self.step_factor)
        conv, own = self.conv1d.weights, self.weights
        assert own.decay is not None
        is_late = self.norm is not None and self.norm_before_gate
        bias = None if conv.bias is None else conv.bias.data
        weights = (conv.weight.data, bias, own.decay, own.get_parameter("D").data, own.get_parameter("dt_bias").data)
        out = self.attn(x, step, None if is_late else gate, *weights, batch=batch)
        if self.norm is not None:
            out = self.norm(out)
        if is_late:
            out = ops.multiply(ops.activation(gate, "silu"), out)
        result: Tensor = self.out_proj(out, batch)
        return result


def scaled(x: Tensor, factor: float) -> Tensor:
    """``x * factor``."""
    return x if factor == 1 else ops.scale(x, factor)
