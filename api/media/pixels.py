"""From the bytes of an image to the patches that an encoder reads: a job of a ``Helper``.

Pixels are those of transformers' processors that use Pillow. They stay 8 bits until the encoder reads them: each value
of a channel stands for one number (``ProcessedImage.levels``).
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import warnings
from collections.abc import Callable, Sequence
from itertools import product

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from api.model.image_spec import ImageSpec, ProcessedImage
from engine_core.messages import to_tensor

U8 = npt.NDArray[np.uint8]

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 50_000_000
"""Pixels of an image, as sent and after resizing."""
Image.MAX_IMAGE_PIXELS = None  # the limit above is checked before anything is decoded


class ImageJob(msgspec.Struct, frozen=True):
    """An image to process."""

    spec: ImageSpec
    data: bytes
    is_base64: bool = False


def process_job(data: bytes) -> bytes:
    """The job: takes an ``ImageJob`` and returns a ``ProcessedImage``, both as msgpack.

    Raises:
        ValueError: It is no image, a damaged one, or one that is too large.
    """
    job = msgspec.msgpack.decode(data, type=ImageJob)
    content = job.data
    if job.is_base64:
        try:
            content = base64.b64decode(content, validate=True)
        except binascii.Error as error:
            raise ValueError(f"its base64 is invalid ({error})") from None
    return msgspec.msgpack.encode(process(job.spec, decode(content)))


def decode(data: bytes) -> Image.Image:
    """The image in RGB, upright, transparent parts on white.

    Raises:
        ValueError: As for ``process_job``.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            file = Image.open(io.BytesIO(data), formats=FORMATS)
            check_pixels(file.width, file.height)
            if getattr(file, "is_animated", False):
                raise ValueError("it is animated; send one frame")
            file.load()
            image: Image.Image = ImageOps.exif_transpose(file)
            if "A" in image.getbands() or image.info.get("transparency") is not None:
                image = image.convert("RGBA")
                background = Image.new("RGBA", image.size, (255, 255, 255, 255))
                image = Image.alpha_composite(background, image)
            return image.convert("RGB")
    except UnidentifiedImageError:
        raise ValueError(f"it is not an image in a known format ({', '.join(FORMATS)})") from None
    except (OSError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError, AttributeError) as error:
        raise ValueError(f"it is damaged: {str(error)[:200] or type(error).__name__}") from None


