"""MPT (MosaicML, 2023): positions as biases of the scores, norms and products without biases."""

from __future__ import annotations

import math

from executor.hf_config import Fields
from executor.layers.context import ModelContext
from executor.layers.mlp import MLP
from executor.layers.norm import LayerNorm
from executor.layers.self_attention import SelfAttention
from executor.models.base import WeightsMapper
from executor.models.decoder import CausalDecoder, DecoderParts


def mpt_slopes(num_heads: int, largest: float) -> tuple[float, ...]:
    """MPT's slopes of the heads, which differ from ALiBi's if their number is no power of 2.

    Args:
        num_heads: Heads over all ranks.
        largest: ``alibi_bias_max``: the exponent of the last head's slope, ``2 ** -largest``.
    """
    count = 1 << math.ceil(math.log2(num_heads))
    slopes = [2 ** (-largest * (head + 1) / count) for head in range(count)]
    return tuple(slopes if count == num_heads else (slopes[1::2] + slopes[::2])[:num_heads])


def attention_fields(fields: Fields) -> Fields:
    """``attn_config``, if there is nothing in it that no class of transformers implements."""
    if not fields.boolean("alibi", True):
        fields.bad("alibi", "true: other positions are not supported")
    for name in ("prefix_lm", "qk_ln"):
        if fields.boolean(name, False):
            fields.bad(name, "false: it is not supported")
    if fields.string("attn_type", "multihead_attention") != "multihead_attention":
        fields.bad("attn_type", "multihead_attention: no other is supported")
    return fields


class MptForCausalLM(CausalDecoder):
    attribute_map = {
        "hidden_size": "d_model",
        "max_position_embeddings": "max_seq_len",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
    }
    config_defaults = {
        "hidden_act": "gelu",
        "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    }
    mapper = WeightsMapper(
        renames=[
            (r"^transformer\.wte\.", "model.embed_tokens."),
            (r"^transformer\.norm_f\.", "model.norm."),
            (r"^transformer\.blocks\.", "model.layers."),
            (r"\.norm_1\.", ".input_layernorm."),
            (r"\.norm_2\.", ".post_attention_layernorm."),
            (r"\.attn\.Wqkv\.", ".self_attn.qkv_proj."),
            (r"\.attn\.out_proj\.", ".self_attn.o_proj."),
            (r"\.ffn\.", ".mlp."),
        ]
    )

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        fields = attention_fields(config.section("attn_config"))
        slopes = mpt_slopes(config.num_heads, fields.number("alibi_bias_max", 8))
        eps = config.epsilon("layer_norm_epsilon")
        clip = fields.number("clip_qkv") if fields.has("clip_qkv") else None
        scale = fields.number("softmax_scale") if fields.has("softmax_scale") else None

        def attention(index: int, prefix: str) -> SelfAttention:
            return SelfAttention(
                context, None, is_fused=True, clip=clip, scale=scale, alibi_slopes=slopes, prefix=prefix
            )

        parts = DecoderParts(
            attention,
            lambda index, prefix: MLP(context, 4 * config.hidden_size, prefix=prefix),
            lambda size: LayerNorm(context, size, eps, bias=False),
        )
        super().__init__(context, parts)
