"""Gemma (arXiv:2403.08295): Llama with Gemma's norms, scaled embeddings and a GELU gate."""

from __future__ import annotations

from executor.layers.context import ModelContext
from executor.layers.rotary import RotaryEmbedding
from executor.layers.self_attention import SelfAttention
from executor.models.decoder import CausalDecoder, DecoderParts
from executor.models.gemma2 import embedding_scale, gemma_norm


class GemmaForCausalLM(CausalDecoder):
    config_defaults = {
        "attention_bias": False,
        "eos_token_id": 1,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "num_key_value_heads": 16,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }

    def __init__(self, context: ModelContext) -> None:
        rotary, bias = RotaryEmbedding(context), context.config.boolean("attention_bias")

        def attention(index: int, prefix: str) -> SelfAttention:
            return SelfAttention(context, rotary, qkv_bias=bias, out_bias=bias, prefix=prefix)

        parts = DecoderParts(
            attention, norm=lambda size: gemma_norm(context, size), embedding_scale=embedding_scale(context)
        )
        super().__init__(context, parts)
