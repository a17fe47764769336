"""Qwen2 and Qwen2.5 (arXiv:2407.10671, arXiv:2412.15115): Llama with biases on q, k and v."""

from __future__ import annotations

from executor.hf_config import HFConfig
from executor.layers.context import ModelContext
from executor.layers.rotary import RotaryEmbedding
from executor.layers.self_attention import SelfAttention
from executor.models.decoder import CausalDecoder, DecoderParts

QWEN_DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "use_sliding_window": False,
}


def sliding_windows(config: HFConfig) -> list[int | None]:
    """The window of each layer. Unless the configuration lists layer types, only the upper layers have one."""
    has_window = config.boolean("use_sliding_window") and config.has("sliding_window")
    window = config.size("sliding_window") if has_window else None
    full = config.integer("max_window_layers")
    types = config.layer_types(
        "full_attention",
        "sliding_attention",
        default=lambda index: "full_attention" if index < full else "sliding_attention",
    )
    return [window if kind == "sliding_attention" else None for kind in types]


class Qwen2ForCausalLM(CausalDecoder):
    config_defaults = QWEN_DEFAULTS

    def __init__(self, context: ModelContext) -> None:
        rotary = RotaryEmbedding(context)
        windows = sliding_windows(context.config)

        def attention(index: int, prefix: str) -> SelfAttention:
            return SelfAttention(context, rotary, qkv_bias=True, sliding_window=windows[index], prefix=prefix)

        super().__init__(context, DecoderParts(attention))
