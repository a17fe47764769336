"""Which class runs which architecture. A model is one file and one line here."""

from __future__ import annotations

import importlib

from executor.base import ModelError
from executor.models.base import Model

REGISTRY = {
    "LlamaForCausalLM": "executor.models.llama:LlamaForCausalLM",
    "MistralForCausalLM": "executor.models.llama:MistralForCausalLM",
    "Qwen2ForCausalLM": "executor.models.qwen2:Qwen2ForCausalLM",
    "Qwen3ForCausalLM": "executor.models.qwen3:Qwen3ForCausalLM",
}
"""The ``architectures`` of config.json."""


def resolve_model(architecture: str) -> type[Model]:
    """The class of that architecture.

    Raises:
        ModelError: It is unknown.
    """
    if architecture not in REGISTRY:
        raise ModelError(f"architecture {architecture!r} is not supported; supported: {', '.join(sorted(REGISTRY))}")
    module, _, attribute = REGISTRY[architecture].partition(":")
    result: type[Model] = getattr(importlib.import_module(module), attribute)
    return result
