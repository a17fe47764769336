"""GPT-2 (Radford et al., 2019, Language Models are Unsupervised Multitask Learners): learned positions, biases
everywhere, an MLP without a gate."""

from __future__ import annotations

from torch import Tensor

from executor.layers.context import ModelContext
from executor.layers.mlp import MLP
from executor.layers.norm import LayerNorm
from executor.layers.positions import LearnedPositions
from executor.layers.self_attention import SelfAttention
from executor.models.base import WeightsMapper
from executor.models.decoder import CausalDecoder, DecoderParts

GPT_NAMES = {
    "hidden_act": "activation_function",
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
"""Names of fields that GPT-J took over."""


class GPT2LMHeadModel(CausalDecoder):
    attribute_map = GPT_NAMES
    config_defaults = {
        "eos_token_id": 50256,
        "hidden_act": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": 1024,
        "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
    }
    mapper = WeightsMapper(
        renames=[
            (r"^transformer\.", ""),
            (r"^wte\.", "model.embed_tokens."),
            (r"^wpe\.", "model.embed_positions."),
            (r"^h\.", "model.layers."),
            (r"^ln_f\.", "model.norm."),
            (r"\.ln_1\.", ".input_layernorm."),
            (r"\.ln_2\.", ".post_attention_layernorm."),
            (r"\.attn\.c_attn\.", ".self_attn.qkv_proj."),
            (r"\.attn\.c_proj\.", ".self_attn.o_proj."),
            (r"\.mlp\.c_fc\.", ".mlp.up_proj."),
            (r"\.mlp\.c_proj\.", ".mlp.down_proj."),
        ],
        ignored=[r"\.attn\.(masked_)?bias$"],  # the causal mask
        transforms={r"_proj\.weight$": Tensor.t},  # products are x @ weight
    )

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        eps = config.epsilon("layer_norm_epsilon")
        inner = config.size("intermediate_size", 4 * config.hidden_size)
        scale = config.head_dim**-0.5 if config.boolean("scale_attn_weights") else 1.0
        by_layer = config.boolean("scale_attn_by_inverse_layer_idx")

        def attention(index: int, prefix: str) -> SelfAttention:
            return SelfAttention(
                context,
                None,
                qkv_bias=True,
                out_bias=True,
                is_fused=True,
                scale=scale / (index + 1) if by_layer else scale,
                prefix=prefix,
            )

        parts = DecoderParts(
            attention,
            lambda index, prefix: MLP(context, inner, bias=True, prefix=prefix),
            lambda size: LayerNorm(context, size, eps),
            positions=LearnedPositions(context),
        )
        super().__init__(context, parts)
