"""JSON of values that a model writes as plain text, by the types that a tool's schema gives them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from api.parsers.base import Tool
from api.parsers.json_text import json_string, kind_of
from api.parsers.python_literal import to_json

_TYPES: Final = frozenset(("string", "number", "integer", "boolean", "object", "array", "null"))
_NAMES: Final = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object", list: "array"}
_MAX_HOPS: Final = 16
_INTEGER: Final = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.0+)?")
_WORDS: Final = {"true": "true", "false": "false", "null": "null", "none": "null"}


class Parameters:
    """The parameters of the tools of a request."""

    def __init__(self, tools: Iterable[Tool]) -> None:
        functions = [tool.get("function") for tool in tools]
        self._schemas: dict[Any, Any] = {
            function.get("name"): function.get("parameters") for function in functions if isinstance(function, Mapping)
        }

    def json(self, function: str, parameter: str, text: str) -> str:
        """The JSON of an argument.

        What does not fit its type, or has none, is a string; without a type, an object or list is one, too.

        Args:
            function: The name of the tool.
            parameter: The name of the argument.
            text: As the model wrote it.
        """
        root = self._schemas.get(function)
        properties = root.get("properties") if isinstance(root, Mapping) else None
        schema = properties.get(parameter) if isinstance(properties, Mapping) else None
        types = _types(schema, root, _MAX_HOPS) or {"object", "array", "string"}
        return json_string(text) if types == {"string"} else _convert(text, types)


def _types(schema: Any, root: Any, hops: int) -> set[str]:
    """The types that a schema allows, as far as can be told; none if it does not say.

    Args:
        schema: A schema, or part of one.
        root: What references are relative to.
        hops: How deep to look: references may lead in circles.
    """
    if not isinstance(schema, Mapping) or not hops:
        return set()
    declared = schema.get("type")
    if declared is not None:
        names = declared if isinstance(declared, list) else [declared]
        return {name for name in names if isinstance(name, str)} & _TYPES
    for key in ("enum", "const"):
        if key in schema:
            values = schema[key] if key == "enum" and isinstance(schema[key], list) else [schema[key]]
            return {_NAMES.get(type(value), "null") for value in values}
    for key in ("anyOf", "oneOf", "allOf"):
        if isinstance(schema.get(key), list):
            found = [_types(part, root, hops - 1) for part in schema[key][:_MAX_HOPS]]
            return set[str]().union(*found)
    return _types(_resolve(schema.get("$ref"), root), root, hops - 1)


def _resolve(reference: Any, root: Any) -> Any:
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return None
    target = root
    for key in reference[2:].split("/"):
        target = target.get(key.replace("~1", "/").replace("~0", "~")) if isinstance(target, Mapping) else None
    return target


def _convert(text: str, types: set[str]) -> str:
    value = text.strip()
    word = _WORDS.get(value.lower())
    if word == "null" and ("null" in types or "string" not in types):
        return word
    if word in ("true", "false") and "boolean" in types:
        return word
    if "integer" in types and _INTEGER.fullmatch(value):
        return value.partition(".")[0]
    kind = kind_of(value)
    if kind == "number" and types & {"number", "integer"}:
        return value
    if types & {"object", "array"}:
        if kind in types:
            return value
        # Models know that Python's literals are not JSON, but not always.
        json = to_json(value)
        if json is not None and kind_of(json) in types & {"object", "array"}:
            return json
    return json_string(text)
