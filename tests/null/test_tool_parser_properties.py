"""What holds for every parser and every text: pieces do not matter, nothing is lost, time is linear."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from api.parsers import REASONING_PARSERS, ToolCallStart, collect, create_parser
from api.parsers.python_literal import to_json
from tests.null.test_tool_parsers import COMPLETE, TRANSLATED, parse, qwen, tool
from tests.work import count_characters

FRAGMENTS = [
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<|python_tag|>", "<|python_start|>", "<|python_end|>"),
    *("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "<function=", "</function>", "<parameter=", "</parameter>"),
    *('{"name": "f", "arguments": {', '"parameters": {"a": "b', '"name"', '"arguments"', "f", "g(", "[f(", "a=", "'b'"),
    *("null", "1", "-2.5", "True", '"""', "'''", "\\", '"', "'", "{", "}", "[", "]", "(", ")", "<", ">", "|", "=", ":"),
    *(",", ";", "\n", " ", "\t", "é", "😀", ".", "\x00", "\u2028", "fn=f>\n", "a>\n"),
    *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "<|tool_call>call:f{", "<tool_call|>", '<|"|>', "a:"),
    *(
        "<｜tool▁call▁begin｜>",
        "<｜tool▁sep｜>",
        "```json",
        "```",
        "<function_calls>",
        "</function_calls>",
        "functools[",
    ),
    *("<|channel>", "thought\n", "<channel|>", "[THINK]", "[/THINK]", "<response>", "</response>", "<|START_ACTION|>"),
    *("<|start|>assistant", "<|channel|>analysis", "<|channel|>final", " to=functions.f", "<|message|>", "<|end|>"),
    *("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]", "[END FINAL RESPONSE]"),
    *COMPLETE.values(),
]
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(), VALUES, max_size=4)
NAMES = st.from_regex(r"[a-z_][a-z0-9_.]{0,10}", fullmatch=True)
VALUE_ENDS = ["</parameter>", "\n<parameter=", "\n</function>", "\n</tool_call>"]
SIZE = 2048
PIECE = 32


def pieces_of(text: str, cuts: Sequence[int]) -> list[str]:
    bounds = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[begin:end] for begin, end in zip(bounds, bounds[1:], strict=False)]


@pytest.mark.parametrize("name", COMPLETE)
@settings(max_examples=50, deadline=None)
@given(
    text=TEXTS,
    cuts=st.lists(st.integers(0, 1000), max_size=8),
    reasoning=st.sampled_from([None, *REASONING_PARSERS]),
    prompt_opened=st.sampled_from([None, True, False]),
)
def test_pieces_do_not_matter(
    name: str, text: str, cuts: list[int], reasoning: str | None, prompt_opened: bool | None
) -> None:
    events = parse(name, text, reasoning=reasoning, prompt_opened=prompt_opened)
    for pieces in list(text), pieces_of(text, cuts):
        assert parse(name, pieces, reasoning=reasoning, prompt_opened=prompt_opened) == events


@pytest.mark.parametrize("name", COMPLETE)
@settings(max_examples=50, deadline=None)
@given(text=TEXTS)
def test_a_text_without_calls_is_content(name: str, text: str) -> None:
    events = parse(name, text)
    if not any(isinstance(event, ToolCallStart) for event in events):
        content = collect(events).content
        if name == "harmony" and "<|message|>" in text:  # marks of messages to the user are omitted
            rest = iter(text)
            assert all(each in rest for each in content)
        else:
            assert content == text
    for call in collect(events).tool_calls:
        if call.complete and name in TRANSLATED:
            assert isinstance(json.loads(call.arguments), dict)


@settings(max_examples=50, deadline=None)
@given(text=TEXTS)
def test_reasoning_and_content_are_the_text(text: str) -> None:
    events = parse(None, f"<think>{text}", reasoning="qwen3")
    reasoning, tag, content = text.partition("</think>")
    parsed = collect(events)
    assert parsed.reasoning == (reasoning.strip("\n") if tag else reasoning.lstrip("\n"))
    assert parsed.content == content.lstrip("\n")


@pytest.mark.parametrize("name", ["hermes", "json_forced", "llama3_json", "mistral"])
@settings(max_examples=30, deadline=None)
@given(
    calls=st.lists(st.tuples(NAMES, OBJECTS), min_size=1, max_size=3),
    is_ascii=st.booleans(),
    indent=st.sampled_from([None, 1]),
    cuts=st.lists(st.integers(0, 1000), max_size=8),
)
def test_json_arguments(
    name: str, calls: list[tuple[str, dict[str, Any]]], is_ascii: bool, indent: int | None, cuts: list[int]
) -> None:
    key = "parameters" if name in ("llama3_json", "json_forced") else "arguments"
    arguments = [json.dumps(value, ensure_ascii=is_ascii, indent=indent) for _, value in calls]
    objects = [
        f'{{"name": "{function}", "{key}": {text}}}' for (function, _), text in zip(calls, arguments, strict=True)
    ]
    text = {
        "hermes": "\n".join(f"<tool_call>\n{object}\n</tool_call>" for object in objects),
        "json_forced": f"[{', '.join(objects)}]",
        "llama3_json": "; ".join(objects),
        "mistral": "".join(
            f"[TOOL_CALLS]{function}[ARGS]{text}" for (function, _), text in zip(calls, arguments, strict=True)
        ),
    }[name]
    parsed = collect(parse(name, pieces_of(text, cuts)))
    assert parsed.content == ""
    assert [(call.name, call.arguments, call.complete) for call in parsed.tool_calls] == [
        (function, text, True) for (function, _), text in zip(calls, arguments, strict=True)
    ]


