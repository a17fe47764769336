"""Closes the objects of a JSON schema: those that declare their properties allow no others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

_SAME_PLACE = ("allOf", "anyOf", "oneOf")
"""Lists of schemas for the same value."""
_APPLICATORS = frozenset((*_SAME_PLACE, "$ref", "$dynamicRef", "if", "not", "dependentSchemas"))
_ABOUT_OBJECTS = frozenset(
    (
        "properties",
        "patternProperties",
        "additionalProperties",
        "unevaluatedProperties",
        "propertyNames",
        "required",
        "minProperties",
        "maxProperties",
        "dependentRequired",
    )
)
_SAYS_WHICH_OTHERS = frozenset(
    ("patternProperties", "additionalProperties", "unevaluatedProperties", "propertyNames", "dependentRequired")
)
_VALUES = ("const", "enum", "default", "examples")
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")

Schema = dict[str, Any]


def close_objects(schema: Schema) -> None:
    """Adds ``additionalProperties: false`` wherever a schema lists properties and does not say what others may be.

    It closes no object that another schema describes too (``allOf``, keywords beside ``$ref``, ``oneOf`` without a
    property that tells its alternatives apart), because each of them would forbid the properties of the other. So
    whatever the result accepts, the schema accepts.
    """
    parts = list(_subschemas(schema))
    bases = {id(part): base for part, base in parts}
    open_parts: list[Schema] = []
    for part, base in parts:
        found = _same_place(part, base)
        if found is None:
            return  # a reference that only the engine can follow
        if _is_combined(part) or ("oneOf" in part and not _are_told_apart(part["oneOf"], base)):
            open_parts += found
    is_open: set[int] = set()
    while open_parts:
        part = open_parts.pop()
        if id(part) not in is_open:
            is_open.add(id(part))
            open_parts += _same_place(part, bases.get(id(part), schema)) or ()
    for part, _ in parts:
        if id(part) not in is_open and _may_close(part):
            part["additionalProperties"] = False


def _may_close(part: Schema) -> bool:
    properties = part.get("properties")
    if not isinstance(properties, dict) or part.keys() & (_APPLICATORS | _SAYS_WHICH_OTHERS):
        return False
    required, least = part.get("required"), part.get("minProperties")
    return not (isinstance(required, list) and any(name not in properties for name in required)) and not (
        isinstance(least, (int, float)) and least > len(properties)
    )


def _is_combined(part: Schema) -> bool:
    """Whether several schemas describe the same object."""
    applicators = part.keys() & _APPLICATORS
    several = len(applicators) > 1 or (isinstance(part.get("allOf"), list) and len(part["allOf"]) > 1)
    return several or bool(applicators and part.keys() & _ABOUT_OBJECTS)


def _same_place(part: Schema, base: Schema) -> list[Schema] | None:
    """Schemas that a schema applies to its own value; None if a reference cannot be followed."""
    found = [inner for key in _SAME_PLACE if isinstance(part.get(key), list) for inner in part[key]]
    if isinstance(part.get("dependentSchemas"), dict):
        found += part["dependentSchemas"].values()
    if "$dynamicRef" in part:
        return None
    if "$ref" in part:
        target = _target(part["$ref"], base)
        if target is None:
            return None
        found.append(target)
    return [inner for inner in found if isinstance(inner, dict)]


def _are_told_apart(alternatives: Any, base: Schema) -> bool:
    """Whether the alternatives require a property whose allowed values differ, as discriminated unions do."""
    if not isinstance(alternatives, list) or not alternatives:
        return False
    tables = [_required_values(alternative, base) for alternative in alternatives]
    shared = set(tables[0]).intersection(*tables[1:])
    return any(
        len(set().union(*(table[name] for table in tables))) == sum(len(table[name]) for table in tables)
        for name in shared
    )


def _required_values(schema: Any, base: Schema) -> dict[str, set[str]]:
    """The allowed values, as JSON, of each required property that lists them."""
    if isinstance(schema, dict) and "$ref" in schema:
        schema = _target(schema["$ref"], base)
    properties = schema.get("properties") if isinstance(schema, dict) else None
    required = schema.get("required") if isinstance(schema, dict) else None
    if not isinstance(properties, dict) or not isinstance(required, list):
        return {}
    values = {}
    for name, value in properties.items():
        if name in required and isinstance(value, dict):
            allowed = [value["const"]] if "const" in value else value.get("enum")
            if isinstance(allowed, list):
                values[name] = {json.dumps(one) for one in allowed}
    return values


def _target(reference: Any, base: Schema) -> Schema | None:
    """What a reference within the schema (``#/$defs/name``) points to."""
    if not isinstance(reference, str) or reference[:1] != "#" or (len(reference) > 1 and reference[1] != "/"):
        return None
    value: Any = base
    for step in reference.split("/")[1:]:
        name = unquote(step).replace("~1", "/").replace("~0", "~")
        if isinstance(value, list) and name.isdigit() and int(name) < len(value):
            value = value[int(name)]
        elif isinstance(value, dict) and name in value:
            value = value[name]
        else:
            return None
    return value if isinstance(value, dict) else {}


def _subschemas(schema: Schema) -> Iterator[tuple[Schema, Schema]]:
    """Yields a schema and all its subschemas, each with the schema that its references start from."""
    pending: list[tuple[Any, Schema, bool]] = [(schema, schema, True)]
    while pending:
        value, base, is_schema = pending.pop()
        if isinstance(value, list):
            pending += [(inner, base, True) for inner in value]
        elif isinstance(value, dict):
            if is_schema:
                base = value if isinstance(value.get("$id"), str) else base
                yield value, base
            pending += [
                (inner, base, not is_schema or name not in _BY_NAME)
                for name, inner in value.items()
                if not is_schema or name not in _VALUES
            ]
