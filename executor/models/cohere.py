"""Command R, R+, R7B and A (Cohere, 2024 and 2025): attention and MLP side by side behind one layer norm without bias.

Adjacent pairs of columns are rotated, and the logits have a factor. Command R+ normalises each head of q and of k. In
R7B and A (``Cohere2``), three of four layers have a window, and only these are rotated.
"""

from __future__ import annotations

from collections.abc import Callable

from executor.layers.context import ModelContext
from executor.layers.norm import HeadsLayerNorm, LayerNorm
from executor.layers.rotary import RotaryEmbedding
from executor.layers.self_attention import SelfAttention
from executor.models.base import WeightsMapper
from executor.models.decoder import ROTARY_BUFFERS, CausalDecoder, DecoderParts, Norms, ParallelDecoderLayer

COHERE_DEFAULTS = {
    "attention_bias": False,
    "eos_token_id": 255001,
    "hidden_act": "silu",
    "layer_norm_eps": 1e-5,
    "logit_scale": 0.0625,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def cohere_parts(context: ModelContext, attention: Callable[[int, str], SelfAttention]) -> DecoderParts:
    """What both generations share."""
    config = context.config
    eps = config.epsilon("layer_norm_eps")
    return DecoderParts(
        attention,
        norm=lambda size: LayerNorm(context, size, eps, bias=False),
        layer=ParallelDecoderLayer,
        norms=Norms(before_attention="input_layernorm"),
        logit_scale=config.number("logit_scale"),
    )


class CohereForCausalLM(CausalDecoder):
    config_defaults = {**COHERE_DEFAULTS, "rope_theta": 500000.0, "use_qk_norm": False}
    mapper = WeightsMapper(renames=[(r"\.([qk]_norm)\.", r".\1.heads.")], ignored=[ROTARY_BUFFERS])

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        rotary = RotaryEmbedding(context, is_interleaved=True)
        bias, eps = config.boolean("attention_bias"), config.epsilon("layer_norm_eps")

        def norms_of_heads(num_heads: int) -> HeadsLayerNorm:
            return HeadsLayerNorm(context, num_heads, eps)

        heads_norm = norms_of_heads if config.boolean("use_qk_norm") else None

        def attention(index: int, prefix: str) -> SelfAttention:
            return SelfAttention(context, rotary, qkv_bias=bias, out_bias=bias, heads_norm=heads_norm, prefix=prefix)

        super().__init__(context, cohere_parts(context, attention))


class Cohere2ForCausalLM(CausalDecoder):
    config_defaults = {**COHERE_DEFAULTS, "sliding_window": 4096, "sliding_window_pattern": 4}

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        rotary = RotaryEmbedding(context, is_interleaved=True)
        bias, pattern = config.boolean("attention_bias"), config.size("sliding_window_pattern")
        types = config.layer_types(
            "full_attention",
            "sliding_attention",
            default=lambda index: "sliding_attention" if (index + 1) % pattern else "full_attention",
        )

        def attention(index: int, prefix: str) -> SelfAttention:
            has_window = types[index] == "sliding_attention"
            return SelfAttention(
                context,
                rotary if has_window else None,
                qkv_bias=bias,
                out_bias=bias,
                sliding_window=config.size("sliding_window") if has_window else None,
                prefix=prefix,
            )

        super().__init__(context, cohere_parts(context, attention))
