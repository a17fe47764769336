"""OLMo (Groeneveld et al., arXiv:2402.00838): Llama with a layer norm that has no weights, and q, k and v limited."""

from __future__ import annotations

from executor.layers.context import ModelContext
from executor.layers.norm import LayerNorm
from executor.layers.rotary import RotaryEmbedding
from executor.layers.self_attention import SelfAttention
from executor.models.decoder import CausalDecoder, DecoderParts


class OlmoForCausalLM(CausalDecoder):
    config_defaults = {
        "attention_bias": False,
        "eos_token_id": 50279,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
    }

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        rotary = RotaryEmbedding(context)
        bias = config.boolean("attention_bias")
        limit = config.number("clip_qkv") if config.has("clip_qkv") else None

        def attention(index: int, prefix: str) -> SelfAttention:
            return SelfAttention(context, rotary, qkv_bias=bias, out_bias=bias, clip=limit, prefix=prefix)

        def norm(size: int) -> LayerNorm:
            return LayerNorm(context, size, 1e-5, weight=False, bias=False)

        super().__init__(context, DecoderParts(attention, norm=norm))
