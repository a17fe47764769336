"""OLMo 2 (arXiv:2501.00656) and OLMo 3 (arXiv:2512.13961): norms follow the blocks, and q and k are normalised over all
their heads together."""

from __future__ import annotations

from executor.hf_config import HFConfig
from executor.layers.context import ModelContext
from executor.layers.norm import AllHeadsRMSNorm
from executor.layers.rotary import RotaryEmbedding
from executor.layers.self_attention import SelfAttention
from executor.models.decoder import CausalDecoder, DecoderParts, Norms

OLMO_DEFAULTS = {
    "attention_bias": False,
    "eos_token_id": 50279,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}

POST_NORMS = Norms(after_attention="post_attention_layernorm", after_mlp="post_feedforward_layernorm")


def kinds_of_layers(config: HFConfig) -> list[str]:
    """The type of each layer. OLMo 2 has no windows; OLMo 3 has one in three of four layers."""
    if not config.has("sliding_window"):
        return ["full_attention"] * config.num_layers
    return config.layer_types(
        "full_attention",
        "sliding_attention",
        default=lambda index: "full_attention" if index % 4 == 3 else "sliding_attention",
    )


class Olmo2ForCausalLM(CausalDecoder):
    config_defaults = OLMO_DEFAULTS

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        bias = config.boolean("attention_bias")
        kinds = kinds_of_layers(config)
        ropes = {kind: config.rope_for(kind, is_scaled=kind == "full_attention") for kind in sorted(set(kinds))}
        rotary = {kind: RotaryEmbedding(context, rope) for kind, rope in ropes.items()}

        def heads_norm(num_heads: int) -> AllHeadsRMSNorm:
            return AllHeadsRMSNorm(context, num_heads, config.head_dim, config.rms_norm_eps)

        def attention(index: int, prefix: str) -> SelfAttention:
            return SelfAttention(
                context,
                rotary[kinds[index]],
                qkv_bias=bias,
                out_bias=bias,
                heads_norm=heads_norm,
                sliding_window=config.size("sliding_window") if kinds[index] == "sliding_attention" else None,
                prefix=prefix,
            )

        super().__init__(context, DecoderParts(attention, norms=POST_NORMS))


class Olmo3ForCausalLM(Olmo2ForCausalLM):
    config_defaults = {**OLMO_DEFAULTS, "rope_theta": 500000.0, "sliding_window": 4096}
