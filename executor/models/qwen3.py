"""Qwen3 (arXiv:2505.09388): the heads of q and k are normalised before rotation."""

from __future__ import annotations

from executor.layers.context import ModelContext
from executor.layers.norm import RMSNorm
from executor.layers.rotary import RotaryEmbedding
from executor.layers.self_attention import SelfAttention
from executor.models.decoder import CausalDecoder, DecoderParts
from executor.models.qwen2 import QWEN_DEFAULTS, sliding_windows


class Qwen3ForCausalLM(CausalDecoder):
    config_defaults = {**QWEN_DEFAULTS, "attention_bias": False, "head_dim": 128}

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        rotary = RotaryEmbedding(context)
        bias = config.boolean("attention_bias")
        windows = sliding_windows(config)

        def head_norm(size: int) -> RMSNorm:
            return RMSNorm(context, size, config.rms_norm_eps)

        def attention(index: int, prefix: str) -> SelfAttention:
            return SelfAttention(
                context,
                rotary,
                qkv_bias=bias,
                out_bias=bias,
                head_norm=head_norm,
                sliding_window=windows[index],
                prefix=prefix,
            )

        super().__init__(context, DecoderParts(attention))
