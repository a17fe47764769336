"""Fields of features that do not exist yet, rejected by name instead of being ignored.

A new feature removes its rows here and types its fields in ``protocol.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import msgspec

from api.errors import RequestError
from api.openai.protocol import ChatCompletionRequest, CompletionRequest, GenerationRequest

RequestT = TypeVar("RequestT")

NOT_SUPPORTED = "{} is not supported by this server"


class Refusal(msgspec.Struct, Generic[RequestT], frozen=True):
    """A field, and whether a request uses it."""

    field: str
    is_wanted: Callable[[RequestT], bool]
    message: str = NOT_SUPPORTED


_GENERATION: tuple[Refusal[GenerationRequest], ...] = (
    Refusal("prompt_embeds", lambda request: request.prompt_embeds is not None),
    Refusal("logits_processors", lambda request: bool(request.logits_processors)),
    Refusal("watermarking", lambda request: request.watermarking is not None),
    Refusal("kv_transfer_params", lambda request: bool(request.kv_transfer_params)),
    # Other servers' fields: an unconstrained answer would be misleading.
    Refusal("grammar", lambda request: bool(request.grammar), "{} is not supported; use structured_outputs.grammar"),
    Refusal("json_schema", lambda request: bool(request.json_schema), "{} is not supported; use response_format"),
    Refusal(
        "format",
        lambda request: request.format == "json" or isinstance(request.format, dict),
        "{} is not supported; use response_format",
    ),
)

_COMPLETION: tuple[Refusal[CompletionRequest], ...] = (
    Refusal("suffix", lambda request: request.suffix not in (None, "")),
)

_CHAT: tuple[Refusal[ChatCompletionRequest], ...] = (
    Refusal("functions", lambda request: bool(request.functions), "{} is deprecated and not supported; use tools"),
    Refusal(
        "function_call",
        lambda request: request.function_call not in (None, "none"),
        "{} is deprecated and not supported; use tools and tool_choice",
    ),
    Refusal(
        "modalities",
        lambda request: request.modalities not in (None, [], ["text"]),
        '{} must be ["text"]: other modalities are not supported',
    ),
    Refusal("audio", lambda request: request.audio is not None),
    Refusal("web_search_options", lambda request: request.web_search_options is not None),
    Refusal("return_assistant_tokens_mask", lambda request: bool(request.return_assistant_tokens_mask)),
)


def refuse_completion(request: CompletionRequest) -> None:
    """Rejects fields that completions do not support.

    Raises:
        RequestError: It names the field.
    """
    _refuse(request, _GENERATION)
    _refuse(request, _COMPLETION)


def refuse_chat(request: ChatCompletionRequest) -> None:
    """Rejects fields that chat completions do not support.

    Raises:
        RequestError: It names the field.
    """
    _refuse(request, _GENERATION)
    _refuse(request, _CHAT)


def _refuse(request: RequestT, refusals: tuple[Refusal[RequestT], ...]) -> None:
    for refusal in refusals:
        if refusal.is_wanted(request):
            raise RequestError(refusal.message.format(refusal.field), refusal.field)
