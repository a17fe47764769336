"""EXAONE 4.0 (arXiv:2507.11407): norms follow the blocks, heads of q and k are normalised, and in models with windows
the layers without one know no positions (NoPE)."""

from __future__ import annotations

from executor.hf_config import HFConfig
from executor.layers.context import ModelContext
from executor.layers.norm import RMSNorm
from executor.layers.rotary import RotaryEmbedding
from executor.layers.self_attention import SelfAttention
from executor.models.decoder import CausalDecoder, DecoderParts
from executor.models.olmo2 import POST_NORMS


def windows(config: HFConfig) -> list[int | None]:
    """The window of each layer: unless types are listed, all but every ``sliding_window_pattern``-th have one.

    The pattern may also be spelt out: ``LLLG`` is three local layers, then a global one.
    """
    if not config.has("sliding_window"):
        return [None] * config.num_layers
    pattern = config.values["sliding_window_pattern"]
    if isinstance(pattern, str) and pattern and not set(pattern) - set("LG"):
        period = [letter == "L" for letter in pattern]
    else:
        period = [True] * (config.size("sliding_window_pattern") - 1) + [False]
    types = config.layer_types(
        "full_attention",
        "sliding_attention",
        default=lambda index: "sliding_attention" if period[index % len(period)] else "full_attention",
    )
    window = config.size("sliding_window")
    return [window if kind == "sliding_attention" else None for kind in types]


class Exaone4ForCausalLM(CausalDecoder):
    config_defaults = {
        "eos_token_id": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-5,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
    }

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        rotary = RotaryEmbedding(context)
        window = windows(config)
        is_rotated = [size is not None or not config.has("sliding_window") for size in window]

        def head_norm(size: int) -> RMSNorm:
            return RMSNorm(context, size, config.rms_norm_eps)

        def attention(index: int, prefix: str) -> SelfAttention:
            return SelfAttention(
                context,
                rotary if is_rotated[index] else None,
                head_norm=head_norm,
                sliding_window=window[index],
                prefix=prefix,
            )

        super().__init__(context, DecoderParts(attention, norms=POST_NORMS))
