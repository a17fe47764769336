"""SmolLM3 (huggingface.co/blog/smollm3): Llama in which every fourth layer knows no positions (NoPE).

NoPE layers: Kazemnejad et al., arXiv:2305.19466; mixed with rotary ones: Yang et al., arXiv:2501.18795.
"""

from __future__ import annotations

from executor.hf_config import HFConfig
from executor.layers.context import ModelContext
from executor.layers.mlp import GatedMLP
from executor.layers.rotary import RotaryEmbedding
from executor.layers.self_attention import SelfAttention
from executor.models.decoder import CausalDecoder, DecoderParts


def rotated_layers(config: HFConfig) -> list[bool]:
    """Whether each layer rotates q and k: ``no_rope_layers`` has a 1 for each layer that does, and a 0 for a NoPE
    layer."""
    if not config.has("no_rope_layers"):
        interval = config.size("no_rope_layer_interval")
        return [(index + 1) % interval != 0 for index in range(config.num_layers)]
    flags = config.numbers("no_rope_layers")
    if len(flags) < config.num_layers or set(flags) - {0, 1}:
        config.bad("no_rope_layers", f"{config.num_layers} times 0 or 1")
    return [flag == 1 for flag in flags]


class SmolLM3ForCausalLM(CausalDecoder):
    config_defaults = {
        "attention_bias": False,
        "eos_token_id": 128001,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "mlp_bias": False,
        "no_rope_layer_interval": 4,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 2000000.0,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    }

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        rotary = RotaryEmbedding(context)
        is_rotated = rotated_layers(config)
        has_window = config.boolean("use_sliding_window") and config.has("sliding_window")
        window = config.size("sliding_window") if has_window else None
        types = config.layer_types(
            "full_attention",
            "sliding_attention",
            default=lambda index: "full_attention" if is_rotated[index] else "sliding_attention",
        )
        bias, mlp_bias = config.boolean("attention_bias"), config.boolean("mlp_bias")

        def attention(index: int, prefix: str) -> SelfAttention:
            return SelfAttention(
                context,
                rotary if is_rotated[index] else None,
                qkv_bias=bias,
                out_bias=bias,
                sliding_window=window if types[index] == "sliding_attention" else None,
                prefix=prefix,
            )

        def mlp(index: int, prefix: str) -> GatedMLP:
            return GatedMLP(context, bias=mlp_bias, prefix=prefix)

        super().__init__(context, DecoderParts(attention, mlp))
