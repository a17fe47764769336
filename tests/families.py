"""The model families, each with a tiny configuration in which every fact of the family matters.

A fact is pinned if the model computes other logits without it. So no value is one at which a feature does nothing: a
factor of 1, a window longer than the test, layers of one type only, a norm or bias of zeros.
"""

from __future__ import annotations

from collections.abc import Mapping

from tests.family import (
    COMMON,
    END_OF_TEXT,
    FULL,
    GRANITE,
    IM_END,
    IM_START,
    REMOVED,
    SLIDING,
    VOCAB_SIZE,
    YARN,
    Family,
    Fields,
    gemma3_spelling,
    hub_internlm2,
    hub_internlm3,
    no_rope,
    old_bloom,
    old_cohere2,
    old_gemma4,
    old_granite,
    old_internlm3,
    old_lfm2,
    old_neox,
    old_olmo3,
    old_phi3,
)
from tests.hybrids import HYBRIDS
from tests.mixtures import MIXTURES

__all__ = [
    "COMMON",
    "DENSE",
    "END_OF_TEXT",
    "FAMILIES",
    "FULL",
    "Family",
    "Fields",
    "IM_END",
    "IM_START",
    "LONGROPE",
    "SLIDING",
    "VOCAB_SIZE",
]

LAYER_NORM: Fields = {"rms_norm_eps": REMOVED}
"""Families with layer norm, which have another name for what is added to the variance."""
GPT: Fields = {
    **LAYER_NORM,
    **dict.fromkeys(("hidden_size", "intermediate_size", "max_position_embeddings"), REMOVED),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), REMOVED),
    "n_embd": 64,
    "n_inner": 96,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 512,
    "layer_norm_epsilon": 0.01,
}
"""Fields of GPT-2 and GPT-J under their own names."""

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 5000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
    "long_factor": [1.0, 1.5, 2.5, 4.0, 6.0, 9.0],
}

