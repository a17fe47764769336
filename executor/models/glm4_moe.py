"""GLM-4.5 (arXiv:2508.06471) to 4.7: half of each head is rotated, routers choose by corrected sigmoids, as those of
DeepSeek V3, and the first layers are dense."""

from __future__ import annotations

from executor.layers.context import ModelContext
from executor.layers.mlp import GatedMLP
from executor.layers.moe import MoE
from executor.layers.norm import RMSNorm
from executor.layers.rotary import RotaryEmbedding
from executor.layers.self_attention import SelfAttention
from executor.models.base import WeightsMapper
from executor.models.decoder import ROTARY_BUFFERS, CausalDecoder, DecoderParts, MakeBlock
from executor.weights_mapper import STACKS
from ops import Routing


def corrected_mlp(context: ModelContext) -> MakeBlock:
    """Dense MLPs in the first layers, then experts chosen by corrected sigmoids."""
    config = context.config
    num_dense, inner = config.integer("first_k_dense_replace"), config.size("moe_intermediate_size")
    num_shared = config.integer("n_shared_experts", 0)
    routing = Routing(
        config.size("num_experts_per_tok"),
        "sigmoid",
        normalize=config.boolean("norm_topk_prob"),
        factor=config.number("routed_scaling_factor"),
        num_groups=config.size("n_group"),
        top_groups=config.size("topk_group"),
    )

    def mlp(index: int, prefix: str) -> GatedMLP | MoE:
        if index < num_dense:
            return GatedMLP(context, prefix=prefix)
        shared = ("shared_experts", num_shared * inner) if num_shared else None
        experts = config.size("num_local_experts")
        return MoE(context, routing, experts, inner, is_corrected=True, shared=shared, prefix=prefix)

    return mlp


class Glm4MoeForCausalLM(CausalDecoder):
    attribute_map = {"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"}
    mapper = WeightsMapper(ignored=[ROTARY_BUFFERS], stacks=STACKS)
    config_defaults = {
        "attention_bias": False,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "moe_intermediate_size": 1408,
        "n_group": 1,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 8,
        "num_local_experts": 128,
        "num_mtp_layers": 1,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-5,
        "routed_scaling_factor": 1.0,
        "topk_group": 1,
        "use_qk_norm": False,
    }

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        rotary = RotaryEmbedding(context)
        bias, is_normed = config.boolean("attention_bias"), config.boolean("use_qk_norm")

        def head_norm(size: int) -> RMSNorm:
            return RMSNorm(context, size, config.rms_norm_eps)

        def attention(index: int, prefix: str) -> SelfAttention:
            norm = head_norm if is_normed else None
            return SelfAttention(context, rotary, qkv_bias=bias, head_norm=norm, prefix=prefix)

        super().__init__(context, DecoderParts(attention, corrected_mlp(context)))
        # Layers that predict further tokens follow the others.
        after = range(config.num_layers, config.num_layers + config.integer("num_mtp_layers"))
        self.ignored = tuple(rf"^model\.layers\.{index}\." for index in after)
