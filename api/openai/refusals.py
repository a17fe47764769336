"""Fields of features that do not exist yet, refused by name rather than ignored.

A feature that arrives deletes its rows here and gives its fields in ``protocol.py`` their types.
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
    """A field, and whether a request asks for what it does."""

    field: str
    is_wanted: Callable[[RequestT], bool]
    message: str = NOT_SUPPORTED


_GENERATION: tuple[Refusal[GenerationRequest], ...] = (
    Refusal("prompt_embeds", lambda request: request.prompt_embeds is not None),
    Refusal("logits_processors", lambda request: bool(request.logits_processors)),
    Refusal("watermarking", lambda request: request.watermarking is not None),
    Refusal("kv_transfer_params", lambda request: bool(request.kv_transfer_params)),
    # How other servers spell these: an answer that follows no grammar would mislead.
    Refusal("grammar", lambda request: bool(request.grammar), "{} is not a field here: use structured_outputs.grammar"),
    Refusal("json_schema", lambda request: bool(request.json_schema), "{} is not a field here: use response_format"),
    Refusal(
        "format",
        lambda request: request.format == "json" or isinstance(request.format, dict),
        "{} is not a field here: use response_format",
    ),
)

_COMPLETION: tuple[Refusal[CompletionRequest], ...] = (
    Refusal("suffix", lambda request: request.suffix not in (None, "")),
)

_CHAT: tuple[Refusal[ChatCompletionRequest], ...] = (
    Refusal("functions", lambda request: bool(request.functions), "{} is the older form of tools: use tools"),
    Refusal(
        "function_call",
        lambda request: request.function_call not in (None, "none"),
        "{} is the older form of tool_choice: use tools and tool_choice",
    ),
    Refusal(
        "modalities",
        lambda request: request.modalities not in (None, [], ["text"]),
        '{} other than ["text"] are not supported by this server',
    ),
    Refusal("audio", lambda request: request.audio is not None),
    Refusal("web_search_options", lambda request: request.web_search_options is not None),
    Refusal("return_assistant_tokens_mask", lambda request: bool(request.return_assistant_tokens_mask)),
)


def refuse_completion(request: CompletionRequest) -> None:
    """Refuses what completions cannot do yet.

    Raises:
        RequestError: It names the field.
    """
    _refuse(request, _GENERATION)
    _refuse(request, _COMPLETION)


def refuse_chat(request: ChatCompletionRequest) -> None:
    """Refuses what chat completions cannot do yet.

    Raises:
        RequestError: It names the field.
    """
    _refuse(request, _GENERATION)
    _refuse(request, _CHAT)


def _refuse(request: RequestT, refusals: tuple[Refusal[RequestT], ...]) -> None:
    for refusal in refusals:
        if refusal.is_wanted(request):
            raise RequestError(refusal.message.format(refusal.field), refusal.field)
