"""What of a structured output's description reaches the engine, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from api.errors import RequestError
from api.params.structured import StructuredOutputsParams, grammar_spec


def schema_of(schema: Any) -> Any:
    return json.loads(grammar_spec(StructuredOutputsParams(json=schema)).text)


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
