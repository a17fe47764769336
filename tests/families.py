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


@dataclass(frozen=True)
class Family:
    """How transformers makes a tiny model of a family."""

    config: str
    """The configuration's class in transformers."""
    model: str
    """The model's class: the ``architectures`` of config.json."""
    fields: Fields = field(default_factory=dict)
    """Fields beside ``COMMON``, under the names that the class takes; ``REMOVED`` takes one of those away."""
    old_spelling: Callable[[Fields], None] = old_rope
    """Turns config.json, as transformers 5 writes it, into what older files on the hub say."""
    variants: Mapping[str, Fields] = field(default_factory=dict)
    """More models of the family: facts that exclude each other. Compared with transformers, nothing else."""
    python_ops: int = 0
    """Ops of a captured program that have no kernel."""

    def arguments(self, fields: Fields) -> Fields:
        """Arguments of the configuration's class."""
        return {name: value for name, value in {**COMMON, **self.fields, **fields}.items() if value is not REMOVED}


REMOVED = object()
"""A value in ``Family.fields``: the class does not take a field of ``COMMON``."""

FAMILIES: Mapping[str, Family] = {
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
    "mistral": Family(
        "MistralConfig", "MistralForCausalLM", {"sliding_window": 24}, variants={"no window": {"sliding_window": None}}
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
}
"""By the name that tests use, in alphabetical order."""
