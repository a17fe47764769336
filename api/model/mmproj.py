"""Vision parts of GGUF models (llama.cpp's mmproj files): what config.json and the processor's file would say."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from api.errors import ModelFileError
from api.model.gguf_file import GGUFFile
from api.model.image_spec import MAX_QWEN_TOKENS, ImageSpec, image_spec
from engine_core.config import projector_type

Fields = dict[str, Any]

MODELS = {
    "gemma3": "Gemma3ForConditionalGeneration",
    "idefics3": "Idefics3ForConditionalGeneration",
    "mlp": "LlavaForConditionalGeneration",
    "pixtral": "LlavaForConditionalGeneration",
    "qwen2.5vl_merger": "Qwen2_5_VLForConditionalGeneration",
    "qwen2vl_merger": "Qwen2VLForConditionalGeneration",
    "qwen3vl_merger": "Qwen3VLForConditionalGeneration",
}
"""By ``clip.projector_type``."""
TOKENS = {
    "gemma3": "<image_soft_token>",
    "idefics3": "<image>",
    "mlp": "<image>",
    "pixtral": "[IMG]",
    "qwen2.5vl_merger": "<|image_pad|>",
    "qwen2vl_merger": "<|image_pad|>",
    "qwen3vl_merger": "<|image_pad|>",
}
"""The text of the token whose embedding an image provides."""


MAX_SIZE = 1 << 20


class VisionHeader:
    """The header of an mmproj file."""

    def __init__(self, file: GGUFFile) -> None:
        self.path = file.path
        self.metadata = file.metadata
        self.shapes = {tensor.name: tensor.shape for tensor in file.tensors}

    def fail(self, problem: str) -> ModelFileError:
        return ModelFileError(self.path, problem)

    def number(self, name: str, default: Any = None) -> Any:
        """A number of ``clip.vision``.

        Raises:
            ModelFileError: It is missing, or no number above 0.
        """
        value = self.metadata.get(f"clip.vision.{name}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self.fail(f"clip.vision.{name} is missing, or not a positive number")
        return value

    def size(self, name: str, default: int | None = None) -> int:
        """An integer of ``clip.vision``.

        Raises:
            ModelFileError: It is missing, or no integer from 1 to 1,048,576.
        """
        value = self.number(name, default)
        if not isinstance(value, int) or value > MAX_SIZE:
            raise self.fail(f"clip.vision.{name} must be an integer from 1 to {MAX_SIZE}")
        return value

    def numbers(self, name: str) -> list[int]:
        """A list of integers of ``clip.vision``; empty if it is missing.

        Raises:
            ModelFileError: It is no such list.
        """
        value = self.metadata.get(f"clip.vision.{name}", [])
        if not isinstance(value, list) or not all(isinstance(each, int) for each in value):
            raise self.fail(f"clip.vision.{name} is no list of integers")
        return value

    def rows(self, name: str) -> int:
        """Rows of a matrix.

        Raises:
            ModelFileError: There is none such.
        """
        shape = self.shapes.get(name, ())
        if len(shape) < 2:
            raise self.fail(f"has no matrix {name}")
        return shape[0]

    @property
    def activation(self) -> str:
        """The activation of the layers."""
        if self.metadata.get("clip.use_silu"):
            return "silu"
        return "gelu" if self.metadata.get("clip.use_gelu") else "quick_gelu"

    @property
    def inner_size(self) -> int:
        """Of MLPs. Some converters write another number in its place."""
        return max(self.rows(f"v.blk.0.ffn_{name}.weight") for name in ("up", "down"))

    @property
    def num_layers(self) -> int:
        """Layers in the file."""
        return len({match[1] for match in map(BLOCK.match, self.shapes) if match})


BLOCK = re.compile(r"v\.blk\.(\d+)\.")


def vision_part(file: GGUFFile, text: GGUFFile, overrides: Mapping[str, Any] | None = None) -> tuple[Fields, ImageSpec]:
    """The configuration of a vision part, as config.json would have it, and its processor.

    Args:
        file: The header of the mmproj file.
        text: That of the language model.
        overrides: Fields of the processor that take precedence.

    Raises:
        ModelFileError: The file is none, or of a kind that is not supported.
    """
    header = VisionHeader(file)
    if header.metadata.get("general.architecture") != "clip":
        raise header.fail("not an mmproj file (general.architecture must be clip)")
    kind = projector_type(header.metadata)
    if kind not in MODELS:
        known = ", ".join(sorted(MODELS))
        raise header.fail(f"projector type {kind[:40]!r} is not supported; choose one of {known}")
    fields: Fields = {"architectures": [MODELS[kind]], "vision_config": {}, "text_config": {}}
    processor: Fields = {name: header.metadata.get(f"clip.vision.{name}") for name in ("image_mean", "image_std")}
    width = CONFIGURE[kind](header, fields, processor)
    own = text.metadata.get(f"{text.metadata.get('general.architecture')}.embedding_length", width)
    if own != width:
        raise header.fail(f"its embeddings have {width} numbers, {text.path}'s do not: they belong to different models")
    fields["text_config"]["hidden_size"] = width
    fields["image_token_id"] = token_id(text, TOKENS[kind], substitute(kind, text))
    fields["boi_token_index"] = token_id(text, "<start_of_image>", 255999)
    fields["eoi_token_index"] = token_id(text, "<end_of_image>", 256000)
    return fields, image_spec(fields, {**processor, **(overrides or {})}, file.path)


def substitute(kind: str, text: GGUFFile) -> int | None:
    """A token that stands for images if the language model has none for them: no text has it.

    The vocabulary of LLaVA's files is often that of the language model alone, whose unknown token is then left.
    """
    if kind == "gemma3":
        return unused_token(text)
    unknown = text.metadata.get("tokenizer.ggml.unknown_token_id", 0)
    is_byte_level = text.metadata.get("tokenizer.ggml.model") == "gpt2"
    return unknown if kind == "mlp" and isinstance(unknown, int) and not is_byte_level else None


def token_id(text: GGUFFile, token: str, default: int | None = None) -> int:
    """The id of a token of the language model.

    Raises:
        ModelFileError: It has no such token.
    """
    tokens: Sequence[Any] = text.metadata.get("tokenizer.ggml.tokens", ())
    if token in tokens:
        return tokens.index(token)
    if default is None:
        raise ModelFileError(text.path, f"has no token {token!r}: it is not the model that the mmproj file belongs to")
    return default


def unused_token(text: GGUFFile) -> int | None:
    """The last token if no text has it: files of Gemma 3 may end before the image's token, which only marks places."""
    tokens: Sequence[Any] = text.metadata.get("tokenizer.ggml.tokens", ())
    return len(tokens) - 1 if tokens and str(tokens[-1]).startswith("<unused") else None


