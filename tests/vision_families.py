"""Tiny models that see, each with images that its encoder can tell apart."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from api.media.pixels import process
from api.media.prompt import place_images
from api.media.reader import Picture
from api.model.image_spec import ImageSpec, ProcessedImage, read_image_spec
from engine_core.messages import MultiModalFeature, to_array
from tests import tiny
from tests.families import FAMILIES, Fields

IMAGE_TOKEN = 380
"""Its id is none of the tokenizer's."""
CLIP: Fields = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
SIGLIP: Fields = {**CLIP, "model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh"}
PIXTRAL: Fields = {**CLIP, "model_type": "pixtral", "image_size": 32, "patch_size": 4, "hidden_act": "silu"}
QWEN: Fields = {"depth": 3, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
MROPE: Fields = {"rope_type": "default", "rope_theta": 3000.0, "mrope_section": [2, 3, 3]}


def text(family: str, **fields: Any) -> Fields:
    """A ``text_config``."""
    return FAMILIES[family].arguments(fields)


@dataclass(frozen=True)
class VisionFamily:
    """How transformers makes a tiny model of a family."""

    prefix: str
    """Of its classes."""
    config: Fields
    processor: Fields
    """preprocessor_config.json."""
    inputs: Callable[[ImageSpec, list[ProcessedImage]], dict[str, torch.Tensor]]
    """What transformers' model takes beside the tokens."""
    sizes: list[tuple[int, int]] = field(default_factory=lambda: [(57, 40), (30, 91)])
    """Widths and heights of images with different numbers of tokens, if they can have them."""


def values(image: ProcessedImage) -> npt.NDArray[np.float32]:
    """What the encoder reads: float32 [patches, columns]."""
    patches, levels = np.concatenate([to_array(each) for each in image.patches]), to_array(image.levels)
    channels = np.repeat(np.arange(3), patches.shape[1] // 3)
    found: npt.NDArray[np.float32] = levels[channels, patches]
    return found


def tiles(spec: ImageSpec, image: ProcessedImage) -> torch.Tensor:
    """The same as tiles of equal size: float32 [tiles, channels, height, width]."""
    rows, columns = to_array(image.grid)[0].tolist()[:2]
    size = spec.patch_size
    parts = values(image).reshape(-1, rows, columns, 3, size, size).transpose(0, 3, 1, 4, 2, 5)
    return torch.from_numpy(parts.reshape(-1, 3, rows * size, columns * size).copy())


def _llava(spec: ImageSpec, images: list[ProcessedImage]) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.cat([tiles(spec, image) for image in images])}


def _llava_next(spec: ImageSpec, images: list[ProcessedImage]) -> dict[str, torch.Tensor]:
    every = [tiles(spec, image) for image in images]
    most = max(map(len, every))
    padded = [torch.cat([each, torch.zeros(most - len(each), *each.shape[1:])]) for each in every]
    sizes = torch.tensor([[image.height, image.width] for image in images])
    return {"pixel_values": torch.stack(padded), "image_sizes": sizes}


def _pixtral(spec: ImageSpec, images: list[ProcessedImage]) -> dict[str, torch.Tensor]:
    every = [tiles(spec, image)[0] for image in images]
    most = [max(each.shape[axis] for each in every) for axis in (1, 2)]
    padded = [torch.nn.functional.pad(each, (0, most[1] - each.shape[2], 0, most[0] - each.shape[1])) for each in every]
    sizes = torch.tensor([each.shape[1:] for each in every])
    return {"pixel_values": torch.stack(padded), "image_sizes": sizes}


def _idefics3(spec: ImageSpec, images: list[ProcessedImage]) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.cat([tiles(spec, image) for image in images]).unsqueeze(0)}


def _qwen(spec: ImageSpec, images: list[ProcessedImage]) -> dict[str, torch.Tensor]:
    patches = torch.from_numpy(np.concatenate([values(image) for image in images]))
    frames = patches.unflatten(1, (3, 1, -1)).expand(-1, -1, 2, -1).flatten(1)
    grids = [[1, *to_array(image.grid)[0].tolist()] for image in images]
    return {"pixel_values": frames, "image_grid_thw": torch.tensor(grids)}