def check_pixels(width: int, height: int) -> None:
    """Checks the number of pixels.

    Raises:
        ValueError: There are too many.
    """
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} are more than {MAX_PIXELS // 10**6} million pixels")


def process(spec: ImageSpec, image: Image.Image) -> ProcessedImage:
    """An image as its model's encoder reads it.

    Raises:
        ValueError: It is too long and thin, so that it would become too large.
    """
    parts, grid, layout = FAMILIES[spec.family](spec, image)
    return ProcessedImage(
        patches=tuple(map(to_tensor, parts)),
        levels=to_tensor(levels(spec)),
        grid=to_tensor(np.array(grid, np.int32)),
        height=image.height,
        width=image.width,
        layout=tuple(layout),
    )


def levels(spec: ImageSpec) -> npt.NDArray[np.float32]:
    """The encoder's input for each value of a channel: float32 [channels, 256], in transformers' arithmetic."""
    scaled = (np.arange(256, dtype=np.float64) * spec.rescale_factor).astype(np.float32)
    mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
    result: npt.NDArray[np.float32] = (scaled - mean[:, None]) / std[:, None]
    return result


def resized(spec: ImageSpec, image: Image.Image, height: int, width: int) -> Image.Image:
    """The image in another size.

    Raises:
        ValueError: It would become too large.
    """
    check_pixels(width, height)
    return image.resize((width, height), resample=spec.resample)


def patches_of(pixels: U8, patch_size: int) -> U8:
    """The patches of an image row by row, uint8 [patches, channels * patch_size ** 2].

    Args:
        pixels: [height, width, channels]. What exceeds whole patches is left out.
        patch_size: Pixels in each direction.
    """
    rows, columns = pixels.shape[0] // patch_size, pixels.shape[1] // patch_size
    whole = pixels[: rows * patch_size, : columns * patch_size]
    split = whole.reshape(rows, patch_size, columns, patch_size, -1)
    result: U8 = split.transpose(0, 2, 4, 1, 3).reshape(rows * columns, -1)
    return result


def shortest_edge(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width if the shorter one becomes ``size``."""
    if width <= height:
        return int(size * height / width), size
    return size, int(size * width / height)


def center_crop(pixels: U8, height: int, width: int) -> U8:
    """The centre of an image [height, width, channels], on black if the image is smaller."""
    own_height, own_width = pixels.shape[:2]
    top, left = (own_height - height) // 2, (own_width - width) // 2
    if top >= 0 and left >= 0:
        return pixels[top : top + height, left : left + width]
    full = np.zeros((max(height, own_height), max(width, own_width), pixels.shape[2]), pixels.dtype)
    above, before = math.ceil((full.shape[0] - own_height) / 2), math.ceil((full.shape[1] - own_width) / 2)
    full[above : above + own_height, before : before + own_width] = pixels
    top, left = top + above, left + before
    return full[max(0, top) : top + height, max(0, left) : left + width]


Patches = tuple[list[U8], list[list[int]], Sequence[int]]
"""The patches of each part, grid and layout of a ``ProcessedImage``."""


def _llava(spec: ImageSpec, image: Image.Image) -> Patches:
    if spec.pads_square and image.width != image.height:
        side = max(image.size)
        check_pixels(side, side)
        square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in spec.mean))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    size = spec.size
    if "shortest_edge" in size:
        height, width = shortest_edge(image.height, image.width, size["shortest_edge"])
    else:
        height, width = size["height"], size["width"]
    pixels = np.asarray(resized(spec, image, height, width))
    if spec.crop is not None:
        pixels = center_crop(pixels, *spec.crop)
    grid = [pixels.shape[0] // spec.patch_size, pixels.shape[1] // spec.patch_size]
    return [patches_of(pixels, spec.patch_size)], [grid], ()


def _llava_next(spec: ImageSpec, image: Image.Image) -> Patches:
    height, width = best_shape(image.height, image.width, spec.shapes)
    tile, side = spec.tile, spec.tile // spec.patch_size
    down_scale, across_scale = height / image.height, width / image.width
    if across_scale < down_scale:
        own_height, own_width = min(math.ceil(image.height * across_scale), height), width
    else:
        own_height, own_width = height, min(math.ceil(image.width * down_scale), width)
    full = np.zeros((height, width, 3), np.uint8)
    top, left = (height - own_height) // 2, (width - own_width) // 2
    full[top : top + own_height, left : left + own_width] = np.asarray(resized(spec, image, own_height, own_width))
    corners = product(range(0, height, tile), range(0, width, tile))
    tiles = [np.asarray(resized(spec, image, tile, tile))]
    tiles += [full[top : top + tile, left : left + tile] for top, left in corners]
    patches = [patches_of(pixels, spec.patch_size) for pixels in tiles]
    down, across = height // tile, width // tile
    top, left = filled_up(image.height, image.width, down * side, across * side)
    parts, grid = patches[:1], [[side, side, 0, 0, 0, 0]]
    for row in range(down):
        first, last = (min(max(end - row * side, 0), side) for end in (top, down * side - top))
        own = patches[1 + row * across :][:across]
        if first < last:
            parts.append(np.concatenate(own))
            grid += [[side, side, across, first, last, left]] * across
        else:  # nothing of it remains
            parts[0] = np.concatenate([parts[0], *own])
            grid = grid[:1] * across + grid
    return parts, grid, ()


def best_shape(height: int, width: int, shapes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The height and width in which most of an image's pixels remain; of those, the smallest."""

    def quality(shape: tuple[int, int]) -> tuple[int, int]:
        scale = min(shape[1] / width, shape[0] / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        return used, used - shape[0] * shape[1]

    return max(shapes, key=quality)


def filled_up(height: int, width: int, rows: int, columns: int) -> tuple[int, int]:
    """Rows above and below, and columns on either side, of patches that only fill up.

    Args:
        height: The image's.
        width: Likewise.
        rows: Of patches that the image became.
        columns: Likewise.
    """
    if width / height > columns / rows:
        return (rows - int(round(height * (columns / width), 7))) // 2, 0
    return 0, (columns - int(round(width * (rows / height), 7))) // 2


def _qwen2_vl(spec: ImageSpec, image: Image.Image) -> Patches:
    cell = spec.patch_size * spec.merge_size
    height, width = smart_resize(image.height, image.width, cell, spec.size["shortest_edge"], spec.size["longest_edge"])
    pixels = np.asarray(resized(spec, image, height, width))
    rows, columns = height // spec.patch_size, width // spec.patch_size
    merge = spec.merge_size
    patches = patches_of(pixels, spec.patch_size).reshape(rows // merge, merge, columns // merge, merge, -1)
    return [patches.transpose(0, 2, 1, 3, 4).reshape(rows * columns, -1)], [[rows, columns]], ()


def smart_resize(height: int, width: int, cell: int, least: int, most: int) -> tuple[int, int]:
    """Height and width in whole cells, with about the same ratio and between ``least`` and ``most`` pixels.

    Raises:
        ValueError: The image is too long and thin.
    """
    if max(height, width) / min(height, width) > 200:
        raise ValueError("one side is more than 200 times as long as the other")
    down, across = round(height / cell) * cell, round(width / cell) * cell
    if down * across > most:
        shrink = math.sqrt((height * width) / most)
        down = max(cell, math.floor(height / shrink / cell) * cell)
        across = max(cell, math.floor(width / shrink / cell) * cell)
    elif down * across < least:
        grow = math.sqrt(least / (height * width))
        down, across = math.ceil(height * grow / cell) * cell, math.ceil(width * grow / cell) * cell
    return down, across


def _pixtral(spec: ImageSpec, image: Image.Image) -> Patches:
    cell, longest = spec.patch_size * spec.merge_size, spec.size["longest_edge"]
    ratio = max(image.height / longest, image.width / longest)
    height, width = image.height, image.width
    if ratio > 1:
        height, width = max(1, math.floor(height / ratio)), max(1, math.floor(width / ratio))
    height, width = (height - 1) // cell * cell + cell, (width - 1) // cell * cell + cell
    pixels = np.asarray(resized(spec, image, height, width))
    grid = [height // spec.patch_size, width // spec.patch_size]
    return [patches_of(pixels, spec.patch_size)], [grid], ()


MAX_IDEFICS3_SIDE = 4096


def _idefics3(spec: ImageSpec, image: Image.Image) -> Patches:
    height, width = idefics3_size(image.height, image.width, spec.size["longest_edge"])
    image = resized(spec, image, height, width)
    tile = spec.tile
    tiles: list[U8] = []
    grid = [tile // spec.patch_size] * 2
    shape = [0, 0]
    if spec.splits:
        height, width = whole_tiles(height, width, tile)
        image = resized(spec, image, height, width)
        if height > tile or width > tile:
            pixels = np.asarray(image)
            shape = [height // tile, width // tile]
            corners = product(range(0, height, tile), range(0, width, tile))
            tiles = [pixels[top : top + tile, left : left + tile] for top, left in corners]
    if not spec.splits or tiles:
        image = resized(spec, image, tile, tile)
    tiles.append(np.asarray(image))
    return [patches_of(pixels, spec.patch_size) for pixels in tiles], [grid] * len(tiles), shape


def idefics3_size(height: int, width: int, longest: int) -> tuple[int, int]:
    """Height and width if the longer one becomes ``longest``, the other even."""
    ratio = width / height
    if width >= height:
        width, height = longest, int(longest / ratio)
        height += height % 2
    else:
        height, width = longest, int(longest * ratio)
        width += width % 2
    height, width = max(height, 1), max(width, 1)
    ratio = width / height
    if width >= height and width > MAX_IDEFICS3_SIDE:
        width, height = MAX_IDEFICS3_SIDE, int(MAX_IDEFICS3_SIDE / ratio)
    elif height > width and height > MAX_IDEFICS3_SIDE:
        height, width = MAX_IDEFICS3_SIDE, int(MAX_IDEFICS3_SIDE * ratio)
    return max(height, 1), max(width, 1)


def whole_tiles(height: int, width: int, tile: int) -> tuple[int, int]:
    """Height and width in whole tiles, with about the same ratio."""
    ratio = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        height = math.ceil(int(width / ratio) / tile) * tile
    else:
        height = math.ceil(height / tile) * tile
        width = math.ceil(int(height * ratio) / tile) * tile
    return height, width


FAMILIES: dict[str, Callable[[ImageSpec, Image.Image], Patches]] = {
    "clip": _llava,
    "gemma3": _llava,
    "idefics3": _idefics3,
    "llava": _llava,
    "llava_next": _llava_next,
    "pixtral": _pixtral,
    "qwen2_vl": _qwen2_vl,
}
