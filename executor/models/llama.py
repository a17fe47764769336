"""Llama (Touvron et al., arXiv:2302.13971) and Mistral (Jiang et al., arXiv:2310.06825)."""

from __future__ import annotations

from executor.layers.context import ModelContext
from executor.layers.mlp import GatedMLP
from executor.layers.rotary import RotaryEmbedding
from executor.layers.self_attention import SelfAttention
from executor.models.decoder import CausalDecoder, DecoderParts


class LlamaForCausalLM(CausalDecoder):
    config_defaults = {
        "attention_bias": False,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "rms_norm_eps": 1e-6,
    }

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        rotary = RotaryEmbedding(context)
        bias, mlp_bias = config.boolean("attention_bias"), config.boolean("mlp_bias")

        def attention(index: int, prefix: str) -> SelfAttention:
            return SelfAttention(context, rotary, qkv_bias=bias, out_bias=bias, prefix=prefix)

        def mlp(index: int, prefix: str) -> GatedMLP:
            return GatedMLP(context, bias=mlp_bias, prefix=prefix)

        super().__init__(context, DecoderParts(attention, mlp))


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