GEMMA3_POOL = 4
"""Patches in each direction that become one embedding; files do not say so."""


def _encoder(header: VisionHeader, fields: Fields, model_type: str, eps: float) -> int:
    """CLIP's or SigLIP's encoder; returns its pixels in each direction."""
    size = header.size("image_size")
    fields["vision_config"] = {
        "model_type": model_type,
        "hidden_size": header.size("embedding_length"),
        "intermediate_size": header.size("feed_forward_length"),
        "num_hidden_layers": header.size("block_count"),
        "num_attention_heads": header.size("attention.head_count"),
        "layer_norm_eps": header.number("attention.layer_norm_epsilon", eps),
        "image_size": size,
        "patch_size": header.size("patch_size"),
    }
    return size


def _gemma3(header: VisionHeader, fields: Fields, processor: Fields) -> int:
    size = _encoder(header, fields, "siglip_vision_model", 1e-6)
    processor["size"] = {"height": size, "width": size}
    side = size // header.size("patch_size") // header.size("projector.scale_factor", GEMMA3_POOL)
    fields["mm_tokens_per_image"] = max(1, side) ** 2
    return header.size("projection_dim")


def _idefics3(header: VisionHeader, fields: Fields, processor: Fields) -> int:
    size = _encoder(header, fields, "siglip_vision_model", 1e-6)
    fields["scale_factor"] = header.size("projector.scale_factor")
    processor["max_image_size"] = {"longest_edge": size}
    processor["size"] = {"longest_edge": header.size("preproc_image_size", 4 * size)}
    return header.size("projection_dim")


def _llava(header: VisionHeader, fields: Fields, processor: Fields) -> int:
    """LLaVA-1.5, and 1.6 if there is an embedding for the ends of rows. Files leave out layers that are not used."""
    if "mm.2.weight" not in header.shapes or "mm.3.weight" in header.shapes:
        raise header.fail("LLaVA's projector must be two matrices, mm.0 and mm.2; others are not supported")
    is_clip = "v.class_embd" in header.shapes
    size = _encoder(header, fields, "clip_vision_model" if is_clip else "siglip_vision_model", 1e-5)
    layers = header.numbers("feature_layer") or [header.num_layers]
    fields["vision_config"] |= {"num_hidden_layers": max(1, *layers), "hidden_act": header.activation}
    fields["vision_feature_layer"] = layers
    fields["vision_feature_select_strategy"] = "default" if is_clip else "full"
    fields["multimodal_projector_bias"] = "mm.0.bias" in header.shapes
    processor["size"] = {"shortest_edge": size} if is_clip else {"height": size, "width": size}
    processor["crop_size"] = {"height": size, "width": size}
    pinpoints = header.numbers("image_grid_pinpoints")
    if pinpoints and {"v.image_newline", "model.image_newline"} & header.shapes.keys():
        fields["architectures"] = ["LlavaNextForConditionalGeneration"]
        shapes = [list(pair) for pair in zip(pinpoints[::2], pinpoints[1::2], strict=False)]
        fields["image_grid_pinpoints"] = processor["image_grid_pinpoints"] = shapes
    else:
        processor["do_pad"] = True  # to a square, as in training
    return header.rows("mm.2.weight")


