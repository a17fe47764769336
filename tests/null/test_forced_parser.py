"""Tool calls that a grammar forces: its schema, and the parser of what it lets through."""

from __future__ import annotations

import json
from typing import Any

import pytest

from api.parsers import forced_calls_schema, forced_tools, is_single
from tests.null.test_tool_parsers import COMPLETE, PARIS, TIME, TOOLS, check, tool

NODE: dict[str, Any] = {
    "type": "object",
    "properties": {
        "value": {"$ref": "#/$defs/value"},
        "next": {"$ref": "#"},
        "$ref": {"type": "string", "default": {"$ref": "#"}},
    },
    "$defs": {"value": {"type": "integer"}},
}
NODE_TOOL: dict[str, Any] = {"type": "function", "function": {"name": "node", "parameters": NODE}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[{"name": "get_weather", "parameters": {"city": "Paris"}}]', [PARIS]),
        ('{"name": "get_weather", "parameters": {"city": "Paris"}}', [PARIS]),
        (
            ' [\n {"name": "get_weather", "parameters": {"city": "Paris"}},\n '
            '{"name": "get_time", "parameters": {}}\n]\n',
            [PARIS, TIME],
        ),
        ("no", ["no"]),
        ('[{"name": "get_time", "parameters": {}}, ', [TIME, ", "]),
        ('{"name": "get_time", "parameters": {}} [', [TIME, " ["]),
    ],
)
def test_parser(text: str, expected: list[Any]) -> None:
    check("json_forced", text, *expected)
    check("hermes", text, *expected, forced=True)


def test_who_is_forced() -> None:
    weather, edit, time = TOOLS
    assert forced_tools(TOOLS, "required") == TOOLS
    assert forced_tools(TOOLS, named("edit")) == [edit]
    allowed = {"mode": "required", "tools": [named("get_time"), named("edit")]}
    assert forced_tools(TOOLS, {"type": "allowed_tools", "allowed_tools": allowed}) == [time, edit]
    for choice in ("auto", "none", None, {"type": "allowed_tools", "allowed_tools": {**allowed, "mode": "auto"}}):
        assert forced_tools(TOOLS, choice) is None


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (named("nope"), "'nope'.* get_weather, edit, get_time"),
        ({"type": "function"}, "unknown tool None"),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}, "must have a list"),
        ({"type": "allowed_tools"}, "must have a list"),
        ({}, "must be 'function' or"),
    ],
)
def test_bad_choices(choice: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        forced_tools(TOOLS, choice)


def test_single() -> None:
    assert is_single(named("edit"), parallel_tool_calls=True)
    assert is_single("required", parallel_tool_calls=False)
    assert not is_single("required", parallel_tool_calls=True)


def test_schema() -> None:
    calls = [
        {
            "title": tool["function"]["name"],
            "type": "object",
            "properties": {"name": {"const": tool["function"]["name"]}, "parameters": tool["function"]["parameters"]},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for tool in TOOLS
    ]
    assert forced_calls_schema(TOOLS) == {"type": "array", "items": {"anyOf": calls}, "minItems": 1}
    assert forced_calls_schema(TOOLS, single=True) == {"anyOf": calls}
    assert forced_calls_schema(TOOLS[:1], single=True) == calls[0]
    without = forced_calls_schema([{"function": {"name": "f"}}], single=True)
    assert without["properties"]["parameters"] == {"type": "object", "properties": {}, "additionalProperties": False}


def test_references_stay_within_their_tool() -> None:
    schema = forced_calls_schema([*TOOLS, NODE_TOOL])
    parameters = schema["items"]["anyOf"][3]["properties"]["parameters"]
    assert parameters == {**NODE, "$id": "octavo:tool/3"}
    assert "$id" not in NODE  # the request's own is untouched


@pytest.mark.parametrize(
    "tools",
    [
        [],
        [{}],
        [{"function": {"name": ""}}],
        *([{"function": {"name": "f", "parameters": bad}}] for bad in ([1], False, {"type": "string"})),
    ],
)
def test_bad_tools(tools: list[Any]) -> None:
    with pytest.raises(ValueError, match="tool"):
        forced_calls_schema(tools)


def test_schemas_may_not_be_nested_forever() -> None:
    schema: Any = {}
    for _ in range(1000):
        schema = {"not": schema}
    with pytest.raises(ValueError, match="nested too deeply"):
        forced_calls_schema([tool("f", a=schema)])


def accepts(tools: list[Any], text: str, single: bool = False) -> bool:
    """Whether the grammar of forced calls takes a text."""
    llguidance = pytest.importorskip("llguidance")
    tokenizer = llguidance.LLTokenizer("byte")
    schema = forced_calls_schema(tools, single=single)
    grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema))
    matcher = llguidance.LLMatcher(tokenizer, grammar)
    assert not matcher.is_error(), matcher.get_error()
    return bool(matcher.consume_tokens(list(text.encode())) and matcher.is_accepting())


def test_the_grammar_takes_the_schema() -> None:
    tools = [*TOOLS, NODE_TOOL]
    assert accepts(tools, COMPLETE["json_forced"])
    assert accepts(tools, '[{"name": "node", "parameters": {"value": 1, "next": {"value": 2}}}]')
    assert not accepts(tools, '[{"name": "node", "parameters": {"value": 1, "next": {"value": "x"}}}]')
    assert not accepts(tools, "[]")
    assert not accepts(tools, '[{"name": "nope", "parameters": {}}]')
    assert accepts(tools, '{"name": "get_time", "parameters": {}}', single=True)


INTEGER: dict[str, Any] = {"type": "integer"}


@pytest.mark.parametrize(
    ("parameters", "takes_any"),
    [
        (True, True),
        ({}, True),
        ({"properties": {"a": INTEGER}}, False),
        ({"type": ["object", "null"], "properties": {"a": INTEGER}}, False),
        ({"anyOf": [{"properties": {"a": INTEGER}}, {"type": "array"}]}, False),
        ({"$ref": "#/$defs/r", "$defs": {"r": {"properties": {"a": INTEGER}}}}, False),
        ({"$ref": "#r", "$defs": {"r": {"$anchor": "r", "properties": {"a": INTEGER}}}}, False),
        ({"$id": "https://x.org/f", "properties": {"a": {"$ref": "#/$defs/r"}}, "$defs": {"r": INTEGER}}, False),
        (
            {"$id": "https://x.org/f#", "properties": {"a": {"$ref": "/r"}}, "$defs": {"r": {"$id": "/r", **INTEGER}}},
            False,
        ),
        (
            {
                "$schema": "http://json-schema.org/draft-07/schema#",
                "$ref": "#/definitions/r",
                "definitions": {"r": {"properties": {"a": INTEGER}}},
            },
            False,
        ),
    ],
)
def test_arguments_are_an_object_whatever_their_schema_leaves_open(parameters: Any, takes_any: bool) -> None:
    tools = [{"function": {"name": "f", "parameters": parameters}}, NODE_TOOL]
    for arguments, is_good in (
        ('{"a": 1}', True),
        ('{"a": "x"}', takes_any),
        ("[1]", False),
        ("3", False),
        ('"x"', False),
        ("null", False),
    ):
        assert accepts(tools, f'[{{"name": "f", "parameters": {arguments}}}]') == is_good, arguments
    assert accepts(tools, '[{"name": "node", "parameters": {"value": 1}}]')
