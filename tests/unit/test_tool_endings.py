"""When an answer calls tools, and when it only began to, over every protocol and parser."""

from __future__ import annotations

import json
from typing import Any

import pytest

from api.config import ServerConfig
from tests.fakes import FakeServer, says
from tests.routes import CHATS, ask
from tests.unit.conftest import Api

TOOLS: list[Any] = [
    {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}},
]
WHOLE = {
    "deepseek_v3": '<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"a": "b c"}\n```<｜tool▁call▁end｜>',
    "gemma4": '<|tool_call>call:f{a:<|"|>b c<|"|>}<tool_call|>',
    "glm45": "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>b c</arg_value>\n</tool_call>",
    "granite": '<|tool_call|>[{"name": "f", "arguments": {"a": "b c"}}]',
    "harmony": '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": "b c"}<|call|>',
    "hermes": '<tool_call>\n{"name": "f", "arguments": {"a": "b c"}}\n</tool_call>',
    "llama3_json": '{"name": "f", "parameters": {"a": "b c"}}',
    "mistral": '[TOOL_CALLS]f[ARGS]{"a": "b c"}',
    "olmo3": "<function_calls>\nf(a='b c', b='d')\n</function_calls>",
    "phi4_mini_json": 'functools[{"name": "f", "arguments": {"a": "b c"}}]',
    "pythonic": "[f(a='b c', b='d')]",
    "qwen3_coder": "<tool_call>\n<function=f>\n<parameter=a>\nb c\n</parameter>\n</function>\n</tool_call>",
}
CUT = {
    "deepseek_v3": '<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"a": "b',
    "gemma4": '<|tool_call>call:f{a:<|"|>b',
    "glm45": "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>b c</arg_value>\n<arg_key>b</arg_key>\n<arg_value>d",
    "granite": '<|tool_call|>[{"name": "f", "arguments": {"a": "b',
    "harmony": '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": "b',
    "hermes": '<tool_call>\n{"name": "f", "arguments": {"a": "b',
    "llama3_json": '{"name": "f", "parameters": {"a": "b',
    "mistral": '[TOOL_CALLS]f[ARGS]{"a": "b',
    "olmo3": "<function_calls>\nf(a='b c', b='d",
    "phi4_mini_json": 'functools[{"name": "f", "arguments": {"a": "b',
    "pythonic": "[f(a='b c', b='d",
    "qwen3_coder": "<tool_call>\n<function=f>\n<parameter=a>\nb c\n</parameter>\n<parameter=b>\nd",
}
"""Texts that break off in a call that has begun."""

EVERYWHERE = pytest.mark.parametrize(
    ("route", "stream", "parser"),
    [(route, stream, parser) for route in CHATS for stream in (False, True) for parser in WHOLE],
)


def api_of(parser: str, text: str) -> Api:
    config = ServerConfig(enable_auto_tool_choice=True, tool_call_parser=parser)
    return Api(FakeServer(config, script=says(text)))


@EVERYWHERE
async def test_whole_calls(route: str, stream: bool, parser: str) -> None:
    for stop in (None, ["END"]):
        api = api_of(parser, f"{WHOLE[parser]}{'END' if stop else ''}")
        fields = {} if stop is None else {"stop": stop}
        reply = await ask(api, route, "hi", stream=stream, tools=TOOLS, max_tokens=200, **fields)
        assert reply.finish == ("stop" if route == "responses" else "tool_calls")
        [(name, arguments)] = reply.calls
        assert name == "f" and json.loads(arguments)["a"] == "b c"
        assert not reply.text


@EVERYWHERE
@pytest.mark.parametrize("end", ["end token", "stop string", "length"])
async def test_a_call_that_breaks_off_is_none(route: str, stream: bool, parser: str, end: str) -> None:
    text = CUT[parser]
    fields: dict[str, Any] = {"max_tokens": len(text.encode())} if end == "length" else {"max_tokens": 200}
    if end == "stop string":
        fields["stop"] = ["STOP"]
        text += "STOP"
    reply = await ask(api_of(parser, text), route, "hi", stream=stream, tools=TOOLS, **fields)
    assert reply.finish == ("length" if end == "length" else "stop")
    if route == "messages" and not stream:  # a message has no place for half an object
        assert reply.text == CUT[parser] and not reply.calls
    else:
        [(name, arguments)] = reply.calls
        assert name == "f" and arguments.startswith('{"a": "b')
        with pytest.raises(ValueError):
            json.loads(arguments)


@pytest.mark.parametrize("route", CHATS)
@pytest.mark.parametrize("stream", [False, True])
async def test_arguments_that_are_no_json_are_no_call(route: str, stream: bool) -> None:
    text = '<tool_call>\n{"name": "f", "arguments": {"a": None}}\n</tool_call>'
    reply = await ask(api_of("hermes", text), route, "hi", stream=stream, tools=TOOLS, max_tokens=200)
    assert reply.finish == "stop"


@pytest.mark.parametrize("route", CHATS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", ["<tool_call>", '<tool_call>\n{"name": "f", "argu', '<tool_call>\n{"name": "f"'])
async def test_markup_without_a_call_is_content(route: str, stream: bool, text: str) -> None:
    reply = await ask(api_of("hermes", text), route, "hi", stream=stream, tools=TOOLS, max_tokens=200)
    assert (reply.text, reply.calls, reply.finish) == (text, [], "stop")
