"""Schemas that users of servers reported: what comes is valid, or the request is refused with the reason."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from api.params.structured import StructuredOutputsParams, grammar_spec
from tests.grammars import Engine

STRING = {"type": "string"}
INTEGER = {"type": "integer"}
BUDGETS = (60, 90, 200)


def closed(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def record(names: Any, values: Any = INTEGER, **more: Any) -> dict[str, Any]:
    return {"type": "object", "propertyNames": names, "additionalProperties": values, **more}


KEPT: dict[str, Any] = {
    "an escape that only ECMAScript needs": closed(a={"type": "string", "pattern": "^hello there indeed\\!$"}),
    "escaped slashes": closed(a={"type": "string", "pattern": "^https?:\\/\\/[a-z]+\\-x$"}),
    "a long string within an object": closed(o=closed(a={"type": "string", "maxLength": 2000})),
    "a pattern within an object": closed(o=closed(a={"type": "string", "pattern": "\\S"})),
    "a pattern of two anchored halves": closed(a={"type": "string", "pattern": "^a|b$"}),
    "a pattern and a length": closed(a={"type": "string", "pattern": "^[a-z]*$", "maxLength": 4}),
    "an integer between bounds": closed(a={"type": "integer", "minimum": 1, "maximum": 5}),
    "bounds between integers": closed(a={"type": "integer", "minimum": 0.5, "maximum": 2.5}),
    "a large integer": closed(a={"type": "integer", "minimum": 10**18, "maximum": 10**18 + 5}),
    "exclusive bounds": closed(a={"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}),
    "an enum by reference": {
        "$defs": {"C": {"enum": ["sedan", "SUV"], "title": "C", "type": "string"}},
        **closed(a={"$ref": "#/$defs/C"}),
    },
    "a reference of an older draft, and more beside it": {
        "definitions": {"C": STRING},
        **closed(a={"$ref": "#/definitions/C", "description": "c", "maxLength": 3}),
    },
    "a recursive reference": {
        "$defs": {"N": {**closed(a={"anyOf": [{"$ref": "#/$defs/N"}, {"type": "null"}]})}},
        "$ref": "#/$defs/N",
    },
    "objects together": {
        "allOf": [
            {"type": "object", "properties": {"a": STRING}, "required": ["a"]},
            {"type": "object", "properties": {"b": INTEGER}, "required": ["b"]},
        ]
    },
    "an enum beyond ASCII": closed(a={"enum": ["é", "Münster", "猫\u2028", '"\\/']}),
    "a constant object": closed(a={"const": {"é": [1, {"b": None}]}}),
    "a name with escapes": closed(**{'a"b\\c\n': STRING}),
    "a type or null": closed(a={"type": ["string", "null"], "maxLength": 5}),
    "an enum with null": closed(a={"type": ["string", "null"], "enum": ["a", "b", None]}),
    "an enum of another type": closed(a={"type": "integer", "enum": [1, "x", 2]}),
    "alternatives with a discriminator": {
        "oneOf": [closed(k={"const": "a"}, v=STRING), closed(k={"const": "b"}, v=INTEGER)],
        "discriminator": {"propertyName": "k"},
    },
    "a tuple": {"type": "array", "prefixItems": [STRING, INTEGER], "items": False, "minItems": 2},
    "free objects in a list": {
        "type": "array",
        "items": closed(t=STRING, p={"type": "object", "additionalProperties": {"anyOf": [STRING, INTEGER]}}),
        "minItems": 1,
        "maxItems": 1,
    },
    "what may never be": {
        "type": "object",
        "properties": {"a": STRING, "b": {"description": "never", "not": {}}},
        "required": ["a"],
        "additionalProperties": False,
    },
    "not nothing": closed(a={"type": "string", "not": False}),
    "a record": closed(a=record({"type": "string"})),
    "names of a pattern": record({"pattern": "^[a-z]+$"}, minProperties=1),
    "names that have an x": record({"type": "string", "pattern": "x"}, True, minProperties=1),
    "names of an enum": record({"enum": ["a b", "c|d", '"', "é.*"]}, minProperties=1),
    "all names of an enum": record({"type": "string", "enum": ["a", "b"]}, required=["a", "b"]),
    "one name": record({"const": "a"}, minProperties=1),
    "names of any kind": {"type": "object", "properties": {"a": STRING}, "propertyNames": {}, "required": ["a"]},
    "nothing unevaluated": {"type": "object", "properties": {"a": STRING}, "unevaluatedProperties": False},
    "anything unevaluated": {"type": "object", "properties": {"a": STRING}, "unevaluatedProperties": True},
    "conditions without effect": {**closed(a=STRING), "then": {"required": ["b"]}, "dependentRequired": {}},
}
REFUSED: dict[str, tuple[Any, str]] = {
    "a pattern that is none": (closed(a={"type": "string", "pattern": "^a\\!$("}), "unclosed group"),
    "a pattern that looks ahead": (closed(a={"type": "string", "pattern": "^(?!x)[a-z]+$"}), "look-ahead"),
    "what may never be, but must": ({"type": "object", "properties": {"a": {"not": {}}}, "required": ["a"]}, "'a'"),
    "what must not be": (closed(a={"type": "string", "not": {"const": "a"}}), "not supported: not"),
    "a condition": ({"if": {"required": ["a"]}, "then": {"required": ["b"]}}, "not supported: if"),
    "long names": (record({"minLength": 3}), "not supported: propertyNames"),
    "names of a pattern beside others": (
        {"properties": {"a": STRING}, "propertyNames": {"pattern": "^b"}},
        "not supported: propertyNames",
    ),
    "no name": (record({"enum": []}), "not supported: propertyNames"),
    "nothing unevaluated of several": (
        {"allOf": [{"properties": {"a": STRING}}], "unevaluatedProperties": False},
        "not supported: unevaluatedProperties",
    ),
    "bounds that cross": (closed(a={"type": "integer", "minimum": 5, "maximum": 1}), "'a'"),
}


def test_what_comes_is_valid() -> None:
    with Engine() as engine:
        for number, schema in enumerate(KEPT.values()):
            for place, budget in enumerate(BUDGETS):
                engine.add(number * 10 + place, grammar_spec(StructuredOutputsParams(json=schema)), budget)
        engine.run()
        for number, (name, schema) in enumerate(KEPT.items()):
            for place in range(len(BUDGETS)):
                index = number * 10 + place
                assert engine.errors[index] == (None, None), name
                jsonschema.Draft202012Validator(schema).validate(json.loads(engine.text(index)))


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named(name: str) -> None:
    schema, message = REFUSED[name]
    with Engine() as engine:
        engine.add(1, grammar_spec(StructuredOutputsParams(json=schema)))
        engine.run()
        text, param = engine.errors[1]
        assert text is not None and message in text
        assert param == "structured_outputs" and not engine.tokens.get(1)
