"""How a model's images are processed, read from its files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from api.errors import ModelFileError
from engine_core.launch import read_json, why
from engine_core.messages import Tensor

MAX_SIDE = 1 << 13
"""Largest number of pixels that files may ask for in one direction."""
MAX_QWEN_TOKENS = 4096
"""Embeddings of an image of Qwen2-VL: larger images become smaller, whatever the files allow."""
QWEN3_SIZE = {"shortest_edge": 1 << 16, "longest_edge": 1 << 24}
"""Pixels of Qwen3-VL's images, if its files do not say so."""
LOW_SIDE = 512
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
BILINEAR, BICUBIC, LANCZOS = 2, 3, 1
"""Pillow's numbers of filters."""


class ImageSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The processor of a model's images, and what a prompt says in place of an image."""

    family: str
    """A key of ``FAMILIES``."""
    image_token_id: int
    """The token that stands for an image in a rendered conversation, and for each of its embeddings in a prompt."""
    placeholder_id: int | None = None
    """The token of a rendered conversation in the place of an image; None: ``image_token_id``."""
    end_id: int | None = None
    """The token after an image, of a prompt that has empty lines around images."""
    patch_size: int
    """Pixels of a patch in each direction."""
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    rescale_factor: float = 1 / 255
    resample: int = BICUBIC
    size: dict[str, int] = {}
    """Size after resizing: shortest_edge, longest_edge, or height and width."""
    crop: tuple[int, int] | None = None
    """Height and width that are cut out of the centre after resizing."""
    pads_square: bool = False
    """Fill up to a square with the mean first."""
    num_extra: int = 0
    """Embeddings of an image in addition to those of its patches."""
    merge_size: int = 1
    """Patches in each direction that become one embedding."""
    num_tokens: int = 0
    """Embeddings of an image, if all have as many."""
    text_length: int = 0
    """Tokens to which the texts of a model of vectors are filled up; 0: they are not."""
    pad_token_id: int = 0
    """What fills them."""
    tile: int = 0
    """Pixels of a tile in each direction."""
    splits: bool = True
    """Whether an image is split into tiles."""
    shapes: tuple[tuple[int, int], ...] = ()
    """Heights and widths to which images are brought, in whole tiles."""

    @property
    def is_pooled(self) -> bool:
        """An image is a prompt of its own, and becomes a vector."""
        return self.family == "clip"

    @property
    def key(self) -> bytes:
        """Identifies the processor: equal images have equal pixels."""
        return hashlib.sha256(msgspec.msgpack.encode(self)).digest()


def low_detail(spec: ImageSpec) -> ImageSpec:
    """The processor of images that a client wants with little detail: without tiles, or of at most 512 x 512 pixels.

    Other families have images of one size.
    """
    if spec.family == "idefics3":
        return msgspec.structs.replace(spec, splits=False)
    if spec.family == "pixtral":
        return msgspec.structs.replace(spec, size={"longest_edge": min(LOW_SIDE, spec.size["longest_edge"])})
    if spec.family == "qwen2_vl":
        least, most = spec.size["shortest_edge"], spec.size["longest_edge"]
        size = {"shortest_edge": least, "longest_edge": max(least, min(LOW_SIDE**2, most))}
        return msgspec.structs.replace(spec, size=size)
    return spec


class ProcessedImage(msgspec.Struct, frozen=True):
    """An image as its encoder reads it."""

    patches: tuple[Tensor, ...]
    """uint8 [patches, channels * height * width of a patch] for each part of the image that is encoded by itself: some
    of its tiles, one after another."""
    levels: Tensor
    """float32 [channels, 256]: the encoder's input for each value of a channel."""
    grid: Tensor
    """int32 [tiles, numbers]: rows and columns of patches, and what else the family has to say."""
    height: int
    """Of the image as sent."""
    width: int
    layout: tuple[int, ...] = ()
    """What the prompt says about the image: rows and columns of tiles."""

    @property
    def num_bytes(self) -> int:
        return sum(len(each.data) for each in (*self.patches, self.levels, self.grid))


