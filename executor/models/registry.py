"""Maps architectures to model classes. A new model is one file and one line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from executor.base import Head, ModelError
from executor.models.fallback.support import fallback_problem
from executor.registry import advice, resolve

if TYPE_CHECKING:  # the names are known without torch
    from executor.models.base import Model

ENCODERS = {
    "CLIPModel": "executor.models.vision.clip:CLIPModel",
    "BertModel": "executor.models.bert:BertModel",
    "BgeM3EmbeddingModel": "executor.models.bert:RobertaModel",
    "CamembertModel": "executor.models.bert:RobertaModel",
    "ColBERTJinaRobertaModel": "executor.models.jina:JinaEmbeddingsV3Model",
    "ColBERTModel": "executor.models.bert:BertModel",
    "ColBERTModernBertModel": "executor.models.modernbert:ModernBertModel",
    "DistilBertModel": "executor.models.bert:DistilBertModel",
    "GteModel": "executor.models.nomic_bert:GteModel",
    "JinaEmbeddingsV3Model": "executor.models.jina:JinaEmbeddingsV3Model",
    "MPNetModel": "executor.models.bert:MPNetModel",
    "ModernBertModel": "executor.models.modernbert:ModernBertModel",
    "NewModel": "executor.models.nomic_bert:GteModel",
    "NomicBertModel": "executor.models.nomic_bert:NomicBertModel",
    "RobertaModel": "executor.models.bert:RobertaModel",
    "SiglipModel": "executor.models.vision.siglip:SiglipModel",
    "XLMRobertaModel": "executor.models.bert:RobertaModel",
}
"""Models that cannot generate."""
REGISTRY = {
    "ArceeForCausalLM": "executor.models.arcee:ArceeForCausalLM",
    "BambaForCausalLM": "executor.models.bamba:BambaForCausalLM",
    "BloomForCausalLM": "executor.models.bloom:BloomForCausalLM",
    "Cohere2ForCausalLM": "executor.models.cohere:Cohere2ForCausalLM",
    "CohereForCausalLM": "executor.models.cohere:CohereForCausalLM",
    "DeepseekV2ForCausalLM": "executor.models.deepseek:DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM": "executor.models.deepseek:DeepseekV3ForCausalLM",
    "Dots1ForCausalLM": "executor.models.dots1:Dots1ForCausalLM",
    "Ernie4_5ForCausalLM": "executor.models.ernie4_5:Ernie45ForCausalLM",
    "Ernie4_5_ForCausalLM": "executor.models.ernie4_5:Ernie45ForCausalLM",
    "Ernie4_5_MoeForCausalLM": "executor.models.ernie4_5:Ernie45MoeForCausalLM",
    "Exaone4ForCausalLM": "executor.models.exaone4:Exaone4ForCausalLM",
    "FalconForCausalLM": "executor.models.falcon:FalconForCausalLM",
    "FalconH1ForCausalLM": "executor.models.falcon_h1:FalconH1ForCausalLM",
    "GPT2LMHeadModel": "executor.models.gpt2:GPT2LMHeadModel",
    "GPTJForCausalLM": "executor.models.gptj:GPTJForCausalLM",
    "GptOssForCausalLM": "executor.models.gpt_oss:GptOssForCausalLM",
    "GPTNeoXForCausalLM": "executor.models.gpt_neox:GPTNeoXForCausalLM",
    "GemmaForCausalLM": "executor.models.gemma:GemmaForCausalLM",
    "Gemma2ForCausalLM": "executor.models.gemma2:Gemma2ForCausalLM",
    "Gemma3ForCausalLM": "executor.models.gemma3:Gemma3ForCausalLM",
    "Gemma4ForCausalLM": "executor.models.gemma4:Gemma4ForCausalLM",
    "Glm4ForCausalLM": "executor.models.glm4:Glm4ForCausalLM",
    "Glm4MoeForCausalLM": "executor.models.glm4_moe:Glm4MoeForCausalLM",
    "Glm4MoeLiteForCausalLM": "executor.models.deepseek:Glm4MoeLiteForCausalLM",
    "GlmForCausalLM": "executor.models.glm4:GlmForCausalLM",
    "GraniteForCausalLM": "executor.models.granite:GraniteForCausalLM",
    "GraniteMoeForCausalLM": "executor.models.granite:GraniteMoeForCausalLM",
    "GraniteMoeHybridForCausalLM": "executor.models.granite:GraniteMoeHybridForCausalLM",
    "GraniteMoeSharedForCausalLM": "executor.models.granite:GraniteMoeSharedForCausalLM",
    "InternLM2ForCausalLM": "executor.models.internlm:InternLM2ForCausalLM",
    "InternLM3ForCausalLM": "executor.models.internlm:InternLM3ForCausalLM",
    "Lfm2ForCausalLM": "executor.models.lfm2:Lfm2ForCausalLM",
    "Lfm2MoeForCausalLM": "executor.models.lfm2:Lfm2MoeForCausalLM",
    "Llama4ForCausalLM": "executor.models.llama4:Llama4ForCausalLM",
    "LlamaForCausalLM": "executor.models.llama:LlamaForCausalLM",
    "Mamba2ForCausalLM": "executor.models.mamba2:Mamba2ForCausalLM",
    "MiniMaxM2ForCausalLM": "executor.models.minimax_m2:MiniMaxM2ForCausalLM",
    "Ministral3ForCausalLM": "executor.models.ministral3:Ministral3ForCausalLM",
    "MistralForCausalLM": "executor.models.llama:MistralForCausalLM",
    "MixtralForCausalLM": "executor.models.mixtral:MixtralForCausalLM",
    "MptForCausalLM": "executor.models.mpt:MptForCausalLM",
    "NemotronForCausalLM": "executor.models.nemotron:NemotronForCausalLM",
    "NemotronHForCausalLM": "executor.models.nemotron_h:NemotronHForCausalLM",
    "OPTForCausalLM": "executor.models.opt:OPTForCausalLM",
    "Olmo2ForCausalLM": "executor.models.olmo2:Olmo2ForCausalLM",
    "Olmo3ForCausalLM": "executor.models.olmo2:Olmo3ForCausalLM",
    "OlmoForCausalLM": "executor.models.olmo:OlmoForCausalLM",
    "OlmoeForCausalLM": "executor.models.olmoe:OlmoeForCausalLM",
    "Phi3ForCausalLM": "executor.models.phi3:Phi3ForCausalLM",
    "PhiForCausalLM": "executor.models.phi:PhiForCausalLM",
    "PhiMoEForCausalLM": "executor.models.phimoe:PhimoeForCausalLM",
    "PhimoeForCausalLM": "executor.models.phimoe:PhimoeForCausalLM",
    "Qwen2ForCausalLM": "executor.models.qwen2:Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM": "executor.models.qwen2:Qwen2MoeForCausalLM",
    "Qwen3ForCausalLM": "executor.models.qwen3:Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM": "executor.models.qwen3:Qwen3MoeForCausalLM",
    "Qwen3NextForCausalLM": "executor.models.qwen3_next:Qwen3NextForCausalLM",
    "Qwen3_5ForCausalLM": "executor.models.qwen3_next:Qwen35ForCausalLM",
    "Qwen3_5MoeForCausalLM": "executor.models.qwen3_next:Qwen35MoeForCausalLM",
    "SeedOssForCausalLM": "executor.models.seed_oss:SeedOssForCausalLM",
    "SmolLM3ForCausalLM": "executor.models.smollm3:SmolLM3ForCausalLM",
    "StableLmForCausalLM": "executor.models.stablelm:StableLmForCausalLM",
    "Starcoder2ForCausalLM": "executor.models.starcoder2:Starcoder2ForCausalLM",
}
"""The ``architectures`` of config.json."""
TOWERS = {
    "CLIPModel": "executor.models.vision.clip:CLIPTower",
    "Mistral3ForConditionalGeneration": "executor.models.vision.pixtral:Mistral3Tower",
    "Gemma3ForConditionalGeneration": "executor.models.vision.gemma3:Gemma3Tower",
    "Idefics3ForConditionalGeneration": "executor.models.vision.idefics3:Idefics3Tower",
    "LlavaForConditionalGeneration": "executor.models.vision.llava:LlavaTower",
    "LlavaNextForConditionalGeneration": "executor.models.vision.llava:LlavaNextTower",
    "Qwen2VLForConditionalGeneration": "executor.models.vision.qwen2_vl:Qwen2VLTower",
    "Qwen2_5_VLForConditionalGeneration": "executor.models.vision.qwen2_vl:Qwen25VLTower",
    "Qwen3_5ForConditionalGeneration": "executor.models.vision.qwen3_vl:Qwen35Tower",
    "Qwen3_5MoeForConditionalGeneration": "executor.models.vision.qwen3_vl:Qwen35Tower",
    "Qwen3VLForConditionalGeneration": "executor.models.vision.qwen3_vl:Qwen3VLTower",
    "Qwen3VLMoeForConditionalGeneration": "executor.models.vision.qwen3_vl:Qwen3VLTower",
    "SiglipModel": "executor.models.vision.siglip:SiglipTower",
    "SmolVLMForConditionalGeneration": "executor.models.vision.idefics3:Idefics3Tower",
}
"""The parts of multimodal models that encode images."""
ENCODERS_OF = {
    "LlavaForConditionalGeneration": ("clip_vision_model", "siglip_vision_model", "pixtral"),
    "LlavaNextForConditionalGeneration": ("clip_vision_model", "siglip_vision_model"),
    "Mistral3ForConditionalGeneration": ("pixtral",),
}
"""The ``model_type`` of ``vision_config`` that a tower can have, where several are possible."""
PIXTRAL = "executor.models.vision.pixtral:PixtralTower"


def tower_of(fields: Mapping[str, Any]) -> str | None:
    """The class that encodes a multimodal model's images, as ``"module:Class"``; None: there is none.

    Args:
        fields: Contents of config.json.
    """
    names = fields.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else ""
    vision = fields.get("vision_config")
    kind = vision.get("model_type", "clip_vision_model") if isinstance(vision, dict) else "clip_vision_model"
    if kind not in ENCODERS_OF.get(name, (kind,)):
        return None
    return PIXTRAL if kind == "pixtral" and name.startswith("Llava") else TOWERS.get(name)


HEADS: dict[str, Head] = {
    "ForMaskedLM": "none",
    "ForPreTraining": "none",
    "ForProcessRewardModel": "process",
    "ForRewardModel": "reward",
    "ForSequenceClassification": "sequence",
    "ForTokenClassification": "token",
    "Model": "none",
    "TextModel": "none",
}
"""Ends of the names of architectures that do not generate."""


def split_architecture(architecture: str) -> tuple[str, Head]:
    """The architecture whose class computes the hidden states, and what reads them.

    ``Qwen3ForSequenceClassification`` has those of ``Qwen3ForCausalLM``, ``BertForMaskedLM`` those of ``BertModel``.
    """
    if architecture in REGISTRY:
        return architecture, "lm"
    for end, head in HEADS.items():
        stem = architecture.removesuffix(end)
        if stem == architecture:
            continue
        for base in (f"{stem}Model", f"{stem}ForCausalLM", f"{stem}LMHeadModel"):
            if base in ENCODERS or base in REGISTRY:
                return base, head
    return architecture, "lm"


def can_generate(architecture: str) -> bool:
    """Whether a model computes logits of the next token, judging by its architecture."""
    return split_architecture(architecture)[1] == "lm"


def is_of_jina(fields: Mapping[str, Any]) -> bool:
    """Whether config.json is one of Jina AI's own code, which calls itself XLM-R and stores other tensors."""
    return fields.get("position_embedding_type") == "rotary" or "use_flash_attn" in fields


