"""Maps architectures to model classes. A new model is one file and one line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from executor.base import ModelError
from executor.registry import resolve

if TYPE_CHECKING:  # the names are known without torch
    from executor.models.base import Model

REGISTRY = {
    "ArceeForCausalLM": "executor.models.arcee:ArceeForCausalLM",
    "Cohere2ForCausalLM": "executor.models.cohere:Cohere2ForCausalLM",
    "CohereForCausalLM": "executor.models.cohere:CohereForCausalLM",
    "Ernie4_5ForCausalLM": "executor.models.ernie4_5:Ernie45ForCausalLM",
    "Ernie4_5_ForCausalLM": "executor.models.ernie4_5:Ernie45ForCausalLM",
    "Exaone4ForCausalLM": "executor.models.exaone4:Exaone4ForCausalLM",
    "FalconForCausalLM": "executor.models.falcon:FalconForCausalLM",
    "GPT2LMHeadModel": "executor.models.gpt2:GPT2LMHeadModel",
    "GPTJForCausalLM": "executor.models.gptj:GPTJForCausalLM",
    "GPTNeoXForCausalLM": "executor.models.gpt_neox:GPTNeoXForCausalLM",
    "Gemma2ForCausalLM": "executor.models.gemma2:Gemma2ForCausalLM",
    "Gemma3ForCausalLM": "executor.models.gemma3:Gemma3ForCausalLM",
    "Glm4ForCausalLM": "executor.models.glm4:Glm4ForCausalLM",
    "GlmForCausalLM": "executor.models.glm4:GlmForCausalLM",
    "GraniteForCausalLM": "executor.models.granite:GraniteForCausalLM",
    "GraniteMoeHybridForCausalLM": "executor.models.granite:GraniteMoeHybridForCausalLM",
    "LlamaForCausalLM": "executor.models.llama:LlamaForCausalLM",
    "Ministral3ForCausalLM": "executor.models.ministral3:Ministral3ForCausalLM",
    "MistralForCausalLM": "executor.models.llama:MistralForCausalLM",
    "NemotronForCausalLM": "executor.models.nemotron:NemotronForCausalLM",
    "OPTForCausalLM": "executor.models.opt:OPTForCausalLM",
    "Olmo2ForCausalLM": "executor.models.olmo2:Olmo2ForCausalLM",
    "Olmo3ForCausalLM": "executor.models.olmo2:Olmo3ForCausalLM",
    "OlmoForCausalLM": "executor.models.olmo:OlmoForCausalLM",
    "Phi3ForCausalLM": "executor.models.phi3:Phi3ForCausalLM",
    "PhiForCausalLM": "executor.models.phi:PhiForCausalLM",
    "Qwen2ForCausalLM": "executor.models.qwen2:Qwen2ForCausalLM",
    "Qwen3ForCausalLM": "executor.models.qwen3:Qwen3ForCausalLM",
    "SeedOssForCausalLM": "executor.models.seed_oss:SeedOssForCausalLM",
    "SmolLM3ForCausalLM": "executor.models.smollm3:SmolLM3ForCausalLM",
    "StableLmForCausalLM": "executor.models.stablelm:StableLmForCausalLM",
    "Starcoder2ForCausalLM": "executor.models.starcoder2:Starcoder2ForCausalLM",
}
"""The ``architectures`` of config.json."""


def check_architecture(architecture: str) -> None:
    """Checks that an architecture is supported.

    Raises:
        ModelError: It is not.
    """
    if architecture not in REGISTRY:
        shown = repr(architecture if len(architecture) <= 100 else f"{architecture[:100]}...")
        raise ModelError(
            f"architecture {shown} is not supported yet; choose a model with one of: {', '.join(sorted(REGISTRY))}"
        )


def resolve_model(architecture: str) -> type[Model]:
    """The model class of an architecture.

    Raises:
        ModelError: The architecture is unknown.
    """
    check_architecture(architecture)
    result: type[Model] = resolve(REGISTRY, architecture, "architecture")
    return result
