"""What llama.cpp's converter does to each architecture, and how to undo it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gguf import MODEL_TENSOR, Keys

from executor.hf_config import MAX_POSITIONS, Fields

Config = dict[str, Any]
"""Fields of config.json."""


def nothing(fields: Fields, config: Config) -> None:
    """For architectures without fields of their own."""


@dataclass(frozen=True)
class Architecture:
    """An architecture as llama.cpp writes it."""

    model: str
    """The ``architectures`` of config.json."""
    permuted: Mapping[MODEL_TENSOR, str] = field(default_factory=dict)
    """Tensors whose rows are reordered so that columns rotated together are adjacent, with the field of their head
    count."""
    norm_offset: float = 0.0
    """What the converter added to the weights of norms."""
    configure: Callable[[Fields, Config], None] = nothing
    """Completes the configuration. Takes the header's fields and the configuration."""


def gemma(fields: Fields, config: Config) -> None:
    """Gemma 2 and 3. llama.cpp knows the pattern of the layers, the base of those with windows, and the scale."""
    arch = config["model_type"]
    window = Keys.Attention.SLIDING_WINDOW.format(arch=arch)
    config["sliding_window"] = fields.size(window, most=MAX_POSITIONS)
    for name, key in (
        ("attn_logit_softcapping", Keys.LLM.ATTN_LOGIT_SOFTCAPPING),
        ("final_logit_softcapping", Keys.LLM.FINAL_LOGIT_SOFTCAPPING),
    ):
        stored = key.format(arch=arch)
        config[name] = fields.number(stored) if fields.has(stored) else None
    largest = {"gemma2": 46, "gemma3": 62}[arch]  # layers of the 27B models
    config["query_pre_attn_scalar"] = (
        config["hidden_size"] // config["num_attention_heads"]
        if config["num_hidden_layers"] == largest
        else config["head_dim"]
    )
    if arch == "gemma3":
        local = fields.number(f"{arch}.rope.freq_base_swa", 10000.0)
        config["rope_parameters"] = {
            "full_attention": config["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }


ARCHITECTURES: Mapping[str, Architecture] = {
    "gemma2": Architecture("Gemma2ForCausalLM", norm_offset=1.0, configure=gemma),
    "gemma3": Architecture("Gemma3ForCausalLM", norm_offset=1.0, configure=gemma),
    "llama": Architecture(
        "LlamaForCausalLM",
        permuted={MODEL_TENSOR.ATTN_Q: "num_attention_heads", MODEL_TENSOR.ATTN_K: "num_key_value_heads"},
    ),
    "qwen2": Architecture("Qwen2ForCausalLM"),
    "qwen3": Architecture("Qwen3ForCausalLM"),
}
"""By ``general.architecture``. Mistral's files also say llama."""
