"""Turns messages and texts into the token ids of a prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec

from api.admission import MAX_MESSAGES, MAX_OFFSET_CHARS, JsonMeter, check_number
from api.config import TEMPLATE_FIELDS
from api.errors import RequestError
from api.generation.host import INLINE_TEXT
from api.generation.served_model import ServedModel
from api.model.chat_template import BrokenTemplateError, ChatTemplate
from api.model.tokenizer import NOTHING_ADDED
from api.openai.pooling_protocol import ClassifyRequest, EmbeddingRequest
from api.openai.protocol import ChatCompletionRequest, ChatMessage, GenerationRequest, TokenizeRequest
from api.params.sampling import check_room
from api.params.thinking import conversation_opens_reasoning
from api.params.truncation import output_room, truncate_prompt
from api.parsers import Tool
from engine_core.launch import HelperError

MAX_INLINE_MESSAGES = 64
"""Longer conversations are rendered in a helper process."""
_CHARS_PER_TOOL = 64
MAX_TEMPLATE_KWARGS = 256


async def render_messages(
    model: ServedModel,
    request: ChatCompletionRequest | TokenizeRequest | EmbeddingRequest | ClassifyRequest,
    messages: Sequence[ChatMessage],
    tools: Sequence[Tool] | None = None,
) -> str:
    """Renders a conversation.

    Args:
        model: Provides the template.
        request: Provides the other variables of the template.
        messages: The conversation.
        tools: Tools for the template to render.

    Raises:
        RequestError: There is no template, the conversation is too long, or the template rejects it.
    """
    check_number(len(messages), MAX_MESSAGES, "messages", "messages")
    template = _template(model, request.chat_template)
    options = {**_template_options(request), "tools": tools}
    variables = _template_variables(model, request)
    is_short = len(messages) <= MAX_INLINE_MESSAGES and not request.documents
    is_short = is_short and all(map(_is_short, variables.values())) and _num_chars(messages, tools) <= INLINE_TEXT
    try:
        if is_short:
            _weigh_arguments(messages)
        else:
            await asyncio.get_running_loop().run_in_executor(model.host.threads, _weigh_arguments, messages)
        return await model.host.templates.render(
            template,
            messages,
            model.config.chat_template_content_format,
            options,
            variables,
            is_short=is_short,
            special_tokens=model.tokenizer.special_tokens_map,
            threads=model.host.threads,
        )
    except RequestError:
        raise
    except HelperError as error:
        raise RequestError(
            f"the conversation cannot be rendered at the moment: {error}", status=503, kind="ServiceUnavailableError"
        ) from error
    except BrokenTemplateError as error:
        raise RequestError(str(error), "messages" if request.chat_template is None else "chat_template") from error
    except ValueError as error:  # includes TemplateError
        raise RequestError(str(error), "messages") from error
    except RecursionError as error:
        raise RequestError("the conversation is nested too deeply", "messages") from error


async def prompt_opened(
    model: ServedModel, request: ChatCompletionRequest, tools: Sequence[Tool] | None, prompt: str
) -> bool | None:
    """Whether a conversation's prompt ends inside reasoning; see ``prompt_opens_reasoning``.

    Args:
        model: Names the reasoning parser.
        request: The conversation.
        tools: The tools that were rendered.
        prompt: The result of ``render_messages``.

    Raises:
        RequestError: The conversation cannot be rendered.
    """

    async def render(messages: Sequence[ChatMessage], **others: bool) -> str:
        return await render_messages(model, msgspec.structs.replace(request, **others), messages, tools)

    continues = bool(request.continue_final_message)
    return await conversation_opens_reasoning(
        model.config.reasoning_parser, render, request.messages, prompt, continues=continues
    )


def _template(model: ServedModel, source: str | None) -> ChatTemplate | str:
    """The server's template, or the source of the request's own template."""
    if source is not None:
        if not model.config.trust_request_chat_template:
            raise RequestError(
                "chat_template requires a server started with --trust-request-chat-template", "chat_template"
            )
        return source
    if model.chat_template is None:
        raise RequestError(
            "the model has no chat template; start the server with --chat-template, or use /v1/completions", "messages"
        )
    return model.chat_template


def _template_options(
    request: ChatCompletionRequest | TokenizeRequest | EmbeddingRequest | ClassifyRequest,
) -> dict[str, Any]:
    """The fields of a request that are passed to every template."""
    continues = bool(request.continue_final_message)
    add_generation_prompt = adds_generation_prompt(request)
    if continues and add_generation_prompt:
        raise RequestError(
            "continue_final_message and add_generation_prompt cannot both be true", "continue_final_message"
        )
    return {
        "documents": request.documents,
        "add_generation_prompt": add_generation_prompt,
        "continue_final_message": continues,
    }


def _template_variables(
    model: ServedModel, request: ChatCompletionRequest | TokenizeRequest | EmbeddingRequest | ClassifyRequest
) -> dict[str, Any]:
    """The other variables of a template: those of the server, overridden by those of the request."""
    variables = dict(request.chat_template_kwargs or {})
    check_number(len(variables), MAX_TEMPLATE_KWARGS, "chat_template_kwargs", "variables")
    for name in TEMPLATE_FIELDS:
        if name in variables:
            raise RequestError(
                f"chat_template_kwargs must not contain {name}; use the request field", "chat_template_kwargs"
            )
    variables = {**model.config.default_chat_template_kwargs, **variables}
    if request.reasoning_effort is not None:
        variables["reasoning_effort"] = request.reasoning_effort
    return variables


def _weigh_arguments(messages: Sequence[ChatMessage]) -> None:
    """Rejects call arguments, which are JSON within JSON, that are too expensive to decode."""
    meter = JsonMeter()
    for message in messages:
        for call in message.tool_calls or ():
            function = call.get("function")
            arguments = function.get("arguments") if isinstance(function, dict) else None
            if isinstance(arguments, str):
                meter.feed(arguments.encode("utf-8", "surrogatepass"))


def _is_short(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float)) or (isinstance(value, str) and len(value) <= 256)


def _num_chars(messages: Sequence[ChatMessage], tools: Sequence[Tool] | None) -> int:
    """Approximate length of a conversation in characters, with structure."""
    num_chars = _CHARS_PER_TOOL * len(tools or ())
    for message in messages:
        content = message.content
        if isinstance(content, str):
            num_chars += len(content)
        for part in content if isinstance(content, list) else ():
            num_chars += len(part) if isinstance(part, str) else len(part.get("text") or "")
            if num_chars > INLINE_TEXT:
                return num_chars
        num_chars += sum(_num_arguments(call) for call in message.tool_calls or ())
    return num_chars


def _num_arguments(call: dict[str, Any]) -> int:
    function = call.get("function")
    arguments = function.get("arguments") if isinstance(function, dict) else None
    return _CHARS_PER_TOOL + (len(arguments) if isinstance(arguments, str) else INLINE_TEXT)


def adds_generation_prompt(
    request: ChatCompletionRequest | TokenizeRequest | EmbeddingRequest | ClassifyRequest,
) -> bool:
    """Whether the prompt ends with the header of an assistant message."""
    if request.add_generation_prompt is not None:
        return request.add_generation_prompt
    return not request.continue_final_message


def text_of(message: ChatMessage) -> str:
    """The text of a message, in whichever form it is given."""
    content = message.content
    if content is None or isinstance(content, str):
        return content or ""
    parts = [part if isinstance(part, str) else part.get("text") for part in content]
    return "".join(part for part in parts if isinstance(part, str))


async def prompt_token_offsets(
    model: ServedModel,
    request: GenerationRequest,
    prompt: str | list[int],
    num_tokens: int,
    *,
    add_special_tokens: bool,
) -> list[tuple[int, int]]:
    """Positions in a prompt's text of the ``num_tokens`` tokens from ``prompt_token_ids``.

    Raises:
        RequestError: The prompt has no text.
    """
    if not isinstance(prompt, str):
        raise RequestError("return_token_offsets requires a text prompt", "return_token_offsets")
    if request.add_special_tokens is not None:
        add_special_tokens = request.add_special_tokens
    side = request.truncation_side or "left"
    return await model.host.apart(len(prompt), model.tokenizer.offsets, prompt, add_special_tokens, num_tokens, side)


async def prompt_token_ids(
    model: ServedModel,
    request: GenerationRequest,
    prompt: str | list[int],
    *,
    add_special_tokens: bool,
    max_tokens: int | None,
) -> list[int]:
    """Tokenises a prompt and truncates it as the request asks.

    Raises:
        RequestError: The prompt is too long or not valid text.
    """
    keep = request.truncate_prompt_tokens
    if request.add_special_tokens is not None:
        add_special_tokens = request.add_special_tokens
    around = NOTHING_ADDED
    if isinstance(prompt, str):
        around = model.tokenizer.added_around(add_special_tokens)
        if keep is not None and request.return_token_offsets:
            most = max(MAX_OFFSET_CHARS, model.limits.max_model_len)
            check_number(len(prompt), most, "prompt", "characters with truncate_prompt_tokens and return_token_offsets")
        prompt = await model.tokenize(prompt, add_special_tokens=add_special_tokens, any_length=keep is not None)
    side, room = request.truncation_side, output_room(max_tokens)
    prompt = truncate_prompt(prompt, keep, model.limits, around, side=side, room=room)
    check_room(len(prompt), model.limits)
    return prompt