class _Section:
    """Fields of a file, checked."""

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        self.values, self.path = values, path

    def fail(self, name: str, expected: str) -> ModelFileError:
        return ModelFileError(self.path, f"{name} must be {expected}, not {str(self.values.get(name))[:100]}")

    def integer(self, name: str, default: int | None = None, most: int = MAX_SIDE) -> int:
        value = self.values.get(name)
        value = default if value is None else value
        if type(value) is not int or not 0 < value <= most:
            raise self.fail(name, f"a number from 1 to {most}")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.values.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
            raise self.fail(name, "a positive number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.fail(name, "true or false")
        return value

    def colour(self, name: str, default: tuple[float, ...]) -> tuple[float, ...]:
        value = self.values.get(name)
        value = list(default) if value is None else value
        if not isinstance(value, list) or len(value) != 3 or not all(isinstance(each, int | float) for each in value):
            raise self.fail(name, "three numbers")
        if name == "image_std" and not all(value):
            raise self.fail(name, "three numbers other than 0")
        return tuple(map(float, value))

    def size(self, name: str, default: Mapping[str, int]) -> dict[str, int]:
        value = self.values.get(name)
        value = default if value is None else {"shortest_edge": value} if isinstance(value, int) else value
        if not isinstance(value, Mapping):
            raise self.fail(name, "an object")
        value = {key: each for key, each in value.items() if each is not None}
        if not value or not all(type(each) is int and 0 < each <= 1 << 26 for each in value.values()):
            raise self.fail(name, "an object of numbers")
        return value


def read_image_spec(
    folder: Path, fields: Mapping[str, Any], overrides: Mapping[str, Any] | None = None
) -> ImageSpec | None:
    """The processor of a model's images; None: the model takes none, or none that is supported.

    Args:
        folder: The model's files.
        fields: Its config.json.
        overrides: Fields that take precedence over those of the processor's file.

    Raises:
        ModelFileError: A file is damaged or asks for the impossible.
    """
    names = fields.get("architectures")
    read = FAMILIES.get(str(names[0])) if isinstance(names, list) and names else None
    if read is None:
        return None
    path, values = _processor_fields(folder)
    values = {**values, **(overrides or {})}
    return read(_Section(values, path), *_sections(fields, folder / "config.json"))


def image_spec(fields: Mapping[str, Any], processor: Mapping[str, Any], path: str) -> ImageSpec:
    """The same from what a file of another format says.

    Args:
        fields: What config.json would say, of a model that takes images.
        processor: What the processor's file would say.
        path: The file.

    Raises:
        ModelFileError: It asks for the impossible.
    """
    read = FAMILIES[fields["architectures"][0]]
    spec = read(_Section(processor, Path(path)), *_sections(fields, Path(path)))
    assert spec is not None
    return spec


def _sections(fields: Mapping[str, Any], path: Path) -> tuple[_Section, _Section]:
    """The configuration of the whole model and that of its encoder."""
    vision = fields.get("vision_config")
    return _Section(fields, path), _Section(vision if isinstance(vision, dict) else {}, path)


def _processor_fields(folder: Path) -> tuple[Path, Mapping[str, Any]]:
    """The fields of the image processor, and the file that has them."""
    for name, key in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        path = folder / name
        if not path.is_file():
            continue
        try:
            values = read_json(path)
        except (OSError, ValueError) as error:
            raise ModelFileError(path, why(error)) from error
        if key is not None and isinstance(values, dict):
            values = values.get(key)
        if isinstance(values, dict):
            return path, values
        if key is None:
            raise ModelFileError(path, "not a JSON object")
    return folder / "preprocessor_config.json", {}


def _common(values: _Section, mean: tuple[float, ...] = CLIP_MEAN, std: tuple[float, ...] = CLIP_STD) -> dict[str, Any]:
    if not values.flag("do_rescale", True) or not values.flag("do_normalize", True):
        raise ModelFileError(values.path, "do_rescale and do_normalize must be true")
    resample = values.values.get("resample")
    if resample is not None and resample not in (BILINEAR, BICUBIC, LANCZOS):
        raise values.fail("resample", "1, 2 or 3")
    return {
        "mean": values.colour("image_mean", mean),
        "std": values.colour("image_std", std),
        "rescale_factor": values.number("rescale_factor", 1 / 255),
        **({} if resample is None else {"resample": resample}),
    }


def _image_token(config: _Section, default: int | None = None) -> int:
    name = "image_token_id" if config.values.get("image_token_id") is not None else "image_token_index"
    value = config.values.get(name, default)
    if type(value) is not int or not 0 <= value < 1 << 30:
        raise config.fail(name, "a token id")
    return value


def _pixtral(values: _Section, config: _Section, vision: _Section) -> ImageSpec | None:
    if vision.values.get("model_type", "pixtral") != "pixtral":
        return None
    patch_size = vision.integer("patch_size", 16)
    merge_size = config.integer("spatial_merge_size", 2) if "Mistral3" in str(config.values["architectures"]) else 1
    longest = values.size("size", {"longest_edge": 1024}).get("longest_edge")
    if longest is None or not patch_size * merge_size <= longest <= vision.integer("image_size", 1024):
        raise values.fail("size", "an object with a longest_edge of at most image_size in config.json")
    return ImageSpec(
        family="pixtral",
        image_token_id=_image_token(config, 10),
        patch_size=patch_size,
        merge_size=merge_size,
        size={"longest_edge": longest},
        **_common(values),
    )


def _llava(values: _Section, config: _Section, vision: _Section) -> ImageSpec | None:
    if vision.values.get("model_type") == "pixtral":
        return _pixtral(values, config, vision)
    if vision.values.get("model_type", "clip_vision_model") not in ("clip_vision_model", "siglip_vision_model"):
        return None
    is_clip = vision.values.get("model_type", "clip_vision_model") == "clip_vision_model"
    side = vision.integer("image_size", 336 if not vision.values else 224)
    default = {"shortest_edge": 224} if is_clip else {"height": 224, "width": 224}
    crop = values.size("crop_size", {"height": 224, "width": 224})
    if "shortest_edge" in crop:  # files may give one number
        crop = {"height": crop["shortest_edge"], "width": crop["shortest_edge"]}
    size = values.size("size", default)
    has_crop = values.flag("do_center_crop", is_clip)
    found = (crop.get("height"), crop.get("width")) if has_crop else (size.get("height"), size.get("width"))
    if found != (side, side):
        raise ModelFileError(
            values.path, f"gives images of {found[0]} x {found[1]} pixels, and the encoder reads {side} x {side}"
        )
    is_default = config.values.get("vision_feature_select_strategy", "default") == "default"
    return ImageSpec(
        family="llava",
        image_token_id=_image_token(config, 32000),
        patch_size=vision.integer("patch_size", 14 if not vision.values else 32 if is_clip else 16),
        size=size,
        crop=(side, side) if has_crop else None,
        pads_square=values.flag("do_pad", False),
        num_extra=int(is_clip and not is_default),
        **_common(values),
    )


def _clip(values: _Section, config: _Section, vision: _Section) -> ImageSpec | None:
    spec = _llava(values, _Section({"image_token_id": 0}, config.path), vision)
    return None if spec is None else msgspec.structs.replace(spec, family="clip", num_extra=0)


def _siglip(values: _Section, config: _Section, vision: _Section) -> ImageSpec | None:
    kind = _Section({"model_type": "siglip_vision_model", **vision.values}, vision.path)
    own = {"image_mean": list(HALF), "image_std": list(HALF), **values.values}
    spec = _clip(_Section(own, values.path), config, kind)
    text = config.values.get("text_config")
    section = _Section(text if isinstance(text, dict) else {}, config.path)
    return spec and msgspec.structs.replace(
        spec,
        text_length=section.integer("max_position_embeddings", 64),
        pad_token_id=section.integer("pad_token_id", 1, most=1 << 30),
    )


def _gemma3(values: _Section, config: _Section, vision: _Section) -> ImageSpec:
    side = vision.integer("image_size", 224)
    if values.values.get("do_pan_and_scan"):
        raise values.fail("do_pan_and_scan", "false")
    size = values.size("size", {"height": 224, "width": 224})
    if (size.get("height"), size.get("width")) != (side, side):
        raise values.fail("size", f"a height and a width of {side}, as the encoder has")
    return ImageSpec(
        family="gemma3",
        image_token_id=_image_token(config, 262144),
        placeholder_id=config.integer("boi_token_index", 255999, most=1 << 30),
        end_id=config.integer("eoi_token_index", 256000, most=1 << 30),
        patch_size=vision.integer("patch_size", 16),
        num_tokens=config.integer("mm_tokens_per_image", 256),
        size=size,
        **{"resample": BILINEAR, **_common(values, HALF, HALF)},
    )


def _llava_next(values: _Section, config: _Section, vision: _Section) -> ImageSpec | None:
    spec = _llava(values, config, vision)
    if spec is None or spec.family != "llava":
        return None
    tile = vision.integer("image_size", 336 if not vision.values else 224)
    default = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    given = values.values.get("image_grid_pinpoints", config.values.get("image_grid_pinpoints", default))
    shapes = given if isinstance(given, list) and 0 < len(given) <= 1024 else [None]
    for shape in shapes:
        is_pair = isinstance(shape, list) and len(shape) == 2 and all(type(each) is int for each in shape)
        if not is_pair or not all(0 < each <= MAX_SIDE and each % tile == 0 for each in shape or ()):
            raise values.fail("image_grid_pinpoints", f"a list of heights and widths in multiples of {tile}")
    if spec.num_extra or spec.pads_square or spec.size.get("shortest_edge", tile) != tile:
        raise values.fail("size", f"the encoder's {tile} pixels, with vision_feature_select_strategy default")
    pairs = tuple((shape[0], shape[1]) for shape in shapes if shape)
    return msgspec.structs.replace(spec, family="llava_next", tile=tile, shapes=pairs)


def _qwen2_vl(values: _Section, config: _Section, vision: _Section) -> ImageSpec:
    patch_size = vision.integer("patch_size", 14)
    merge_size = vision.integer("spatial_merge_size", 2)
    if values.integer("patch_size", 14) != patch_size or values.integer("merge_size", 2) != merge_size:
        raise values.fail("patch_size", "that of config.json, and so must be merge_size")
    cell = (patch_size * merge_size) ** 2
    size = values.size("size", {"shortest_edge": 4 * cell, "longest_edge": 1280 * cell})
    least = values.integer("min_pixels", size.get("shortest_edge", 4 * cell), most=1 << 26)
    most = values.integer("max_pixels", size.get("longest_edge", 1280 * cell), most=1 << 26)
    if not least <= most:
        raise values.fail("size", "an object with a shortest_edge of at most longest_edge")
    return ImageSpec(
        family="qwen2_vl",
        image_token_id=_image_token(config, 151655),
        patch_size=patch_size,
        merge_size=merge_size,
        size={"shortest_edge": least, "longest_edge": max(least, min(most, MAX_QWEN_TOKENS * cell))},
        **_common(values),
    )


def _qwen3_vl(values: _Section, config: _Section, vision: _Section) -> ImageSpec:
    own = {"patch_size": 16, "image_mean": list(HALF), "image_std": list(HALF), "size": QWEN3_SIZE}
    given = {name: value for name, value in values.values.items() if value is not None}
    return _qwen2_vl(
        _Section({**own, **given}, values.path), config, _Section({"patch_size": 16, **vision.values}, vision.path)
    )


def _idefics3(values: _Section, config: _Section, vision: _Section) -> ImageSpec:
    tile = values.size("max_image_size", {"longest_edge": 364}).get("longest_edge", 0)
    size = values.size("size", {"longest_edge": 4 * 364})
    longest = size.get("longest_edge")
    if not 0 < tile <= MAX_SIDE or longest is None or not tile <= longest <= 6 * tile:
        raise values.fail("size", f"an object with a longest_edge of one to six tiles of {tile} pixels")
    patch_size = vision.integer("patch_size", 32)
    side, merge_size = tile // patch_size, config.integer("scale_factor", 2)
    if tile > vision.integer("image_size", 224) or tile % patch_size or side % merge_size:
        raise values.fail("max_image_size", "pixels that the encoder has positions for")
    own = _common(values, HALF, HALF)
    return ImageSpec(
        family="idefics3",
        image_token_id=_image_token(config, 128257),
        patch_size=patch_size,
        merge_size=merge_size,
        size=size,
        tile=tile,
        splits=values.flag("do_image_splitting", True),
        **{"resample": LANCZOS, **own},
    )


FAMILIES: Mapping[str, Callable[[_Section, _Section, _Section], ImageSpec | None]] = {
    "CLIPModel": _clip,
    "Mistral3ForConditionalGeneration": _pixtral,
    "Gemma3ForConditionalGeneration": _gemma3,
    "Idefics3ForConditionalGeneration": _idefics3,
    "LlavaForConditionalGeneration": _llava,
    "LlavaNextForConditionalGeneration": _llava_next,
    "Qwen2VLForConditionalGeneration": _qwen2_vl,
    "Qwen2_5_VLForConditionalGeneration": _qwen2_vl,
    "Qwen3_5ForConditionalGeneration": _qwen3_vl,
    "Qwen3_5MoeForConditionalGeneration": _qwen3_vl,
    "Qwen3VLForConditionalGeneration": _qwen3_vl,
    "Qwen3VLMoeForConditionalGeneration": _qwen3_vl,
    "SiglipModel": _siglip,
    "SmolVLMForConditionalGeneration": _idefics3,
}
"""By architecture: reads the processor of a model's images."""
