"""The families whose layers are not all attention; see ``families.py``."""

from __future__ import annotations

from collections.abc import Mapping

from tests.family import FULL, REMOVED, Family, Fields

LINEAR = "linear_attention"
"""An entry of ``layer_types``."""

HYBRID: Fields = {
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 24,
    "linear_value_head_dim": 40,
    "linear_conv_kernel_dim": 4,
    "layer_types": [LINEAR, FULL, LINEAR],
    "rope_parameters": {"rope_theta": 3000.0, "partial_rotary_factor": 0.5},
}
"""Qwen3-Next and Qwen3.5."""

HYBRIDS: Mapping[str, Family] = {
    "qwen3_5": Family("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", HYBRID),
    "qwen3_5_moe": Family(
        "Qwen3_5MoeTextConfig",
        "Qwen3_5MoeForCausalLM",
        {
            **HYBRID,
            "intermediate_size": REMOVED,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 56,
        },
    ),
    "qwen3_next": Family(
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        {
            **HYBRID,
            "attention_bias": True,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 56,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
        },
        variants={
            "default types": {"layer_types": None, "num_hidden_layers": 4, "norm_topk_prob": False},
            "a head for each": {"linear_num_key_heads": 4, "linear_conv_kernel_dim": 3, "attention_bias": False},
        },
    ),
}