FALLBACK = "executor.models.fallback.model:TransformersForCausalLM"


def implementation(architecture: str, fields: Mapping[str, Any], model_impl: str = "auto") -> str:
    """The model class of an architecture, as ``"module:Class"``.

    Args:
        architecture: First entry of ``architectures`` in config.json.
        fields: Contents of config.json.
        model_impl: ``--model-impl``.

    Raises:
        ModelError: The architecture is not supported.
    """
    base, head = split_architecture(architecture)
    if base == "XLMRobertaModel" and is_of_jina(fields):
        base = "JinaEmbeddingsV3Model"
    if head != "lm" or (architecture in REGISTRY and model_impl != "transformers"):
        return (ENCODERS | REGISTRY)[base]
    shown = repr(architecture if len(architecture) <= 100 else f"{architecture[:100]}...")
    if model_impl in ("octavo", "vllm"):
        raise ModelError(
            f"architecture {shown} is not built in; use --model-impl auto, which also runs most models of "
            f"transformers, or choose one that is ({advice(architecture, REGISTRY)})"
        )
    problem = fallback_problem(architecture, fields)
    if problem is None:
        return FALLBACK
    if model_impl == "transformers":
        raise ModelError(f"--model-impl transformers cannot run architecture {shown}: {problem}")
    raise ModelError(
        f"architecture {shown} is not supported yet, nor can it run through transformers: {problem}; choose a model "
        f"of another one ({advice(architecture, REGISTRY)})"
    )


def resolve_model(architecture: str, fields: Mapping[str, Any] | None = None, model_impl: str = "auto") -> type[Model]:
    """The class that ``implementation`` names. Raises the same errors."""
    name = implementation(architecture, fields or {}, model_impl)
    result: type[Model] = resolve({architecture: name}, architecture, "architecture")
    return result