LLAVA_PROCESSOR: Fields = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
LLAVA_TEXT: Fields = {**text("llama"), "model_type": "llama"}
IDEFICS3 = VisionFamily(
    "Idefics3",
    {
        "text_config": LLAVA_TEXT,
        "vision_config": {**SIGLIP, "model_type": "idefics3_vision", "image_size": 32, "patch_size": 8},
        "scale_factor": 2,
        "tie_word_embeddings": False,
    },
    {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}},
    _idefics3,
)
SMOLVLM = replace(
    IDEFICS3,
    prefix="SmolVLM",
    config={**IDEFICS3.config, "vision_config": {**IDEFICS3.config["vision_config"], "model_type": "smolvlm_vision"}},
)
GEMMA3 = VisionFamily(
    "Gemma3",
    {
        "text_config": text("gemma3"),
        "vision_config": {**SIGLIP, "vision_use_head": False},
        "mm_tokens_per_image": 4,
        "boi_token_index": 379,
        "eoi_token_index": 378,
    },
    {"size": {"height": 28, "width": 28}},
    _llava,
)
INTERLEAVED: Fields = {**MROPE, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
QWEN3: Fields = {
    "vision_config": {
        **QWEN,
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 64,
        "num_position_embeddings": 25,
        "deepstack_visual_indexes": [2, 0],
    },
    "tie_word_embeddings": False,
}
QWEN_PROCESSOR: Fields = {"patch_size": 4, "min_pixels": 256, "max_pixels": 2048}
QWEN3_PROCESSOR: Fields = {**QWEN_PROCESSOR, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
VISION: Mapping[str, VisionFamily] = {
    "llava": VisionFamily("Llava", {"text_config": LLAVA_TEXT, "vision_config": CLIP}, LLAVA_PROCESSOR, _llava),
    "llava_layers": VisionFamily(
        "Llava",
        {
            "text_config": LLAVA_TEXT,
            "vision_config": CLIP,
            "vision_feature_layer": [-3, -1],
            "vision_feature_select_strategy": "full",
            "projector_hidden_act": "relu",
        },
        LLAVA_PROCESSOR,
        _llava,
    ),
    "llava_siglip": VisionFamily(
        "Llava",
        {
            "text_config": LLAVA_TEXT,
            "vision_config": SIGLIP,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "multimodal_projector_bias": False,
        },
        {"size": {"height": 28, "width": 28}},
        _llava,
    ),
    "llava_next": VisionFamily(
        "LlavaNext",
        {
            "text_config": LLAVA_TEXT,
            "vision_config": CLIP,
            "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56], [84, 28]],
        },
        {**LLAVA_PROCESSOR, "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56], [84, 28]]},
        _llava_next,
    ),
    "gemma3": GEMMA3,
    "idefics3": IDEFICS3,
    "smolvlm": SMOLVLM,
    "pixtral": VisionFamily(
        "Llava",
        {
            "text_config": {**text("mistral", head_dim=16), "model_type": "mistral"},
            "vision_config": {**PIXTRAL, "rope_parameters": {"rope_type": "axial", "rope_theta": 300.0}},
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
        {"size": {"longest_edge": 32}},
        _pixtral,
    ),
    "mistral3": VisionFamily(
        "Mistral3",
        {
            "text_config": {**text("mistral", head_dim=16), "model_type": "mistral"},
            "vision_config": PIXTRAL,
            "spatial_merge_size": 2,
            "tie_word_embeddings": False,
        },
        {"size": {"longest_edge": 32}},
        _pixtral,
    ),
    "qwen2_vl": VisionFamily(
        "Qwen2VL",
        {
            "text_config": text("qwen2", rope_parameters=MROPE),
            "vision_config": {**QWEN, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
            "tie_word_embeddings": False,
        },
        QWEN_PROCESSOR,
        _qwen,
    ),
    "qwen2_5_vl": VisionFamily(
        "Qwen2_5_VL",
        {
            "text_config": text("qwen2", rope_parameters=MROPE),
            "vision_config": {
                **QWEN,
                "hidden_size": 32,
                "intermediate_size": 48,
                "out_hidden_size": 64,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
            "tie_word_embeddings": False,
        },
        QWEN_PROCESSOR,
        _qwen,
    ),
    "qwen3_vl": VisionFamily(
        "Qwen3VL",
        {"text_config": text("qwen3", rope_parameters=INTERLEAVED), **QWEN3},
        QWEN3_PROCESSOR,
        _qwen,
    ),
    "qwen3_5": VisionFamily(
        "Qwen3_5",
        {
            "text_config": text(
                "qwen3_5",
                rope_parameters={**INTERLEAVED, "partial_rotary_factor": 0.5, "mrope_section": [3, 3, 2]},
            ),
            "vision_config": {**QWEN3["vision_config"], "deepstack_visual_indexes": []},
            "tie_word_embeddings": False,
        },
        QWEN3_PROCESSOR,
        _qwen,
    ),
    "qwen3_vl_moe": VisionFamily(
        "Qwen3VLMoe",
        {
            "text_config": {
                **text("qwen3", rope_parameters=INTERLEAVED),
                "num_experts": 8,
                "num_experts_per_tok": 3,
                "moe_intermediate_size": 40,
                "mlp_only_layers": [1],
            },
            **QWEN3,
        },
        QWEN3_PROCESSOR,
        _qwen,
    ),
}


@functools.cache
def checkpoint(name: str, image_token: int = IMAGE_TOKEN) -> Path:
    """A folder with a tiny random model, its tokenizer and its processor."""
    import transformers

    family = VISION[name]
    folder = tiny.session_folder() / f"vision-{name}-{image_token}"
    special = {"image_token_id": image_token, "image_token_index": image_token}
    config = getattr(transformers, f"{family.prefix}Config")(**family.config, **special)
    network = getattr(transformers, f"{family.prefix}ForConditionalGeneration")(config)
    tiny.randomize(network)
    network.save_pretrained(folder)
    tiny.write_tokenizer(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(family.processor))
    return folder


@functools.cache
def spec_of(name: str) -> ImageSpec:
    """The processor of a family."""
    folder = checkpoint(name)
    spec = read_image_spec(folder, json.loads((folder / "config.json").read_text()))
    assert spec is not None
    return spec


def picture(name: str, size: tuple[int, int], seed: int = 0) -> Picture:
    """A processed image of noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Picture(f"{size}-{seed}", process(spec_of(name), Image.fromarray(noise)))


def with_images(
    name: str, prompt: list[int], pictures: list[Picture]
) -> tuple[list[int], tuple[MultiModalFeature, ...]]:
    """A prompt with its images; texts between placeholders become any tokens."""
    return place_images(spec_of(name), prompt, pictures, lambda text: [40 + len(text)], "prompt")


@functools.cache
def network(name: str) -> Any:
    """The model as transformers loads it."""
    import transformers

    kind = getattr(transformers, f"{VISION[name].prefix}ForConditionalGeneration")
    return kind.from_pretrained(checkpoint(name), dtype=torch.float32, attn_implementation="eager").eval()


def reference_logits(name: str, tokens: list[int], pictures: list[Picture]) -> torch.Tensor:
    """transformers' logits, float32 [tokens, vocab_size]."""
    ids = torch.tensor([tokens])
    inputs = VISION[name].inputs(spec_of(name), [each.image for each in pictures]) if pictures else {}
    if name == "gemma3" and pictures:
        inputs["token_type_ids"] = (ids == IMAGE_TOKEN).int()
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (ids == IMAGE_TOKEN).int()
    with torch.inference_mode():
        logits: torch.Tensor = network(name)(input_ids=ids, **inputs).logits[0]
    return logits
