"""What a prompt says in place of its images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from api.errors import RequestError
from api.media.reader import Picture
from api.model.image_spec import ImageSpec
from engine_core.messages import MultiModalFeature, to_array, to_tensor

WITH_AXES = ("qwen2_vl",)
"""Families whose positions have three axes."""
Encode = Callable[[str], list[int]]
"""Tokenises a text without special tokens around it."""


def place_images(
    spec: ImageSpec, prompt: Sequence[int], pictures: Sequence[Picture], encode: Encode, field: str
) -> tuple[list[int], tuple[MultiModalFeature, ...]]:
    """Replaces the token that stands for an image by what the model expects there.

    Args:
        spec: The model's processor.
        prompt: Token ids with one placeholder per image.
        pictures: The images in the order of the placeholders.
        encode: Tokenises texts between the placeholders of an image.
        field: The client's name of the prompt, for errors.

    Returns:
        The prompt with a placeholder per embedding, and where each image is in it.

    Raises:
        RequestError: There are more or fewer placeholders than images.
    """
    placeholder = spec.image_token_id if spec.placeholder_id is None else spec.placeholder_id
    places = [index for index, token in enumerate(prompt) if token == placeholder]
    if len(places) != len(pictures):
        raise RequestError(
            f"{field}: the prompt has {len(places)} placeholders for {len(pictures)} images: a text must not spell the "
            "model's image token, and the chat template must write it once per image",
            field,
        )
    result: list[int] = []
    features = []
    done = 0
    for place, picture in zip(places, pictures, strict=True):
        result += prompt[done:place]
        tokens = FAMILIES[spec.family](spec, picture, encode)
        features += _features(spec, picture, len(result), tokens)
        result += tokens
        done = place + 1
    result += prompt[done:]
    return result, tuple(features)


def _features(spec: ImageSpec, picture: Picture, offset: int, tokens: list[int]) -> list[MultiModalFeature]:
    """The parts of an image that are encoded by themselves, whose placeholders follow each other."""
    image = picture.image
    grid = to_array(image.grid)
    places = [index for index, token in enumerate(tokens) if token == spec.image_token_id]
    if spec.family == "llava_next":
        counts = _llava_next_counts(picture)
    else:
        counts = [len(places) // len(image.patches)] * len(image.patches)
    result = []
    done = num_tiles = 0
    for part, (patches, count) in enumerate(zip(image.patches, counts, strict=True)):
        first, last = places[done], places[done + count - 1]
        tiles = grid[num_tiles:][: patches.shape[0] // int(grid[num_tiles, :2].prod())]
        data = (("patches", patches), ("levels", image.levels), ("grid", to_tensor(tiles)))
        axes = (1, *tiles[0].tolist()) if spec.family in WITH_AXES else ()
        name = f"{picture.identifier}.{part}"
        result.append(
            MultiModalFeature(name, offset + first, last + 1 - first, count, patches.shape[0], axes=axes, data=data)
        )
        done, num_tiles = done + count, num_tiles + len(tiles)
    return result


def _llava(spec: ImageSpec, picture: Picture, encode: Encode) -> list[int]:
    (rows, columns), *_ = to_array(picture.image.grid).tolist()
    return [spec.image_token_id] * (rows * columns + spec.num_extra)


def _idefics3(spec: ImageSpec, picture: Picture, encode: Encode) -> list[int]:
    rows, columns = picture.image.layout
    count = (spec.tile // spec.patch_size // spec.merge_size) ** 2
    own = [spec.image_token_id] * count
    fake = encode("<fake_token_around_image>")
    result: list[int] = []
    for row in range(rows):
        for column in range(columns):
            result += [*fake, *encode(f"<row_{row + 1}_col_{column + 1}>"), *own]
        result += encode("\n") if row + 1 < rows else encode("\n\n")
    return [*result, *fake, *encode("<global-img>"), *own, *fake]


def _llava_next(spec: ImageSpec, picture: Picture, encode: Encode) -> list[int]:
    return [spec.image_token_id] * sum(_llava_next_counts(picture))


def _llava_next_counts(picture: Picture) -> list[int]:
    """Embeddings of the whole image, and of each row of tiles, where every row of patches ends with one more."""
    image = picture.image
    grid, counts, place = to_array(image.grid).tolist(), [], 0
    for patches in image.patches:
        side, _, across, first, last, left = grid[place]
        counts.append((last - first) * (across * side - 2 * left + 1) if across else side**2)
        place += patches.shape[0] // side**2
    return counts


def _qwen2_vl(spec: ImageSpec, picture: Picture, encode: Encode) -> list[int]:
    ((rows, columns),) = to_array(picture.image.grid).tolist()
    return [spec.image_token_id] * (rows * columns // spec.merge_size**2)


def _pixtral(spec: ImageSpec, picture: Picture, encode: Encode) -> list[int]:
    ((rows, columns),) = to_array(picture.image.grid).tolist()
    merge = spec.merge_size
    row = [*[spec.image_token_id] * (columns // merge), *encode("[IMG_BREAK]")]
    tokens = row * (rows // merge)
    return [*tokens[: -len(encode("[IMG_BREAK]"))], *encode("[IMG_END]")]


def _gemma3(spec: ImageSpec, picture: Picture, encode: Encode) -> list[int]:
    assert spec.placeholder_id is not None
    return [spec.placeholder_id, *[spec.image_token_id] * spec.num_tokens]


FAMILIES: dict[str, Callable[[ImageSpec, Picture, Encode], list[int]]] = {
    "clip": lambda spec, picture, encode: [spec.image_token_id],
    "gemma3": _gemma3,
    "idefics3": _idefics3,
    "llava": _llava,
    "llava_next": _llava_next,
    "pixtral": _pixtral,
    "qwen2_vl": _qwen2_vl,
}
"""The tokens of an image, by family."""
