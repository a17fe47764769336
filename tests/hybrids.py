"""The families whose layers are not all attention; see ``families.py``."""

from __future__ import annotations

from collections.abc import Mapping

from tests.family import (
    FULL,
    GRANITE,
    LINEAR,
    REMOVED,
    Family,
    Fields,
    no_rope,
    old_granite_h,
    old_nemotron_h,
)

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

MAMBA: Fields = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 24,
    "mamba_d_conv": 4,
    "mamba_chunk_size": 32,
    "mamba_proj_bias": True,
}
"""Bamba, Falcon-H1 and Granite 4."""

HYBRIDS: Mapping[str, Family] = {
    "bamba": Family(
        "BambaConfig",
        "BambaForCausalLM",
        {**MAMBA, "attn_layer_indices": [1], "attention_bias": True, "mlp_bias": True},
        variants={
            "short convolution": {
                "attn_layer_indices": [0, 2],
                "mamba_d_conv": 3,
                "mamba_conv_bias": False,
                "mamba_proj_bias": False,
                "mlp_bias": False,
            }
        },
    ),
    "falcon_h1": Family(
        "FalconH1Config",
        "FalconH1ForCausalLM",
        {
            **MAMBA,
            "num_hidden_layers": 2,
            "mamba_n_heads": 6,
            "mamba_d_head": 40,
            "mamba_d_ssm": 240,
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": True,
            "head_dim": 32,
            "attention_bias": True,
            "projectors_bias": True,
            "mlp_bias": True,
            "attention_in_multiplier": 1.3,
            "attention_out_multiplier": 0.8,
            "embedding_multiplier": 2.1,
            "key_multiplier": 0.6,
            "lm_head_multiplier": 1.7,
            "mlp_multipliers": [0.9, 1.2],
            "ssm_in_multiplier": 1.4,
            "ssm_multipliers": [0.7, 0.8, 1.1, 1.3, 0.6],
            "ssm_out_multiplier": 0.9,
            "rope_parameters": {"rope_theta": 3000.0},
        },
        variants={
            "no norm": {"mamba_rms_norm": False, "mamba_d_head": "auto", "mamba_proj_bias": False},
            "gate first": {"mamba_norm_before_gate": False, "mamba_conv_bias": False, "mlp_multipliers": None},
        },
    ),
    "granite4_h": Family(
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        {
            **GRANITE,
            **MAMBA,
            "layer_types": [LINEAR, FULL, LINEAR],
            "intermediate_size": 40,
            "shared_intermediate_size": 56,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
        },
        old_granite_h,
        variants={
            "dense": {"num_local_experts": 0, "position_embedding_type": "rope", "mamba_n_groups": 1},
            "limits": {"time_step_limit": [0.6, 0.7], "mamba_d_conv": 3, "mamba_conv_bias": False},
        },
    ),
    "mamba2": Family(
        "Mamba2Config",
        "Mamba2ForCausalLM",
        {
            **dict.fromkeys(("intermediate_size", "num_attention_heads", "num_key_value_heads"), REMOVED),
            "rms_norm_eps": REMOVED,
            "layer_norm_epsilon": 0.01,
            "num_heads": 8,
            "head_dim": 16,
            "n_groups": 2,
            "state_size": 24,
            "conv_kernel": 4,
            "chunk_size": 32,
            "use_bias": True,
        },
        no_rope,
        variants={
            "limits": {"time_step_limit": [0.6, 0.7], "n_groups": 1, "use_bias": False},
            "no bias": {"use_conv_bias": False, "conv_kernel": 2},
        },
    ),
    "nemotron_h": Family(
        "NemotronHConfig",
        "NemotronHForCausalLM",
        {
            "num_hidden_layers": REMOVED,
            "rms_norm_eps": REMOVED,
            "layer_norm_epsilon": 0.01,
            "layers_block_type": [LINEAR, "moe", FULL, "mlp", LINEAR],
            "head_dim": 32,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "ssm_state_size": 24,
            "chunk_size": 32,
            "use_bias": True,
            "mlp_bias": False,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "moe_shared_expert_intermediate_size": 56,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.7,
        },
        old_nemotron_h,
        variants={
            "latent experts": {"moe_latent_size": 32, "norm_topk_prob": False, "n_group": 1, "topk_group": 1},
            "dense": {
                "layers_block_type": [LINEAR, "mlp", FULL],
                "mlp_bias": True,
                "use_conv_bias": False,
                "conv_kernel": 3,
            },
        },
    ),
    "qwen3_5": Family(
        "Qwen3_5TextConfig",
        "Qwen3_5ForCausalLM",
        HYBRID,
        variants={
            "a head for each": {"linear_num_key_heads": 4, "linear_conv_kernel_dim": 3, "attention_bias": True},
            "default types": {"layer_types": None, "num_hidden_layers": 4},
        },
    ),
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
