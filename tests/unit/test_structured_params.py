"""What of a structured output's description reaches the engine, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from api.errors import RequestError
from api.params.structured import StructuredOutputsParams, grammar_spec


def schema_of(schema: Any) -> Any:
    params = StructuredOutputsParams(json=schema, disable_additional_properties=False)
    return json.loads(grammar_spec(params).text)


@pytest.mark.parametrize("name", ["password", "byte", "uri-template", "color", "int32", "no such format"])
def test_unknown_formats_are_annotations(name: str) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "format": name}}}
    assert schema_of(schema)["properties"]["a"] == {"type": "string"}
    assert schema["properties"]["a"]["format"] == name  # type: ignore[index]  # the request's own is untouched


def test_known_formats_and_properties_of_that_name_stay() -> None:
    schema = {"type": "object", "properties": {"format": {"type": "string", "format": "uuid"}}}
    assert schema_of(schema) == schema


def test_items_need_not_be_unique() -> None:
    schema = {"type": "array", "items": {"type": "array", "uniqueItems": False}, "uniqueItems": False}
    assert schema_of(schema) == {"type": "array", "items": {"type": "array"}}
    assert schema_of({"uniqueItems": True}) == {"uniqueItems": True}  # the engine refuses it


def test_patterns_are_translated() -> None:
    schema = {"properties": {"a": {"pattern": "^[^[]+$"}}, "patternProperties": {"[[x]": {}}}
    assert schema_of(schema) == {"properties": {"a": {"pattern": r"^[^\[]+$"}}, "patternProperties": {r"[\[x]": {}}}
    assert grammar_spec(StructuredOutputsParams(regex="[a&&b]")).text == r"[a\&\&b]"


@pytest.mark.parametrize(
    ("schema", "is_good"),
    [
        ({"minProperties": 2}, False),
        ({"minProperties": 1}, True),
        ({"minProperties": 2, "properties": {"a": {}}, "required": ["a"]}, True),
        ({"minProperties": 3, "properties": {"a": {}}, "required": ["a"]}, False),
        ({"minProperties": 2, "properties": {"a": {}, "b": {}}, "additionalProperties": False}, True),
        ({"minProperties": 2, "patternProperties": {"^c$": {}}, "additionalProperties": False}, False),
        ({"items": {"minProperties": 2}}, False),
    ],
)
def test_numbers_of_properties_that_one_name_could_make_up(schema: Any, is_good: bool) -> None:
    if is_good:
        schema_of(schema)
        return
    with pytest.raises(RequestError, match="minProperties . is not supported for free property names"):
        schema_of(schema)


A: dict[str, Any] = {"properties": {"a": {"type": "integer"}}}
B: dict[str, Any] = {"properties": {"b": {"type": "integer"}}}
CLOSED: dict[str, Any] = {"additionalProperties": False}


def kind(value: str, **fields: Any) -> dict[str, Any]:
    return {"properties": {"kind": {"const": value}}, "required": ["kind"], **fields}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (A, {**A, **CLOSED}),
        ({"type": ["object", "null"], **A}, {"type": ["object", "null"], **A, **CLOSED}),
        ({"type": "object"}, None),
        ({"additionalProperties": {"type": "integer"}, **A}, None),
        ({"patternProperties": {"^x": {}}, **A}, None),
        ({"unevaluatedProperties": {"type": "integer"}, **A}, None),
        ({"required": ["b"], **A}, None),
        ({"minProperties": 2, "required": ["a"], **A}, None),
        ({"properties": {"properties": A}}, {"properties": {"properties": {**A, **CLOSED}}, **CLOSED}),
        ({"enum": [A]}, None),
        ({"items": A, "prefixItems": [B]}, {"items": {**A, **CLOSED}, "prefixItems": [{**B, **CLOSED}]}),
        # one object, one schema: alternatives and references
        ({"anyOf": [A, {"type": "null"}]}, {"anyOf": [{**A, **CLOSED}, {"type": "null"}]}),
        ({"title": "t", "allOf": [{"$ref": "#"}]}, None),
        ({"$ref": "#/$defs/x", "$defs": {"x": A}}, {"$ref": "#/$defs/x", "$defs": {"x": {**A, **CLOSED}}}),
        (
            {"$ref": "#/$defs/x%20~1", "$defs": {"x /": A}},
            {"$ref": "#/$defs/x%20~1", "$defs": {"x /": {**A, **CLOSED}}},
        ),
        ({"oneOf": [kind("a"), kind("b")]}, {"oneOf": [kind("a", **CLOSED), kind("b", **CLOSED)]}),
        # one object, several schemas: each would forbid the properties of the other
        ({"allOf": [A, B]}, None),
        ({"anyOf": [A], **B}, None),
        ({"oneOf": [A, B]}, None),
        ({"oneOf": [kind("a"), kind("a")]}, None),
        ({"$ref": "#/$defs/x", "$defs": {"x": A}, **B}, None),
        (
            {"allOf": [{"$ref": "#/$defs/x"}, {"anyOf": [{"$ref": "#/$defs/x"}, B]}], "$defs": {"x": {"allOf": [A]}}},
            None,
        ),
        (
            {"properties": {"p": {"$ref": "#/$defs/x"}, "q": {"allOf": [{"$ref": "#/$defs/x"}, B]}}, "$defs": {"x": A}},
            {
                "properties": {"p": {"$ref": "#/$defs/x"}, "q": {"allOf": [{"$ref": "#/$defs/x"}, B]}},
                "$defs": {"x": A},
                **CLOSED,
            },
        ),
        # references start from the schema with an id, and may be such that only the engine can follow them
        (
            {"properties": {"p": {"$id": "x", "$ref": "#/$defs/y", "$defs": {"y": A}}}},
            {"properties": {"p": {"$id": "x", "$ref": "#/$defs/y", "$defs": {"y": {**A, **CLOSED}}}}, **CLOSED},
        ),
        ({"properties": {"p": {"$ref": "#anchor"}}}, None),
        ({"properties": {"p": {"$ref": "#/nowhere"}}}, None),
    ],
)
def test_objects_have_the_properties_that_are_listed(schema: Any, expected: Any) -> None:
    before = json.dumps(schema)
    assert json.loads(grammar_spec(StructuredOutputsParams(json=schema)).text) == (expected or schema)
    assert json.dumps(schema) == before, "the caller's schema stays as it is"
