"""Seed-OSS (github.com/ByteDance-Seed/seed-oss): Llama with biases on q, k and v, and heads of a size of their own."""

from __future__ import annotations

from executor.layers.context import ModelContext
from executor.layers.rotary import RotaryEmbedding
from executor.models.decoder import CausalDecoder
from executor.models.llama import llama_parts


class SeedOssForCausalLM(CausalDecoder):
    config_defaults = {
        "attention_bias": True,
        "attention_out_bias": False,
        "eos_token_id": 2,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 524288,
        "mlp_bias": False,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
    }

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        parts = llama_parts(
            context,
            RotaryEmbedding(context),
            qkv_bias=config.boolean("attention_bias"),
            out_bias=config.boolean("attention_out_bias"),
            mlp_bias=config.boolean("mlp_bias"),
        )
        super().__init__(context, parts)
