"""The model families, each with a tiny configuration in which every fact of the family matters.

A fact is pinned if the model computes other logits without it. So no value is one at which a feature does nothing: a
factor of 1, a window longer than the test, layers of one type only, a norm or bias of zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

VOCAB_SIZE = 384
"""Width of the logits; the tokenizer knows a few ids less."""
END_OF_TEXT, IM_START, IM_END = 0, 1, 2
"""Ids of the special tokens. The last ends a turn."""

FULL, SLIDING = "full_attention", "sliding_attention"
"""Entries of ``layer_types``."""

Fields = dict[str, Any]
Tensors = dict[str, Any]
"""Tensors by name."""

COMMON: Fields = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": END_OF_TEXT,
    "eos_token_id": IM_END,
    "pad_token_id": END_OF_TEXT,
    "tie_word_embeddings": False,
}
"""Fields of all families that have them; ``Family.fields`` takes precedence."""


def old_rope(config: Fields) -> None:
    """``rope_theta`` and ``rope_scaling`` instead of ``rope_parameters``, as before transformers 5."""
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    if rope["rope_type"] != "default":
        config["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}


def no_rope(config: Fields) -> None:
    """For families whose positions are learned or need no parameters: one spelling."""


def old_bloom(config: Fields) -> None:
    """BLOOM's own name of the hidden size."""
    config["n_embed"] = config.pop("hidden_size")


def old_cohere2(config: Fields) -> None:
    """A pattern instead of ``layer_types``."""
    old_rope(config)
    assert config.pop("layer_types") == [SLIDING, FULL, SLIDING]
    config["sliding_window_pattern"] = 2


def old_lfm2(config: Fields) -> None:
    """LFM2's own names."""
    old_rope(config)
    assert config.pop("layer_types") == ["conv", FULL, "conv"]
    config["full_attn_idxs"] = [1]
    config["block_ff_dim"] = config.pop("intermediate_size")
    config["tie_embedding"] = config.pop("tie_word_embeddings")


def old_neox(config: Fields) -> None:
    """GPT-NeoX's own names."""
    rope = config.pop("rope_parameters")
    config["rotary_emb_base"], config["rotary_pct"] = rope["rope_theta"], rope["partial_rotary_factor"]


def gemma3_spelling(config: Fields) -> None:
    """A base for each type of layer, scaling of one, and ``sliding_window_pattern``."""
    rope = config.pop("rope_parameters")
    full = rope[FULL]
    config |= {"rope_theta": full.pop("rope_theta"), "rope_local_base_freq": rope[SLIDING]["rope_theta"]}
    config["rope_scaling"] = full
    del config["layer_types"]
    config["sliding_window_pattern"] = 2


def old_phi3(config: Fields) -> None:
    """The lengths are no part of ``rope_scaling``, and the type has an older name."""
    rope = config["rope_parameters"]
    del rope["original_max_position_embeddings"]
    rope["rope_type"] = "su"
    old_rope(config)


def old_qwen3_moe(config: Fields) -> None:
    """The number of experts has another name."""
    config["num_experts"] = config.pop("num_local_experts")
    old_rope(config)


def old_olmo3(config: Fields) -> None:
    """One set of rotary parameters, whose scaling is for full attention only."""
    config["rope_parameters"] = config["rope_parameters"][FULL]
    old_rope(config)


def old_granite(config: Fields) -> None:
    """Types of layers have older names."""
    config["layer_types"] = ["attention"] * len(config["layer_types"])
    old_rope(config)


def old_gemma4(config: Fields) -> None:
    """As on the hub: sizes of global layers, not of each layer."""
    sizes = config.pop("per_layer_config")["1"]
    config |= {"global_head_dim": sizes["head_dim"], "num_global_key_value_heads": sizes["num_key_value_heads"]}


