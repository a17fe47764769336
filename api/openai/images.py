"""The images of a conversation: read from its messages, and put into its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, cast

import msgspec

from api.engine.queue_bound import Tenant
from api.errors import RequestError
from api.generation.served_model import ServedModel
from api.media.model_images import ModelImages, has_images
from api.media.reader import Picture
from api.openai.prompts import text_of
from api.openai.protocol import ChatCompletionRequest, ChatMessage, TokenizeRequest
from api.params.sampling import check_room
from engine_core.messages import MultiModalFeature

RequestT = TypeVar("RequestT", ChatCompletionRequest, TokenizeRequest)


async def read_images(model: ServedModel, request: RequestT, tenant: Tenant) -> tuple[RequestT, list[Picture]]:
    """Takes the images out of a conversation.

    Args:
        model: Reads them.
        request: The conversation.
        tenant: Whom the work is for.

    Returns:
        The request with a short part in place of each image, and the images in order.

    Raises:
        RequestError: An image cannot be read, or the model takes none.
    """
    given = request.messages or []
    contents = [message.content for message in given]
    if not has_images(contents):
        return request, []
    if model.images is None:
        raise RequestError("messages: images are not supported by this model", "messages")
    roles = [message.role for message in given]
    taken, pictures = await model.images.take(roles, contents, owner="/".join(tenant))
    messages = [
        msgspec.structs.replace(message, content=cast(Any, content))
        for message, content in zip(given, taken, strict=True)
    ]
    return msgspec.structs.replace(request, messages=messages), pictures


def with_images(
    model: ServedModel, request: ChatCompletionRequest, prompt: list[int], pictures: Sequence[Picture]
) -> tuple[list[int], tuple[MultiModalFeature, ...]]:
    """The prompt of a conversation as the engine takes it, and where each image is in it.

    Args:
        model: The model.
        request: The conversation.
        prompt: Its tokens, with a placeholder for each image.
        pictures: The images.

    Raises:
        RequestError: Texts of the conversation spell placeholders of images, or the prompt becomes too long.
    """
    if pictures and request.truncate_prompt_tokens is not None:
        raise RequestError("truncate_prompt_tokens does not support images", "truncate_prompt_tokens")
    if pictures and request.return_token_offsets:
        raise RequestError("return_token_offsets does not support images", "return_token_offsets")
    tokens, features = place_images(model, prompt, pictures, request.cache_salt or "")
    if features:
        check_room(len(tokens), model.limits)
    return tokens, features


def place_images(
    model: ServedModel, prompt: list[int], pictures: Sequence[Picture], salt: str = ""
) -> tuple[list[int], tuple[MultiModalFeature, ...]]:
    """The same, for a prompt of any length."""
    return (prompt, ()) if model.images is None else model.images.place(prompt, pictures, "messages", salt)


async def pooled_images(
    images: ModelImages, conversations: Sequence[Sequence[ChatMessage]]
) -> tuple[list[str | list[int]], dict[int, tuple[MultiModalFeature, ...]]]:
    """What to embed with a model of texts and images: each conversation is a message with a text, or with an image.

    Returns:
        Texts, or token ids in the place of images; the images by their number.

    Raises:
        RequestError: A conversation is neither.
    """
    prompts: list[str | list[int]] = []
    features = {}
    for number, conversation in enumerate(conversations):
        contents = [message.content for message in conversation]
        _, pictures = await images.take([message.role for message in conversation], contents)
        texts = [text_of(message) for message in conversation]
        if len(conversation) != 1 or bool(pictures) == bool("".join(texts)) or len(pictures) > 1:
            raise RequestError("messages: this model embeds one text or one image at a time", "messages")
        if not pictures:
            prompts.append(texts[0])
            continue
        tokens, found = images.place([images.spec.image_token_id], pictures, "messages")
        prompts.append(tokens)
        features[number] = found
    return prompts, features
