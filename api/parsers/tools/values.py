"""Converts arguments that a model writes as plain text to JSON, using the types in the tool's schema."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final
from urllib.parse import unquote

from api.parsers.base import Tool
from api.parsers.json_text import json_string, kind_of
from api.parsers.python_literal import to_json
from api.stop_regex import StopRegexChecker, StopRegexError

_TYPES: Final = frozenset(("string", "number", "integer", "boolean", "object", "array", "null"))
_NAMES: Final = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object", list: "array"}
_MAX_HOPS: Final = 16
_END: Final = "\0"
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

        Text that does not fit its type becomes a string. Without a type, only objects and lists are converted; all
        other text becomes a string.

        Args:
            function: Name of the tool.
            parameter: Name of the argument.
            text: The value as the model wrote it.
        """
        types = self.types(function, parameter) or {"object", "array", "string"}
        return json_string(text) if types == {"string"} else _convert(text, types)

    def types(self, function: str, parameter: str) -> set[str]:
        """The types that a tool's schema allows for an argument; empty if it declares none."""
        root = self._schemas.get(function)
        types = set[str]()
        seen = set[int]()
        for schema in _property_schemas(root, parameter, root, _MAX_HOPS, set()):
            types |= _types(schema, root, _MAX_HOPS, seen)
        return types

    def may_have(self, function: str, parameter: str) -> bool:
        """Whether a tool has a parameter; true if its schema is unknown."""
        root = self._schemas.get(function)
        return not isinstance(root, Mapping) or bool(_property_schemas(root, parameter, root, _MAX_HOPS, set()))


def _property_schemas(schema: Any, name: str, root: Any, hops: int, seen: set[int]) -> list[Any]:
    """All schemas that an object's schema declares for a property; see ``_types``."""
    if not isinstance(schema, Mapping) or not hops or id(schema) in seen:
        return []
    seen.add(id(schema))
    found = []
    properties = schema.get("properties")
    if isinstance(properties, Mapping) and name in properties:
        found.append(properties[name])
    patterns = schema.get("patternProperties")
    if isinstance(patterns, Mapping):
        found += [patterns[pattern] for pattern in list(patterns)[:_MAX_HOPS] if _matches(pattern, name)]
    if not found and isinstance(schema.get("additionalProperties"), Mapping):
        found.append(schema["additionalProperties"])
    for key in ("allOf", "anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            for part in schema[key][:_MAX_HOPS]:
                found += _property_schemas(part, name, root, hops - 1, seen)
    if "$ref" in schema:
        found += _property_schemas(_resolve(schema["$ref"], root), name, root, hops - 1, seen)
    return found


def _matches(pattern: Any, name: str) -> bool:
    """Whether a pattern matches somewhere in a name, in time linear in the name."""
    if not isinstance(pattern, str):
        return False
    if pattern.endswith("$") and not pattern.endswith("\\$"):
        # The checker does not support ``$``, so a character that no name contains stands for the end.
        pattern, name = pattern[:-1] + _END, name + _END
    try:
        checker = StopRegexChecker((), (pattern,), False)
    except StopRegexError:
        return False
    return checker.feed(name)[1] is not None


def _types(schema: Any, root: Any, hops: int, seen: set[int]) -> set[str]:
    """The types that a schema allows, as far as can be determined; empty if it declares none.

    Args:
        schema: A schema, or part of one.
        root: The schema that references are relative to.
        hops: Maximum depth.
        seen: Ids of the schemas already visited. References may be circular, and several may lead to one schema: to
            follow each of them would take exponential time.
    """
    if not isinstance(schema, Mapping) or not hops or id(schema) in seen:
        return set()
    seen.add(id(schema))
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
            found = [_types(part, root, hops - 1, seen) for part in schema[key][:_MAX_HOPS]]
            return set[str]().union(*found)
    return _types(_resolve(schema.get("$ref"), root), root, hops - 1, seen)


def _resolve(reference: Any, root: Any) -> Any:
    if reference == "#":
        return root
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return None
    target = root
    for key in unquote(reference[2:]).split("/"):
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
        # Models sometimes write Python literals instead of JSON.
        json = to_json(value)
        if json is not None and kind_of(json) in types & {"object", "array"}:
            return json
    return json_string(text)
