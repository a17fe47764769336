"""Converts Anthropic conversations to chat completions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from api.admission import MAX_MESSAGES, MAX_TOOLS, check_number
from api.anthropic.protocol import (
    ConversationRequest,
    DocumentBlock,
    ImageBlock,
    InputBlock,
    InputMessage,
    InputTool,
    MessagesRequest,
    PlainTextSource,
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    UrlSource,
)
from api.errors import RequestError
from api.openai.protocol import ChatCompletionRequest, ChatMessage, JsonObject, JsonSchemaFormat, ResponseFormat

CLIENT_NOTE = "x-anthropic-billing-header:"
"""Prefix of a line of provider metadata that a client prepends to its system prompt. It changes with each request and
means nothing to the model, so it would only defeat prefix caching."""


def to_chat_request(request: ConversationRequest) -> ChatCompletionRequest:
    """The equivalent chat completion request.

    Raises:
        RequestError: It contains something unsupported; the message names the place.
    """
    check_number(len(request.messages), MAX_MESSAGES, "messages", "messages")
    check_number(len(request.tools or ()), MAX_TOOLS, "tools", "tools")
    messages = _system(request.system)
    names: dict[str, str] = {}
    for index, message in enumerate(request.messages):
        _append(messages, message, f"messages[{index}]", names)
    last = messages[-1] if messages else None
    if last is None:
        raise RequestError("messages must not be empty", "messages")
    continues = last.role == "assistant" and last.tool_calls is None
    chat = ChatCompletionRequest(
        model=request.model,
        messages=messages,
        tools=_tools(request.tools),
        chat_template_kwargs=request.chat_template_kwargs,
        continue_final_message=continues or None,
    )
    _set_tool_choice(chat, request)
    if request.thinking is not None:
        is_on = request.thinking.type != "disabled"
        chat.chat_template_kwargs = {"enable_thinking": is_on, **(request.chat_template_kwargs or {})}
        chat.include_reasoning = is_on
        if is_on:
            chat.thinking_token_budget = request.thinking.budget_tokens
    config = request.output_config
    wanted = request.output_format if config is None or config.format is None else config.format
    if wanted is not None:
        chat.response_format = ResponseFormat(type="json_schema", json_schema=JsonSchemaFormat(schema=wanted.schema))
    if config is not None:
        chat.reasoning_effort = config.effort
    if isinstance(request, MessagesRequest):
        chat.max_completion_tokens = request.max_tokens
        chat.stop = request.stop_sequences
        chat.stream = request.stream
        chat.temperature = request.temperature
        chat.top_k = request.top_k
        chat.top_p = request.top_p
        chat.cache_salt = request.cache_salt
    return chat


def _system(system: str | list[TextBlock] | None) -> list[ChatMessage]:
    texts = [system] if isinstance(system, str) else [block.text for block in system or ()]
    text = "\n".join(text for text in map(_without_note, texts) if text)
    return [ChatMessage(role="system", content=text)] if text else []


def _without_note(text: str) -> str:
    """Removes the metadata line that a client prepends to a system prompt."""
    return text.partition("\n")[2].lstrip("\n") if text.startswith(CLIENT_NOTE) else text


def _append(messages: list[ChatMessage], message: InputMessage, where: str, names: dict[str, str]) -> None:
    """Appends the equivalent of one message; tool results become separate messages.

    Args:
        messages: The converted messages so far.
        message: The message to append.
        where: Name of the message in errors.
        names: Names of called functions by call id.
    """
    if isinstance(message.content, str):
        messages.append(ChatMessage(role=message.role, content=message.content))
    elif message.role == "assistant":
        messages.append(_assistant(message.content, where, names))
    else:
        _append_blocks(messages, message.role, message.content, where, names)


def _assistant(blocks: Sequence[InputBlock], where: str, names: dict[str, str]) -> ChatMessage:
    texts, thoughts = [], []
    calls: list[JsonObject] = []
    for index, block in enumerate(blocks):
        match block:
            case TextBlock(text=text):
                texts.append(text)
            case ThinkingBlock(thinking=thinking):
                thoughts.append(thinking)
            case RedactedThinkingBlock():
                pass
            case ToolUseBlock():
                names[block.id] = block.name
                # Formatted as templates render objects, for templates that use the text.
                function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
                calls.append({"id": block.id, "type": "function", "function": function})
            case _:
                raise _misplaced(f"{where}.content[{index}]", block, "assistant")
    return ChatMessage(
        role="assistant",
        content="".join(texts) if texts or not calls else None,
        reasoning="\n".join(thoughts) or None,
        tool_calls=calls or None,
    )


def _append_blocks(
    messages: list[ChatMessage], role: str, blocks: Sequence[InputBlock], where: str, names: dict[str, str]
) -> None:
    parts: list[str | JsonObject] = []

    def close() -> None:
        if parts:
            messages.append(ChatMessage(role=role, content=parts.copy()))
            parts.clear()

    for index, block in enumerate(blocks):
        place = f"{where}.content[{index}]"
        if isinstance(block, ToolResultBlock):
            close()
            messages.append(_tool_result(block, place, names))
        elif isinstance(block, (TextBlock, ImageBlock, DocumentBlock)):
            parts.append(_part(block, place))
        else:
            raise _misplaced(place, block, role)
    close()


def _tool_result(block: ToolResultBlock, place: str, names: dict[str, str]) -> ChatMessage:
    content: str | list[str | JsonObject]
    if block.content is None or isinstance(block.content, str):
        content = block.content or ""
    else:
        content = [_part(part, f"{place}.content[{i}]") for i, part in enumerate(block.content)]
    return ChatMessage(
        role="tool",
        content=content,
        tool_call_id=block.tool_use_id,
        name=names.get(block.tool_use_id),
        is_error=block.is_error or None,
    )


def _part(block: TextBlock | ImageBlock | DocumentBlock, place: str) -> JsonObject:
    """A part of a chat message."""
    if isinstance(block, ImageBlock):
        source = block.source
        url = source.url if isinstance(source, UrlSource) else f"data:{source.media_type};base64,{source.data}"
        return {"type": "image_url", "image_url": {"url": url}}
    return {"type": "text", "text": _text_of(block, place)}


def _text_of(block: TextBlock | DocumentBlock, place: str) -> str:
    if isinstance(block, TextBlock):
        return block.text
    if isinstance(block, DocumentBlock) and isinstance(block.source, PlainTextSource):
        return block.source.data if block.title is None else f"{block.title}\n{block.source.data}"
    raise RequestError(f"{place}: a document other than plain text is not supported by this model", "messages")


def _misplaced(place: str, block: Any, role: str) -> RequestError:
    kind = type(block).__struct_config__.tag
    return RequestError(f"{place}: blocks of type {kind!r} are not allowed in {role} messages", "messages")


def _tools(tools: Sequence[InputTool] | None) -> list[JsonObject] | None:
    result: list[JsonObject] = []
    for index, tool in enumerate(tools or ()):
        if tool.type not in (None, "custom"):
            raise RequestError(f"tools[{index}].type: this server supports custom tools only", "tools")
        function: JsonObject = {"name": tool.name}
        if tool.description is not None:
            function["description"] = tool.description
        function["parameters"] = tool.input_schema or {"type": "object", "properties": {}}
        result.append({"type": "function", "function": function})
    return result or None


def _set_tool_choice(chat: ChatCompletionRequest, request: ConversationRequest) -> None:
    choice = request.tool_choice
    if choice is None:
        return
    if choice.disable_parallel_tool_use:
        chat.parallel_tool_calls = False
    match choice.type:
        case "any":
            chat.tool_choice = "required"
        case "tool":
            chat.tool_choice = {"type": "function", "function": {"name": choice.name}}
        case "none":
            chat.tool_choice = "none"
        case "auto":
            chat.tool_choice = "auto"
