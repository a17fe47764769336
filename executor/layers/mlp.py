"""The gated feed-forward layer (Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

import ops
from executor.layers.context import ModelContext
from executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear

Activation = Literal["silu", "gelu", "gelu_tanh"]

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}
"""Names of ``hidden_act`` in config.json."""


class GatedMLP(nn.Module):
    """``down(act(gate(x)) * up(x))``."""

    def __init__(self, context: ModelContext, *, bias: bool = False, prefix: str) -> None:
        super().__init__()
        config = context.config
        hidden, inner = config.hidden_size, config.intermediate_size
        self.activation = config.choice("hidden_act", ACTIVATIONS)
        self.gate_up_proj = MergedColumnParallelLinear(
            context, hidden, {"gate_proj": inner, "up_proj": inner}, bias=bias, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(context, inner, hidden, bias=bias, prefix=f"{prefix}.down_proj")

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(ops.act_and_mul(self.gate_up_proj(x), self.activation))
        return out
