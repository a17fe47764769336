"""Tool parsers, on what models of each family write."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from api.parsers import (
    TOOL_PARSERS,
    Content,
    Event,
    Tool,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    collect,
    create_parser,
    merge,
    resolve_tool_parser,
)
from api.parsers.registry import FORCED


def tool(name: str, **properties: Any) -> Tool:
    return {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": properties}},
    }


TOOLS = [
    tool("get_weather", city={"type": "string"}, days={"type": "integer"}, unit={"enum": ["celsius", "fahrenheit"]}),
    tool("edit", path={"type": "string"}, text={"type": "string"}, options={"type": "object"}),
    tool("get_time"),
]


def parse(
    name: str | None, pieces: str | Iterable[str], *, tools: Sequence[Tool] = TOOLS, **options: Any
) -> list[Event]:
    """The events of a text, or of its pieces; ids are 0, 1, ..."""
    ids = itertools.count()
    parser = create_parser(options.pop("reasoning", None), name, tools, make_id=lambda: str(next(ids)), **options)
    events: list[Event] = []
    for piece in [pieces] if isinstance(pieces, str) else pieces:
        events += parser.feed(piece)
    return merge(events + parser.finish())


def check(
    name: str, text: str, *expected: str | tuple[str, Any], tools: Sequence[Tool] = TOOLS, **options: Any
) -> None:
    """Compares with content and calls in their order, whatever the pieces that the text comes in."""
    events = parse(name, text, tools=tools, **options)
    found: list[str | tuple[str, Any]] = []
    for event in events:
        match event:
            case Content(content):
                found.append(content)
            case ToolCallArguments(_, arguments):
                call = found.pop()
                assert isinstance(call, tuple)
                found.append((call[0], json.loads(arguments)))
            case ToolCallStart(index, id, function):
                assert id == str(index) or id == f"functions.{function}:{index}"
                assert index == sum(isinstance(item, tuple) for item in found)
                found.append((function, None))
            case ToolCallEnd(_, complete):
                assert complete
    assert found == list(expected)
    assert parse(name, list(text), tools=tools, **options) == events
    for cut in range(1, len(text)):
        assert parse(name, (text[:cut], text[cut:]), tools=tools, **options) == events, (text[:cut], text[cut:])


PARIS = ("get_weather", {"city": "Paris"})
TIME: tuple[str, dict[str, Any]] = ("get_time", {})
NESTED = {
    "path": "a.py",
    "text": 'x = "</tool_call>"\n[TOOL_CALLS] <|python_tag|> ] } é 😀 \\',
    "options": {"a": [{}, [1.5e3, None]]},
}
INDENTED = json.dumps(NESTED, ensure_ascii=False, indent=1)


# Hermes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>', [PARIS]),
        ('\n\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n', [PARIS]),
        (
            'Let me look.\n\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
            '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>\nJust a moment. ',
            ["Let me look.\n\n", PARIS, TIME, "\nJust a moment. "],
        ),
        (f'<tool_call>{{"name": "edit", "arguments": {json.dumps(NESTED)}}}</tool_call>', [("edit", NESTED)]),
        (f'<tool_call>{{"name": "edit", "arguments": {INDENTED}}}</tool_call>', [("edit", NESTED)]),
        # Keys in another order, a key too many, no arguments at all, another name for them.
        ('<tool_call>{"arguments": {"city": "Paris"}, "name": "get_weather"}</tool_call>', [PARIS]),
        (
            '<tool_call>{"id": [1, "a"], "name": "get_weather", "arguments": {"city": "Paris"}, "x": 1}</tool_call>',
            [PARIS],
        ),
        ('<tool_call>{"name": "get_time"}</tool_call>', [TIME]),
        ('<tool_call>{"name": "get_time", "arguments": null}</tool_call>', [TIME]),
        ('<tool_call>{"name": "get_weather", "parameters": {"city": "Paris"}}</tool_call>', [PARIS]),
        # The arguments as a string, line breaks in strings, a name with escapes.
        (r'<tool_call>{"name": "get_weather", "arguments": "{\"city\": \"Paris\"}"}</tool_call>', [PARIS]),
        (
            '<tool_call>{"name": "edit", "arguments": {"text": "a\n\tb\\\nc"}}</tool_call>',
            [("edit", {"text": "a\n\tb\nc"})],
        ),
        (r'<tool_call>{"name": "get\u005ftime", "arguments": {}}</tool_call>', [TIME]),
        # An unknown tool is the client's business.
        ('<tool_call>{"name": "nope", "arguments": {}}</tool_call>', [("nope", {})]),
        # Tags that are missing, doubled or shared; a brace too few.
        ('<tool_call>\n<tool_call>{"name": "get_time", "arguments": {}}</tool_call>', ["<tool_call>\n", TIME]),
        ('<tool_call>{"name": "get_time"}\n{"name": "get_time"}\n</tool_call>', [TIME, TIME]),
        ('<tool_call>{"name": "get_time"}<tool_call>{"name": "get_time"}', [TIME, TIME]),
        ('<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}\n</tool_call>', [PARIS]),
        # No calls.
        ("Nothing to see, a < b </tool_call> <tool", ["Nothing to see, a < b </tool_call> <tool"]),
        (" \n", [" \n"]),
        ("", []),
    ],
)
def test_hermes(text: str, expected: list[Any]) -> None:
    check("hermes", text, *expected)


# Llama


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"name": "get_weather", "parameters": {"city": "Paris"}}', [PARIS]),
        ('<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}', [PARIS]),
        ('{"type": "function", "name": "get_weather", "parameters": {"city": "Paris"}}', [PARIS]),
        (
            '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}; '
            '{"name": "get_time", "parameters": {}}',
            [PARIS, TIME],
        ),
        (
            '{"name": "get_weather", "arguments": {"city": "Paris"}}\n\n{"name": "get_time", "arguments": {}};\n',
            [PARIS, TIME],
        ),
        (
            '<|python_tag|>{"name": "get_time", "parameters": {}}<|python_tag|>{"name": "get_time"}',
            [TIME, TIME],
        ),
        ('I will look. {"name": "get_time", "parameters": {}} Wait.', ["I will look. ", TIME, " Wait."]),
        (f'{{"name": "edit", "parameters": {json.dumps(NESTED)}}}', [("edit", NESTED)]),
        # Other JSON and code: content.
        ('{"name": "Bob", "age": 3}', ['{"name": "Bob", "age": 3}']),
        ('{"name": "get_time"}', ['{"name": "get_time"}']),
        (
            '{"name": "f", "description": "d", "parameters": {}}',
            ['{"name": "f", "description": "d", "parameters": {}}'],
        ),
        ('if (x) { y["a"] = {}; } {{"name": 1}', ['if (x) { y["a"] = {}; } {{"name": 1}']),
        ('<|python_tag|>brave_search.call(query="x")', ['<|python_tag|>brave_search.call(query="x")']),
        ('{"name": "get_time", "parameters": {}}; or not', [TIME, "; or not"]),
        ("a <|python", ["a <|python"]),
    ],
)
def test_llama3_json(text: str, expected: list[Any]) -> None:
    check("llama3_json", text, *expected)


# Mistral


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}]', [PARIS]),
        (
            '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}, "id": "a1b2c3d4e"}, '
            '{"arguments": {}, "name": "get_time"}]</s>',
            [PARIS, TIME, "</s>"],
        ),
        ('[TOOL_CALLS]get_weather{"city": "Paris"}[TOOL_CALLS]get_time{}', [PARIS, TIME]),
        ('Sure.[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}', ["Sure.", PARIS]),
        ('[TOOL_CALLS]get_weather[CALL_ID]a1b2c3d4e[ARGS]{"city": "Paris"}', [PARIS]),
        ('[TOOL_CALLS]{"name": "get_weather", "arguments": {"city": "Paris"}}', [PARIS]),
        (f"[TOOL_CALLS]edit{json.dumps(NESTED)}", [("edit", NESTED)]),
        (f'[TOOL_CALLS] [{{"name": "edit", "arguments": {json.dumps(NESTED)}}}]', [("edit", NESTED)]),
        ("[TOOL_CALLS] hm, no", ["[TOOL_CALLS] hm, no"]),
        ('[TOOL_CALLS]f[ARGS]"no"', ['[TOOL_CALLS]f[ARGS]"no"']),
        ("[TOOL_CALLS] []", ["[TOOL_CALLS] []"]),
        ("[TOOL_CALLS]f[CALL", ["[TOOL_CALLS]f[CALL"]),
        ("[1] [TOOL", ["[1] [TOOL"]),
    ],
)
def test_mistral(text: str, expected: list[Any]) -> None:
    check("mistral", text, *expected)


# Pythonic


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[get_weather(city='Paris')]", [PARIS]),
        ('[get_weather(city="Paris"), get_time()]', [PARIS, TIME]),
        ("\n[ get_weather( city = 'Paris', ) ,\n  get_time( ) ]\n", [PARIS, TIME]),
        ("<|python_start|>[get_weather(city='Paris')]<|python_end|>", [PARIS]),
        ("One moment: <|python_start|>[get_time()]<|python_end|> Yes", ["One moment: ", TIME, " Yes"]),
        ("One moment:\n[get_time()]\nYes", ["One moment:\n", TIME, "\nYes"]),
        ("[get_time()][get_time()]", [TIME, TIME]),
        ("[a.b.c(x=1)]", [("a.b.c", {"x": 1})]),
        (
            "[f(a=-1.5e3, b=True, c=None, d=[1, (2, 3), ()], e={'k': {'l': false}, 1: 'x',}, g=(7), h=[],)]",
            [
                (
                    "f",
                    {
                        "a": -1500.0,
                        "b": True,
                        "c": None,
                        "d": [1, [2, 3], []],
                        "e": {"k": {"l": False}, "1": "x"},
                        "g": 7,
                        "h": [],
                    },
                )
            ],
        ),
        (
            r"""[f(a='it\'s \x41\u00e9\n\q', b="", c='''a'b''c"''', d=r"\n", e="é😀)]", f="\ud83d\ude00")]""",
            [("f", {"a": "it's Aé\n\\q", "b": "", "c": "a'b''c\"", "d": r"\n", "e": "é😀)]", "f": "😀"})],
        ),
        # No calls: brackets inside a line, other lists, arguments without names, expressions.
        ("See [link(s)](url) and x = [f(a=1)].", ["See [link(s)](url) and x = [f(a=1)]."]),
        ("[1, 2]\n[f(1)]\n[f(*a)]\n[f(a=b)]\n[f]\n[]", ["[1, 2]\n[f(1)]\n[f(*a)]\n[f(a=b)]\n[f]\n[]"]),
        ("[f(a=1 for x in y)]", ["[f(a=1 for x in y)]"]),
        ("[f(a=1 + 1)]", ["[f(a=1 + 1)]"]),
        ("[f(a={1, 2})]", ["[f(a={1, 2})]"]),
        ("[f(a=f'{x}')]", ["[f(a=f'{x}')]"]),
        ("[get_time(), not a call]", [TIME, ", not a call]"]),
        ("[f(a='x", ["[f(a='x"]),
    ],
)
def test_pythonic(text: str, expected: list[Any]) -> None:
    check("pythonic", text, *expected)


# Qwen3-Coder


def qwen(name: str, **values: str) -> str:
    lines = [f"<parameter={key}>\n{value}\n</parameter>" for key, value in values.items()]
    return "\n".join(["<tool_call>", f"<function={name}>", *lines, "</function>", "</tool_call>"])


CODE = '    if a < b:\n        print("</b> {\\n} </function>")\n\n'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (qwen("get_weather", city="Paris"), [PARIS]),
        (f"Well.\n{qwen('get_weather', city='Paris')}\n{qwen('get_time')}", ["Well.\n", PARIS, TIME]),
        (qwen("get_weather", city="123", days="7"), [("get_weather", {"city": "123", "days": 7})]),
        (qwen("edit", path="a.py", text=CODE), [("edit", {"path": "a.py", "text": CODE})]),
        (qwen("edit", options='{"a": [1, null]}'), [("edit", {"options": {"a": [1, None]}})]),
        (qwen("edit", options="{'a': [1, None]}"), [("edit", {"options": {"a": [1, None]}})]),
        # Values that do not fit, and those without a schema.
        (qwen("get_weather", days="a week"), [("get_weather", {"days": "a week"})]),
        (qwen("edit", options="{oops"), [("edit", {"options": "{oops"})]),
        (qwen("nope", a="1", b='["x"]', c="null"), [("nope", {"a": "1", "b": ["x"], "c": "null"})]),
        # Tags that are missing, values in the same line.
        ("<function=get_time>\n</function>", [TIME]),
        ("<function=get_weather><parameter=city>Paris</parameter></function>", [PARIS]),
        ("<tool_call><function=get_time></function><function=get_time></function></tool_call>", [TIME, TIME]),
        ("<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</tool_call>", [PARIS]),
        (
            "<tool_call>\n<function=edit>\n<parameter=path>\na\n<parameter=text>\nb\n</function>\n</tool_call>",
            [("edit", {"path": "a", "text": "b"})],
        ),
        # No calls.
        ("<tool_call>\nno", ["<tool_call>\nno"]),
        ("A <function=f> is what <function", ["A <function=f> is what <function"]),
        ("<function=f>\n<parameter=a\n>", ["<function=f>\n<parameter=a\n>"]),
        ("<function=>", ["<function=>"]),
    ],
)
def test_qwen3_coder(text: str, expected: list[Any]) -> None:
    check("qwen3_coder", text, *expected)


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "true", "true"),
        ({"type": "string"}, '"x"', '"x"'),
        ({"type": "integer"}, " 5 ", 5),
        ({"type": "integer"}, "5.0", 5),
        ({"type": "integer"}, "5.5", 5.5),
        ({"type": "integer"}, "1" * 5000, "big"),
        ({"type": "number"}, "-1e-3", -0.001),
        ({"type": "number"}, "NaN", "NaN"),
        ({"type": "boolean"}, "True", True),
        ({"type": "boolean"}, "yes", "yes"),
        ({"type": "boolean"}, "null", None),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "null"]}, "nullify", "nullify"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "None", None),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "7", 7),
        ({"type": "array"}, "[1, (2,), 'x']", [1, [2], "x"]),
        ({"type": "array"}, '{"a": 1}', '{"a": 1}'),
        ({"type": "object"}, "{'a': __import__('os')}", "{'a': __import__('os')}"),
        ({"type": "object"}, '{"a":' * 5000, '{"a":' * 5000),
        ({"enum": ["a", 1]}, "1", 1),
        ({"const": True}, "true", True),
        ({"$ref": "#/$defs/n"}, "3", 3),
        ({"$ref": "#/properties/v"}, "3", "3"),
        ({"type": 7}, "3", "3"),
        (True, "3", "3"),
    ],
)
def test_types_of_values(schema: Any, text: str, value: Any) -> None:
    parameters = {"type": "object", "properties": {"v": schema}, "$defs": {"n": {"type": "integer"}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    arguments = collect(parse("qwen3_coder", qwen("f", v=text), tools=tools)).tool_calls[0].arguments
    if value == "big":
        assert arguments == f'{{"v": {text}}}'
    else:
        assert json.loads(arguments) == {"v": value}


EDITOR: list[Tool] = [
    {
        "type": "function",
        "function": {
            "name": "edit",
            "parameters": {"type": "object", "properties": {"old": {"type": "string"}, "new": {"type": "string"}}},
        },
    }
]


VALUES_WITH_TAGS = [
    "old </parameter> new",
    "old </parameter>",
    "</parameter>\n\nfoo",
    "line\n</function>\nmore",
    "line\n<parameter=bogus>\nx",
    "line\n<parameter=\n",
    "line\n<parameter=a<b>c",
    "</parameter></parameter>",
    "<tool_call></parameter>x",
    "</para",
]


# Without <tool_call> there is nothing that must follow </function>, so that ends a value.
@pytest.mark.parametrize(
    ("value", "is_wrapped"),
    [(value, True) for value in VALUES_WITH_TAGS]
    + [(value, False) for value in VALUES_WITH_TAGS if "</function>" not in value],
)
def test_qwen3_coder_values_hold_tags(value: str, is_wrapped: bool) -> None:
    text = f"<function=edit>\n<parameter=old>\n{value}\n</parameter>\n<parameter=new>\nb\n</parameter>\n</function>"
    if is_wrapped:
        text = f"<tool_call>\n{text}\n</tool_call>"
    events = parse("qwen3_coder", text, tools=EDITOR)
    parsed = collect(events)
    assert [json.loads(call.arguments) for call in parsed.tool_calls] == [{"old": value, "new": "b"}]
    assert not parsed.content and parsed.tool_calls[0].complete
    assert parse("qwen3_coder", list(text), tools=EDITOR) == events


@pytest.mark.parametrize(
    ("root", "value"),
    [
        ({"$ref": "#/$defs/Root", "$defs": {"Root": {"properties": {"v": {"type": "integer"}}}}}, 3),
        ({"allOf": [{"properties": {"w": {}}}, {"properties": {"v": {"type": "integer"}}}]}, 3),
        ({"anyOf": [{"properties": {"v": {"type": "null"}}}, {"properties": {"v": {"type": "integer"}}}]}, 3),
        ({"additionalProperties": {"type": "integer"}}, 3),
        ({"properties": {"w": {"type": "string"}}, "additionalProperties": {"type": "integer"}}, 3),
        ({"properties": {"v": {"type": "string"}}, "additionalProperties": {"type": "integer"}}, "3"),
        ({"patternProperties": {"^[a-z]$": {"type": "integer"}}}, 3),
        ({"patternProperties": {"^[a-z]{2}$": {"type": "integer"}}}, "3"),
        ({"patternProperties": {"(?=v)v": {"type": "integer"}, "(": {}, "(a+)+$": {}}}, "3"),
        ({"$ref": "#"}, "3"),
        # Many ways to the same schema.
        ({"allOf": [{"$ref": "#"}] * 16, "properties": {"v": {"type": "integer"}}}, 3),
        ({"properties": {"v": {"anyOf": [*[{"$ref": "#/properties/v"}] * 15, {"type": "integer"}]}}}, 3),
        ({"properties": {"v": {"$ref": "#/$defs/a%20b"}}, "$defs": {"a b": {"type": "integer"}}}, 3),
    ],
)
def test_types_wherever_the_schema_declares_them(root: Any, value: Any) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": root}}]
    arguments = collect(parse("qwen3_coder", qwen("f", v="3"), tools=tools)).tool_calls[0].arguments
    assert json.loads(arguments) == {"v": value}


@pytest.mark.parametrize("tools", [[], [{}], [{"function": None}], [{"function": {"name": "f", "parameters": []}}]])
def test_tools_may_be_anything(tools: list[Tool]) -> None:
    check("qwen3_coder", qwen("f", a="1"), ("f", {"a": "1"}), tools=tools)


# All of them

EDIT = '{"name": "edit", "arguments": {"path": "a", "text": "b"}}'
COMPLETE = {
    "cohere_command3": f"<|START_ACTION|>[\n    {EDIT.replace('name', 'tool_name', 1)}\n]<|END_ACTION|>",
    "deepseek_v32": (
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="edit">\n<｜DSML｜parameter name="path" string="true">a'
        '</｜DSML｜parameter>\n<｜DSML｜parameter name="text" string="true">b</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜function_calls>"
    ),
    "deepseek_v4": (
        '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="edit">\n<｜DSML｜parameter name="path" string="true">a'
        '</｜DSML｜parameter>\n<｜DSML｜parameter name="text" string="false">"b"</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
    ),
    "deepseek_v3": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>edit\n```json\n"
        '{"path": "a", "text": "b"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
    ),
    "functiongemma": "<start_function_call>call:edit{path:<escape>a<escape>,text:<escape>b<escape>}<end_function_call>",
    "gemma4": '<|tool_call>call:edit{path:<|"|>a<|"|>,text:<|"|>b<|"|>}<tool_call|>',
    "glm45": (
        "<tool_call>edit\n<arg_key>path</arg_key>\n<arg_value>a</arg_value>\n"
        "<arg_key>text</arg_key>\n<arg_value>b</arg_value>\n</tool_call>"
    ),
    "granite": f"<|tool_call|>[{EDIT}]",
    "granite-20b-fc": f"<function_call> {EDIT}",
    "harmony": (
        "<|start|>assistant<|channel|>commentary to=functions.edit <|constrain|>json<|message|>"
        '{"path": "a", "text": "b"}<|call|>'
    ),
    "hermes": f"<tool_call>\n{EDIT}\n</tool_call>",
    "internlm": f"<|action_start|><|plugin|>\n{EDIT}<|action_end|>",
    "apriel": f"<tool_calls>[{EDIT}]</tool_calls>",
    "json_forced": '[{"name": "edit", "parameters": {"path": "a", "text": "b"}}]',
    "kimi_k2": (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.edit:0<|tool_call_argument_begin|>"
        '{"path": "a", "text": "b"}<|tool_call_end|><|tool_calls_section_end|>'
    ),
    "llama_nemotron_json": f"<TOOLCALL>[{EDIT}]</TOOLCALL>",
    "lfm2": "<|tool_call_start|>[edit(path='a', text='b')]<|tool_call_end|>",
    "llama3_json": '{"name": "edit", "parameters": {"path": "a", "text": "b"}}',
    "longcat": f"<longcat_tool_call>{EDIT}</longcat_tool_call>",
    "minimax_m2": (
        '<minimax:tool_call>\n<invoke name="edit">\n<parameter name="path">a</parameter>\n'
        '<parameter name="text">b</parameter>\n</invoke>\n</minimax:tool_call>'
    ),
    "mistral": '[TOOL_CALLS]edit[ARGS]{"path": "a", "text": "b"}',
    "olmo3": "<function_calls>\nedit(path='a', text='b')\n</function_calls>",
    "phi4_mini_json": f"functools[{EDIT}]",
    "pythonic": "[edit(path='a', text='b')]",
    "qwen3_coder": qwen("edit", path="a", text="b"),
    "seed_oss": qwen("edit", path="a", text="b").replace("tool_call>", "seed:tool_call>"),
    "xlam": f"[{EDIT}]",
}
"""A call of each format, by the first name of it."""
TRANSLATED = (
    *("deepseek_v32", "deepseek_v4", "functiongemma", "gemma4", "glm45", "lfm2", "minimax_m2", "olmo3", "pythonic"),
    *("qwen3_coder", "seed_oss"),
)
"""Formats whose arguments are not JSON."""


def test_all_are_tested() -> None:
    known = {**TOOL_PARSERS, **FORCED}
    formats = {target: name for name, target in reversed(known.items())}
    assert {known[name] for name in COMPLETE} == set(formats) and len(COMPLETE) == len(formats)


@pytest.mark.parametrize("name", COMPLETE)
def test_a_text_that_is_cut_off(name: str) -> None:
    text = COMPLETE[name]
    whole = '{"path": "a", "text": "b"}'
    for length in range(len(text) + 1):
        parsed = collect(parse(name, text[:length]))
        if not parsed.tool_calls:
            assert parsed.content == text[:length]
            continue
        [call] = parsed.tool_calls
        assert call.name == "edit"
        assert whole.startswith(call.arguments)
        assert call.complete == (call.arguments == whole)
        if name not in TRANSLATED:
            assert call.complete or text[:length].endswith(call.arguments)
            assert not parsed.content
    assert call.complete
    assert not parsed.content


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", '<tool_call>\n{"name": "edit", "arguments": {'),
        ("json_forced", '[{"name": "edit", "parameters": {'),
        ("llama3_json", '{"name": "edit", "parameters": {'),
        ("mistral", "[TOOL_CALLS]edit[ARGS]{"),
        ("mistral", '[TOOL_CALLS][{"name": "edit", "arguments": {'),
    ],
)
def test_a_brace_begins_a_call(name: str, text: str) -> None:
    parsed = collect(parse(name, text))
    assert [(call.name, call.arguments, call.complete) for call in parsed.tool_calls] == [("edit", "{", False)]
    assert not parsed.content
    assert collect(parse(name, text[:-1])).content == text[:-1]


@pytest.mark.parametrize("name", COMPLETE)
def test_arguments_are_streamed(name: str) -> None:
    parser = create_parser(None, name, TOOLS)
    pieces = [
        (type(event), position)
        for position, char in enumerate(COMPLETE[name])
        for event in parser.feed(char)
        if isinstance(event, (ToolCallStart, ToolCallArguments))
    ]
    assert pieces[0][0] is ToolCallStart
    assert pieces[0][1] < COMPLETE[name].rindex("b") - 4
    assert len(pieces) >= 3
    assert not any(isinstance(event, ToolCallArguments) for event in parser.finish())


@pytest.mark.parametrize("name", ["hermes", "json_forced", "llama3_json", "mistral"])
def test_json_is_passed_on_as_it_is(name: str) -> None:
    text = COMPLETE[name].replace('{"path": "a", "text": "b"}', '{ "path"\n:"\\u00e9\\/" ,"text":1E5}')
    assert collect(parse(name, text)).tool_calls[0].arguments == '{ "path"\n:"\\u00e9\\/" ,"text":1E5}'


@pytest.mark.parametrize(
    ("name", "text", "arguments", "content"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": [1}}</tool_call> x', '{"a": [1', "}} x"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1</tool_call> x', '{"a": 1', " x"),
        ("llama3_json", '{"name": "f", "parameters": {"a": (1)}}', '{"a": ', "(1)}}"),
        ("mistral", '[TOOL_CALLS]f{"a": {1}}', '{"a": {', "1}}"),
        ("pythonic", "[f(a=1, b=c)]", '{"a": 1', ", b=c)]"),
        ("gemma4", "<|tool_call>call:f{a:1,b}x", '{"a": 1, ', "}x"),
        ("gemma4", "<|tool_call>call:f{a:[1}]", '{"a": [1', "}]"),
        ("kimi_k2", '<|tool_call_begin|>f<|tool_call_argument_begin|>{"a": {1}}', '{"a": {', "1}}"),
        (
            "glm45",
            "<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value><arg_key>b</arg_key>x",
            '{"a": "1"',
            "<arg_key>b</arg_key>x",
        ),
        (
            "qwen3_coder",
            "<function=f>\n<parameter=a>1</parameter>\n<parameter=>2</parameter>\n</function>",
            '{"a": "1"',
            "<parameter=>2</parameter>\n</function>",
        ),
    ],
)
def test_what_is_malformed_after_the_beginning_ends_the_call(
    name: str, text: str, arguments: str, content: str
) -> None:
    events = parse(name, text)
    parsed = collect(events)
    assert [(call.arguments, call.complete) for call in parsed.tool_calls] == [(arguments, False)]
    assert parsed.content == content
    assert parse(name, list(text)) == events


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "f", "arguments": {\'a\': 1}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "[1]"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "x"}</tool_call>',
        '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "\\x", "arguments": {}}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        f'<tool_call>{{"name": "{"f" * 300}", "arguments": {{}}}}</tool_call>',
        '<tool_call>{"arguments": ' + '{"a":' * 200 + "1" + "}" * 201 + "</tool_call>",
        '<tool_call>["name"]</tool_call>',
        "<tool_call></tool_call>",
    ],
)
def test_malformed_calls_are_content(text: str) -> None:
    check("hermes", text, text)


def test_arguments_may_be_nested_but_not_forever() -> None:
    for depth, is_call in (100, True), (200, False):
        nested = '{"a":' * depth + "1" + "}" * depth
        parsed = collect(parse("hermes", f'<tool_call>{{"name": "f", "arguments": {nested}}}</tool_call>'))
        assert parsed.tool_calls[0].complete == is_call
        nested = "[" * depth + "]" * depth
        parsed = collect(parse("pythonic", f"[f(a={nested})]"))
        assert bool(parsed.tool_calls) == is_call


# The others

BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, CALL_END, SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        # Granite 3, with both tags and without one; a list that is none.
        (
            "granite",
            '<tool_call>[{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name": "get_time"}]',
            [PARIS, TIME],
        ),
        ("granite", '[{"name": "get_weather", "arguments": {"city": "Paris"}}]', [PARIS]),
        ("granite", '[1, 2] <|tool_call|>[{"name": "get_time"}]', ["[1, 2] ", TIME]),
        ("granite", '[{"name": "Bob", "age": 3}]', ['[{"name": "Bob", "age": 3}]']),
        (
            "granite-20b-fc",
            '<function_call> {"name": "get_time", "arguments": {}}\n<function_call> {"name": "get_time"}',
            [TIME, TIME],
        ),
        # Phi-4-mini: the word by itself is text.
        (
            "phi4_mini_json",
            'Ok. functools[{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name": "get_time"}]',
            ["Ok. ", PARIS, TIME],
        ),
        ("phi4_mini_json", '<|tool_call|>[{"name": "get_time", "arguments": {}}]<|/tool_call|>', [TIME]),
        ("phi4_mini_json", "import functools\nfunctools[0]", ["import functools\nfunctools[0]"]),
        ("xlam", '```json\n[{"name": "get_time", "arguments": {}}]\n```\n', [TIME]),
        ("xlam", 'See ```json\n{"a": 1}\n```', ['See ```json\n{"a": 1}\n```']),
        ("xlam", '[TOOL_CALLS][{"name": "get_time", "arguments": {}}]', [TIME]),
        (
            "cohere_command3",
            '<|START_ACTION|>[\n {"tool_call_id": "0", "tool_name": "get_weather", "parameters": {"city": "Paris"}},\n'
            ' {"tool_call_id": "1", "tool_name": "get_time", "parameters": {}}\n]<|END_ACTION|>',
            [PARIS, TIME],
        ),
        (
            "internlm",
            'Hm.<|action_start|><|plugin|>\n{"name": "get_time", "parameters": {}}<|action_end|>\n',
            ["Hm.", TIME],
        ),
        ("jamba", '<tool_calls>\n{"name": "get_time"}\n{"name": "get_time"}\n</tool_calls>', [TIME, TIME]),
        # DeepSeek: both versions, and tokens that are missing.
        (
            "deepseek_v3",
            f'Ok.{BEGIN}{CALL}function{SEP}get_weather\n```json\n{{"city": "Paris"}}\n```{CALL_END}\n'
            f"{CALL}function{SEP}get_time\n```json\n{{}}\n```{CALL_END}{END}",
            ["Ok.", PARIS, TIME],
        ),
        (
            "deepseek_v31",
            f'{BEGIN}{CALL}get_weather{SEP}{{"city": "Paris"}}{CALL_END}{CALL}get_time{SEP}{{}}{CALL_END}{END}',
            [PARIS, TIME],
        ),
        ("deepseek_v31", "<｜tool▁call▁begin｜>get_time<｜tool▁sep｜>{}", [TIME]),
        ("deepseek_v31", "<｜tool▁calls▁begin｜>no", ["<｜tool▁calls▁begin｜>no"]),
        (
            "kimi_k2",
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
            '{"city": "Paris"}<|tool_call_end|>'
            "<|tool_call_begin|>functions.get_time:1<|tool_call_argument_begin|>{}<|tool_call_end|>"
            "<|tool_calls_section_end|>",
            [PARIS, TIME],
        ),
        # GLM-4.5 with line breaks, GLM-4.7 without; a value with a tag in it.
        (
            "glm45",
            "Ok.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>\n<tool_call>get_time\n</tool_call>",
            ["Ok.\n", PARIS, TIME],
        ),
        (
            "glm47",
            "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value></tool_call><tool_call>get_time</tool_call>",
            [PARIS, TIME],
        ),
        (
            "glm45",
            "<tool_call>edit<arg_key>text</arg_key><arg_value> a</arg_value> b\n</arg_value></tool_call>",
            [("edit", {"text": " a</arg_value> b\n"})],
        ),
        ("glm45", "<tool_call> is a tag", ["<tool_call> is a tag"]),
        # Relatives of Qwen3-Coder's tags: two calls between the same tags, values with line breaks, types by the tag.
        (
            "minimax_m2",
            'Ok.\n<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Paris</parameter>\n'
            '<parameter name="days">3</parameter>\n</invoke>\n<invoke name="get_time">\n</invoke>\n'
            "</minimax:tool_call>",
            ["Ok.\n", ("get_weather", {"city": "Paris", "days": 3}), TIME],
        ),
        ("minimax_m2", "<minimax:tool_call> is a tag", ["<minimax:tool_call> is a tag"]),
        (
            "seed_oss",
            "<seed:tool_call>\n<function=get_weather>\n<parameter=city>Paris</parameter>\n</function>\n</seed:tool_call>",
            [PARIS],
        ),
        (
            "deepseek_v32",
            '<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="a" string="true">\n1\n'
            '</｜DSML｜parameter>\n<｜DSML｜parameter name="b" string="false">[1, "x"]</｜DSML｜parameter>\n'
            '<｜DSML｜parameter name="c" string="false">7</｜DSML｜parameter>\n'
            '<｜DSML｜parameter name="d" string="false">oops</｜DSML｜parameter>\n'
            "</｜DSML｜invoke>\n</｜DSML｜function_calls>",
            [("f", {"a": "\n1\n", "b": [1, "x"], "c": 7, "d": "oops"})],
        ),
        ("qwen3_coder", '<function="get_time">\n</function>', [TIME]),
        # OLMo 3 and Gemma 3: blocks without brackets.
        (
            "olmo3",
            "Ok.\n<function_calls>\nget_weather(city='Paris')\nget_time()\n</function_calls>",
            ["Ok.\n", PARIS, TIME],
        ),
        ("olmo3", "<function_calls>get_time()", [TIME]),
        ("olmo3", "[get_time()]", ["[get_time()]"]),
        ("pythonic", "```tool_code\nget_weather(city='Paris')\n```", [PARIS]),
        ("pythonic", "```tool_code\n[get_time()]\n```\nOk", [TIME, "\nOk"]),
        ("pythonic", "```tool_code\nimport x\n```", ["```tool_code\nimport x\n```"]),
        (
            "lfm2",
            "[1] <|tool_call_start|>[get_weather(city='Paris'), get_time()]<|tool_call_end|>Ok.",
            ["[1] ", PARIS, TIME, "Ok."],
        ),
    ],
)
def test_other_formats(name: str, text: str, expected: list[Any]) -> None:
    check(name, text, *expected)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", {}),
        (' city : <|"|>Pa,r}i"s\n\\<|"|> ', {"city": 'Pa,r}i"s\n\\'}),
        ("days:3,city:75001", {"days": 3, "city": "75001"}),
        (
            "a:-1.5e3,b:true,c:False,d:null,e:x y,f:007,g:",
            {"a": -1500.0, "b": True, "c": False, "d": None, "e": "x y", "f": "007", "g": ""},
        ),
        (
            'a:[],b:{},c:[1,<|"|>x<|"|>,[true],{k:<|"|><|"|>,l:2}],',
            {"a": [], "b": {}, "c": [1, "x", [True], {"k": "", "l": 2}]},
        ),
        ('<|"|>a:b<|"|>:1', {"a:b": 1}),
    ],
)
def test_gemma_arguments(arguments: str, expected: dict[str, Any]) -> None:
    for name, quote in ("gemma4", '<|"|>'), ("functiongemma", "<escape>"):
        begin, end = (
            ("<|tool_call>", "<tool_call|>") if name == "gemma4" else ("<start_function_call>", "<end_function_call>")
        )
        text = f"{begin}call:get_weather{{{arguments}}}{end}\n{begin}call:get_time{{}}{end}"
        check(name, text.replace('<|"|>', quote), ("get_weather", expected), TIME)


@pytest.mark.parametrize(
    "text", ["<|tool_call>no", "<|tool_call>call:", "<|tool_call>call:f g{}", "<|tool_call", "<|tool_call>call:{}"]
)
def test_what_is_no_gemma_call(text: str) -> None:
    check("gemma4", text, text)


def test_ids() -> None:
    text = '<tool_call>{"name": "f"}</tool_call>' * 2
    parser = create_parser(None, "hermes", TOOLS)
    ids = [call.id for call in collect([*parser.feed(text), *parser.finish()]).tool_calls]
    assert len(set(ids)) == 2
    assert all(re.fullmatch("call_[0-9a-f]{24}", id) for id in ids)
    # Mistral's templates accept no other ids, whichever parser finds the call.
    for forced, text in (False, "[TOOL_CALLS]f{}"), (True, '{"name": "f", "parameters": {}}'):
        parser = create_parser(None, "mistral", TOOLS, forced=forced)
        [call] = collect([*parser.feed(text), *parser.finish()]).tool_calls
        assert re.fullmatch("[A-Za-z0-9]{9}", call.id)


def test_names() -> None:
    for name in TOOL_PARSERS:
        resolve_tool_parser(name)
    with pytest.raises(ValueError, match="'none_such'.*hermes.*jamba, kimi_k2"):
        create_parser(None, "none_such")


def test_special_tokens() -> None:
    assert create_parser("qwen3", "mistral").special_tokens == (
        *("<think>", "</think>"),
        *("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
    )
    assert create_parser().special_tokens == ()
    assert create_parser(None, "mistral", forced=True).special_tokens == ()
