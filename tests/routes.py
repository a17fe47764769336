"""One question over every route, and what a client reads of each answer in the same terms.

What holds for one protocol holds for all: a test names its fields as chat completions do, asks over ``ROUTES``, and
compares ``Reply``s.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from tests.fakes import MODEL
from tests.unit.conftest import Api

ROUTES = ("chat", "completions", "messages", "responses")
CHATS = ("chat", "messages", "responses")
"""Routes that know roles, tools and reasoning."""

_PATHS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "messages": "/v1/messages",
    "responses": "/v1/responses",
}
_FINISH = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "tool_use": "tool_calls",
    "completed": "stop",
    "incomplete": "length",
}


@dataclass
class Reply:
    """What a client reads."""

    text: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    """Name and arguments, as JSON text, of each tool call."""
    finish: str | None = None
    """In the words of chat completions. Responses say ``stop`` for tool calls too, as their output tells."""


def request(route: str, prompt: str, *, stream: bool = False, **fields: Any) -> tuple[str, dict[str, Any]]:
    """Path and body of a question.

    Args:
        route: One of ``ROUTES``.
        prompt: What the user says.
        stream: As events.
        fields: More fields as chat completions name them; ``tools`` are functions with name and parameters.
    """
    body: dict[str, Any] = {"max_tokens": 64, "temperature": 0, **fields, "stream": stream}
    tools = body.pop("tools", None)
    if route == "completions":
        body["prompt"] = prompt
    elif route == "responses":
        body["input"] = prompt
        body["max_output_tokens"] = body.pop("max_tokens")
        if tools is not None:
            body["tools"] = [{"type": "function", **tool} for tool in tools]
    else:
        body["messages"] = [{"role": "user", "content": prompt}]
    if route == "messages":
        body["model"] = MODEL
        stops = body.pop("stop", None)
        if stops is not None:
            body["stop_sequences"] = [stops] if isinstance(stops, str) else stops
        if tools is not None:
            body["tools"] = [{"name": tool["name"], "input_schema": tool.get("parameters", {})} for tool in tools]
    elif route == "chat" and tools is not None:
        body["tools"] = [{"type": "function", "function": tool} for tool in tools]
    return _PATHS[route], body


async def ask(api: Api, route: str, prompt: str, *, stream: bool = False, **fields: Any) -> Reply:
    """Asks, and reads the answer; see ``request``."""
    path, body = request(route, prompt, stream=stream, **fields)
    response = await api.post(path, body)
    assert response.status_code == 200, response.text
    return reply_of(route, response.text, stream=stream)


def reply_of(route: str, text: str, *, stream: bool = False) -> Reply:
    """What a client reads of the body of an answer."""
    if not stream:
        return _WHOLE[route](json.loads(text))
    lines = [line[len("data: ") :] for line in text.split("\n") if line.startswith("data: ")]
    return _STREAMED[route]([json.loads(line) for line in lines if line != "[DONE]"])


def _chat(answer: Any) -> Reply:
    (choice,) = answer["choices"]
    message = choice["message"]
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls") or ()]
    return Reply(message["content"] or "", message.get("reasoning") or "", calls, choice["finish_reason"])


def _chat_stream(chunks: list[Any]) -> Reply:
    reply = Reply()
    for chunk in chunks:
        for choice in chunk["choices"]:
            delta = choice["delta"]
            reply.text += delta.get("content") or ""
            reply.reasoning += delta.get("reasoning") or ""
            for call in delta.get("tool_calls") or ():
                if call["index"] == len(reply.calls):
                    reply.calls.append((call["function"]["name"], ""))
                name, arguments = reply.calls[call["index"]]
                reply.calls[call["index"]] = name, arguments + (call["function"].get("arguments") or "")
            reply.finish = choice["finish_reason"] or reply.finish
    return reply


def _completion(answer: Any) -> Reply:
    (choice,) = answer["choices"]
    return Reply(choice["text"], finish=choice["finish_reason"])


def _completion_stream(chunks: list[Any]) -> Reply:
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return Reply("".join(choice["text"] for choice in choices), finish=choices[-1]["finish_reason"])


def _message(answer: Any) -> Reply:
    reply = Reply(finish=_FINISH[answer["stop_reason"]])
    for block in answer["content"]:
        if block["type"] == "text":
            reply.text += block["text"]
        elif block["type"] == "thinking":
            reply.reasoning += block["thinking"]
        else:
            arguments = block["input"]
            reply.calls.append((block["name"], arguments if isinstance(arguments, str) else json.dumps(arguments)))
    return reply


def _message_stream(events: list[Any]) -> Reply:
    blocks: list[dict[str, Any]] = []
    arguments: dict[int, str] = {}
    stop_reason = ""
    for event in events:
        if event["type"] == "content_block_start":
            blocks.append(event["content_block"])
        elif event["type"] == "content_block_delta":
            delta, block = event["delta"], blocks[event["index"]]
            if delta["type"] == "input_json_delta":
                arguments[event["index"]] = arguments.get(event["index"], "") + delta["partial_json"]
            elif delta["type"] in ("text_delta", "thinking_delta"):
                key = delta["type"].removesuffix("_delta")
                block[key] += delta[key]
        elif event["type"] == "message_delta":
            stop_reason = event["delta"]["stop_reason"]
    for index, text in arguments.items():
        blocks[index]["input"] = text  # it may have been cut off
    return _message({"content": blocks, "stop_reason": stop_reason})


def _response(answer: Any) -> Reply:
    reply = Reply(finish=_FINISH[answer["status"]])
    for item in answer["output"]:
        if item["type"] == "message":
            reply.text += "".join(part["text"] for part in item["content"])
        elif item["type"] == "reasoning":
            reply.reasoning += "".join(part["text"] for part in item["content"])
        elif item["type"] == "function_call":
            reply.calls.append((item["name"], item["arguments"]))
    return reply


def _response_stream(events: list[Any]) -> Reply:
    whole = _response(events[-1]["response"])
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert text == whole.text
    return whole


_WHOLE = {"chat": _chat, "completions": _completion, "messages": _message, "responses": _response}
_STREAMED = {
    "chat": _chat_stream,
    "completions": _completion_stream,
    "messages": _message_stream,
    "responses": _response_stream,
}