@settings(max_examples=50, deadline=None)
@given(calls=st.lists(st.tuples(NAMES, st.dictionaries(NAMES, VALUES, max_size=3)), min_size=1, max_size=3))
def test_python_arguments(calls: list[tuple[str, dict[str, Any]]]) -> None:
    texts = [f"{name}({', '.join(f'{key}={value!r}' for key, value in values.items())})" for name, values in calls]
    parsed = collect(parse("pythonic", f"[{', '.join(texts)}]"))
    assert parsed.content == ""
    assert [(call.name, json.loads(call.arguments)) for call in parsed.tool_calls] == calls


@settings(max_examples=50, deadline=None)
@given(value=VALUES)
def test_python_literals(value: Any) -> None:
    json_text = to_json(repr(value))
    assert json_text is not None
    assert json.loads(json_text) == value


@settings(max_examples=50, deadline=None)
@given(text=st.text(alphabet="'\"\\rub0x1u{}[]():,.-_eENoneTruefals \n"))
def test_anything_is_no_python_literal(text: str) -> None:
    json_text = to_json(text)
    if json_text is not None:
        json.loads(json_text, parse_int=len)


@settings(max_examples=50, deadline=None)
@given(values=st.dictionaries(NAMES, VALUES, min_size=1, max_size=4))
def test_tagged_arguments(values: dict[str, Any]) -> None:
    kinds = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
    tools = [tool("f", **{key: {"type": kinds.get(type(value), "null")} for key, value in values.items()})]
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
    assume(not any(tag in f"\n{text}" for text in texts.values() for tag in VALUE_ENDS))
    parsed = collect(parse("qwen3_coder", qwen("f", **texts), tools=tools))
    assert parsed.content == ""
    assert [json.loads(call.arguments) for call in parsed.tool_calls] == [values]


def repeat(unit: str, size: int) -> str:
    return unit * (size // len(unit))


def long_object(size: int) -> str:
    return json.dumps({"a": [{"b": "line\n" * 20, "c": [1, None, {}]}] * (size // 160)})


LONG_TEXTS: dict[str, Callable[[int], str]] = {
    "text": lambda n: repeat("The quick brown fox. ", n),
    "beginnings": lambda n: repeat("<", n),
    "brackets": lambda n: repeat("[\n", n),
    "spaces": lambda n: repeat(" ", n),
    "breaks": lambda n: repeat("\n", n),
    "hermes": lambda n: f'<tool_call>{{"name": "f", "arguments": {long_object(n)}}}</tool_call>',
    "no name": lambda n: f'<tool_call>{{"arguments": {long_object(n)}, "x": 1}}</tool_call>',
    "unclosed": lambda n: repeat('<tool_call>{"', n),
    "many failures": lambda n: repeat('<tool_call>{"a":', n),
    "llama": lambda n: repeat('{"name": "f", "parameters": {"a": 1}};', n),
    "unnamed": lambda n: repeat('{"name":"', n),
    "mistral": lambda n: repeat("[TOOL_CALLS]f[CALL_ID]", n),
    "pythonic": lambda n: f"[f(a={json.loads(long_object(n))!r})]",
    "quotes": lambda n: "[f(a='''" + repeat("''\\'", n) + "''')]",
    "deep": lambda n: "[f(a=" + repeat("[(", n) + ")]",
    "tagged": lambda n: "<function=f>\n<parameter=a>\n" + repeat("a <b>\n", n) + "</parameter>\n</function>",
    "parameters": lambda n: "<function=f>" + repeat("\n<parameter=a>\n", n) + "</function>",
    "tagged object": lambda n: f"<function=f>\n<parameter=a>{json.loads(long_object(n))!r}</parameter>\n</function>",
    "digits": lambda n: f"<function=f>\n<parameter=a>{repeat('1', n)}</parameter>\n</function>",
    "gemma": lambda n: (
        '<|tool_call>call:f{a:<|"|>' + repeat("x <|", n // 2) + '<|"|>,b:[' + repeat("{k:1},", n // 2) + "]}"
    ),
    "gemma quotes": lambda n: "<|tool_call>call:f{" + repeat('<|"|>', n),
    "bare": lambda n: "<|tool_call>call:f{a:" + repeat("1 ", n),
    "keys": lambda n: "<tool_call>f" + repeat("<arg_key>a</arg_key><arg_value>1</arg_value> ", n),
    "separators": lambda n: repeat("<｜tool▁call▁begin｜>f<｜tool▁sep｜>", n),
    "calls in a block": lambda n: "<function_calls>" + repeat("f(a=1)\n", n),
    "thoughts": lambda n: "<think>" + repeat("\n\n</thin", n),
}
"""Texts of about ``n`` characters."""


@pytest.mark.parametrize("name", COMPLETE)
@pytest.mark.parametrize("kind", LONG_TEXTS)
def test_work_is_linear(kind: str, name: str) -> None:
    """Four times the text takes four times the work. It would be sixteen times if a parser began again with each
    piece."""

    def work(size: int) -> int:
        text = LONG_TEXTS[kind](size)

        def parse_pieces() -> None:
            parser = create_parser("qwen3", name)
            for position in range(0, len(text), PIECE):
                parser.feed(text[position : position + PIECE])
            parser.finish()

        return count_characters(parse_pieces)

    assert work(4 * SIZE) < 6 * work(SIZE)