DENSE: Mapping[str, Family] = {
    "arcee": Family(
        "ArceeConfig",
        "ArceeForCausalLM",
        {"attention_bias": True, "mlp_bias": True, "rope_parameters": {"rope_theta": 3000.0}, "head_dim": 24},
        variants={"plain": {"attention_bias": False, "mlp_bias": False}},
    ),
    "bloom": Family(
        "BloomConfig",
        "BloomForCausalLM",
        {
            **LAYER_NORM,
            **dict.fromkeys(("intermediate_size", "max_position_embeddings", "num_key_value_heads"), REMOVED),
            **dict.fromkeys(("num_hidden_layers", "num_attention_heads"), REMOVED),
            "n_layer": 3,
            "n_head": 4,
            "layer_norm_epsilon": 0.01,
            "tie_word_embeddings": True,
        },
        old_bloom,
        variants={"six heads": {"hidden_size": 48, "n_head": 6}, "untied": {"tie_word_embeddings": False}},
    ),
    "cohere": Family(
        "CohereConfig",
        "CohereForCausalLM",
        {
            **LAYER_NORM,
            "layer_norm_eps": 0.01,
            "logit_scale": 0.3,
            "use_qk_norm": True,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_theta": 3000.0},
        },
        variants={"plain": {"use_qk_norm": False, "attention_bias": True, "tie_word_embeddings": False}},
    ),
    "cohere2": Family(
        "Cohere2Config",
        "Cohere2ForCausalLM",
        {
            **LAYER_NORM,
            "layer_norm_eps": 0.01,
            "logit_scale": 0.3,
            "sliding_window": 17,
            "layer_types": [SLIDING, FULL, SLIDING],
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_theta": 3000.0},
        },
        old_spelling=old_cohere2,
        variants={"biases": {"attention_bias": True}},
    ),
    "ernie4_5": Family(
        "Ernie4_5Config",
        "Ernie4_5ForCausalLM",
        {"head_dim": 32, "use_bias": True, "tie_word_embeddings": True},
        variants={"untied": {"tie_word_embeddings": False, "use_bias": False}},
    ),
    "exaone4": Family(
        "Exaone4Config",
        "Exaone4ForCausalLM",
        {"sliding_window": 24, "layer_types": [SLIDING, FULL, SLIDING]},
        variants={
            "pattern": {"sliding_window": 24, "sliding_window_pattern": 2, "layer_types": None},
            "no windows": {"sliding_window": None, "layer_types": [FULL] * 3},
        },
    ),
    "falcon": Family(
        "FalconConfig",
        "FalconForCausalLM",
        {
            **LAYER_NORM,
            "intermediate_size": REMOVED,
            "num_key_value_heads": REMOVED,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "ffn_hidden_size": 96,
            "layer_norm_epsilon": 0.01,
            "new_decoder_architecture": True,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_theta": 3000.0},
        },
        variants={
            "7b": {"new_decoder_architecture": False},
            "11b": {"num_ln_in_parallel_attn": 1},
            "many heads": {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 4, "bias": True},
            "sequential": {"new_decoder_architecture": False, "parallel_attn": False, "bias": True},
        },
    ),
    "gemma": Family(
        "GemmaConfig",
        "GemmaForCausalLM",
        {"hidden_size": 72, "head_dim": 24, "tie_word_embeddings": True},
        variants={"biases": {"attention_bias": True}},
    ),
    "gemma2": Family(
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            "hidden_size": 72,  # its root is no whole number
            "head_dim": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 7,
            "sliding_window": 17,
            "tie_word_embeddings": True,
        },
        variants={
            "no caps": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
            "listed types": {"layer_types": [FULL, SLIDING, FULL]},
            "biases": {"attention_bias": True, "tie_word_embeddings": False},
        },
    ),
    "gemma3": Family(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            "hidden_size": 72,
            "head_dim": 24,
            "layer_types": [SLIDING, FULL, SLIDING],
            "query_pre_attn_scalar": 7,
            "rope_parameters": {
                FULL: {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
                SLIDING: {"rope_type": "default", "rope_theta": 100.0},
            },
            "sliding_window": 17,
            "tie_word_embeddings": True,
        },
        old_spelling=gemma3_spelling,
        variants={
            "caps": {"final_logit_softcapping": 3.0},
            "default types": {"layer_types": None, "num_hidden_layers": 7},
            "biases": {"attention_bias": True, "tie_word_embeddings": False},
        },
    ),
    "glm": Family("GlmConfig", "GlmForCausalLM", {"head_dim": 32}, variants={"no biases": {"attention_bias": False}}),
    "glm4": Family(
        "Glm4Config",
        "Glm4ForCausalLM",
        {"head_dim": 32},
        variants={"a quarter rotated": {"rope_parameters": {"rope_theta": 3000.0, "partial_rotary_factor": 0.25}}},
    ),
    "gpt2": Family(
        "GPT2Config",
        "GPT2LMHeadModel",
        {**GPT, "scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": True},
        no_rope,
        variants={"plain": {"n_inner": None, "scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": False}},
    ),
    "gpt_neox": Family(
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        {
            **LAYER_NORM,
            "num_key_value_heads": REMOVED,
            "layer_norm_eps": 0.01,
            "rope_parameters": {"rope_theta": 3000.0, "partial_rotary_factor": 0.25},
        },
        old_neox,
        variants={
            "sequential": {"use_parallel_residual": False},
            "no biases": {"attention_bias": False, "hidden_act": "relu"},
        },
    ),
    "gptj": Family("GPTJConfig", "GPTJForCausalLM", {**GPT, "rotary_dim": 6}, no_rope),
    "granite": Family("GraniteConfig", "GraniteForCausalLM", {**GRANITE, "mlp_bias": True}),
    "granite4": Family(
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        {
            **GRANITE,
            "layer_types": [FULL] * 3,
            "num_local_experts": 0,
            "position_embedding_type": "rope",
            "shared_intermediate_size": 80,
            "mamba_n_heads": 4,
        },
        old_spelling=old_granite,
        variants={"no rotation": {"position_embedding_type": None}},
    ),
    "gemma4": Family(
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {
            "hidden_size": 72,
            "num_hidden_layers": 6,
            "head_dim": 8,  # scores have no factor: with larger heads they would be as large
            "global_head_dim": 16,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "layer_types": [SLIDING, FULL] * 3,
            "final_logit_softcapping": 3.0,
            "sliding_window": 17,
            "rope_parameters": {
                FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 5000.0},
                SLIDING: {"rope_type": "default", "rope_theta": 100.0},
            },
            "tie_word_embeddings": True,
        },
        old_spelling=old_gemma4,
        variants={
            "no inputs of layers": {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
            "v": {"attention_k_eq_v": False, "num_kv_shared_layers": 0, "tie_word_embeddings": False},
            "biases": {"attention_bias": True, "final_logit_softcapping": None},
            "experts": {
                "enable_moe_block": True,
                "hidden_size_per_layer_input": 0,
                "moe_intermediate_size": 40,
                "num_experts": 6,
                "num_kv_shared_layers": 0,
                "top_k_experts": 2,
            },
        },
    ),
    "internlm2": Family(
        "LlamaConfig",
        "LlamaForCausalLM",
        {"attention_bias": True, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 3000.0, "factor": 2.0}},
        variants={"plain": {"attention_bias": False}},
        hub_form=hub_internlm2,
        architecture="InternLM2ForCausalLM",
    ),
    "internlm3": Family(
        "InternLM3Config",
        "LlamaForCausalLM",
        {
            "head_dim": 24,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 3000.0, "factor": 6.0},
        },
        old_internlm3,
        variants={"plain": {"attention_bias": False, "mlp_bias": False}},
        hub_form=hub_internlm3,
        architecture="InternLM3ForCausalLM",
    ),
    "lfm2": Family(
        "Lfm2Config",
        "Lfm2ForCausalLM",
        {
            **LAYER_NORM,
            "norm_eps": 0.01,
            "intermediate_size": 144,
            "block_multiple_of": 10,
            "block_ffn_dim_multiplier": 1.1,
            "conv_L_cache": 4,
            "conv_bias": True,
            "layer_types": ["conv", FULL, "conv"],
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_theta": 3000.0},
        },
        old_lfm2,
        variants={"plain": {"conv_bias": False, "block_auto_adjust_ff_dim": False, "conv_L_cache": 3}},
    ),
    "llama": Family(
        "LlamaConfig",
        "LlamaForCausalLM",
        variants={
            "theta": {"rope_parameters": {"rope_theta": 3000.0}},
            "tied": {"tie_word_embeddings": True},
            "head_dim": {"head_dim": 24},
            "biases": {"attention_bias": True, "mlp_bias": True},
            "gelu": {"hidden_act": "gelu_pytorch_tanh"},
            "one kv head": {"num_key_value_heads": 1},
        },
    ),
    "ministral3": Family(
        "Ministral3Config",
        "Ministral3ForCausalLM",
        {
            "head_dim": 32,
            "sliding_window": 50,
            "rope_parameters": {
                **YARN,
                "factor": 16.0,
                "original_max_position_embeddings": 32,
                "mscale": 1.0,
                "mscale_all_dim": 0.7,
                "llama_4_scaling_beta": 0.5,
            },
        },
        variants={"no window": {"sliding_window": None}},
    ),
    "mistral": Family(
        "MistralConfig", "MistralForCausalLM", {"sliding_window": 24}, variants={"no window": {"sliding_window": None}}
    ),
    "mpt": Family(
        "MptConfig",
        "MptForCausalLM",
        {
            **LAYER_NORM,
            **dict.fromkeys(("hidden_size", "intermediate_size", "num_key_value_heads"), REMOVED),
            **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "max_position_embeddings"), REMOVED),
            "d_model": 64,
            "n_layers": 3,
            "n_heads": 4,
            "max_seq_len": 512,
            "layer_norm_epsilon": 0.01,
            "attn_config": {"clip_qkv": 0.7, "softmax_scale": 0.4},
            "tie_word_embeddings": True,
        },
        no_rope,
        variants={"six heads": {"d_model": 48, "n_heads": 6, "attn_config": {}}},
    ),
    "nemotron": Family(
        "NemotronConfig",
        "NemotronForCausalLM",
        {
            **LAYER_NORM,
            "norm_eps": 0.01,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_theta": 3000.0, "partial_rotary_factor": 0.5},
        },
        variants={"plain": {"attention_bias": False, "mlp_bias": False, "head_dim": 24}},
    ),
    "olmo": Family(
        "OlmoConfig",
        "OlmoForCausalLM",
        {**LAYER_NORM, "clip_qkv": 0.5, "rope_parameters": {"rope_theta": 3000.0}},
        variants={"biases": {"attention_bias": True, "clip_qkv": None}},
    ),
    "olmo2": Family(
        "Olmo2Config", "Olmo2ForCausalLM", {"attention_bias": True}, variants={"yarn": {"rope_parameters": YARN}}
    ),
    "olmo3": Family(
        "Olmo3Config",
        "Olmo3ForCausalLM",
        {
            "sliding_window": 24,
            "layer_types": [SLIDING, FULL, SLIDING],
            "rope_parameters": {
                FULL: YARN,
                SLIDING: {"rope_type": "default", "rope_theta": YARN["rope_theta"]},
            },
        },
        old_spelling=old_olmo3,
        variants={
            "default types": {"sliding_window": 24, "layer_types": None, "num_hidden_layers": 4},
            "two bases": {
                "rope_parameters": {
                    FULL: YARN,
                    SLIDING: {"rope_type": "default", "rope_theta": 300.0},
                }
            },
        },
    ),
    "opt": Family(
        "OPTConfig",
        "OPTForCausalLM",
        {
            **LAYER_NORM,
            "intermediate_size": REMOVED,
            "num_key_value_heads": REMOVED,
            "ffn_dim": 96,
            "tie_word_embeddings": True,
        },
        no_rope,
        variants={
            "350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
            "no final norm": {"_remove_final_layer_norm": True, "activation_function": "gelu"},
            "no biases": {"enable_bias": False, "layer_norm_elementwise_affine": False},
        },
    ),
    "phi": Family(
        "PhiConfig",
        "PhiForCausalLM",
        {
            **LAYER_NORM,
            "layer_norm_eps": 0.01,
            "qk_layernorm": True,
            "rope_parameters": {"rope_theta": 3000.0, "partial_rotary_factor": 0.4},
        },
        variants={"plain": {"qk_layernorm": False}},
    ),
    "phi3": Family(
        "Phi3Config",
        "Phi3ForCausalLM",
        {"sliding_window": 24, "original_max_position_embeddings": 32, "rope_parameters": LONGROPE},
        old_spelling=old_phi3,
        variants={
            "plain": {"rope_parameters": {"rope_theta": 3000.0}, "sliding_window": None},
            "factors": {"rope_parameters": {**LONGROPE, "attention_factor": 1.3}},
        },
    ),
    "qwen2": Family(
        "Qwen2Config",
        "Qwen2ForCausalLM",
        variants={
            "some windows": {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 1},
            "listed windows": {
                "use_sliding_window": True,
                "sliding_window": 40,
                "layer_types": [SLIDING, FULL, SLIDING],
            },
        },
    ),
    "qwen3": Family(
        "Qwen3Config",
        "Qwen3ForCausalLM",
        {"head_dim": 32},
        variants={
            "tied": {"tie_word_embeddings": True},
            "some windows": {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 2},
            "biases": {"attention_bias": True},
        },
    ),
    "seed_oss": Family(
        "SeedOssConfig",
        "SeedOssForCausalLM",
        {"head_dim": 32, "mlp_bias": True},
        variants={"other biases": {"attention_bias": False, "attention_out_bias": True}},
    ),
    "smollm3": Family(
        "SmolLM3Config",
        "SmolLM3ForCausalLM",
        {
            "no_rope_layers": [1, 0, 1],
            "use_sliding_window": True,
            "sliding_window": 24,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
        variants={
            "interval": {"no_rope_layers": None, "no_rope_layer_interval": 2, "use_sliding_window": False},
            "listed types": {"layer_types": [SLIDING, FULL, SLIDING], "no_rope_layers": [0, 0, 1]},
        },
    ),
    "stablelm": Family(
        "StableLmConfig",
        "StableLmForCausalLM",
        {
            **LAYER_NORM,
            "layer_norm_eps": 0.01,
            "use_qkv_bias": True,
            "rope_parameters": {"rope_theta": 3000.0, "partial_rotary_factor": 0.25},
        },
        variants={"12b": {"use_qkv_bias": False, "qk_layernorm": True, "use_parallel_residual": True}},
    ),
    "starcoder2": Family(
        "Starcoder2Config",
        "Starcoder2ForCausalLM",
        {
            **LAYER_NORM,
            "norm_epsilon": 0.01,
            "sliding_window": 17,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_theta": 3000.0},
        },
        variants={"plain": {"use_bias": False, "sliding_window": None, "tie_word_embeddings": False}},
    ),
}

FAMILIES: Mapping[str, Family] = dict(sorted({**DENSE, **HYBRIDS, **MIXTURES}.items()))
"""By the name that tests use, in alphabetical order."""
