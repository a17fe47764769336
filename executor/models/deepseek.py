"""DeepSeek-V2 (arXiv:2405.04434), V3 and R1 (arXiv:2412.19437), and models of their architecture: Kimi K2
(arXiv:2507.20534) and GLM-4.7-Flash. Latent attention, and experts of which all tokens share some."""

from __future__ import annotations

from dataclasses import replace

from executor.hf_config import HFConfig
from executor.layers.context import ModelContext
from executor.layers.latent_attention import LatentAttention
from executor.layers.mlp import GatedMLP
from executor.layers.moe import MoE
from executor.layers.rotary import RotaryEmbedding
from executor.models.base import WeightsMapper
from executor.models.decoder import ROTARY_BUFFERS, CausalDecoder, DecoderParts
from executor.weights_mapper import STACKS
from ops import Routing


def groups_of(config: HFConfig) -> tuple[int, int]:
    """How many groups the experts form, and from how many of these they are chosen."""
    return (config.size("n_group"), config.size("topk_group")) if config.has("n_group") else (1, 1)


class DeepseekForCausalLM(CausalDecoder):
    """What the generations share. They differ in how experts are chosen."""

    mapper = WeightsMapper(ignored=[ROTARY_BUFFERS], stacks=STACKS)
    is_corrected = False
    """Whether the router has a bias that counts for the choice alone."""

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        rope_dim = config.size("qk_rope_head_dim")
        rotary = RotaryEmbedding(
            context, head_dim=rope_dim, rotary_dim=rope_dim, is_interleaved=config.boolean("rope_interleave")
        )
        has_split_up = config.boolean("has_split_kv_b", False)
        routing, sparse = self.routing(config), self.sparse_layers(config)
        inner, num_experts = config.size("moe_intermediate_size"), config.size("n_routed_experts")
        num_shared = config.integer("n_shared_experts", 0)
        shared = ("shared_experts", inner * num_shared) if num_shared > 0 else None

        def attention(index: int, prefix: str) -> LatentAttention:
            return LatentAttention(context, rotary, has_split_up=has_split_up, prefix=prefix)

        def mlp(index: int, prefix: str) -> MoE | GatedMLP:
            if not (index >= len(sparse) or sparse[index]):  # those behind the last predict further tokens
                return GatedMLP(context, prefix=prefix)
            return MoE(
                context, routing, num_experts, inner, is_corrected=self.is_corrected, shared=shared, prefix=prefix
            )

        super().__init__(context, DecoderParts(attention, mlp))
        # Layers that predict further tokens follow those of the model.
        extra = rf"^model\.layers\.{config.num_layers}\."
        self.mapper = replace(self.mapper, ignored=[*self.mapper.ignored, extra])

    def routing(self, config: HFConfig) -> Routing:
        """How experts are chosen."""
        raise NotImplementedError

    def sparse_layers(self, config: HFConfig) -> list[bool]:
        """Whether each layer has experts: all but the first."""
        first = config.integer("first_k_dense_replace")
        return [index >= first for index in range(config.num_layers)]


class DeepseekV2ForCausalLM(DeepseekForCausalLM):
    config_defaults = {
        "attention_bias": False,
        "first_k_dense_replace": 0,
        "hidden_act": "silu",
        "kv_lora_rank": 512,
        "max_position_embeddings": 2048,
        "moe_intermediate_size": 1407,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-6,
        "rope_interleave": True,
        "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
        "v_head_dim": 128,
    }

    def routing(self, config: HFConfig) -> Routing:
        if config.boolean("norm_topk_prob"):
            config.bad("norm_topk_prob", "false, as in all models of DeepSeek-V2")
        has_groups = config.choice("topk_method", {"greedy": False, "group_limited_greedy": True})
        num_groups, top_groups = groups_of(config) if has_groups else (1, 1)
        return Routing(
            config.size("num_experts_per_tok"),
            factor=config.number("routed_scaling_factor"),
            num_groups=num_groups,
            top_groups=top_groups,
            group_best=1,
        )


class DeepseekV3ForCausalLM(DeepseekForCausalLM):
    is_corrected = True
    config_defaults = {
        "attention_bias": False,
        "first_k_dense_replace": 3,
        "hidden_act": "silu",
        "kv_lora_rank": 512,
        "max_position_embeddings": 4096,
        "moe_intermediate_size": 2048,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": 8,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-6,
        "rope_interleave": True,
        "routed_scaling_factor": 2.5,
        "topk_group": 4,
        "v_head_dim": 128,
    }

    def routing(self, config: HFConfig) -> Routing:
        num_groups, top_groups = groups_of(config)
        return Routing(
            config.size("num_experts_per_tok"),
            "sigmoid",
            normalize=config.boolean("norm_topk_prob"),
            factor=config.number("routed_scaling_factor"),
            num_groups=num_groups,
            top_groups=top_groups,
        )


class Glm4MoeLiteForCausalLM(DeepseekV3ForCausalLM):
    """GLM-4.7-Flash."""

    config_defaults = {
        "attention_bias": False,
        "hidden_act": "silu",
        "kv_lora_rank": 512,
        "max_position_embeddings": 202752,
        "moe_intermediate_size": 1536,
        "n_group": 1,
        "n_routed_experts": 64,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": 4,
        "qk_nope_head_dim": 192,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-5,
        "rope_interleave": True,
        "routed_scaling_factor": 1.8,
        "topk_group": 1,
        "v_head_dim": 256,
    }

    def sparse_layers(self, config: HFConfig) -> list[bool]:
        if config.has("mlp_layer_types"):
            types = config.strings("mlp_layer_types")
            if len(types) != config.num_layers or set(types) - {"dense", "sparse"}:
                config.bad("mlp_layer_types", f"{config.num_layers} times dense or sparse")
            return [kind == "sparse" for kind in types]
        first = config.integer("first_k_dense_replace", 1)
        return [index >= first for index in range(config.num_layers)]
