"""Images of the offline class."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

from api.admission import check_number
from api.errors import RequestError
from api.media.model_images import ModelImages, has_images
from api.media.reader import Picture
from engine_core.messages import MultiModalFeature

Prompt = tuple[list[int], tuple[MultiModalFeature, ...]]
"""Token ids, and the images among them."""


def images_of(data: Any) -> list[bytes]:
    """The image files in ``multi_modal_data``: ``{"image": ...}`` with one image of Pillow's or several, or files as
    bytes.

    Raises:
        RequestError: It has something else.
    """
    if data is None:
        return []
    if not isinstance(data, Mapping) or set(data) - {"image"}:
        raise RequestError(
            'multi_modal_data must be {"image": ...}; other inputs are not supported', "multi_modal_data"
        )
    images = data.get("image")
    images = [] if images is None else images if isinstance(images, list | tuple) else [images]
    return [_encoded(image) for image in images]


def _encoded(image: Any) -> bytes:
    if isinstance(image, bytes | bytearray):
        return bytes(image)
    if not hasattr(image, "getbands"):
        raise RequestError(
            f"an image must be one of Pillow's, or bytes, not {type(image).__name__}", "multi_modal_data"
        )
    file = io.BytesIO()
    # Neither loses anything; PNG knows the modes that files have.
    image.save(file, format="PNG", compress_level=1)
    return file.getvalue()


async def place_offline(
    images: ModelImages | None, prompt: list[int], files: Sequence[bytes], pictures: Sequence[Picture]
) -> Prompt:
    """A prompt as the engine takes it.

    Args:
        images: What the model does with images.
        prompt: Token ids with a placeholder for each image.
        files: The images of ``multi_modal_data``.
        pictures: Images that have been read, of a conversation.

    Raises:
        RequestError: The model takes no images, or there are more or fewer placeholders.
    """
    if not files and not pictures:
        return prompt, ()
    if images is None:
        raise RequestError("images are not supported by this model", "prompts")
    check_number(len(files) + len(pictures), images.most, "prompts", "images")
    read = [await images.reader.read_bytes(file, "multi_modal_data", "prompts") for file in files]
    return images.place(prompt, [*read, *pictures], "prompts")


async def take_offline(
    images: ModelImages | None, messages: Sequence[Mapping[str, Any]]
) -> tuple[list[Mapping[str, Any]], list[Picture]]:
    """Takes the images out of a conversation. See ``ModelImages.take``."""
    contents = [message.get("content") if isinstance(message, Mapping) else None for message in messages]
    if not has_images(contents):
        return list(messages), []
    if images is None:
        raise RequestError("messages: images are not supported by this model", "messages")
    taken, pictures = await images.take([str(message.get("role")) for message in messages], contents)
    return [{**message, "content": content} for message, content in zip(messages, taken, strict=True)], pictures


class WithImages(Protocol):
    """A prompt that may have images."""

    @property
    def images(self) -> Sequence[bytes]: ...


PromptT = TypeVar("PromptT", bound=WithImages)


def without_images(prompts: list[PromptT]) -> list[PromptT]:
    """The prompts of a method that takes no images.

    Raises:
        RequestError: One has an image.
    """
    if any(prompt.images for prompt in prompts):
        raise RequestError("multi_modal_data: only generate and chat take images", "prompts")
    return prompts
