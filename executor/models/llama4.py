"""Llama 4, its text models (ai.meta.com/blog/llama-4-multimodal-intelligence): layers that attend within chunks and
rotate, and layers that see everything and know no positions; experts whose weights multiply their inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from executor.hf_config import MAX_POSITIONS, HFConfig
from executor.input_batch import InputBatch
from executor.layers.attention import Attention
from executor.layers.context import ModelContext
from executor.layers.linear import QKVParallelLinear, RowParallelLinear, head_columns
from executor.layers.mlp import GatedMLP
from executor.layers.moe import MoE
from executor.layers.norm import RMSNorm
from executor.layers.rotary import RotaryEmbedding
from executor.models.base import WeightsMapper
from executor.models.decoder import ROTARY_BUFFERS, CausalDecoder, DecoderParts
from executor.models.smollm3 import rotated_layers
from executor.weights_mapper import Stack, first_half, second_half
from ops import AttentionShape, Routing

FULL, CHUNKED = "full_attention", "chunked_attention"


def gate(tensor: Tensor) -> Tensor:
    """An expert's gate in [inputs, outputs of both]."""
    return first_half(tensor.t())


def up(tensor: Tensor) -> Tensor:
    """Likewise up."""
    return second_half(tensor.t())


def sparse_layers(config: HFConfig) -> list[bool]:
    """Whether each layer has experts."""
    if config.has("moe_layers"):
        listed = config.numbers("moe_layers")
        return [index in listed for index in range(config.num_layers)]
    step = config.size("interleave_moe_layer_step")
    return [(index + 1) % step == 0 for index in range(config.num_layers)]


class Llama4Attention(nn.Module):
    """Attention that normalises q and k after their rotation, or scales q by its position."""

    def __init__(
        self,
        context: ModelContext,
        rotary: RotaryEmbedding | None,
        scaling: RotaryEmbedding | None,
        kind: str,
        prefix: str,
    ) -> None:
        """Creates the layer.

        Args:
            context: The model's construction context.
            rotary: Rotates q and k; None: the layer knows no positions.
            scaling: Then scales q.
            kind: Type of the layer.
            prefix: The layer's name in the model.
        """
        super().__init__()
        config = context.config
        hidden, head_dim, bias = config.hidden_size, config.head_dim, config.boolean("attention_bias")
        heads, kv_heads = config.num_heads, config.num_kv_heads
        self.qkv_proj = QKVParallelLinear(
            context, hidden, head_dim, heads, kv_heads, bias=bias, prefix=f"{prefix}.qkv_proj"
        )
        self.rotary, self.scaling = rotary, scaling
        self.norm: RMSNorm | None = None
        if rotary is not None and config.boolean("use_qk_norm"):
            self.norm = RMSNorm(context, head_dim, config.rms_norm_eps, weight=False)
        chunk = config.size("attention_chunk_size", most=MAX_POSITIONS) if kind == CHUNKED else None
        shape = AttentionShape(
            heads, kv_heads, head_dim, head_dim**-0.5, sliding_window=chunk, is_chunked=chunk is not None
        )
        self.attn = Attention(context, shape)
        columns = head_columns(heads, kv_heads, head_dim, context.parallel.tp_size)
        self.o_proj = RowParallelLinear(
            context, heads * head_dim, hidden, bias=bias, input_shares=columns, prefix=f"{prefix}.o_proj"
        )

    def forward(self, hidden: Tensor, batch: InputBatch) -> Tensor:
        """``hidden`` [num_tokens, hidden_size] -> the same."""
        q, k, v = self.qkv_proj(hidden, batch).split(self.qkv_proj.output_sizes, dim=-1)
        if self.rotary is not None:
            q, k = self.rotary(batch.positions, q, k)
        elif self.scaling is not None:
            q = self.scaling.rotate(batch.positions, q)
        if self.norm is not None:
            q, k = self.norm(q), self.norm(k)
        out: Tensor = self.o_proj(self.attn(q, k, v, batch=batch), batch)
        return out


class Llama4ForCausalLM(CausalDecoder):
    mapper = WeightsMapper(
        renames=[(r"\.feed_forward\.", ".mlp."), (r"\.mlp\.router\.", ".mlp.gate.")],
        ignored=[ROTARY_BUFFERS],
        stacks=[
            Stack(r"^(.*\.experts\.)gate_up_proj$", {"gate_proj.weight": gate, "up_proj.weight": up}),
            Stack(r"^(.*\.experts\.)down_proj$", {"down_proj.weight": Tensor.t}),
        ],
    )
    config_defaults = {
        "attention_bias": False,
        "attention_chunk_size": 8192,
        "attn_scale": 0.1,
        "attn_temperature_tuning": True,
        "eos_token_id": 2,
        "floor_scale": 8192,
        "head_dim": 128,
        "hidden_act": "silu",
        "interleave_moe_layer_step": 1,
        "intermediate_size_mlp": 16384,
        "max_position_embeddings": 131072,
        "no_rope_layer_interval": 4,
        "num_experts_per_tok": 1,
        "num_key_value_heads": 8,
        "num_local_experts": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "use_qk_norm": True,
    }

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        rotary = RotaryEmbedding(context, is_interleaved=True)
        growth, length = config.number("attn_scale"), config.positive("floor_scale")

        def query_scale(positions: Tensor) -> Tensor:
            """Scores keep their sharpness in long contexts."""
            return torch.log1p(torch.floor((positions + 1) / length)) * growth + 1

        scaling = None
        if config.boolean("attn_temperature_tuning"):
            scaling = RotaryEmbedding(context, is_rotated=False, query_scale=query_scale)
        is_rotated, is_sparse = rotated_layers(config), sparse_layers(config)
        has_chunks = config.has("attention_chunk_size")
        types = config.layer_types(
            FULL, CHUNKED, default=lambda index: CHUNKED if is_rotated[index] and has_chunks else FULL
        )
        routing = Routing(config.size("num_experts_per_tok"), "sigmoid")

        def attention(index: int, prefix: str) -> Llama4Attention:
            return Llama4Attention(context, rotary if is_rotated[index] else None, scaling, types[index], prefix)

        def mlp(index: int, prefix: str) -> GatedMLP | MoE:
            if not is_sparse[index]:
                return GatedMLP(context, config.size("intermediate_size_mlp"), prefix=prefix)
            inner = config.intermediate_size
            shared = ("shared_expert", inner)
            experts = config.size("num_local_experts")
            return MoE(context, routing, experts, inner, scales_input=True, shared=shared, prefix=prefix)

        super().__init__(context, DecoderParts(attention, mlp))
