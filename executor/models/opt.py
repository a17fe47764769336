"""OPT (Zhang et al., arXiv:2205.01068): learned positions, biases everywhere, an MLP without a gate."""

from __future__ import annotations

from executor.layers.context import ModelContext
from executor.layers.mlp import MLP
from executor.layers.norm import LayerNorm
from executor.layers.positions import LearnedPositions
from executor.layers.self_attention import SelfAttention
from executor.models.base import WeightsMapper
from executor.models.decoder import CausalDecoder, DecoderLayer, DecoderParts, Norms, PostNormDecoderLayer

PRE_NORM = Norms(before_attention="self_attn_layer_norm", before_mlp="final_layer_norm")
POST_NORM = Norms(after_attention="self_attn_layer_norm", after_mlp="final_layer_norm")


class OPTForCausalLM(CausalDecoder):
    attribute_map = {"hidden_act": "activation_function", "intermediate_size": "ffn_dim"}
    config_defaults = {
        "_remove_final_layer_norm": False,
        "do_layer_norm_before": True,
        "enable_bias": True,
        "eos_token_id": 2,
        "hidden_act": "relu",
        "layer_norm_elementwise_affine": True,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    }
    mapper = WeightsMapper(
        renames=[
            (r"^(model\.)?decoder\.", "model."),
            (r"^model\.final_layer_norm\.", "model.norm."),
            (r"\.out_proj\.", ".o_proj."),
            (r"\.fc1\.", ".mlp.up_proj."),
            (r"\.fc2\.", ".mlp.down_proj."),
        ]
    )

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        bias, has_weights = config.boolean("enable_bias"), config.boolean("layer_norm_elementwise_affine")
        is_pre_norm = config.boolean("do_layer_norm_before")  # OPT-350m is not

        def attention(index: int, prefix: str) -> SelfAttention:
            return SelfAttention(context, None, qkv_bias=bias, out_bias=bias, prefix=prefix)

        parts = DecoderParts(
            attention,
            lambda index, prefix: MLP(context, bias=bias, prefix=prefix),
            lambda size: LayerNorm(context, size, 1e-5, weight=has_weights, bias=has_weights),
            DecoderLayer if is_pre_norm else PostNormDecoderLayer,
            PRE_NORM if is_pre_norm else POST_NORM,
            has_final_norm=is_pre_norm and not config.boolean("_remove_final_layer_norm"),
            embedding_dim=config.size("word_embed_proj_dim", config.hidden_size),
            positions=LearnedPositions(context, offset=2),
        )
        super().__init__(context, parts)