def hub_internlm2(config: Fields, tensors: Tensors) -> Tensors:
    """InternLM2, which transformers does not have: Llama's tensors under its names, q, k and v by KV head in one."""
    import torch  # the table itself needs none

    config |= {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2"}
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"}
    config["bias"] = config.pop("attention_bias")
    kv_heads, head_dim = config["num_key_value_heads"], config["hidden_size"] // config["num_attention_heads"]
    result = {}
    for name, tensor in tensors.items():
        if ".q_proj." in name:
            heads = [tensors[name.replace("q_proj", each)].unflatten(0, (kv_heads, -1)) for each in QKV]
            by_head = torch.cat([each.unflatten(1, (-1, head_dim)) for each in heads], dim=1)
            result[name.replace("self_attn.q_proj", "attention.wqkv")] = by_head.flatten(0, 2).contiguous()
        elif ".k_proj." not in name and ".v_proj." not in name:
            for pattern, own in INTERNLM2_NAMES:
                name = name.replace(pattern, own)
            result[name] = tensor
    return result


QKV = ("q_proj", "k_proj", "v_proj")
INTERNLM2_NAMES = (
    ("embed_tokens", "tok_embeddings"),
    ("lm_head", "output"),
    ("input_layernorm", "attention_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.o_proj", "attention.wo"),
    ("mlp.gate_proj", "feed_forward.w1"),
    ("mlp.down_proj", "feed_forward.w2"),
    ("mlp.up_proj", "feed_forward.w3"),
)


def hub_internlm3(config: Fields, tensors: Tensors) -> Tensors:
    """InternLM3, which transformers runs as Llama, under its own name."""
    config |= {"architectures": ["InternLM3ForCausalLM"], "model_type": "internlm3"}
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_internlm3.InternLM3ForCausalLM"}
    return tensors


def old_internlm3(config: Fields) -> None:
    """InternLM3's own names of fields."""
    config["qkv_bias"], config["bias"] = config.pop("attention_bias"), config.pop("mlp_bias")
    old_rope(config)


@dataclass(frozen=True)
class Family:
    """How transformers makes a tiny model of a family."""

    config: str
    """The configuration's class in transformers."""
    model: str
    """The model's class: the ``architectures`` of config.json, unless ``hub_form`` changes it."""
    fields: Fields = field(default_factory=dict)
    """Fields beside ``COMMON``, under the names that the class takes; ``REMOVED`` takes one of those away."""
    old_spelling: Callable[[Fields], None] = old_rope
    """Turns config.json, as transformers 5 writes it, into what older files on the hub say."""
    variants: Mapping[str, Fields] = field(default_factory=dict)
    """More models of the family: facts that exclude each other. Compared with transformers, nothing else."""
    python_ops: int = 0
    """Ops of a captured program that have no kernel."""
    hub_form: Callable[[Fields, Tensors], Tensors] | None = None
    """Turns what transformers saves into files as on the hub, if transformers has no class of the family: edits
    config.json, and takes and returns the tensors."""
    architecture: str = ""
    """The ``architectures`` that ``hub_form`` gives."""

    @property
    def own_model(self) -> str:
        """The ``architectures`` of config.json."""
        return self.architecture or self.model

    def arguments(self, fields: Fields) -> Fields:
        """Arguments of the configuration's class."""
        return {name: value for name, value in {**COMMON, **self.fields, **fields}.items() if value is not REMOVED}


REMOVED = object()
"""A value in ``Family.fields``: the class does not take a field of ``COMMON``."""

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

GRANITE: Fields = {
    "attention_bias": True,
    "attention_multiplier": 0.4,
    "embedding_multiplier": 2.5,
    "logits_scaling": 0.7,
    "residual_multiplier": 0.6,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 5000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
    "long_factor": [1.0, 1.5, 2.5, 4.0, 6.0, 9.0],
}
YARN = {"rope_type": "yarn", "rope_theta": 7000.0, "factor": 4.0, "original_max_position_embeddings": 64}

FAMILIES: Mapping[str, Family] = {
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
    "granitemoe": Family(
        "GraniteMoeConfig",
        "GraniteMoeForCausalLM",
        {**GRANITE, "num_local_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 40},
        variants={"one expert for a token": {"num_experts_per_tok": 1}},
    ),
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
"""By the name that tests use, in alphabetical order."""
