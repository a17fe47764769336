"""How tests describe a model family, and what turns files of transformers 5 into those of the hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

VOCAB_SIZE = 384
"""Width of the logits; the tokenizer knows a few ids less."""
END_OF_TEXT, IM_START, IM_END = 0, 1, 2
"""Ids of the special tokens. The last ends a turn."""

FULL, SLIDING, CHUNKED, LINEAR = "full_attention", "sliding_attention", "chunked_attention", "linear_attention"
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


def old_minimax_m2(config: Fields) -> None:
    """As on the hub: the rotated columns are counted."""
    factor = config["rope_parameters"].pop("partial_rotary_factor")
    config["rotary_dim"] = int(config["head_dim"] * factor)
    old_rope(config)


def old_granite(config: Fields) -> None:
    """Types of layers have older names."""
    config["layer_types"] = ["attention"] * len(config["layer_types"])
    old_rope(config)


def old_granite_h(config: Fields) -> None:
    """Likewise."""
    names = {FULL: "attention", LINEAR: "mamba"}
    config["layer_types"] = [names[kind] for kind in config["layer_types"]]
    old_rope(config)


def old_nemotron_h(config: Fields) -> None:
    """A letter for each layer, and older names of fields."""
    letters = {LINEAR: "M", FULL: "*", "mlp": "-", "moe": "E"}
    types = config.pop("layers_block_type")
    config["hybrid_override_pattern"] = "".join(letters[kind] for kind in types)
    config["num_hidden_layers"] = len(types)
    config["attention_head_dim"] = config.pop("head_dim")


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

GRANITE: Fields = {
    "attention_bias": True,
    "attention_multiplier": 0.4,
    "embedding_multiplier": 2.5,
    "logits_scaling": 0.7,
    "residual_multiplier": 0.6,
}
YARN = {"rope_type": "yarn", "rope_theta": 7000.0, "factor": 4.0, "original_max_position_embeddings": 64}
