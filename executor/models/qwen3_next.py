"""Qwen3-Next and Qwen3.5 (Qwen team, 2025 and 2026): three of four layers are Gated DeltaNets, the others attention
with a gate. Norms have weights around 0."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

import ops
from executor.input_batch import InputBatch
from executor.layers.attention import Attention
from executor.layers.context import ModelContext
from executor.layers.gated_delta import GatedDeltaNet, Layout, grouped
from executor.layers.linear import LinearLayer, RowParallelLinear
from executor.layers.norm import RMSNorm
from executor.layers.parameter import Part, ShardId
from executor.layers.rotary import RotaryEmbedding
from executor.models.base import WeightsMapper
from executor.models.decoder import ROTARY_BUFFERS, CausalDecoder, DecoderParts, MakeBlock
from executor.models.lfm2 import transpose_conv
from executor.models.qwen2 import qwen_mlp
from executor.weights_mapper import STACKS
from ops import AttentionShape


class GatedAttention(nn.Module):
    """Grouped-query attention whose result is multiplied with the sigmoid of a gate, a column for each of its own."""

    def __init__(self, context: ModelContext, rotary: RotaryEmbedding, *, prefix: str) -> None:
        super().__init__()
        config = context.config
        if context.parallel.tp_size > 1:
            config.bad("num_attention_heads", "served by one rank; use --tensor-parallel-size 1")
        head_dim, heads, kv_heads = config.head_dim, config.num_heads, config.num_kv_heads
        bias = config.boolean("attention_bias")
        q, kv = heads * head_dim, kv_heads * head_dim
        rows: dict[ShardId, Part] = {
            "q_proj": grouped(heads, [head_dim, head_dim], 0),  # of each head its query, then its gate
            "k_proj": Part.whole(kv, 2 * q),
            "v_proj": Part.whole(kv, 2 * q + kv),
        }
        hidden = Part.whole(config.hidden_size)
        self.qkv_proj = LinearLayer(context, hidden, rows, bias=bias, prefix=f"{prefix}.qkv_proj")
        self.sizes = [q, q, kv, kv]
        self.q_norm, self.k_norm = (zero_centred_norm(context, head_dim) for _ in range(2))
        self.rotary = rotary
        self.attn = Attention(context, AttentionShape(heads, kv_heads, head_dim, head_dim**-0.5))
        self.o_proj = RowParallelLinear(context, q, config.hidden_size, bias=bias, prefix=f"{prefix}.o_proj")

    def forward(self, hidden: Tensor, batch: InputBatch) -> Tensor:
        """``hidden`` [num_tokens, hidden_size] -> the same."""
        q, gate, k, v = self.qkv_proj(hidden, batch).split(self.sizes, dim=-1)
        q, k = self.rotary(batch.positions, self.q_norm(q), self.k_norm(k))
        gated = ops.multiply(ops.activation(gate, "sigmoid"), self.attn(q, k, v, batch=batch))
        out: Tensor = self.o_proj(gated, batch)
        return out


def zero_centred_norm(context: ModelContext, size: int) -> RMSNorm:
    """``x * (1 + w)``."""
    return RMSNorm(context, size, context.config.rms_norm_eps, offset=1.0, round_first=False)


class HybridForCausalLM(CausalDecoder):
    """What the generations share."""

    layout: ClassVar[Layout]
    """Of checkpoints."""
    mapper = WeightsMapper(
        renames=[(r"\.linear_attn\.", ".self_attn.")],
        ignored=[ROTARY_BUFFERS, r"^(model\.)?mtp\."],
        transforms={r"\.conv1d\.weight$": transpose_conv},
        stacks=STACKS,
    )
    config_defaults = {
        "attention_bias": False,
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_value_head_dim": 128,
        "max_position_embeddings": 32768,
        "partial_rotary_factor": 0.25,
        "rms_norm_eps": 1e-6,
    }

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        rotary = RotaryEmbedding(context)
        layout: Layout = "grouped gates" if config.boolean("has_split_qkv", False) else self.layout
        is_tiled = config.boolean("has_tiled_heads", False)
        interval = config.size("full_attention_interval")
        types = config.layer_types(
            "full_attention",
            "linear_attention",
            default=lambda index: "linear_attention" if (index + 1) % interval else "full_attention",
        )

        def full_attention(prefix: str) -> GatedAttention:
            return GatedAttention(context, rotary, prefix=prefix)

        def attention(index: int, prefix: str) -> nn.Module:
            if types[index] == "linear_attention":
                return GatedDeltaNet(context, layout=layout, has_tiled_heads=is_tiled, prefix=prefix)
            return full_attention(prefix)

        super().__init__(
            context,
            DecoderParts(attention, self.mlp(context), norm=lambda size: zero_centred_norm(context, size)),
        )
        self.full_attention = full_attention
        """Creates the attention of a layer that is no Gated DeltaNet: takes the block's name."""

    def mlp(self, context: ModelContext) -> MakeBlock | None:
        """Makes the MLPs; None: dense ones."""
        return None


class Qwen3NextForCausalLM(HybridForCausalLM):
    layout = "grouped"
    config_defaults = {
        **HybridForCausalLM.config_defaults,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 512,
        "norm_topk_prob": True,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "num_key_value_heads": 2,
        "shared_expert_intermediate_size": 512,
    }

    def mlp(self, context: ModelContext) -> MakeBlock:
        return qwen_mlp(context, context.config.size("num_experts"), has_shared=True)


class Qwen35ForCausalLM(HybridForCausalLM):
    layout = "apart"
    config_defaults = {**HybridForCausalLM.config_defaults, "num_key_value_heads": 4}


class Qwen35MoeForCausalLM(Qwen35ForCausalLM):
    config_defaults = {
        **HybridForCausalLM.config_defaults,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 512,
        "norm_topk_prob": True,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 2,
        "shared_expert_intermediate_size": 512,
    }

    def mlp(self, context: ModelContext) -> MakeBlock:
        return qwen_mlp(context, context.config.size("num_experts"), has_shared=True)
