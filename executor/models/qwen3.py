"""Qwen3 and Qwen3-MoE (arXiv:2505.09388): the heads of q and k are normalised before rotation."""

from __future__ import annotations

from dataclasses import replace

from executor.layers.context import ModelContext
from executor.layers.norm import RMSNorm
from executor.layers.rotary import RotaryEmbedding
from executor.layers.self_attention import SelfAttention
from executor.models.decoder import CausalDecoder, DecoderParts, MakeBlock
from executor.models.qwen2 import QWEN_DEFAULTS, QWEN_MOE_DEFAULTS, QWEN_MOE_MAPPER, qwen_mlp, sliding_windows
from executor.weights_mapper import stacks_of_either


def qwen3_attention(context: ModelContext, windows: list[int | None]) -> MakeBlock:
    """Attention layers with these windows."""
    config = context.config
    rotary = RotaryEmbedding(context)
    bias = config.boolean("attention_bias")

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

    return attention


class Qwen3ForCausalLM(CausalDecoder):
    config_defaults = {**QWEN_DEFAULTS, "attention_bias": False, "head_dim": 128}

    def __init__(self, context: ModelContext) -> None:
        super().__init__(context, DecoderParts(qwen3_attention(context, sliding_windows(context.config))))


class Qwen3MoeForCausalLM(CausalDecoder):
    """Qwen3 with experts, and windows in all layers or in none."""

    attribute_map = {"num_experts": "num_local_experts"}
    mapper = QWEN_MOE_MAPPER
    config_defaults = {
        **QWEN_MOE_DEFAULTS,
        "attention_bias": False,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 4,
    }

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        has_window = config.boolean("use_sliding_window") and config.has("sliding_window")
        windows = [config.size("sliding_window") if has_window else None] * config.num_layers
        mlp = qwen_mlp(context, config.size("num_experts"), has_shared=False)
        super().__init__(context, DecoderParts(qwen3_attention(context, windows), mlp))
        if config.get("model_type") == "qwen3_vl_moe_text":
            self.mapper = replace(self.mapper, stacks=stacks_of_either(config.hidden_size))
