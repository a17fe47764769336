"""The JSON schema that makes a model call tools, for ``tool_choice`` other than ``auto`` and ``none``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from api.parsers.base import MAX_DEPTH, Tool

_NO_PARAMETERS: Final[dict[str, Any]] = {"type": "object", "properties": {}, "additionalProperties": False}
_VALUES: Final = frozenset(("const", "default", "enum", "examples"))
"""Keywords whose value is no schema."""
_BY_NAME: Final = frozenset(("$defs", "definitions", "dependentSchemas", "patternProperties", "properties"))
"""Keywords whose value has schemas by name."""


def forced_tools(tools: Sequence[Tool], tool_choice: Any) -> list[Tool] | None:
    """The tools one of which must be called.

    Args:
        tools: The tools of a request.
        tool_choice: ``"required"``, ``{"type": "function", "function": {"name": ...}}``, or ``{"type": "allowed_tools",
            "allowed_tools": {"mode": ..., "tools": [...]}}``; any other choice forces nothing.

    Returns:
        None if nothing is forced.

    Raises:
        ValueError: The choice is malformed, or names no tool of the request; the text lists those that there are.
    """
    if tool_choice == "required":
        return list(tools)
    if not isinstance(tool_choice, Mapping):
        return None
    if tool_choice.get("type") == "function":
        return [_tool_of(tools, tool_choice)]
    if tool_choice.get("type") == "allowed_tools":
        allowed = tool_choice.get("allowed_tools")
        chosen = allowed.get("tools") if isinstance(allowed, Mapping) else None
        if not isinstance(chosen, list) or not chosen:
            raise ValueError("allowed_tools has no list of tools")
        found = [_tool_of(tools, tool) for tool in chosen]
        assert isinstance(allowed, Mapping)
        return found if allowed.get("mode") == "required" else None
    raise ValueError("type is neither 'function' nor 'allowed_tools'")


def is_single(tool_choice: Any, *, parallel_tool_calls: bool) -> bool:
    """Whether a choice asks for exactly one call: that of a function by name does."""
    named = isinstance(tool_choice, Mapping) and tool_choice.get("type") == "function"
    return named or not parallel_tool_calls


def forced_calls_schema(tools: Sequence[Tool], *, single: bool = False) -> dict[str, Any]:
    """The schema of what ``json_forced`` parses.

    Args:
        tools: Those that may be called; at least one.
        single: One call, rather than a list of one or more.

    Raises:
        ValueError: A tool has no name, or parameters that are no schema or too deep.
    """
    definitions: dict[str, Any] = {}
    calls = [_call_schema(tool, index, definitions) for index, tool in enumerate(tools)]
    if not calls:
        raise ValueError("there are no tools to call")
    call: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    schema = call if single else {"type": "array", "items": call, "minItems": 1}
    return {**schema, "$defs": definitions} if definitions else schema


def _call_schema(tool: Tool, index: int, definitions: dict[str, Any]) -> dict[str, Any]:
    function = tool.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        raise ValueError(f"tools[{index}] has no function with a name")
    assert isinstance(function, Mapping)
    parameters = function.get("parameters")
    if parameters is None:
        parameters = _NO_PARAMETERS
    if not isinstance(parameters, (Mapping, bool)):
        raise ValueError(f"tools[{index}].function.parameters is no JSON schema")
    references: list[str] = []
    # A reference is relative to the root, which the tool's schema is no longer: it gets a place that can be named.
    place = f"tool{index}"
    parameters = _moved(parameters, f"#/$defs/{place}", references, MAX_DEPTH)
    if references:
        definitions[place] = parameters
        parameters = {"$ref": f"#/$defs/{place}"}
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "parameters": parameters},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def _moved(schema: Any, root: str, references: list[str], depth: int) -> Any:
    """A copy of a schema whose references begin at ``root``; they are added to ``references``."""
    if not depth:
        raise ValueError("a tool's JSON schema is nested too deeply")
    if isinstance(schema, list):
        return [_moved(item, root, references, depth - 1) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    result: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str) and value.startswith("#"):
            references.append(value)
            value = root + value[1:]
        elif key in _BY_NAME and isinstance(value, Mapping):
            value = {name: _moved(item, root, references, depth - 1) for name, item in value.items()}
        elif key not in _VALUES:
            value = _moved(value, root, references, depth - 1)
        result[key] = value
    return result


def _tool_of(tools: Sequence[Tool], choice: Any) -> Tool:
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    by_name = {_name_of(tool): tool for tool in tools}
    if not isinstance(name, str) or name not in by_name:
        names = ", ".join(str(name) for name in by_name)
        raise ValueError(f"{name!r} is not the name of a tool; there are {names or 'none'}")
    return by_name[name]


def _name_of(tool: Tool) -> Any:
    function = tool.get("function")
    return function.get("name") if isinstance(function, Mapping) else None
