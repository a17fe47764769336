"""MiniMax-M2: q and k are normalised over all their heads together, a part of each head is rotated, and routers choose
by corrected sigmoids."""

from __future__ import annotations

from dataclasses import replace

from executor.layers.context import ModelContext
from executor.layers.moe import MoE
from executor.layers.norm import AllHeadsRMSNorm
from executor.layers.rotary import RotaryEmbedding
from executor.layers.self_attention import SelfAttention
from executor.models.base import WeightsMapper
from executor.models.decoder import ROTARY_BUFFERS, CausalDecoder, DecoderParts
from executor.models.mixtral import MIXTRAL_NAMES
from executor.weights_mapper import STACKS
from ops import Routing


class MiniMaxM2ForCausalLM(CausalDecoder):
    attribute_map = {"num_experts": "num_local_experts"}
    mapper = WeightsMapper(
        renames=[*MIXTRAL_NAMES, (r"\.mlp\.e_score_correction_bias$", ".mlp.gate.e_score_correction_bias")],
        ignored=[ROTARY_BUFFERS],
        stacks=STACKS,
    )
    config_defaults = {
        "eos_token_id": 200020,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 196608,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5000000.0,
    }

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        rope = config.rope
        if config.has("rotary_dim"):  # files on the hub say how many columns are rotated
            factor = config.size("rotary_dim") / config.head_dim
            rope = replace(rope, values={**rope.values, "partial_rotary_factor": factor})
        rotary = RotaryEmbedding(context, rope)
        routing = Routing(config.size("num_experts_per_tok"), "sigmoid", normalize=True)

        def heads_norm(num_heads: int) -> AllHeadsRMSNorm:
            return AllHeadsRMSNorm(context, num_heads, config.head_dim, config.rms_norm_eps)

        def attention(index: int, prefix: str) -> SelfAttention:
            return SelfAttention(context, rotary, heads_norm=heads_norm, prefix=prefix)

        def mlp(index: int, prefix: str) -> MoE:
            experts, inner = config.size("num_experts"), config.intermediate_size
            return MoE(context, routing, experts, inner, is_corrected=True, prefix=prefix)

        super().__init__(context, DecoderParts(attention, mlp))
