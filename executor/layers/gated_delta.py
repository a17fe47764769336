"""Gated DeltaNet (Yang et al., arXiv:2412.06464), as in Qwen3-Next and Qwen3.5, in the place of attention."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

import ops
from executor.attention.base import GATED_DELTA
from executor.base import ModelError
from executor.input_batch import InputBatch
from executor.layers.attention import Attention
from executor.layers.context import ModelContext
from executor.layers.linear import LinearLayer, RowParallelLinear
from executor.layers.norm import RMSNorm
from executor.layers.parameter import Part, Range, ShardId, WeightParameter, Weights, single
from ops import AttentionShape

Layout = Literal["grouped", "grouped gates", "apart"]
"""Tensors of a checkpoint. grouped: q, k, v and z in one by key head, and the gates in another (Qwen3-Next); grouped
gates: only these are by key head; apart: one for q, k and v together, and others for z and for each gate."""
MAX_KEY_DIM = 256
"""Columns of a head of k that the kernels take."""


class DecayWeights(Weights):
    """``A_log`` and ``dt_bias`` [value heads]: how fast a state is forgotten."""

    A_log: nn.Parameter

    def __init__(self, context: ModelContext, heads: int) -> None:
        super().__init__()
        parts = single(Part.whole(heads))
        self.A_log = WeightParameter.empty(parts, dtype=torch.float32, device=context.device)
        self.dt_bias = WeightParameter.empty(parts, dtype=torch.float32, device=context.device)
        self.decay: Tensor | None = None

    def pack(self) -> None:
        self.decay = -self.A_log.data.exp()


class ConvWeights(nn.Module):
    """``weight`` [length, width]."""

    def __init__(self, context: ModelContext, length: int, width: int) -> None:
        super().__init__()
        parts = single(Part.whole(length), Part.whole(width))
        self.weight = WeightParameter.empty(parts, dtype=context.dtype, device=context.device)


class GatedDeltaNet(nn.Module):
    """``out(norm(delta(conv(qkv))) * silu(z))`` with q, k, v, z and the gates projected from the hidden states."""

    def __init__(self, context: ModelContext, *, layout: Layout, has_tiled_heads: bool = False, prefix: str) -> None:
        """Creates the layer with the sizes given by the configuration.

        Args:
            context: The model's construction context.
            layout: The checkpoint's tensors.
            has_tiled_heads: See ``AttentionShape``.
            prefix: The layer's name in the model.

        Raises:
            ModelError: Several ranks would share the layer.
        """
        super().__init__()
        config = context.config
        if context.parallel.tp_size > 1:
            raise ModelError("--tensor-parallel-size must be 1 for models with recurrent layers")
        keys, values = config.size("linear_num_key_heads"), config.size("linear_num_value_heads")
        key_dim, value_dim = config.size("linear_key_head_dim"), config.size("linear_value_head_dim")
        length = config.size("linear_conv_kernel_dim")
        if values % keys:
            config.bad("linear_num_value_heads", f"a multiple of linear_num_key_heads ({keys})")
        if key_dim > MAX_KEY_DIM:
            config.bad("linear_key_head_dim", f"at most {MAX_KEY_DIM}")
        config.choice("hidden_act", {"silu": None, "swish": None})
        shape = AttentionShape(
            values,
            keys,
            key_dim,
            1.0,
            v_head_dim=value_dim,
            sliding_window=2,
            kind=GATED_DELTA,
            conv_length=length,
            has_tiled_heads=has_tiled_heads,
        )
        qkv, z = 2 * keys * key_dim + values * value_dim, values * value_dim
        self.sizes = [qkv, z, values, values]
        each = values // keys
        gates: dict[ShardId, Part] = {"in_proj_ba": grouped(keys, [each, each], qkv + z)}
        starts = [sum(self.sizes[:index]) for index in range(len(self.sizes))]
        names = ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"]
        apart: dict[ShardId, Part] = {
            name: Part.whole(*pair) for name, *pair in zip(names, self.sizes, starts, strict=True)
        }
        rows: dict[ShardId, Part] = {name: apart[name] for name in (names if layout == "apart" else names[:2])}
        if layout == "grouped":
            rows = {"in_proj_qkvz": grouped(keys, [key_dim, key_dim, each * value_dim, each * value_dim], 0)}
        if layout != "apart":
            rows |= gates
        hidden = Part.whole(config.hidden_size)
        self.in_proj = LinearLayer(context, hidden, rows, bias=False, prefix=f"{prefix}.in_proj")
        self.conv1d = ConvWeights(context, length, qkv)
        self.weights = DecayWeights(context, values)
        self.attn = Attention(context, shape)
        self.norm = RMSNorm(context, value_dim, config.rms_norm_eps)
        self.out_proj = RowParallelLinear(context, z, config.hidden_size, prefix=f"{prefix}.out_proj")

    def forward(self, hidden: Tensor, batch: InputBatch) -> Tensor:
        """``hidden`` [num_tokens, hidden_size] -> the same."""
        qkv, z, beta, step = self.in_proj(hidden, batch).split(self.sizes, dim=-1)
        assert self.weights.decay is not None
        out = self.attn(
            qkv, beta, step, self.conv1d.weight.data, self.weights.decay, self.weights.dt_bias.data, batch=batch
        )
        gated = ops.multiply(ops.activation(z, "silu"), self.norm(out))
        result: Tensor = self.out_proj(gated, batch)
        return result


def grouped(heads: int, sizes: list[int], offset: int) -> Part:
    """Rows of several projections in a tensor that holds them by head: those of one head after the other.

    Args:
        heads: The heads.
        sizes: Rows that each projection has for a head.
        offset: Where the first projection begins in the parameter.
    """
    ranges, each = [], sum(sizes)
    for index, size in enumerate(sizes):
        before = sum(sizes[:index])
        ranges += [Range(head * each + before, size, offset + heads * before + head * size) for head in range(heads)]
    return Part(heads * each, tuple(ranges))
