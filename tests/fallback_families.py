"""Families that run through transformers: tiny configurations, as in ``families.py``."""

from __future__ import annotations

from collections.abc import Mapping

from tests.families import FULL, SLIDING, Family

FALLBACKS: Mapping[str, Family] = {
    "apertus": Family("ApertusConfig", "ApertusForCausalLM", {"attention_bias": True}),
    "cwm": Family("CwmConfig", "CwmForCausalLM", {"sliding_window": 24, "layer_types": [FULL, SLIDING, FULL]}),
    "diffllama": Family("DiffLlamaConfig", "DiffLlamaForCausalLM", {"attention_bias": True}),
    "doge": Family("DogeConfig", "DogeForCausalLM"),
    "exaone_moe": Family(
        "ExaoneMoeConfig",
        "ExaoneMoeForCausalLM",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "num_shared_experts": 1,
            "sliding_window": 24,
            "layer_types": [FULL, SLIDING, FULL],
        },
    ),
    "flex_olmo": Family(
        "FlexOlmoConfig",
        "FlexOlmoForCausalLM",
        {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 32, "tie_word_embeddings": True},
    ),
    "helium": Family("HeliumConfig", "HeliumForCausalLM", {"head_dim": 16}),
    "hunyuan": Family("HunYuanDenseV1Config", "HunYuanDenseV1ForCausalLM", {"head_dim": 24, "attention_bias": True}),
    "lfm2 without types": Family("Lfm2Config", "Lfm2ForCausalLM", {"layer_types": ["conv", FULL, "conv"]}),
    "roberta": Family("RobertaConfig", "RobertaForCausalLM", {"is_decoder": True}),
    "vaultgemma": Family(
        "VaultGemmaConfig",
        "VaultGemmaForCausalLM",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 20,
            "sliding_window": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "layer_types": [SLIDING, FULL, SLIDING],
        },
    ),
    "youtu": Family(
        "YoutuConfig",
        "YoutuForCausalLM",
        {
            "pad_token_id": None,  # transformers sets its embedding to zero, whatever the file says
            "num_key_value_heads": 4,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 12,
        },
    ),
}
"""Families that run through transformers."""
