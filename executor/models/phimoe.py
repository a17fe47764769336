"""Phi-3.5-MoE (arXiv:2404.14219): Phi-3 with layer norms, biases, and experts that a mixer of its own chooses."""

from __future__ import annotations

from executor.layers.context import ModelContext
from executor.layers.moe import MoE
from executor.layers.norm import LayerNorm
from executor.layers.rotary import RotaryEmbedding
from executor.layers.self_attention import SelfAttention
from executor.models.base import WeightsMapper
from executor.models.decoder import ROTARY_BUFFERS, CausalDecoder, DecoderParts
from executor.models.mixtral import MIXTRAL_NAMES
from executor.weights_mapper import STACKS
from ops import Routing


class PhimoeForCausalLM(CausalDecoder):
    mapper = WeightsMapper(
        renames=[*MIXTRAL_NAMES, (r"\.mlp\.router\.", ".mlp.gate.")], ignored=[ROTARY_BUFFERS], stacks=STACKS
    )
    config_defaults = {
        "attention_bias": False,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "lm_head_bias": False,
        "max_position_embeddings": 131072,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 8,
        "num_local_experts": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "router_jitter_noise": 0.01,
    }

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        rotary = RotaryEmbedding(context)
        bias = config.boolean("attention_bias")
        window = config.size("sliding_window") if config.has("sliding_window") else None
        routing = Routing(
            config.size("num_experts_per_tok"), "sparsemixer", jitter=config.number("router_jitter_noise")
        )

        def attention(index: int, prefix: str) -> SelfAttention:
            return SelfAttention(context, rotary, qkv_bias=bias, out_bias=bias, sliding_window=window, prefix=prefix)

        def mlp(index: int, prefix: str) -> MoE:
            return MoE(context, routing, config.size("num_local_experts"), config.intermediate_size, prefix=prefix)

        parts = DecoderParts(
            attention,
            mlp,
            norm=lambda size: LayerNorm(context, size, config.rms_norm_eps),
            logit_bias=config.boolean("lm_head_bias"),
        )
        super().__init__(context, parts)
