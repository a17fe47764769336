"""Normalises conversations of all protocols to the form that the chat template expects.

All such conversions are made here. Endpoints pass on what clients sent: content in parts, arguments as JSON text,
the client's names of roles.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, Final

from api.model.template_uses import ArgumentsFormat, ContentFormat, TemplateUses

Message = dict[str, Any]

IMAGE_PART: Final = "image"
"""Type of a part in place of an image that was taken out; its ``placeholder`` is what a template that joins texts
gets."""
_TEXT_PARTS: Final = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_ERROR: Final = "Error"


def normalize_messages(messages: Sequence[Mapping[str, Any]], uses: TemplateUses) -> list[Message]:
    """Converts messages to the form that a template expects.

    * String content stays a string; a list of parts becomes a string if the template does not loop over parts. Null
      fields are omitted, since templates print ``None``. The content of an assistant message is the exception: if it
      is missing, as after a tool call, it becomes an empty string, since many templates concatenate it.
    * Arguments of calls become objects or JSON text, as the template expects. An empty list of calls is omitted.
    * ``function_call`` and the role ``function``, the older form of calls, become ``tool_calls`` and ``tool``.
    * Several calls of a message become a message each, followed by its result, if the template writes only the first.
    * A result with ``is_error`` begins with "Error: ", unless the template reads the field itself.
    * ``developer`` becomes ``system`` unless the template knows it. Leading system messages are joined, since templates
      look only at the first message.

    Raises:
        ValueError: A message is malformed or has content other than text; the error names the field.
    """
    messages = _without_functions(messages)
    result = [_normalized(message, f"messages[{i}]", uses) for i, message in enumerate(messages)]
    return _with_one_system(_one_call_each(result) if uses.has_one_call else result)


def _without_functions(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Converts ``function_call`` to ``tool_calls``. The older form has no ids, so the message's index becomes the id.

    Raises:
        ValueError: A result has no preceding call.
    """
    result: list[Mapping[str, Any]] = []
    call_id = None
    for index, message in enumerate(messages):
        if isinstance(message, Mapping):
            call = message.get("function_call")
            if call is not None:
                message = {key: value for key, value in message.items() if key != "function_call"}
                if not message.get("tool_calls"):
                    call_id = f"{index:09}"  # Mistral's templates require nine characters
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
    if content_format == "string":
        return "\n".join(_text_of_part(part, f"{where}[{i}]") for i, part in enumerate(content))
    return [
        {"type": IMAGE_PART} if _is_image(part) else _part(_text_of_part(part, f"{where}[{i}]"))
        for i, part in enumerate(content)
    ]


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == IMAGE_PART and isinstance(part.get("placeholder"), str)


def _part(text: str) -> Message:
    return {"type": "text", "text": text}


def _text_of_part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise ValueError(f"{where} must be an object with a 'type'")
    if _is_image(part):
        return str(part["placeholder"])
    kind = part.get("type", "text")
    key = _TEXT_PARTS.get(kind) if isinstance(kind, str) else None
    if key is None:
        raise ValueError(f"{where}: content of type {str(kind)[:40]!r} is not supported by this model")
    text = part.get(key)
    if not isinstance(text, str):
        raise ValueError(f"{where}.{key} must be a string")
    return text


def _as_error(content: str | list[Message]) -> str | list[Message]:
    """Prefixes content with "Error: ", unless it already begins with "error"."""
    first = content if isinstance(content, str) else content[0].get("text", "") if content else ""
    if first.lstrip()[: len(_ERROR)].lower() == _ERROR.lower():
        return content
    marked = f"{_ERROR}: {first}" if first else _ERROR
    if isinstance(content, str):
        return marked
    rest = content[1:] if content and "text" in content[0] else content
    return [_part(marked), *rest]


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
    """Converts arguments to a format. Text that is not a JSON object, such as truncated output, stays text."""
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


def _one_call_each(messages: list[Message]) -> list[Message]:
    """Gives each call a message of its own, before its result. A result without a known id belongs to the first call
    that has none."""
    result: list[Message] = []
    rest = deque(messages)
    while rest:
        message = rest.popleft()
        calls = [call for call in message.get("tool_calls", ()) if isinstance(call, Mapping)]
        if len(calls) < 2:
            result.append(message)
            continue
        ids = {str(call["id"]) for call in calls if call.get("id") is not None}
        own: dict[str, list[Message]] = {}
        others: deque[Message] = deque()
        while rest and rest[0]["role"] == "tool":
            call_id = str(rest[0].get("tool_call_id", ""))
            (own.setdefault(call_id, []) if call_id in ids else others).append(rest.popleft())
        for index, call in enumerate(calls):
            head = message if index == 0 else {"role": message["role"], "content": ""}
            result.append({**head, "tool_calls": [call]})
            found = own.pop(str(call.get("id")), None)
            result += found or ([others.popleft()] if others else [])
        result += others
    return result


def _with_one_system(messages: list[Message]) -> list[Message]:
    """Joins leading ``system`` messages to one. Later ones stay in place."""
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
        if parts:  # templates put no separator between parts
            more = [_part("\n\n" + more[0]["text"]), *more[1:]]
        parts += more
    return parts
