"""AFM-4.5B (Arcee AI, 2025): Llama with an MLP without a gate, with squared ReLU."""

from __future__ import annotations

from executor.layers.context import ModelContext
from executor.layers.mlp import MLP
from executor.layers.rotary import RotaryEmbedding
from executor.layers.self_attention import SelfAttention
from executor.models.decoder import CausalDecoder, DecoderParts


class ArceeForCausalLM(CausalDecoder):
    config_defaults = {
        "attention_bias": False,
        "eos_token_id": 128001,
        "hidden_act": "relu2",
        "max_position_embeddings": 4096,
        "mlp_bias": False,
        "rms_norm_eps": 1e-5,
    }

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        rotary = RotaryEmbedding(context)
        bias, mlp_bias = config.boolean("attention_bias"), config.boolean("mlp_bias")

        def attention(index: int, prefix: str) -> SelfAttention:
            return SelfAttention(context, rotary, qkv_bias=bias, out_bias=bias, prefix=prefix)

        def mlp(index: int, prefix: str) -> MLP:
            return MLP(context, bias=mlp_bias, prefix=prefix)

        super().__init__(context, DecoderParts(attention, mlp))
