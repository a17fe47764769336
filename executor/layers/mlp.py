"""Feed-forward layers."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

import ops
from executor.input_batch import InputBatch
from executor.layers.context import ModelContext
from executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear

GATED_ACTIVATIONS: dict[str, Literal["silu", "gelu", "gelu_tanh"]] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}
"""By ``hidden_act`` in config.json."""
ACTIVATIONS: dict[str, Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2"]] = {
    **GATED_ACTIVATIONS,
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
}
"""Activations of an MLP without a gate."""


class GatedMLP(nn.Module):
    """``down(act(gate(x)) * up(x))`` (Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202)."""

    def __init__(
        self,
        context: ModelContext,
        intermediate_size: int | None = None,
        *,
        bias: bool = False,
        down_bias: bool | None = None,
        is_fused: bool = False,
        is_summed: bool = True,
        prefix: str,
    ) -> None:
        """Creates the layer.

        Args:
            context: The model's construction context.
            intermediate_size: Columns of gate and of up. Default: ``config.intermediate_size``.
            bias: Whether the projections have biases.
            down_bias: Whether the last one has, if that differs.
            is_fused: The checkpoint holds gate and up, concatenated, as one tensor ``gate_up_proj``.
            is_summed: Whether the layer sums the ranks' results, or gathers them; False: its user does.
            prefix: The layer's name in the model.
        """
        super().__init__()
        config = context.config
        hidden, inner = config.hidden_size, intermediate_size or config.intermediate_size
        self.activation = config.choice("hidden_act", GATED_ACTIVATIONS)
        projections = [inner, inner] if is_fused else {"gate_proj": inner, "up_proj": inner}
        self.gate_up_proj = MergedColumnParallelLinear(
            context, hidden, projections, bias=bias, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(
            context,
            inner,
            hidden,
            bias=bias if down_bias is None else down_bias,
            is_summed=is_summed,
            prefix=f"{prefix}.down_proj",
        )

    def forward(self, x: Tensor, batch: InputBatch) -> Tensor:
        out: Tensor = self.down_proj(ops.act_and_mul(self.gate_up_proj(x, batch), self.activation), batch)
        return out


class MLP(nn.Module):
    """``down(act(up(x)))``."""

    def __init__(
        self,
        context: ModelContext,
        intermediate_size: int | None = None,
        *,
        bias: bool = False,
        is_summed: bool = True,
        prefix: str,
    ) -> None:
        """Creates the layer.

        Args:
            context: The model's construction context.
            intermediate_size: Columns between the projections. Default: ``config.intermediate_size``.
            bias: Whether the projections have biases.
            is_summed: Whether the layer sums the ranks' results; False: its user does.
            prefix: The layer's name in the model.
        """
        super().__init__()
        config = context.config
        hidden, inner = config.hidden_size, intermediate_size or config.intermediate_size
        self.activation = config.choice("hidden_act", ACTIVATIONS)
        self.up_proj = ColumnParallelLinear(context, hidden, inner, bias=bias, prefix=f"{prefix}.up_proj")
        self.down_proj = RowParallelLinear(
            context, inner, hidden, bias=bias, is_summed=is_summed, prefix=f"{prefix}.down_proj"
        )

    def forward(self, x: Tensor, batch: InputBatch) -> Tensor:
        out: Tensor = self.down_proj(ops.activation(self.up_proj(x, batch), self.activation), batch)
        return out
