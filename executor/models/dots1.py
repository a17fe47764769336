"""dots.llm1 (arXiv:2506.05767): attention as in Qwen3, and experts as in DeepSeek V3."""

from __future__ import annotations

from executor.layers.context import ModelContext
from executor.models.base import WeightsMapper
from executor.models.decoder import ROTARY_BUFFERS, CausalDecoder, DecoderParts
from executor.models.glm4_moe import corrected_mlp
from executor.models.qwen3 import qwen3_attention
from executor.weights_mapper import STACKS


class Dots1ForCausalLM(CausalDecoder):
    attribute_map = {"num_local_experts": "n_routed_experts"}
    mapper = WeightsMapper(ignored=[ROTARY_BUFFERS], stacks=STACKS)
    config_defaults = {
        "attention_bias": False,
        "first_k_dense_replace": 0,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "max_window_layers": 62,
        "moe_intermediate_size": 1408,
        "n_group": 1,
        "norm_topk_prob": False,
        "rms_norm_eps": 1e-6,
        "routed_scaling_factor": 1.0,
        "topk_group": 1,
    }

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        window = config.size("sliding_window") if config.has("sliding_window") else None
        full = config.integer("max_window_layers")
        types = config.layer_types(
            "full_attention",
            "sliding_attention",
            default=lambda index: "full_attention" if index < full else "sliding_attention",
        )
        windows = [window if kind == "sliding_attention" else None for kind in types]
        super().__init__(context, DecoderParts(qwen3_attention(context, windows), corrected_mlp(context)))
