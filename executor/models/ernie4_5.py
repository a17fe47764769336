"""ERNIE 4.5 (Baidu, ERNIE 4.5 Technical Report, 2025): Llama with rotation of adjacent columns."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from executor.layers.context import ModelContext
from executor.layers.mlp import GatedMLP
from executor.layers.moe import MoE
from executor.layers.rotary import RotaryEmbedding
from executor.models.base import WeightsMapper
from executor.models.decoder import ROTARY_BUFFERS, CausalDecoder
from executor.models.llama import llama_parts
from executor.weights_mapper import STACKS
from ops import Routing


class Ernie45ForCausalLM(CausalDecoder):
    config_defaults = {
        "eos_token_id": 2,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "use_bias": False,
    }

    def __init__(self, context: ModelContext) -> None:
        rotary = RotaryEmbedding(context, is_interleaved=True)
        bias = context.config.boolean("use_bias")
        super().__init__(context, llama_parts(context, rotary, qkv_bias=bias, out_bias=bias, mlp_bias=bias))


class Ernie45MoeForCausalLM(CausalDecoder):
    """ERNIE 4.5 with experts, whose scores are corrected for the choice, in some layers."""

    attribute_map = {"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"}
    mapper = WeightsMapper(
        renames=[(r"\.mlp\.(gate\.)?moe_statics\.", ".mlp.gate.")],
        ignored=[ROTARY_BUFFERS, r"^model\.mtp_"],
        transforms={r"\.e_score_correction_bias$": Tensor.flatten},
        stacks=STACKS,
    )
    config_defaults = {
        "eos_token_id": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "moe_intermediate_size": 1536,
        "moe_layer_end_index": -1,
        "moe_layer_interval": 1,
        "moe_layer_start_index": 1,
        "moe_num_shared_experts": 2,
        "num_experts": 64,
        "num_experts_per_tok": 6,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "use_bias": False,
    }

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        rotary = RotaryEmbedding(context, is_interleaved=True)
        bias, inner = config.boolean("use_bias"), config.size("moe_intermediate_size")
        first, last = config.integer("moe_layer_start_index"), config.integer("moe_layer_end_index")
        sparse = range(first, config.num_layers if last == -1 else last + 1)
        interval, num_shared = config.size("moe_layer_interval"), config.integer("moe_num_shared_experts")
        shared = ("shared_experts", num_shared * inner) if num_shared else None
        routing = Routing(config.size("num_experts_per_tok"), normalize=True)

        def mlp(index: int, prefix: str) -> GatedMLP | MoE:
            if index not in sparse or (index + 1) % interval:
                return GatedMLP(context, bias=bias, prefix=prefix)
            experts = config.size("num_experts")
            return MoE(context, routing, experts, inner, is_corrected=True, shared=shared, prefix=prefix)

        parts = llama_parts(context, rotary, qkv_bias=bias, out_bias=bias, mlp_bias=bias)
        super().__init__(context, replace(parts, mlp=mlp))
