"""ERNIE 4.5 without experts (Baidu, ERNIE 4.5 Technical Report, 2025): Llama with rotation of adjacent columns."""

from __future__ import annotations

from executor.layers.context import ModelContext
from executor.layers.mlp import GatedMLP
from executor.layers.rotary import RotaryEmbedding
from executor.layers.self_attention import SelfAttention
from executor.models.decoder import CausalDecoder, DecoderParts


class Ernie45ForCausalLM(CausalDecoder):
    config_defaults = {
        "eos_token_id": 2,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "use_bias": False,
    }

    def __init__(self, context: ModelContext) -> None:
        rotary = RotaryEmbedding(context, is_interleaved=True)
        bias = context.config.boolean("use_bias")

        def attention(index: int, prefix: str) -> SelfAttention:
            return SelfAttention(context, rotary, qkv_bias=bias, out_bias=bias, prefix=prefix)

        def mlp(index: int, prefix: str) -> GatedMLP:
            return GatedMLP(context, bias=bias, prefix=prefix)

        super().__init__(context, DecoderParts(attention, mlp))
