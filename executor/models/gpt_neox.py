"""GPT-NeoX (Black et al., arXiv:2204.06745) and Pythia (Biderman et al., arXiv:2304.01373).

Attention and MLP side by side, each with a norm of its own; a quarter of each head is rotated.
"""

from __future__ import annotations

from executor.layers.context import ModelContext
from executor.layers.mlp import MLP
from executor.layers.norm import LayerNorm
from executor.layers.rotary import RotaryEmbedding
from executor.layers.self_attention import SelfAttention
from executor.models.base import WeightsMapper
from executor.models.decoder import ROTARY_BUFFERS, CausalDecoder, DecoderLayer, DecoderParts, ParallelDecoderLayer


class GPTNeoXForCausalLM(CausalDecoder):
    attribute_map = {"partial_rotary_factor": "rotary_pct", "rope_theta": "rotary_emb_base"}
    config_defaults = {
        "attention_bias": True,
        "eos_token_id": 2,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "partial_rotary_factor": 0.25,
        "use_parallel_residual": True,
    }
    mapper = WeightsMapper(
        renames=[
            (r"^gpt_neox\.embed_in\.", "model.embed_tokens."),
            (r"^gpt_neox\.final_layer_norm\.", "model.norm."),
            (r"^gpt_neox\.", "model."),
            (r"^embed_out\.", "lm_head."),
            (r"\.attention\.query_key_value\.", ".self_attn.qkv_proj."),
            (r"\.attention\.dense\.", ".self_attn.o_proj."),
            (r"\.dense_h_to_4h\.", ".up_proj."),
            (r"\.dense_4h_to_h\.", ".down_proj."),
        ],
        ignored=[ROTARY_BUFFERS, r"\.attention\.(masked_)?bias$"],  # the causal mask
    )

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        rotary = RotaryEmbedding(context)
        bias, eps = config.boolean("attention_bias"), config.epsilon("layer_norm_eps")

        def attention(index: int, prefix: str) -> SelfAttention:
            return SelfAttention(context, rotary, qkv_bias=bias, out_bias=bias, is_grouped=True, prefix=prefix)

        parts = DecoderParts(
            attention,
            lambda index, prefix: MLP(context, bias=True, prefix=prefix),
            lambda size: LayerNorm(context, size, eps),
            ParallelDecoderLayer if config.boolean("use_parallel_residual") else DecoderLayer,
        )
        super().__init__(context, parts)
