"""What users of servers reported about texts, tools and reasoning: what the model says, and what a client reads.

Every case is asked over every protocol that it can occur on, streamed and not.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from typing import Any

import pytest

from api.config import ServerConfig
from engine_core.messages import i32
from tests.fakes import BOS, CHAT_TEMPLATE, VOCAB_SIZE, FakeServer, says, token_of
from tests.routes import CHATS, ROUTES, ask
from tests.routes import request as request_of
from tests.scripted import ScriptedModel, spelled
from tests.unit.conftest import Api

STRING = {"type": "string"}
TOOLS: list[Any] = [
    {
        "name": "f",
        "parameters": {
            "type": "object",
            "properties": {"s": STRING, "t": STRING, "n": {"type": "number"}, "i": {"type": "integer"}},
        },
    },
    {"name": "g", "parameters": {"type": "object", "properties": {}}},
]
WAYS = [
    *itertools.product((1, 3), ROUTES, (True,)),
    *itertools.product((1,), ROUTES, (False,)),
]
"""Tokens a chunk, route, and whether the answer is streamed."""
Calls = list[tuple[str, dict[str, Any]]]


@dataclass(frozen=True)
class Case:
    """What a model says, and what a client reads."""

    parser: str
    says: str
    calls: Calls
    text: str = ""
    reasoning: str = ""
    tool_choice: str | None = None


def hermes(body: str) -> str:
    return f"<tool_call>\n{body}\n</tool_call>"


def coder(value: str, name: str = "s") -> str:
    return f"<tool_call>\n<function=f>\n<parameter={name}>\n{value}\n</parameter>\n</function>\n</tool_call>"


CODE = "    if x:\n        return 1\n"
CASES = {
    "white space of an XML value is its own": Case("qwen3_coder", coder(CODE), [("f", {"s": CODE})]),
    "an empty XML value": Case("qwen3_coder", coder(""), [("f", {"s": ""})]),
    "a string that looks like a number": Case("qwen3_coder", coder("007"), [("f", {"s": "007"})]),
    "lines between XML calls are no content": Case(
        "qwen3_coder", f"{coder('a')}\n{coder('b')}\n", [("f", {"s": "a"}), ("f", {"s": "b"})]
    ),
    "XML of a string's own": Case("qwen3_coder", coder("<a>&amp;</a>"), [("f", {"s": "<a>&amp;</a>"})]),
    "an XML call without parameters": Case(
        "qwen3_coder", "<tool_call>\n<function=g>\n</function>\n</tool_call>", [("g", {})]
    ),
    "negative numbers": Case("pythonic", "[f(n=-5), f(n=-3.5e-2)]", [("f", {"n": -5}), ("f", {"n": -0.035})]),
    "brackets in strings": Case(
        "pythonic", "[f(s='grep -F \"])\" a', t=')]')]", [("f", {"s": 'grep -F "])" a', "t": ")]"})]
    ),
    "lines in strings": Case("pythonic", "[f(s='a\nb')]", [("f", {"s": "a\nb"})]),
    "a backslash at the end of a string": Case("pythonic", "[f(s='a\\\\', t='b')]", [("f", {"s": "a\\", "t": "b"})]),
    "tuples are lists": Case("pythonic", "[f(s=(8, 6))]", [("f", {"s": [8, 6]})]),
    "a parameter that is a keyword": Case("pythonic", "[f(from=1)]", [("f", {"from": 1})]),
    "nested lists": Case(
        "pythonic", "[f(s=[['a', {'b': [1, None]}], [True]])]", [("f", {"s": [["a", {"b": [1, None]}], [True]]})]
    ),
    "calls without arguments, pythonic": Case("pythonic", "[g(), g()]", [("g", {}), ("g", {})]),
    "no choice of tools leaves markup alone": Case(
        "hermes", hermes('{"name": "g"}'), [], hermes('{"name": "g"}'), tool_choice="none"
    ),
    "empty arguments": Case("hermes", hermes('{"name": "g", "arguments": {}}'), [("g", {})]),
    "no arguments": Case("hermes", hermes('{"name": "g"}'), [("g", {})]),
    "null arguments": Case("hermes", hermes('{"name": "g", "arguments": null}'), [("g", {})]),
    "braces in a string": Case(
        "hermes",
        hermes('{"name": "f", "arguments": {"s": "mkdir -p test/{a,{b"}}'),
        [("f", {"s": "mkdir -p test/{a,{b"})],
    ),
    "arguments before the name": Case(
        "hermes", hermes('{"arguments": {"s": "| a |\\n|--|"}, "name": "f"}'), [("f", {"s": "| a |\n|--|"})]
    ),
    "text between calls": Case(
        "hermes",
        f"One.{hermes(json.dumps({'name': 'g', 'arguments': {}}))}Two.",
        [("g", {})],
        "One.Two.",
    ),
    "arguments as a text": Case(
        "hermes", hermes('{"name": "f", "arguments": "{\\"s\\": \\"a\\"}"}'), [("f", {"s": "a"})]
    ),
    "markup within a string": Case(
        "hermes",
        hermes('{"name": "f", "arguments": {"s": "</tool_call><tool_call>"}}'),
        [("f", {"s": "</tool_call><tool_call>"})],
    ),
    "characters beyond ASCII": Case(
        "llama3_json",
        '{"name": "f", "parameters": {"s": "Münster 🐈", "t": "\\u00fc"}}',
        [("f", {"s": "Münster 🐈", "t": "ü"})],
    ),
    "two calls, Llama": Case(
        "llama3_json",
        '{"name": "g", "parameters": {}}; {"name": "f", "parameters": {"i": 5}}',
        [("g", {}), ("f", {"i": 5})],
    ),
    "JSON that is an answer": Case("llama3_json", '{"name": 5}', [], '{"name": 5}'),
    "a list of calls, Mistral": Case(
        "mistral",
        '[TOOL_CALLS][{"name": "f", "arguments": {"i": 5}}, {"name": "g", "arguments": {}}]',
        [("f", {"i": 5}), ("g", {})],
    ),
    "calls in a row, Mistral": Case(
        "mistral", '[TOOL_CALLS]f[ARGS]{"i": -15}[TOOL_CALLS]g[ARGS]{}', [("f", {"i": -15}), ("g", {})]
    ),
    "text before a call, Mistral": Case("mistral", "Yes.[TOOL_CALLS]g[ARGS]{}", [("g", {})], "Yes."),
    "a thought before a call": Case(
        "hermes",
        f"<think>\nA?\n</think>\n\n{hermes(json.dumps({'name': 'g', 'arguments': {}}))}",
        [("g", {})],
        "",
        "A?",
    ),
    "a call within a thought is a thought": Case(
        "hermes",
        f"<think>{hermes(json.dumps({'name': 'g'}))}</think>No.",
        [],
        "No.",
        hermes('{"name": "g"}'),
    ),
}


def server(case: Case, interval: int) -> Api:
    config = ServerConfig(
        enable_auto_tool_choice=True,
        tool_call_parser=case.parser,
        reasoning_parser="qwen3" if "<think>" in case.says else None,
        stream_interval=interval,
    )
    return Api(FakeServer(config, script=says(case.says)))


@pytest.mark.parametrize("name", CASES)
async def test_tools_and_thoughts(name: str) -> None:
    case = CASES[name]
    apis = {interval: server(case, interval) for interval in (1, 3)}
    for interval, route, stream in WAYS:
        if route not in CHATS:
            continue
        fields: dict[str, Any] = {"tools": TOOLS, "max_tokens": 300}
        if case.tool_choice is not None:
            fields["tool_choice"] = {"type": case.tool_choice} if route == "messages" else case.tool_choice
        reply = await ask(apis[interval], route, "hi", stream=stream, **fields)
        where = f"{route}, stream={stream}, interval={interval}"
        assert [(name, json.loads(arguments)) for name, arguments in reply.calls] == case.calls, where
        assert (reply.text, reply.reasoning.strip()) == (case.text, case.reasoning), where
        assert reply.finish == ("tool_calls" if case.calls and route != "responses" else "stop"), where


TEXTS: dict[str, tuple[list[str | bytes], list[str], str]] = {
    "a stop string over tokens": (["a", "ST", "OP", "b"], ["STOP"], "a"),
    "a stop string within a token": (["a", "xSTOPy", "b"], ["STOP"], "ax"),
    "the beginning of a stop string": (["a", "ST", "x"], ["STOP"], "aSTx"),
    "the beginning of a stop string at the end": (["a", "ST"], ["STOP"], "aST"),
    "a stop string that begins twice": (["a", "ST", "STO", "P", "b"], ["STOP"], "aST"),
    "the earlier of two stop strings": (["a", "bc", "d"], ["cd", "bcd"], "a"),
    "characters of several tokens": ([*spelled("é🐈猫")], [], "é🐈猫"),
    "a stop string of several bytes": ([*spelled("a猫b")], ["猫"], "a"),
    "a stop string behind half a character": ([*spelled("é🐈"), "STOP"], ["STOP"], "é🐈"),
}
"""By name: what the model says in tokens, the stop strings, and the text."""


@pytest.mark.parametrize("name", TEXTS)
async def test_texts_and_stops(name: str) -> None:
    pieces, stop, text = TEXTS[name]
    model = ScriptedModel()
    marker = model.says("it", *pieces)
    apis = {interval: Api(model.fake(ServerConfig(stream_interval=interval))) for interval in (1, 3)}
    for interval, route, stream in WAYS:
        reply = await ask(apis[interval], route, marker, stream=stream, **({"stop": stop} if stop else {}))
        assert (reply.text, reply.finish) == (text, "stop"), f"{route}, stream={stream}, interval={interval}"


@pytest.mark.parametrize("route", ROUTES)
async def test_a_prompt_has_one_start_token(route: str) -> None:
    """Both the template and the tokenizer would write it."""
    server = FakeServer(script=says("x"), chat_template="{{ bos_token }}" + CHAT_TEMPLATE)
    await ask(Api(server), route, "hi")
    (request,) = server.engine.submitted
    assert i32(request.prompt_token_ids).tolist().count(BOS) == 1


@pytest.mark.parametrize("route", CHATS)
async def test_an_empty_answer_in_the_history(route: str) -> None:
    server = FakeServer(script=says("x"))
    turns = [("user", "A"), ("assistant", ""), ("user", "B")]
    path, body = request_of(route, "")
    body["input" if route == "responses" else "messages"] = [
        {"role": role, "content": content} for role, content in turns
    ]
    await Api(server).ok(path, body)
    (request,) = server.engine.submitted
    prompt = server.model.tokenizer.decode(i32(request.prompt_token_ids).tolist(), True)
    assert prompt.split("\n")[:5] == ["user", "A", "assistant", "", "user"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ["chat", "completions", "responses"])
async def test_minus_infinity_is_a_number_of_json(route: str, stream: bool) -> None:
    server = FakeServer(script=says("x"))
    server.engine.likely = lambda _: dict.fromkeys(range(VOCAB_SIZE), -math.inf) | {token_of(ord("x")): 0.0}
    fields: dict[str, Any] = {"logprobs": 2} if route == "completions" else {"top_logprobs": 2}
    if route == "chat":
        fields["logprobs"] = True
    elif route == "responses":
        fields["include"] = ["message.output_text.logprobs"]
    path, body = request_of(route, "hi", stream=stream, **fields)
    response = await Api(server).post(path, body)
    assert response.status_code == 200, response.text
    assert "Infinity" not in response.text and "-9999.0" in response.text


CALLS = (
    "<think>Hm.</think>Yes."
    + hermes('{"name": "f", "arguments": {"s": "a"}}')
    + hermes('{"name": "g", "arguments": {}}')
    + "End."
)


async def stream_of(route: str, text: str) -> list[Any]:
    api = server(Case("hermes", text, []), 1)
    path, body = request_of(route, "hi", stream=True, tools=TOOLS, max_tokens=300)
    lines = (await api.post(path, body)).text.split("\n")
    return [json.loads(line[len("data: ") :]) for line in lines if line.startswith("data: {")]


@pytest.mark.parametrize("text", [CALLS, "Hello."])
async def test_what_chunks_of_chat_hold(text: str) -> None:
    """A finish reason that is null until the end, and no empty lists of calls, which some clients take for calls."""
    choices = [chunk["choices"][0] for chunk in await stream_of("chat", text)]
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] == ("tool_calls" if text == CALLS else "stop")
    calls = [call for choice in choices for call in choice["delta"].get("tool_calls", ())]
    assert all(choice["delta"].get("tool_calls", True) for choice in choices)
    assert [call["index"] for call in calls] == sorted(call["index"] for call in calls)
    assert len({call["id"] for call in calls if "id" in call}) == (2 if text == CALLS else 0)
    assert all(("id" in call) == ("name" in call["function"]) for call in calls)


async def test_blocks_of_messages_come_one_after_the_other() -> None:
    deltas = {
        "thinking": {"thinking_delta", "signature_delta"},
        "text": {"text_delta"},
        "tool_use": {"input_json_delta"},
    }
    kinds: list[str] = []
    is_open = False
    for event in await stream_of("messages", CALLS):
        if event["type"] == "content_block_start":
            assert not is_open and event["index"] == len(kinds)
            kinds.append(event["content_block"]["type"])
            is_open = True
        elif event["type"] == "content_block_delta":
            assert is_open and event["index"] == len(kinds) - 1
            assert event["delta"]["type"] in deltas[kinds[-1]]
        elif event["type"] == "content_block_stop":
            assert is_open and event["index"] == len(kinds) - 1
            is_open = False
    assert kinds == ["thinking", "text", "tool_use", "tool_use", "text"]


async def test_items_of_responses_are_those_of_the_whole() -> None:
    events = await stream_of("responses", CALLS)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for kind in ("added", "done"):
        items = [event for event in events if event["type"] == f"response.output_item.{kind}"]
        assert [item["output_index"] for item in items] == list(range(5))
        whole = events[-1]["response"]["output"]
        assert [item["item"]["id"] for item in items] == [item["id"] for item in whole]
        assert kind == "added" or [item["item"] for item in items] == whole
