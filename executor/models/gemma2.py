"""Gemma 2 (arXiv:2408.00118): norms before and after each block, soft caps, a window in every other layer."""

from __future__ import annotations

import torch

from executor.hf_config import HFConfig
from executor.layers.context import ModelContext
from executor.layers.norm import RMSNorm
from executor.layers.rotary import RotaryEmbedding
from executor.layers.self_attention import SelfAttention
from executor.models.decoder import CausalDecoder, DecoderParts, MakeBlock, Norms

FULL, SLIDING = "full_attention", "sliding_attention"

SANDWICH = Norms(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)


def gemma_norm(context: ModelContext, size: int) -> RMSNorm:
    """``x / rms(x) * (1 + weight)``, rounded once."""
    return RMSNorm(context, size, context.config.rms_norm_eps, offset=1.0, round_first=False)


def embedding_scale(context: ModelContext) -> float:
    """``sqrt(hidden_size)``, rounded to the activations' type as in training."""
    return torch.tensor(context.config.hidden_size**0.5).to(context.dtype).item()


def optional(config: HFConfig, name: str) -> float | None:
    """A field that turns something off if it is missing or null."""
    return config.number(name) if config.has(name) else None


def gemma_parts(context: ModelContext, attention: MakeBlock) -> DecoderParts:
    """What Gemma 2 and 3 have around their attention."""
    return DecoderParts(
        attention,
        norm=lambda size: gemma_norm(context, size),
        norms=SANDWICH,
        embedding_scale=embedding_scale(context),
        logit_softcap=optional(context.config, "final_logit_softcapping"),
    )


class Gemma2ForCausalLM(CausalDecoder):
    attribute_map = {"hidden_act": "hidden_activation"}
    config_defaults = {
        "attention_bias": False,
        "attn_logit_softcapping": 50.0,
        "eos_token_id": 1,
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
    }

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        rotary = RotaryEmbedding(context)
        bias = config.boolean("attention_bias")
        types = config.layer_types(FULL, SLIDING, default=lambda index: FULL if index % 2 else SLIDING)

        def attention(index: int, prefix: str) -> SelfAttention:
            return SelfAttention(
                context,
                rotary,
                qkv_bias=bias,
                out_bias=bias,
                scale=config.positive("query_pre_attn_scalar") ** -0.5,
                sliding_window=config.size("sliding_window") if types[index] == SLIDING else None,
                logit_softcap=optional(config, "attn_logit_softcapping"),
                prefix=prefix,
            )

        super().__init__(context, gemma_parts(context, attention))
