"""GLM-4-9B (arXiv:2406.12793) and GLM-4-0414: half of each head is rotated, in adjacent pairs of columns.

GLM-4-0414 adds norms after the blocks to those before them.
"""

from __future__ import annotations

from executor.layers.context import ModelContext
from executor.layers.mlp import GatedMLP
from executor.layers.rotary import RotaryEmbedding
from executor.layers.self_attention import SelfAttention
from executor.models.decoder import CausalDecoder, DecoderParts, Norms

PRE_NORMS = Norms(before_attention="input_layernorm", before_mlp="post_attention_layernorm")
SANDWICH = Norms(
    before_attention="input_layernorm",
    after_attention="post_self_attn_layernorm",
    before_mlp="post_attention_layernorm",
    after_mlp="post_mlp_layernorm",
)


class GlmForCausalLM(CausalDecoder):
    norms = PRE_NORMS
    config_defaults = {
        "attention_bias": True,
        "eos_token_id": [151329, 151336, 151338],
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "num_key_value_heads": 2,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1.5625e-7,
    }

    def __init__(self, context: ModelContext) -> None:
        rotary = RotaryEmbedding(context, is_interleaved=True)
        bias = context.config.boolean("attention_bias")

        def attention(index: int, prefix: str) -> SelfAttention:
            return SelfAttention(context, rotary, qkv_bias=bias, prefix=prefix)

        def mlp(index: int, prefix: str) -> GatedMLP:
            return GatedMLP(context, is_fused=True, prefix=prefix)

        super().__init__(context, DecoderParts(attention, mlp, norms=self.norms))


class Glm4ForCausalLM(GlmForCausalLM):
    norms = SANDWICH
