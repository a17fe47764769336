"""Parsers chosen by the chat template, over every protocol."""

from __future__ import annotations

from typing import Any

import pytest

from api.config import ServerConfig
from api.flags import ConfigError
from api.model.files import with_parsers
from api.parsers.detect import detect_reasoning_parser, detect_tool_parser
from tests.fakes import FakeServer, says
from tests.routes import CHATS, ask
from tests.scripted import CHAT_TEMPLATE, ScriptedModel
from tests.unit.conftest import Api

AUTO = ServerConfig(enable_auto_tool_choice=True, tool_call_parser="auto", reasoning_parser="auto")
TOOLS: list[Any] = [{"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}]
FAMILIES = {
    "gemma4": (
        ["<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>'],
        ["<|channel>", "thought", "\n", "Hm", "<channel|>", "<|tool_call>", "call:f{a:b}",
         "<tool_call|>"],
        "<|tool_call>call: <|channel>",
    ),
    "harmony": (
        ["<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>"],
        ["<|channel|>", "analysis", "<|message|>", "Hm", "<|end|>", "<|start|>", "assistant",
         "<|channel|>commentary to=functions.f ", "<|constrain|>", 'json<|message|>{"a": "b', '"}', "<|call|>"],
        "<|channel|>analysis {{ ' to=' }}{{ 'functions.' }}",
    ),
    "mistral": (
        ["[THINK]", "[/THINK]", "[TOOL_CALLS]", "[ARGS]"],
        ["[THINK]", "Hm", "[/THINK]", "[TOOL_CALLS]", "f", "[ARGS]", '{"a": "b', '"}'],
        "[THINK] [TOOL_CALLS]",
    ),
    "glm45": (
        ["<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>",
         "</arg_value>"],
        ["\n", "<think>", "Hm", "</think>", "<tool_call>", "f", "<arg_key>", "a", "</arg_key>", "<arg_value>", "b",
         "</arg_value>", "</tool_call>"],
        "<think></think> <tool_call> <arg_key>",
    ),
    "granite": (
        ["<|tool_call|>"],
        ["<think>", "Hm", "</think>", "<response>", "</response>", "<|tool_call|>", '[{"name": "f", "arguments":',
         ' {"a": "b', '"}}]'],
        "<think></think> <response></response> <|tool_call|>",
    ),
    "cohere": (
        ["<|START_THINKING|>", "<|END_THINKING|>", "<|START_ACTION|>", "<|END_ACTION|>"],
        ["<|START_THINKING|>", "Hm", "<|END_THINKING|>", "<|START_ACTION|>", '[{"tool_name": "f", "parameters":',
         ' {"a": "b', '"}}]', "<|END_ACTION|>"],
        "<|START_THINKING|> <|START_ACTION|>",
    ),
    "kimi_k2": (
        ["<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_end|>",
         "<|tool_call_argument_begin|>", "<think>"],
        ["<think>", "Hm", "<|tool_calls_section_begin|>", "<|tool_call_begin|>", "functions.f:0",
         "<|tool_call_argument_begin|>", '{"a": "b', '"}', "<|tool_call_end|>", "<|tool_calls_section_end|>"],
        "<|tool_calls_section_begin|> <think>",
    ),
    "olmo3": (
        [],
        ["<think>", "Hm", "</think>", "<function_calls>", "\nf(a='b", "')", "\n", "</function_calls>"],
        "<function_calls> <think>",
    ),
}  # fmt: skip
"""For each family: its special tokens, what the model says, and what its template has."""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("route", CHATS)
@pytest.mark.parametrize("stream", [False, True])
async def test_reasoning_and_a_call(route: str, stream: bool, family: str) -> None:
    special, pieces, marks = FAMILIES[family]
    model = ScriptedModel(special=special, chat_template=f"{CHAT_TEMPLATE}{{# {marks} #}}")
    marker = model.says("call", *pieces)
    reply = await ask(Api(model.fake(AUTO)), route, marker, stream=stream, tools=TOOLS)
    assert (reply.text, reply.reasoning) == ("", "Hm")
    assert reply.calls == [("f", '{"a": "b"}')]
    assert reply.finish == ("stop" if route == "responses" else "tool_calls")


@pytest.mark.parametrize(
    ("template", "tool", "reasoning"),
    [
        (None, None, None),
        (CHAT_TEMPLATE, None, None),
        ({"default": "x", "tool_use": "<tool_call>{\"name\": 1}</tool_call>"}, "hermes", None),
        ("<tool_call><function=f><parameter=a> <think>", "qwen3_coder", "qwen3"),
        ("<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n</think>", "deepseek_v3", "qwen3"),
        ("<｜tool▁call▁begin｜>f<｜tool▁sep｜>", "deepseek_v31", None),
        ("{% set mark = '｜DSML｜' %}<{{ mark }}function_calls> '</think>'", "deepseek_v32", "qwen3"),
        ("'<｜DSML｜tool_calls>'", "deepseek_v4", None),
        ("'<minimax:tool_call>' '<invoke name=' <think> <response></response>", "minimax_m2", "minimax_m2"),
        ('"<seed:tool_call>" "<function=" "<parameter=" "<seed:think>"', "seed_oss", "seed_oss"),
        ("<think>\n\n</think> content.split('<answer>') <tool_calls>", "jamba", "hunyuan_a13b"),
        ("</think> <think>\n <response>\n <tool_call>{\"name\": 1}", "hermes", "ernie45"),
        ("Here are my reasoning steps:\n <tool_calls>[ [BEGIN FINAL RESPONSE]", "apriel", "apriel"),
        ("<TOOLCALL>[{}]</TOOLCALL> <think>", "llama_nemotron_json", "qwen3"),
        ("<start_function_call>call:f{}<end_function_call>", "functiongemma", None),
        ("<|tool|>[]<|/tool|>", "phi4_mini_json", None),
        ("<|tool_list_start|>", "lfm2", None),
        ('{"name": function name, "parameters": dictionary of argument name and its value}', "llama3_json", None),
    ],
)  # fmt: skip
def test_which_parsers(template: Any, tool: str | None, reasoning: str | None) -> None:
    assert (detect_tool_parser(template), detect_reasoning_parser(template)) == (tool, reasoning)
    config = with_parsers(AUTO, template)
    assert (config.tool_call_parser, config.reasoning_parser) == (tool, reasoning)
    named = ServerConfig(tool_call_parser="hermes", reasoning_parser="qwen3")
    assert with_parsers(named, template) == named


def test_tools_without_a_named_parser() -> None:
    """vLLM's command lines name one; without, the template chooses, or the server does not start."""
    config = ServerConfig(enable_auto_tool_choice=True)
    assert with_parsers(config, '<tool_call>{"name": 1}</tool_call>').tool_call_parser == "hermes"
    for template in (None, CHAT_TEMPLATE):
        with pytest.raises(ConfigError, match="the chat template shows no known format .* with --tool-call-parser$"):
            with_parsers(config, template)


async def test_no_parser_is_known() -> None:
    api = Api(FakeServer(AUTO, script=says("x"), chat_template=CHAT_TEMPLATE))
    tools = [{"type": "function", "function": TOOLS[0]}]
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": tools}
    error = await api.error("/v1/chat/completions", body)
    assert error["param"] == "tool_choice" and "--tool-call-parser auto" in error["message"]
    await api.ok("/v1/chat/completions", {**body, "tool_choice": "none"})
