"""Converts items of responses to messages of chat completions, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import msgspec

from api.admission import MAX_MESSAGES, MAX_TOOLS, check_number
from api.errors import RequestError
from api.openai.protocol import (
    ChatCompletionRequest,
    ChatMessage,
    JsonObject,
    JsonSchemaFormat,
    ResponseFormat,
    SamplingFields,
)
from api.responses.protocol import (
    FunctionCallItem,
    FunctionTool,
    InputFunctionCall,
    InputFunctionCallOutput,
    InputMessage,
    InputPart,
    InputReasoning,
    OutputItem,
    OutputMessage,
    ReasoningItem,
    ResponsesRequest,
    TextFormat,
)

T = TypeVar("T")

_TEXT_PARTS = ("input_text", "output_text", "text")


def to_chat_request(request: ResponsesRequest, previous: Sequence[ChatMessage] = ()) -> ChatCompletionRequest:
    """The equivalent chat completion request.

    Args:
        request: The request, without the conversation that it continues.
        previous: The previous conversation.

    Raises:
        RequestError: It contains something unsupported; the message names the place.
    """
    check_number(len(request.tools or ()), MAX_TOOLS, "tools", "tools")
    messages = [*previous, *input_messages(request.input)]
    if request.instructions:
        messages.insert(0, ChatMessage(role="system", content=request.instructions))
    wants_logprobs = "message.output_text.logprobs" in (request.include or ())
    chat = ChatCompletionRequest(
        **{name: getattr(request, name) for name in SamplingFields.__struct_fields__},
        model=request.model,
        messages=messages,
        max_completion_tokens=request.max_output_tokens,
        stream=request.stream,
        logprobs=wants_logprobs or None,
        top_logprobs=request.top_logprobs if wants_logprobs else None,
        tools=_tools(request.tools),
        tool_choice=_tool_choice(request.tool_choice),
        parallel_tool_calls=request.parallel_tool_calls,
        include_reasoning=request.include_reasoning,
        chat_template=request.chat_template,
        chat_template_kwargs=request.chat_template_kwargs,
        reasoning_effort=None if request.reasoning is None else request.reasoning.effort,
    )
    if request.text is not None:
        chat.response_format = _response_format(request.text.format)
    return chat


def input_messages(items: str | Sequence[JsonObject]) -> list[ChatMessage]:
    """The messages of a request's input.

    Raises:
        RequestError: There are too many items, or one is malformed or of a type that is not supported.
    """
    if isinstance(items, str):
        return [ChatMessage(role="user", content=items)]
    check_number(len(items), MAX_MESSAGES, "input", "items")
    conversation = _Conversation()
    for index, item in enumerate(items):
        kind = item.get("type", "message")
        add = _ADD.get(kind) if isinstance(kind, str) else None
        if add is None:
            raise RequestError(
                f"input[{index}]: this server does not support items of type {str(kind)[:40]!r}", "input"
            )
        add(conversation, item, f"input[{index}]")
    return conversation.messages


def output_messages(items: Iterable[OutputItem]) -> list[ChatMessage]:
    """The messages of a response's output."""
    conversation = _Conversation()
    for item in items:
        if isinstance(item, OutputMessage):
            conversation.say("".join(part.text for part in item.content))
        elif isinstance(item, ReasoningItem):
            conversation.think("".join(part.text for part in item.content))
        elif isinstance(item, FunctionCallItem):
            conversation.call(item.call_id, item.name, item.arguments)
    return conversation.messages


