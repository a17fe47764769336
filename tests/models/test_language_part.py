"""Multimodal checkpoints, served as the language models within them."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from executor.hf_config import HFConfig
from executor.supported import check_supported
from tests import tiny
from tests.families import COMMON, FAMILIES, Fields
from tests.models.harness import assert_close, load, logits_of, random_tokens, refusal

CLIP: Fields = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION: Fields = {"depth": 1, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2}
MROPE: Fields = {"rope_type": "default", "rope_theta": 3000.0, "mrope_section": [2, 3, 3]}


def text(family: str, **fields: Any) -> Fields:
    return FAMILIES[family].arguments(fields)


MODELS: dict[str, tuple[str, Fields]] = {
    "gemma3": (
        "Gemma3",
        {
            "text_config": text("gemma3"),
            "vision_config": {**CLIP, "model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 1,
        },
    ),
    "mistral3": (
        "Mistral3",
        {
            "text_config": {**text("mistral", head_dim=16), "model_type": "mistral"},
            "vision_config": {**CLIP, "model_type": "pixtral", "head_dim": 16},
            "tie_word_embeddings": False,
        },
    ),
    "ministral3": (
        "Mistral3",
        {
            "text_config": {**text("ministral3"), "model_type": "ministral3"},
            "vision_config": {**CLIP, "model_type": "pixtral", "head_dim": 16},
            "tie_word_embeddings": False,
        },
    ),
    "llama4": (
        "Llama4",
        {
            "text_config": text("llama4"),
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 128,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
                "vision_output_dim": 32,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
            },
        },
    ),
    "llava": ("Llava", {"text_config": {**text("llama"), "model_type": "llama"}, "vision_config": CLIP}),
    "qwen2_vl": (
        "Qwen2VL",
        {
            "text_config": text("qwen2", rope_parameters=MROPE),
            "vision_config": {**QWEN_VISION, "embed_dim": 32, "hidden_size": 64},
        },
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        {
            "text_config": text("qwen2", rope_parameters=MROPE),
            "vision_config": {**QWEN_VISION, "hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 64},
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_vl": (
        "Qwen3VL",
        {
            "text_config": text("qwen3", rope_parameters={**MROPE, "mrope_section": [4, 6, 6]}),
            "vision_config": {
                **QWEN_VISION,
                "hidden_size": 32,
                "intermediate_size": 32,
                "out_hidden_size": 64,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
        },
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, torch.Tensor]:
    """A tiny multimodal model: its name, its folder, and the logits of 100 tokens."""
    import transformers

    prefix, fields = MODELS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    special = {"image_token_id": 380, "image_token_index": 380, "video_token_id": 381}
    config = getattr(transformers, f"{prefix}Config")(**fields, **special)
    network = getattr(transformers, f"{prefix}ForConditionalGeneration")(config).eval()
    tiny.randomize(network)
    network.save_pretrained(folder)
    with torch.inference_mode():
        # transformers' Llama 4 does not run without images.
        reader = network.language_model if prefix == "Llama4" else network
        logits = reader(torch.tensor([random_tokens(100)])).logits[0].float()
    return request.param, folder, logits


def test_the_language_model_is_served(model: tuple[str, Path, torch.Tensor], caplog: pytest.LogCaptureFixture) -> None:
    name, folder, logits = model
    caplog.set_level(logging.INFO, "executor.loader")
    loaded = load(folder, language_model_only=True)
    assert loaded.hf_config.is_part and loaded.tower is None
    assert_close(logits_of(loaded, random_tokens(100), captured=True), logits)
    assert re.search(r"for text alone; skipping \d+ tensors \(.* GB\) of others", caplog.text), name
    assert len(caplog.records) == 1


def test_both_ways_to_name_tensors(model: tuple[str, Path, torch.Tensor], tmp_path: Path) -> None:
    """transformers before 5 put the whole language model under a prefix; since, its inner part."""
    _, folder, logits = model
    inner = r"^(model\.)?language_model\.(model\.)?(?!lm_head)"
    ways = {
        "old": [(inner, "language_model.model."), (r"^.*lm_head", "language_model.lm_head")],
        "new": [(inner, "model.language_model."), (r"^.*lm_head", "lm_head")],
    }
    for way, renames in ways.items():
        copy = tiny.copy_of(folder, tmp_path / way)
        tensors = {}
        for name, tensor in load_file(folder / "model.safetensors").items():
            for pattern, replacement in renames:
                name = re.sub(pattern, replacement, name)
            tensors[name] = tensor
        save_file(tensors, copy / "model.safetensors")
        assert_close(logits_of(load(copy), random_tokens(100)), logits)


def test_tensors_of_no_known_part_are_refused(model: tuple[str, Path, torch.Tensor], tmp_path: Path) -> None:
    _, folder, _ = model
    copy = tiny.copy_of(folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.language_model.layers.9.extra": torch.ones(2)}, copy / "model.safetensors")
    assert "'model.language_model.layers.9.extra' is not part of this model" in refusal(copy)


def test_older_qwen_vl_files_have_no_text_config() -> None:
    fields = {
        **COMMON,
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {"depth": 32},
    }
    config = HFConfig.from_fields(fields, {}, "config.json")
    assert (config.architecture, config.is_part) == ("Qwen2ForCausalLM", True)
    assert config.rope.string("rope_type") == "default"
    check_supported(fields)


def test_sizes_that_the_text_config_leaves_out() -> None:
    inner = {"model_type": "llama", "vocab_size": 32064, "torch_dtype": "float16"}
    outer = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "text_config": inner}
    config = HFConfig.from_fields(outer, {}, "config.json")
    assert (config.architecture, config.hidden_size, config.vocab_size) == ("LlamaForCausalLM", 4096, 32064)


def test_lists_of_exceptions_name_modules_of_the_language_model() -> None:
    saved = {
        "quant_method": "fp8",
        "modules_to_not_convert": ["model.vision_tower", "model.language_model.layers.0.mlp", "language_model.lm_head"],
        "extra_config": {"language_model.model.layers.1.mlp": {"bits": 16}},
    }
    fields = {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "text_config": {"model_type": "mistral"},
        "quantization_config": saved,
    }
    assert HFConfig.from_fields(fields, {}, "config.json").quantization == {
        "quant_method": "fp8",
        "modules_to_not_convert": ["model.vision_tower", "model.layers.0.mlp", "lm_head"],
        "extra_config": {"model.layers.1.mlp": {"bits": 16}},
    }
