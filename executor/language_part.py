"""The language model within a multimodal checkpoint, which serves text alone. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

TEXT_MODELS = {
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma4_text": "Gemma4ForCausalLM",
    "llama": "LlamaForCausalLM",
    "llama4_text": "Llama4ForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_5_vl": "Qwen2ForCausalLM",
    "qwen2_5_vl_text": "Qwen2ForCausalLM",
    "qwen2_vl": "Qwen2ForCausalLM",
    "qwen2_vl_text": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_vl_moe_text": "Qwen3MoeForCausalLM",
    "qwen3_vl_text": "Qwen3ForCausalLM",
}
"""``model_type`` of ``text_config`` (in older Qwen-VL files, of config.json itself) -> the architecture."""

COLBERT_MODELS = {
    "bert": "ColBERTModel",
    "modernbert": "ColBERTModernBertModel",
    "xlm-roberta": "ColBERTJinaRobertaModel",
}
"""``model_type`` -> architecture of late interaction models, which call themselves ``HF_ColBERT``."""

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "vocab_size": 32000,
    },
    "mistral": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "vocab_size": 32000,
    },
    "qwen3_vl_moe_text": {"norm_topk_prob": True},
}
"""Fields that ``text_config`` leaves out if they are those of transformers' classes, as LLaVA's and Pixtral's do."""

RENAMES = (
    (r"^language_model\.(model|lm_head)\.", r"\1."),
    (r"^model\.(language_model|text_model)\.", "model."),
)
"""Names of the language model's tensors -> those of a language model alone."""

OTHER_PARTS = r"^(model\.)?(vision|visual|multi_modal|mm_|audio|image|connector|embed_vision|embed_audio)"
"""Tensors of towers and projectors."""


def renamed_modules(value: Any) -> Any:
    """A part of ``quantization_config``, in which names of modules become those of a language model alone."""
    if isinstance(value, dict):
        return {_renamed(name): renamed_modules(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_renamed(each) if isinstance(each, str) else renamed_modules(each) for each in value]
    return value


def _renamed(module: str) -> str:
    for pattern, replacement in RENAMES:
        module = re.sub(pattern, replacement, f"{module}.")[:-1]
    return module


def is_multimodal(fields: Mapping[str, Any]) -> bool:
    """Whether config.json describes a language model with other parts."""
    names = fields.get("architectures")
    return isinstance(names, list) and bool(names) and str(names[0]).endswith("ForConditionalGeneration")


def language_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's configuration, from that of a multimodal one; any other stays as it is.

    Its ``architectures`` is that of the language model if we know it.
    """
    text = fields.get("text_config")
    inner: Mapping[str, Any] = text if isinstance(text, dict) else {}
    values = {**fields, **inner}
    values["architectures"] = fields.get("architectures") or values.get("architectures")
    kind = values.get("model_type")
    if is_multimodal(fields) and isinstance(kind, str) and kind in TEXT_MODELS:
        # Either configuration may say it, whichever release wrote the file.
        if fields.get("tie_word_embeddings") is True:
            values["tie_word_embeddings"] = True
        values = {**DEFAULTS.get(kind, {}), **values, "architectures": [TEXT_MODELS[kind]]}
    if values["architectures"] == ["HF_ColBERT"] and isinstance(kind, str) and kind in COLBERT_MODELS:
        values["architectures"] = [COLBERT_MODELS[kind]]
    return values