class _Conversation:
    """Merges consecutive reasoning, text and calls into one message, as chat templates expect."""

    def __init__(self) -> None:
        self.messages: list[ChatMessage] = []
        self._turn: ChatMessage | None = None
        self._names: dict[str, str] = {}

    def _model(self) -> ChatMessage:
        if self._turn is None:
            self._turn = ChatMessage(role="assistant")
            self.messages.append(self._turn)
        return self._turn

    def think(self, text: str) -> None:
        if self._turn is not None:
            self._turn = None  # new reasoning starts a new turn
        if text:
            self._model().reasoning = text

    def say(self, text: str) -> None:
        turn = self._model()
        if turn.content is not None or turn.tool_calls is not None:
            self._turn = None
            turn = self._model()
        turn.content = text

    def call(self, call_id: str, name: str, arguments: str) -> None:
        turn = self._model()
        call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        if turn.tool_calls is None:
            turn.tool_calls = []
        turn.tool_calls.append(call)
        self._names[call_id] = name

    def add(self, message: ChatMessage) -> None:
        self._turn = None
        self.messages.append(message)

    # -- items of a request

    def add_message(self, item: JsonObject, where: str) -> None:
        message = _converted(item, InputMessage, where)
        content = _content(message.content, f"{where}.content")
        if message.role == "assistant":
            self.say(content if isinstance(content, str) else "".join(part.get("text", "") for part in content))
        else:
            self.add(ChatMessage(role=message.role, content=content if isinstance(content, str) else [*content]))

    def add_call(self, item: JsonObject, where: str) -> None:
        call = _converted(item, InputFunctionCall, where)
        self.call(call.call_id, call.name, call.arguments)

    def add_call_output(self, item: JsonObject, where: str) -> None:
        result = _converted(item, InputFunctionCallOutput, where)
        content = _content(result.output, f"{where}.output")
        self.add(
            ChatMessage(
                role="tool",
                content=content if isinstance(content, str) else [*content],
                tool_call_id=result.call_id,
                name=self._names.get(result.call_id),
            )
        )

    def add_reasoning(self, item: JsonObject, where: str) -> None:
        reasoning = _converted(item, InputReasoning, where)
        self.think("".join(part.text for part in reasoning.content or ()))


_ADD: dict[str, Callable[[_Conversation, JsonObject, str], None]] = {
    "message": _Conversation.add_message,
    "function_call": _Conversation.add_call,
    "function_call_output": _Conversation.add_call_output,
    "reasoning": _Conversation.add_reasoning,
}


def _converted(item: JsonObject, kind: type[T], where: str) -> T:
    try:
        return msgspec.convert(item, kind)
    except msgspec.ValidationError as error:
        text = str(error).replace("`", "").replace("at $", f"at {where}")
        raise RequestError(f"{where}: {text}", "input") from None


def _content(content: str | list[InputPart], where: str) -> str | list[JsonObject]:
    if isinstance(content, str):
        return content
    parts: list[JsonObject] = []
    for index, part in enumerate(content):
        if part.type == "input_image":
            parts.append({"type": part.type, "image_url": part.image_url, "detail": part.detail})
            continue
        text = part.refusal if part.type == "refusal" else part.text if part.type in _TEXT_PARTS else None
        if text is None:
            raise RequestError(
                f"{where}[{index}]: content of type {part.type[:40]!r} is not supported by this model", "input"
            )
        parts.append({"type": "text", "text": text})
    return parts


def _tools(tools: Sequence[JsonObject] | None) -> list[JsonObject] | None:
    result: list[JsonObject] = []
    for index, tool in enumerate(tools or ()):
        if tool.get("type") != "function":
            kind = str(tool.get("type"))[:40]
            raise RequestError(f"tools[{index}]: this server does not support tools of type {kind!r}", "tools")
        try:
            function = msgspec.convert(tool, FunctionTool)
        except msgspec.ValidationError as error:
            text = str(error).replace("`", "").replace("at $", f"at tools[{index}]")
            raise RequestError(f"tools[{index}]: {text}", "tools") from None
        fields = {key: value for key, value in tool.items() if key != "type" and value is not None}
        result.append({"type": "function", "function": {**fields, "name": function.name}})
    return result or None


def _tool_choice(choice: Any) -> Any:
    """Chat completions nest choices one level deeper."""
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if choice.get("type") == "allowed_tools":
        tools = choice.get("tools")
        nested = [_tool_choice(tool) for tool in tools] if isinstance(tools, list) else tools
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode"), "tools": nested}}
    return choice


def _response_format(wanted: TextFormat) -> ResponseFormat:
    if wanted.type != "json_schema":
        return ResponseFormat(type=wanted.type)
    if wanted.schema is None:
        raise RequestError("text.format: type json_schema requires a schema", "text.format")
    return ResponseFormat(type=wanted.type, json_schema=JsonSchemaFormat(schema=wanted.schema))
