"""What callers of ``LLM`` pass as prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from msgspec import UNSET, UnsetType

from api.errors import RequestError
from api.media.offline import images_of, without_images
from api.media.reader import Picture
from api.params.lora import LoRARequest

Prompt = str | Sequence[int] | Mapping[str, Any]
"""A text, token ids, ``{"prompt": text}`` or ``{"prompt_token_ids": ids}``. With a ``cache_salt`` in the
dictionary, the prompt shares cached blocks only with prompts of the same salt."""
LoRARequests = LoRARequest | Sequence[LoRARequest | None] | None
"""An adapter for all prompts, or one (or None) per prompt."""
Messages = Sequence[Mapping[str, Any]]
"""A conversation."""


@dataclass(frozen=True)
class Input:
    """A prompt."""

    text: str | None
    token_ids: list[int] | None
    add_special_tokens: bool = True
    cache_salt: str = ""
    opened: bool | UnsetType | None = UNSET
    """See ``ServedModel.resolve``."""
    adapter: LoRARequest | None = None
    images: Sequence[bytes] = ()
    pictures: Sequence[Picture] = ()


def text_of(item: Input, field: str) -> str:
    """The text of a prompt that must not be token ids."""
    if item.text is None:
        raise RequestError(f"{field} must be texts for a cross-encoder, which joins them itself", field)
    return item.text


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list. Raises RequestError if token ids are among prompts."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    token_ids: list[int] = []
    several: list[Prompt] = []
    for each in prompts:
        if isinstance(each, int):
            token_ids.append(each)
        else:
            several.append(each)
    if token_ids and several:
        raise RequestError("prompts must be one list of token ids, or a list of prompts, not both", "prompts")
    return [token_ids] if token_ids else several


def conversations_of(messages: Messages | Sequence[Messages]) -> list[Messages]:
    """One conversation or several, as a list. Raises RequestError if messages are among conversations."""
    single: list[Mapping[str, Any]] = []
    several: list[Messages] = []
    for each in messages:
        if isinstance(each, Mapping):
            single.append(each)
        else:
            several.append(each)
    if single and several:
        raise RequestError("messages must be one conversation, or a list of conversations, not both", "messages")
    return [single] if single else several


def parse_prompt(prompt: Prompt) -> Input:
    """What a prompt says. Raises RequestError if it says nothing."""
    if isinstance(prompt, str):
        return Input(prompt, None)
    if isinstance(prompt, Mapping):
        salt, images = prompt.get("cache_salt") or "", images_of(prompt.get("multi_modal_data"))
        if "prompt_token_ids" in prompt:
            return Input(prompt.get("prompt"), list(prompt["prompt_token_ids"]), cache_salt=salt, images=images)
        if "prompt" in prompt:
            return Input(prompt["prompt"], None, cache_salt=salt, images=images)
        raise RequestError("a dict prompt must have 'prompt' or 'prompt_token_ids'", "prompts")
    return Input(None, list(prompt))


def inputs_of(prompts: Prompt | Sequence[Prompt], lora_request: LoRARequests) -> list[Input]:
    """Prompts without images, with their adapters. Raises RequestError."""
    return adapters_of(without_images([parse_prompt(prompt) for prompt in as_list(prompts)]), lora_request)


def adapters_of(inputs: list[Input], given: LoRARequests) -> list[Input]:
    """The prompts with their adapters: one for all, or one (or None) for each.

    Raises:
        RequestError: There are more or fewer of them than prompts.
    """
    if given is None or isinstance(given, LoRARequest):
        return [replace(item, adapter=given) for item in inputs]
    if len(given) != len(inputs):
        raise RequestError(
            f"lora_request must be one, or one per prompt; got {len(given)} for {len(inputs)} prompts", "lora_request"
        )
    return [replace(item, adapter=adapter) for item, adapter in zip(inputs, given, strict=True)]
