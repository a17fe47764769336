"""ERNIE 4.5 without experts (Baidu, ERNIE 4.5 Technical Report, 2025): Llama with rotation of adjacent columns."""

from __future__ import annotations

from executor.layers.context import ModelContext
from executor.layers.rotary import RotaryEmbedding
from executor.models.decoder import CausalDecoder
from executor.models.llama import llama_parts


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
        super().__init__(context, llama_parts(context, rotary, qkv_bias=bias, out_bias=bias, mlp_bias=bias))
