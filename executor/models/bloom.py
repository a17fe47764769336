"""BLOOM (arXiv:2211.05100): positions as biases of the scores, a norm of the embeddings, an MLP without a gate."""

from __future__ import annotations

from executor.layers.context import ModelContext
from executor.layers.mlp import MLP
from executor.layers.norm import LayerNorm
from executor.layers.positions import alibi_slopes
from executor.layers.self_attention import SelfAttention
from executor.models.base import WeightsMapper
from executor.models.decoder import CausalDecoder, DecoderParts

LAYER_NAMES = (
    (r"\.self_attention\.query_key_value\.", ".self_attn.qkv_proj."),
    (r"\.self_attention\.dense\.", ".self_attn.o_proj."),
    (r"\.dense_h_to_4h\.", ".up_proj."),
    (r"\.dense_4h_to_h\.", ".down_proj."),
)
"""Names of tensors that Falcon took over."""


class BloomForCausalLM(CausalDecoder):
    attribute_map = {
        "hidden_size": "n_embed",
        "max_position_embeddings": "seq_length",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
    config_defaults = {
        "apply_residual_connection_post_layernorm": False,
        "eos_token_id": 2,
        "hidden_act": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    }
    mapper = WeightsMapper(
        renames=[
            (r"^transformer\.", ""),
            (r"^word_embeddings\.", "model.embed_tokens."),
            (r"^word_embeddings_layernorm\.", "model.embedding_norm."),
            (r"^ln_f\.", "model.norm."),
            (r"^h\.", "model.layers."),
            *LAYER_NAMES,
        ]
    )

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        if config.boolean("apply_residual_connection_post_layernorm"):
            config.bad("apply_residual_connection_post_layernorm", "false: no model of the family has it")
        eps, slopes = config.epsilon("layer_norm_epsilon"), alibi_slopes(config.num_heads)

        def attention(index: int, prefix: str) -> SelfAttention:
            return SelfAttention(
                context, None, qkv_bias=True, out_bias=True, is_grouped=True, alibi_slopes=slopes, prefix=prefix
            )

        parts = DecoderParts(
            attention,
            lambda index, prefix: MLP(context, 4 * config.hidden_size, bias=True, prefix=prefix),
            lambda size: LayerNorm(context, size, eps),
            has_embedding_norm=True,
        )
        super().__init__(context, parts)
