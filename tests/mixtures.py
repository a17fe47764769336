"""The families with experts; see ``families.py``."""

from __future__ import annotations

from collections.abc import Mapping

from tests.family import CHUNKED, FULL, GRANITE, SLIDING, YARN, Family, Fields, old_phi3, old_qwen3_moe

DEEPSEEK: Fields = {
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
    "rms_norm_eps": 0.01,  # other than that of the norms of latents
    "moe_intermediate_size": 40,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "routed_scaling_factor": 1.7,
}

MIXTURES: Mapping[str, Family] = {
    "deepseek_v2": Family(
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        {
            **DEEPSEEK,
            "q_lora_rank": None,
            "topk_method": "greedy",
            "rope_parameters": {**YARN, "mscale": 0.9, "mscale_all_dim": 0.7},
        },
        variants={
            "groups": {
                "q_lora_rank": 24,
                "attention_bias": True,
                "topk_method": "group_limited_greedy",
                "n_group": 4,
                "topk_group": 2,
                "rope_parameters": {"rope_theta": 3000.0},
            }
        },
    ),
    "deepseek_v3": Family(
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            **DEEPSEEK,
            "q_lora_rank": 24,
            "attention_bias": True,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": True,
            "num_mtp_layers": 0,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
        variants={
            "halves": {"rope_interleave": False, "norm_topk_prob": False, "rope_parameters": {"rope_theta": 3000.0}},
            "kimi": {"n_group": 1, "topk_group": 1, "attention_bias": False, "kv_lora_rank": 64},
        },
    ),
    "glm4_moe": Family(
        "Glm4MoeConfig",
        "Glm4MoeForCausalLM",
        {
            "head_dim": 32,
            "attention_bias": True,
            "use_qk_norm": True,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 40,
            "n_group": 4,
            "n_routed_experts": 8,
            "n_shared_experts": 2,
            "num_experts_per_tok": 3,
            "routed_scaling_factor": 2.5,
            "topk_group": 2,
        },
        variants={
            "plain": {"use_qk_norm": False, "attention_bias": False, "n_group": 1, "topk_group": 1},
            "not normalised": {"norm_topk_prob": False, "n_shared_experts": 1, "first_k_dense_replace": 2},
        },
    ),
    "glm4_moe_lite": Family(
        "Glm4MoeLiteConfig",
        "Glm4MoeLiteForCausalLM",
        {
            **{name: value for name, value in DEEPSEEK.items() if name != "first_k_dense_replace"},
            "q_lora_rank": 24,
            "mlp_layer_types": ["dense", "sparse", "dense"],
            "rope_parameters": {"rope_theta": 3000.0},
        },
        variants={"default types": {"mlp_layer_types": None}},
    ),
    "gpt_oss": Family(
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            "head_dim": 16,
            "intermediate_size": 40,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "sliding_window": 24,
            "swiglu_alpha": 1.3,
            "swiglu_limit": 0.5,
            "layer_types": [SLIDING, FULL, SLIDING],
            "rope_parameters": {**YARN, "truncate": False, "beta_fast": 3.0, "beta_slow": 1.5},
        },
        variants={
            "default types": {"layer_types": None, "attention_bias": False},
            "truncated": {"rope_parameters": {**YARN, "truncate": True, "beta_fast": 3.0, "beta_slow": 1.5}},
        },
    ),
    "granitemoe": Family(
        "GraniteMoeConfig",
        "GraniteMoeForCausalLM",
        {**GRANITE, "num_local_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 40},
        variants={"one expert for a token": {"num_experts_per_tok": 1}},
    ),
    "llama4": Family(
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {
            "num_hidden_layers": 4,
            "head_dim": 32,
            "intermediate_size": 40,
            "intermediate_size_mlp": 80,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "interleave_moe_layer_step": 2,
            "no_rope_layer_interval": 3,
            "attention_chunk_size": 24,
            "floor_scale": 16,
            "attn_scale": 0.4,
            "rms_norm_eps": 0.01,
            "rope_parameters": {"rope_theta": 3000.0},
        },
        variants={
            "maverick": {"use_qk_norm": False, "moe_layers": [0, 3], "num_experts_per_tok": 1},
            "plain": {"attn_temperature_tuning": False, "attention_bias": True, "attention_chunk_size": None},
            "listed": {"no_rope_layers": [0, 1, 1, 0], "layer_types": [FULL, CHUNKED, FULL, FULL]},
        },
    ),
    "mixtral": Family(
        "MixtralConfig",
        "MixtralForCausalLM",
        {
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "intermediate_size": 48,
            "head_dim": 24,
            "sliding_window": 24,
        },
        variants={"all experts": {"num_experts_per_tok": 5, "sliding_window": None}},
    ),
    "olmoe": Family(
        "OlmoeConfig",
        "OlmoeForCausalLM",
        {
            "attention_bias": True,
            "clip_qkv": 0.9,
            "intermediate_size": 40,
            "num_experts": 8,
            "num_experts_per_tok": 3,
        },
        variants={"normalised": {"norm_topk_prob": True, "clip_qkv": None}},
    ),
    "phimoe": Family(
        "PhimoeConfig",
        "PhimoeForCausalLM",
        {
            "attention_bias": True,
            "lm_head_bias": True,
            "rms_norm_eps": 0.01,
            "intermediate_size": 40,
            "num_local_experts": 6,
            "router_jitter_noise": 0.3,
            "sliding_window": 24,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 5000.0,
                "original_max_position_embeddings": 32,
                "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5, 3.0, 4.0],
                "long_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5, 3.0, 4.0],  # transformers always takes the short ones
                "short_mscale": 1.2,
                "long_mscale": 1.4,
            },
        },
        old_spelling=old_phi3,
        variants={"plain": {"attention_bias": False, "lm_head_bias": False, "router_jitter_noise": 0.01}},
    ),
    "qwen2_moe": Family(
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 56,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [1],
            "use_sliding_window": True,
            "sliding_window": 24,
            "layer_types": [SLIDING, FULL, SLIDING],
        },
        variants={
            "normalised": {"norm_topk_prob": True, "mlp_only_layers": [], "decoder_sparse_step": 2},
            "no biases": {"qkv_bias": False, "use_sliding_window": False, "layer_types": None},
        },
    ),
    "qwen3_moe": Family(
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            "attention_bias": True,
            "head_dim": 32,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
            "use_sliding_window": True,
            "sliding_window": 24,
            "tie_word_embeddings": True,
        },
        old_spelling=old_qwen3_moe,
        variants={"not normalised": {"norm_topk_prob": False, "use_sliding_window": False, "decoder_sparse_step": 2}},
    ),
}
