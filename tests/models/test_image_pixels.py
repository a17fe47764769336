"""From files to pixels: as transformers' processors that use Pillow, and within limits."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from api.errors import ModelFileError
from api.media.pixels import ImageJob, decode, process, process_job
from api.model.image_spec import ImageSpec, ProcessedImage, read_image_spec
from engine_core.messages import to_array

SIZES = [(1, 1), (57, 40), (30, 91), (200, 200), (301, 17), (64, 64)]
LLAVA = ImageSpec(family="llava", image_token_id=0, patch_size=7, size={"shortest_edge": 28}, crop=(28, 28))


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(width * height)
    channels = len(Image.new(mode, (1, 1)).getbands())
    data = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(data[..., 0] if channels == 1 else data, mode)


def values(image: ProcessedImage) -> np.ndarray[Any, Any]:
    """float32 [patches, columns]: what the encoder reads."""
    patches, levels = np.concatenate([to_array(each) for each in image.patches]), to_array(image.levels)
    channels = np.repeat(np.arange(3), patches.shape[1] // 3)
    found: np.ndarray[Any, Any] = levels[channels, patches]
    return found


def patches_of(image: np.ndarray[Any, Any], size: int) -> np.ndarray[Any, Any]:
    """The same of an image [channels, height, width]."""
    channels, height, width = image.shape
    parts = image.reshape(channels, height // size, size, width // size, size)
    found: np.ndarray[Any, Any] = parts.transpose(1, 3, 0, 2, 4).reshape(-1, channels * size * size)
    return found


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("crop", [(28, 28), (35, 21), None])
def test_clip(size: tuple[int, int], crop: tuple[int, int] | None) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    edge = {"shortest_edge": 28} if crop else {"height": 28, "width": 28}
    theirs = CLIPImageProcessorPil(
        size=edge,
        do_center_crop=crop is not None,
        crop_size={"height": (crop or (1, 1))[0], "width": (crop or (1, 1))[1]},
    )
    image = picture(*size)
    ours = process(msgspec.structs.replace(LLAVA, size=edge, crop=crop), image)
    assert np.array_equal(values(ours), patches_of(theirs(image)["pixel_values"][0], 7))


def test_llava_fills_up_to_a_square() -> None:
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    theirs = LlavaImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, do_pad=True)
    for size in SIZES:
        ours = process(msgspec.structs.replace(LLAVA, pads_square=True), picture(*size))
        assert np.array_equal(values(ours), patches_of(theirs(picture(*size))["pixel_values"][0], 7)), size


@pytest.mark.parametrize("splits", [True, False])
def test_idefics3(splits: bool) -> None:
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    fields: dict[str, Any] = {"size": {"longest_edge": 80}, "max_image_size": {"longest_edge": 32}}
    theirs = Idefics3ImageProcessorPil(**fields, do_image_splitting=splits)
    spec = ImageSpec(
        family="idefics3",
        image_token_id=0,
        patch_size=8,
        tile=32,
        splits=splits,
        size=fields["size"],
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        resample=1,
    )
    for size in SIZES[1:]:
        image = picture(*size)
        expected = theirs(image, return_row_col_info=True)
        ours = process(spec, image)
        assert ours.layout == (expected["rows"][0][0], expected["cols"][0][0])
        tiles = [patches_of(tile, 8) for tile in expected["pixel_values"][0]]
        assert np.array_equal(values(ours), np.concatenate(tiles)), size


def test_llava_next() -> None:
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    shapes = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
    theirs = LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=shapes
    )
    spec = msgspec.structs.replace(
        LLAVA, family="llava_next", tile=28, shapes=tuple((shape[0], shape[1]) for shape in shapes)
    )
    for size in SIZES:
        expected = theirs(picture(*size))["pixel_values"][0]
        ours = process(spec, picture(*size))
        assert np.array_equal(values(ours), np.concatenate([patches_of(tile, 7) for tile in expected])), size


@pytest.mark.parametrize("limits", [(256, 2048), (64, 1 << 20)])
def test_qwen2_vl(limits: tuple[int, int]) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    size = {"shortest_edge": limits[0], "longest_edge": limits[1]}
    theirs = Qwen2VLImageProcessorPil(patch_size=4, size=size)
    spec = ImageSpec(family="qwen2_vl", image_token_id=0, patch_size=4, merge_size=2, size=size)
    for width, height in SIZES:
        expected = theirs(picture(width, height))
        ours = process(spec, picture(width, height))
        assert [[1, *row] for row in to_array(ours.grid).tolist()] == expected["image_grid_thw"].tolist()
        frames = np.asarray(expected["pixel_values"]).reshape(-1, 3, 2, 16)
        assert np.array_equal(frames[:, :, 0], frames[:, :, 1])
        assert np.array_equal(values(ours), frames[:, :, 0].reshape(-1, 48)), (width, height)


@pytest.mark.parametrize("merge", [1, 2])
def test_pixtral(merge: int) -> None:
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

    theirs = PixtralImageProcessorPil(
        patch_size={"height": 4 * merge, "width": 4 * merge}, size={"longest_edge": 64}, do_pad=False
    )
    spec = ImageSpec(family="pixtral", image_token_id=0, patch_size=4, merge_size=merge, size={"longest_edge": 64})
    for size in SIZES:
        expected = np.asarray(theirs(picture(*size))["pixel_values"][0])
        assert np.array_equal(values(process(spec, picture(*size))), patches_of(expected, 4)), size


def test_an_image_too_thin_for_qwen() -> None:
    spec = ImageSpec(family="qwen2_vl", image_token_id=0, patch_size=4, size={"shortest_edge": 1, "longest_edge": 999})
    with pytest.raises(ValueError, match="more than 200 times as long"):
        process(spec, Image.new("RGB", (1, 201)))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "I;16", "CMYK"])
def test_modes_become_rgb_on_white(mode: str) -> None:
    from transformers.image_transforms import convert_to_rgb

    image = picture(9, 5, "RGBA" if mode in ("P", "1") else mode).convert(mode) if mode != "I;16" else None
    if image is None:
        image = Image.fromarray(np.arange(45, dtype=np.uint16).reshape(5, 9) * 1000)
    file = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    expected: Any = convert_to_rgb(Image.open(io.BytesIO(file)), return_numpy=True)
    assert np.array_equal(np.asarray(decode(file)), expected)


def test_photos_are_turned_upright() -> None:
    image = picture(9, 5)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    file = encoded(image, "PNG", exif=exif)
    assert np.array_equal(np.asarray(decode(file)), np.rot90(np.asarray(image), -1))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it has any number of pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "not an image in a known format"),
    "text": (lambda: b"hello", "not an image in a known format"),
    "svg": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg' width='5' height='5'/>", "not an image in a known"),
    "large": (lambda: bomb(20_000, 20_000), "20000 x 20000 are more than 50 million pixels"),
    "lying": (lambda: bomb(5000, 5000), "it is damaged"),
    "truncated png": (lambda: encoded(picture(50, 50))[:500], "it is damaged"),
    "truncated jpeg": (lambda: encoded(picture(50, 50), "JPEG")[:500], "it is damaged"),
    "animated": (
        lambda: encoded(picture(5, 5), "GIF", save_all=True, append_images=[picture(5, 6).crop((0, 0, 5, 5))]),
        "it is animated",
    ),
    "thin": (lambda: encoded(Image.new("RGB", (1, 100_000))), "more than 50 million pixels"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(name: str) -> None:
    make, message = HOSTILE[name]
    spec = msgspec.structs.replace(LLAVA, size={"shortest_edge": 672})
    for is_base64 in (False, True):
        data = base64.b64encode(make()) if is_base64 else make()
        with pytest.raises(ValueError, match=message):
            process_job(msgspec.msgpack.encode(ImageJob(spec, data, is_base64)))


def test_invalid_base64() -> None:
    with pytest.raises(ValueError, match="its base64 is invalid"):
        process_job(msgspec.msgpack.encode(ImageJob(LLAVA, b"a$", is_base64=True)))


VISION = {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 7}
CONFIG = {"architectures": ["LlavaForConditionalGeneration"], "image_token_index": 5, "vision_config": VISION}
PROCESSOR: dict[str, Any] = {"size": {"shortest_edge": 28}, "crop_size": 28, "resample": 3}


@pytest.mark.parametrize("inner", [False, True])
def test_processors_in_files(tmp_path: Path, inner: bool) -> None:
    name = "processor_config.json" if inner else "preprocessor_config.json"
    fields = {"image_processor": PROCESSOR} if inner else PROCESSOR
    (tmp_path / name).write_bytes(msgspec.json.encode(fields))
    spec = read_image_spec(tmp_path, CONFIG)
    assert spec is not None
    assert (spec.image_token_id, spec.crop, spec.size) == (5, (28, 28), {"shortest_edge": 28})
    assert read_image_spec(tmp_path, {"architectures": ["LlamaForCausalLM"]}) is None


def test_overridden_processors(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_bytes(msgspec.json.encode({"size": {"longest_edge": 16}}))
    config = {"architectures": ["Qwen3VLForConditionalGeneration"], "vision_config": {"patch_size": 4}}
    limits = {"patch_size": 4, "min_pixels": 64, "max_pixels": 512}
    spec = read_image_spec(tmp_path, config, limits)
    assert spec is not None and spec.mean == (0.5, 0.5, 0.5)
    assert spec.size == {"shortest_edge": 64, "longest_edge": 512}
    with pytest.raises(ModelFileError, match="max_pixels must be a number"):
        read_image_spec(tmp_path, config, {**limits, "max_pixels": "many"})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"crop_size": 35}, "gives images of 35 x 35 pixels, and the encoder reads 28 x 28"),
        ({"image_std": [0, 1, 1]}, "image_std must be three numbers"),
        ({"size": {"shortest_edge": -1}}, "size must be"),
        ({"resample": 77}, "resample must be"),
        ({"do_normalize": False}, "must be true"),
    ],
)
def test_processors_that_lie(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    (tmp_path / "preprocessor_config.json").write_bytes(msgspec.json.encode({**PROCESSOR, **wrong}))
    with pytest.raises(ModelFileError, match=message):
        read_image_spec(tmp_path, CONFIG)