def _pixtral(header: VisionHeader, fields: Fields, processor: Fields) -> int:
    """Pixtral, and Mistral Small 3, which merges patches."""
    size = _encoder(header, fields, "pixtral", 1e-5)
    fields["vision_config"] |= {"hidden_act": header.activation, "rope_theta": 10000.0}
    fields["multimodal_projector_bias"] = "mm.1.bias" in header.shapes
    if "mm.patch_merger.weight" in header.shapes:
        fields["architectures"] = ["Mistral3ForConditionalGeneration"]
        fields["spatial_merge_size"] = header.size("spatial_merge_size", 2)
    processor["size"] = {"longest_edge": size}
    return header.rows("mm.2.weight")


def _qwen(header: VisionHeader, fields: Fields, processor: Fields) -> int:
    """What Qwen's towers have in common."""
    patch_size, merge_size = header.size("patch_size"), header.size("spatial_merge_size", 2)
    width = header.rows("mm.2.weight")
    fields["vision_config"] = {
        "depth": header.size("block_count"),
        "hidden_act": header.activation,
        "hidden_size": header.size("embedding_length"),
        "intermediate_size": header.inner_size,
        "num_heads": header.size("attention.head_count"),
        "out_hidden_size": width,
        "patch_size": patch_size,
        "spatial_merge_size": merge_size,
        "temporal_patch_size": 2 if "v.patch_embd.weight.1" in header.shapes else 1,
    }
    processor |= {"patch_size": patch_size, "merge_size": merge_size}
    for name, limit in (("min_pixels", "image_min_pixels"), ("max_pixels", "image_max_pixels")):
        if f"clip.vision.{limit}" in header.metadata:
            processor[name] = min(header.number(limit), 1 << 26)
    return width


def _qwen2_vl(header: VisionHeader, fields: Fields, processor: Fields) -> int:
    width = _qwen(header, fields, processor)
    processor["size"] = qwen_sizes(processor)
    vision = fields["vision_config"]
    vision |= {"embed_dim": vision["hidden_size"], "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"]}
    vision["hidden_size"] = width
    return width


def qwen_sizes(processor: Fields) -> Fields:
    """Pixels of images, as the released models have them: from 4 tokens to as many as are possible."""
    cell = (processor["patch_size"] * processor["merge_size"]) ** 2
    return {"shortest_edge": 4 * cell, "longest_edge": MAX_QWEN_TOKENS * cell}


def _qwen2_5_vl(header: VisionHeader, fields: Fields, processor: Fields) -> int:
    width = _qwen(header, fields, processor)
    processor["size"] = qwen_sizes(processor)
    vision, every = fields["vision_config"], header.size("n_wa_pattern")
    vision["fullatt_block_indexes"] = list(range(every - 1, vision["depth"], every))
    vision["window_size"] = header.size("window_size", 112)
    return width


def _qwen3_vl(header: VisionHeader, fields: Fields, processor: Fields) -> int:
    width = _qwen(header, fields, processor)
    found = (DEEPSTACK.match(name) for name in header.shapes)
    fields["vision_config"] |= {
        "hidden_act": "gelu_pytorch_tanh",
        "deepstack_visual_indexes": sorted({int(match[1]) for match in found if match}),
        "num_position_embeddings": header.rows("v.position_embd.weight"),
    }
    return width


DEEPSTACK = re.compile(r"v\.deepstack\.(\d{1,6})\.")
CONFIGURE: Mapping[str, Callable[[VisionHeader, Fields, Fields], int]] = {
    "gemma3": _gemma3,
    "idefics3": _idefics3,
    "mlp": _llava,
    "pixtral": _pixtral,
    "qwen2.5vl_merger": _qwen2_5_vl,
    "qwen2vl_merger": _qwen2_vl,
    "qwen3vl_merger": _qwen3_vl,
}
"""Each completes the configuration and the processor's, and returns the numbers of an embedding."""
