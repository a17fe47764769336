"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini (arXiv:2404.14219, arXiv:2412.08905, arXiv:2503.01743): Llama with merged
projections in the checkpoint, LongRoPE, and in some models windows or partly rotated heads."""

from __future__ import annotations

from executor.layers.context import ModelContext
from executor.layers.mlp import GatedMLP
from executor.layers.rotary import RotaryEmbedding
from executor.layers.self_attention import SelfAttention
from executor.models.decoder import CausalDecoder, DecoderParts


class Phi3ForCausalLM(CausalDecoder):
    config_defaults = {
        "eos_token_id": 32000,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    }

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        rotary = RotaryEmbedding(context)
        window = config.size("sliding_window") if config.has("sliding_window") else None

        def attention(index: int, prefix: str) -> SelfAttention:
            return SelfAttention(context, rotary, is_fused=True, sliding_window=window, prefix=prefix)

        def mlp(index: int, prefix: str) -> GatedMLP:
            return GatedMLP(context, is_fused=True, prefix=prefix)

        super().__init__(context, DecoderParts(attention, mlp))
