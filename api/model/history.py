"""A conversation as the chat template wants it, whatever protocol it came by.

This is the one place that decides it; endpoints hand on what clients sent: content in parts, arguments as JSON text,
roles by the client's names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, Final

from api.model.template_uses import ArgumentsFormat, ContentFormat, TemplateUses

Message = dict[str, Any]

_TEXT_PARTS: Final = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_ERROR: Final = "Error"


def normalize_messages(messages: Sequence[Mapping[str, Any]], uses: TemplateUses) -> list[Message]:
    """Messages as a template expects them.

    * Content that is a text already stays one; parts become a text for a template that does not loop over them. Empty
      fields are left out, as templates print ``None``; only an assistant that said nothing, as clients send it back
      after a tool call, has an empty text, since many templates add to it.
    * Arguments of calls are objects, or the client's own text. An empty list of calls is left out.
    * ``function_call`` and the role ``function``, the older form of calls, become ``tool_calls`` and ``tool``.
    * A result with ``is_error`` begins with "Error: ", unless the template looks for the field itself.
    * ``developer`` is ``system`` to a template that does not know it. Systems that lead the conversation become one, as
      templates look at the first message only.

    Raises:
        ValueError: A message is malformed or has content that is no text; the text names the place.
    """
    messages = _without_functions(messages)
    return _with_one_system([_normalized(message, f"messages[{i}]", uses) for i, message in enumerate(messages)])


def _without_functions(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Messages in which calls have their present form. The older one has no ids: a call's is made of its place.

    Raises:
        ValueError: A result answers no call.
    """
    result: list[Mapping[str, Any]] = []
    call_id = None
    for index, message in enumerate(messages):
        if isinstance(message, Mapping):
            call = message.get("function_call")
            if call is not None:
                message = {key: value for key, value in message.items() if key != "function_call"}
                if not message.get("tool_calls"):
                    call_id = f"{index:09}"  # templates of Mistral want nine characters
                    message["tool_calls"] = [{"id": call_id, "type": "function", "function": call}]
            elif message.get("role") == "function":
                if call_id is None:
                    raise ValueError(f"messages[{index}] has the role 'function', but no function_call precedes it")
                message, call_id = {**message, "role": "tool", "tool_call_id": call_id}, None
        result.append(message)
    return result


def _normalized(message: Mapping[str, Any], where: str, uses: TemplateUses) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"{where} must be an object with a 'role'")
    copy = {key: value for key, value in message.items() if value is not None}
    role = copy["role"]
    if role == "developer" and not uses.knows_developer:
        copy["role"] = "system"
    content_format = uses.tool_content_format if role == "tool" else uses.content_format
    if "content" in copy:
        copy["content"] = _content(copy["content"], f"{where}.content", content_format)
    elif role == "assistant":
        copy["content"] = ""
    if "is_error" in copy and not uses.reads_is_error and copy.pop("is_error") is True:
        copy["content"] = _as_error(copy.get("content") or "")
    if "tool_calls" in copy:
        calls = _tool_calls(copy.pop("tool_calls"), f"{where}.tool_calls", uses.arguments_format)
        if calls:
            copy["tool_calls"] = calls
    return copy


def _content(content: Any, where: str, content_format: ContentFormat) -> str | list[Message]:
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"{where} must be a string or a list of parts")
    texts = [_text_of_part(part, f"{where}[{i}]") for i, part in enumerate(content)]
    return "\n".join(texts) if content_format == "string" else list(map(_part, texts))


def _part(text: str) -> Message:
    return {"type": "text", "text": text}


def _text_of_part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise ValueError(f"{where} must be an object with a 'type'")
    kind = part.get("type", "text")
    key = _TEXT_PARTS.get(kind) if isinstance(kind, str) else None
    if key is None:
        raise ValueError(f"{where}: content of type {str(kind)[:40]!r} is not supported by this model")
    text = part.get(key)
    if not isinstance(text, str):
        raise ValueError(f"{where}.{key} must be a string")
    return text


def _as_error(content: str | list[Message]) -> str | list[Message]:
    """Content that says that it is an error, in words, unless it does so already."""
    first = content if isinstance(content, str) else content[0]["text"]
    if first.lstrip()[: len(_ERROR)].lower() == _ERROR.lower():
        return content
    marked = f"{_ERROR}: {first}" if first else _ERROR
    return marked if isinstance(content, str) else [_part(marked), *content[1:]]


def _tool_calls(calls: Any, where: str, arguments_format: ArgumentsFormat) -> list[Any]:
    if not isinstance(calls, (list, tuple)):
        raise ValueError(f"{where} must be a list")
    result = []
    for index, call in enumerate(calls):
        if not isinstance(call, Mapping):
            raise ValueError(f"{where}[{index}] must be an object")
        function = call.get("function")
        if isinstance(function, Mapping):
            call = {**call, "function": {**function, "arguments": _arguments(function, arguments_format)}}
        result.append(call)
    return result


def _arguments(function: Mapping[str, Any], arguments_format: ArgumentsFormat) -> Any:
    """Arguments in a format. What the model wrote may have been cut off: a text that is no object stays a text."""
    arguments = function.get("arguments")
    if arguments is None or arguments == "":
        arguments = {}
    if arguments_format == "object" and isinstance(arguments, str):
        try:
            value = json.loads(arguments)
        except (ValueError, RecursionError):
            return arguments
        return value if isinstance(value, dict) else arguments
    if arguments_format == "text" and isinstance(arguments, Mapping):
        return json.dumps(arguments, ensure_ascii=False)
    return arguments


def _with_one_system(messages: list[Message]) -> list[Message]:
    """Makes one message of those of the role ``system`` that come first. Later ones stay where they are."""
    leading = list(takewhile(lambda message: message["role"] == "system", messages))
    if len(leading) < 2:
        return messages
    contents = [message["content"] for message in leading if message.get("content")]
    return [{**leading[0], "content": _joined(contents)}, *messages[len(leading) :]]


def _joined(contents: list[str | list[Message]]) -> str | list[Message]:
    texts = [content for content in contents if isinstance(content, str)]
    if len(texts) == len(contents):
        return "\n\n".join(texts)
    parts: list[Message] = []
    for content in contents:
        more = [_part(content)] if isinstance(content, str) else content
        if parts:  # templates put nothing between parts
            more = [_part("\n\n" + more[0]["text"]), *more[1:]]
        parts += more
    return parts
