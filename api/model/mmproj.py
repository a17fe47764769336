"""Vision parts of GGUF models (llama.cpp's mmproj files): what config.json and the processor's file would say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from api.errors import ModelFileError
from api.model.gguf_file import GGUFFile
from api.model.image_spec import ImageSpec, image_spec

Fields = dict[str, Any]

MODELS = {"gemma3": "Gemma3ForConditionalGeneration", "idefics3": "Idefics3ForConditionalGeneration"}
"""By ``clip.projector_type``."""
TOKENS = {"gemma3": "<image_soft_token>", "idefics3": "<image>"}
"""The text of the token whose embedding an image provides."""


def vision_part(file: GGUFFile, text: GGUFFile) -> tuple[Fields, ImageSpec]:
    """The configuration of a vision part, as config.json would have it, and its processor.

    Args:
        file: The header of the mmproj file.
        text: That of the language model.

    Raises:
        ModelFileError: The file is none, or of a kind that is not supported.
    """
    metadata = file.metadata
    if metadata.get("general.architecture") != "clip":
        raise ModelFileError(file.path, "not an mmproj file (general.architecture must be clip)")
    kind = metadata.get("clip.projector_type", metadata.get("clip.vision.projector_type"))
    if kind not in MODELS:
        known = ", ".join(sorted(MODELS))
        raise ModelFileError(file.path, f"projector type {str(kind)[:40]!r} is not supported; choose one of {known}")

    def number(name: str, default: Any = None) -> Any:
        value = metadata.get(f"clip.vision.{name}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ModelFileError(file.path, f"clip.vision.{name} is missing, or not a positive number")
        return value

    image_size = number("image_size")
    vision: Fields = {
        "model_type": "siglip_vision_model",
        "hidden_size": number("embedding_length"),
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": number("attention.head_count"),
        "layer_norm_eps": number("attention.layer_norm_epsilon", 1e-6),
        "image_size": image_size,
        "patch_size": number("patch_size"),
    }
    width = number("projection_dim")
    if text.metadata.get(f"{text.metadata.get('general.architecture')}.embedding_length", width) != width:
        raise ModelFileError(
            file.path, f"its embeddings have {width} numbers, {text.path}'s do not: they belong to different models"
        )
    fields: Fields = {
        "architectures": [MODELS[kind]],
        "vision_config": vision,
        "text_config": {"hidden_size": width},
        "image_token_id": token_id(text, TOKENS[kind], unused_token(text) if kind == "gemma3" else None),
        "boi_token_index": token_id(text, "<start_of_image>", 255999),
        "eoi_token_index": token_id(text, "<end_of_image>", 256000),
    }
    processor: Fields = {name: metadata.get(f"clip.vision.{name}") for name in ("image_mean", "image_std")}
    CONFIGURE[kind](number, fields, processor)
    return fields, image_spec(fields, processor, file.path)


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


Number = Callable[..., Any]
GEMMA3_POOL = 4
"""Patches in each direction that become one embedding; files do not say so."""


def _gemma3(number: Number, fields: Fields, processor: Fields) -> None:
    size = fields["vision_config"]["image_size"]
    processor["size"] = {"height": size, "width": size}
    side = size // number("patch_size") // number("projector.scale_factor", GEMMA3_POOL)
    fields["mm_tokens_per_image"] = max(1, side) ** 2


def _idefics3(number: Number, fields: Fields, processor: Fields) -> None:
    size = fields["vision_config"]["image_size"]
    fields["scale_factor"] = number("projector.scale_factor")
    processor["max_image_size"] = {"longest_edge": size}
    processor["size"] = {"longest_edge": number("preproc_image_size", 4 * size)}


CONFIGURE: Mapping[str, Callable[[Number, Fields, Fields], None]] = {"gemma3": _gemma3, "idefics3": _idefics3}
