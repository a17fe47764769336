"""OLMoE (Muennighoff et al., arXiv:2409.02060): Llama with experts, with norms over all heads of q and of k."""

from __future__ import annotations

from executor.layers.context import ModelContext
from executor.layers.moe import MoE
from executor.layers.norm import AllHeadsRMSNorm
from executor.layers.rotary import RotaryEmbedding
from executor.layers.self_attention import SelfAttention
from executor.models.base import WeightsMapper
from executor.models.decoder import ROTARY_BUFFERS, CausalDecoder, DecoderParts
from executor.weights_mapper import STACKS
from ops import Routing


class OlmoeForCausalLM(CausalDecoder):
    attribute_map = {"num_local_experts": "num_experts"}
    mapper = WeightsMapper(ignored=[ROTARY_BUFFERS], stacks=STACKS)
    config_defaults = {
        "attention_bias": False,
        "eos_token_id": 50279,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "norm_topk_prob": False,
        "num_experts_per_tok": 8,
        "num_local_experts": 64,
        "rms_norm_eps": 1e-5,
    }

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        rotary = RotaryEmbedding(context)
        bias = config.boolean("attention_bias")
        limit = config.number("clip_qkv") if config.has("clip_qkv") else None
        routing = Routing(config.size("num_experts_per_tok"), normalize=config.boolean("norm_topk_prob"))

        def heads_norm(num_heads: int) -> AllHeadsRMSNorm:
            return AllHeadsRMSNorm(context, num_heads, config.head_dim, config.rms_norm_eps)

        def attention(index: int, prefix: str) -> SelfAttention:
            return SelfAttention(
                context,
                rotary,
                qkv_bias=bias,
                out_bias=bias,
                clip=limit,
                clips_normed=True,
                heads_norm=heads_norm,
                prefix=prefix,
            )

        def mlp(index: int, prefix: str) -> MoE:
            return MoE(context, routing, config.size("num_local_experts"), config.intermediate_size, prefix=prefix)

        super().__init__(context, DecoderParts(attention, mlp))
