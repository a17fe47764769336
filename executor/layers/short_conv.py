"""The gated short convolution of LFM2 (Liquid AI, arXiv:2511.23404), in the place of attention."""

from __future__ import annotations

from torch import Tensor, nn

from executor.attention.base import SHORT_CONV
from executor.input_batch import InputBatch
from executor.layers.attention import Attention
from executor.layers.context import ModelContext
from executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear, own_columns
from executor.layers.parameter import Part, WeightParameter, single
from ops import AttentionShape


class ConvWeights(nn.Module):
    """``weight`` [length, width] and ``bias`` [width] or None: this rank's columns."""

    def __init__(self, context: ModelContext, length: int, width: int, *, bias: bool, prefix: str) -> None:
        super().__init__()
        columns = own_columns(context, width, prefix)
        weight = single(Part.whole(length), columns)
        self.weight = WeightParameter.empty(weight, dtype=context.dtype, device=context.device)
        self.bias = None
        if bias:
            self.bias = WeightParameter.empty(single(columns), dtype=context.dtype, device=context.device)


class ShortConv(nn.Module):
    """``out(C * conv(B * x))`` with B, C and x projected from the hidden states."""

    def __init__(self, context: ModelContext, length: int, *, bias: bool = False, prefix: str) -> None:
        """Creates the layer.

        Args:
            context: The model's construction context.
            length: Tokens that the convolution looks at, the current one included.
            bias: Whether the projections and the convolution have biases.
            prefix: The layer's name in the model.
        """
        super().__init__()
        hidden = context.config.hidden_size
        self.in_proj = MergedColumnParallelLinear(
            context, hidden, [hidden, hidden, hidden], bias=bias, prefix=f"{prefix}.in_proj"
        )
        self.conv = ConvWeights(context, length, hidden, bias=bias, prefix=f"{prefix}.conv")
        self.attn = Attention(
            context, AttentionShape(hidden, hidden, head_dim=1, scale=1.0, sliding_window=length, kind=SHORT_CONV)
        )
        self.out_proj = RowParallelLinear(context, hidden, hidden, bias=bias, prefix=f"{prefix}.out_proj")

    def forward(self, hidden: Tensor, batch: InputBatch) -> Tensor:
        """``hidden`` [num_tokens, hidden_size] -> the same."""
        gate_in, gate_out, x = self.in_proj(hidden, batch).split(self.in_proj.output_sizes, dim=-1)
        weights = [self.conv.weight.data] + ([] if self.conv.bias is None else [self.conv.bias.data])
        out: Tensor = self.out_proj(self.attn(gate_in, gate_out, x, *weights, batch=batch), batch)
        return out
