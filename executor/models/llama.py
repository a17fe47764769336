"""Llama (Touvron et al., arXiv:2302.13971) and Mistral (Jiang et al., arXiv:2310.06825)."""

from __future__ import annotations

from typing import ClassVar

from executor.layers.context import ModelContext
from executor.layers.mlp import MLP, GatedMLP
from executor.layers.rotary import RotaryEmbedding
from executor.layers.self_attention import SelfAttention
from executor.models.decoder import CausalDecoder, DecoderParts


def llama_parts(
    context: ModelContext,
    rotary: RotaryEmbedding,
    mlp: type[GatedMLP | MLP] = GatedMLP,
    *,
    qkv_bias: bool,
    out_bias: bool,
    mlp_bias: bool,
) -> DecoderParts:
    """Llama's parts, for families that differ in what has biases, in angles or in the MLP."""
    return DecoderParts(
        lambda index, prefix: SelfAttention(context, rotary, qkv_bias=qkv_bias, out_bias=out_bias, prefix=prefix),
        lambda index, prefix: mlp(context, bias=mlp_bias, prefix=prefix),
    )


class LlamaForCausalLM(CausalDecoder):
    mlp: ClassVar[type[GatedMLP | MLP]] = GatedMLP
    config_defaults = {
        "attention_bias": False,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "rms_norm_eps": 1e-6,
    }

    def __init__(self, context: ModelContext) -> None:
        bias, mlp_bias = context.config.boolean("attention_bias"), context.config.boolean("mlp_bias")
        rotary = RotaryEmbedding(context)
        super().__init__(
            context, llama_parts(context, rotary, self.mlp, qkv_bias=bias, out_bias=bias, mlp_bias=mlp_bias)
        )


class MistralForCausalLM(CausalDecoder):
    """Llama with a sliding window in every layer."""

    config_defaults = {
        "eos_token_id": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
    }

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        rotary = RotaryEmbedding(context)
        window = config.size("sliding_window") if config.has("sliding_window") else None

        def attention(index: int, prefix: str) -> SelfAttention:
            return SelfAttention(context, rotary, sliding_window=window, prefix=prefix)

        super().__init__(context, DecoderParts(attention))
