"""Mixtral (Jiang et al., arXiv:2401.04088): Mistral with experts."""

from __future__ import annotations

from executor.layers.context import ModelContext
from executor.layers.moe import MoE
from executor.layers.rotary import RotaryEmbedding
from executor.layers.self_attention import SelfAttention
from executor.models.base import WeightsMapper
from executor.models.decoder import ROTARY_BUFFERS, CausalDecoder, DecoderParts
from executor.weights_mapper import STACKS
from ops import Routing

MIXTRAL_NAMES = [
    (r"\.block_sparse_moe\.", ".mlp."),
    (r"\.w1\.", ".gate_proj."),
    (r"\.w2\.", ".down_proj."),
    (r"\.w3\.", ".up_proj."),
]


class MixtralForCausalLM(CausalDecoder):
    attribute_map = {"num_experts": "num_local_experts"}
    mapper = WeightsMapper(renames=MIXTRAL_NAMES, ignored=[ROTARY_BUFFERS], stacks=STACKS)
    config_defaults = {
        "eos_token_id": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
    }

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        rotary = RotaryEmbedding(context)
        window = config.size("sliding_window") if config.has("sliding_window") else None
        routing = Routing(config.size("num_experts_per_tok"), normalize=True)

        def attention(index: int, prefix: str) -> SelfAttention:
            return SelfAttention(context, rotary, sliding_window=window, prefix=prefix)

        def mlp(index: int, prefix: str) -> MoE:
            return MoE(context, routing, config.size("num_experts"), config.intermediate_size, prefix=prefix)

        super().__init__(context, DecoderParts(attention, mlp))
