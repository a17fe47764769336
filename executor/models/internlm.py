"""InternLM2 (Cai et al., arXiv:2403.17297) and InternLM3 (Shanghai AI Laboratory, 2025): Llama with other names.

InternLM2 holds q, k and v as one tensor, by KV head.
"""

from __future__ import annotations

from executor.layers.context import ModelContext
from executor.layers.rotary import RotaryEmbedding
from executor.layers.self_attention import SelfAttention
from executor.models.base import WeightsMapper
from executor.models.decoder import ROTARY_BUFFERS, CausalDecoder, DecoderParts
from executor.models.llama import llama_parts


class InternLM2ForCausalLM(CausalDecoder):
    reward_activation = None
    config_defaults = {
        "eos_token_id": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
    }
    mapper = WeightsMapper(
        renames=[
            (r"^model\.tok_embeddings\.", "model.embed_tokens."),
            (r"^output\.", "lm_head."),
            (r"\.attention_norm\.", ".input_layernorm."),
            (r"\.ffn_norm\.", ".post_attention_layernorm."),
            (r"\.attention\.wqkv\.", ".self_attn.qkv_proj."),
            (r"\.attention\.wo\.", ".self_attn.o_proj."),
            (r"\.feed_forward\.w1\.", ".mlp.gate_proj."),
            (r"\.feed_forward\.w2\.", ".mlp.down_proj."),
            (r"\.feed_forward\.w3\.", ".mlp.up_proj."),
        ],
        ignored=[ROTARY_BUFFERS],
    )

    def __init__(self, context: ModelContext) -> None:
        rotary, bias = RotaryEmbedding(context), context.config.boolean("bias")

        def attention(index: int, prefix: str) -> SelfAttention:
            return SelfAttention(context, rotary, qkv_bias=bias, out_bias=bias, is_grouped=True, prefix=prefix)

        super().__init__(context, DecoderParts(attention))


class InternLM3ForCausalLM(CausalDecoder):
    config_defaults = {
        "bias": False,
        "eos_token_id": 2,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "num_key_value_heads": 2,
        "qkv_bias": False,
        "rms_norm_eps": 1e-5,
    }
    attribute_map = {"bias": "mlp_bias", "qkv_bias": "attention_bias"}  # as transformers writes them

    def __init__(self, context: ModelContext) -> None:
        rotary = RotaryEmbedding(context)
        qkv_bias, bias = context.config.boolean("qkv_bias"), context.config.boolean("bias")
        super().__init__(context, llama_parts(context, rotary, qkv_bias=qkv_bias, out_bias=bias, mlp_bias=bias))
