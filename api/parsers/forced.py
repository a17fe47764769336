"""The JSON schema that forces tool calls, for ``tool_choice`` other than ``auto`` and ``none``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from api.parsers.base import MAX_DEPTH, Tool

_NO_PARAMETERS: Final[dict[str, Any]] = {"type": "object", "properties": {}, "additionalProperties": False}
_IDENTIFIERS: Final = frozenset(("$ref", "$dynamicRef", "$id", "$anchor", "$dynamicAnchor"))


def forced_tools(tools: Sequence[Tool], tool_choice: Any) -> list[Tool] | None:
    """The tools of which at least one must be called.

    Args:
        tools: The tools of a request.
        tool_choice: ``"required"``, ``{"type": "function", "function": {"name": ...}}``, or ``{"type": "allowed_tools",
            "allowed_tools": {"mode": ..., "tools": [...]}}``; any other choice forces nothing.

    Returns:
        None if nothing is forced.

    Raises:
        ValueError: The choice is malformed or names an unknown tool; the message lists the known ones.
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
            raise ValueError("allowed_tools must have a list of tools")
        found = [_tool_of(tools, tool) for tool in chosen]
        assert isinstance(allowed, Mapping)
        return found if allowed.get("mode") == "required" else None
    raise ValueError("type must be 'function' or 'allowed_tools'")


def is_single(tool_choice: Any, *, parallel_tool_calls: bool) -> bool:
    """Whether a choice asks for exactly one call, as a named function does."""
    named = isinstance(tool_choice, Mapping) and tool_choice.get("type") == "function"
    return named or not parallel_tool_calls


def forced_calls_schema(tools: Sequence[Tool], *, single: bool = False) -> dict[str, Any]:
    """The schema of the text that ``json_forced`` parses.

    Args:
        tools: The callable tools; at least one.
        single: One call instead of a list of one or more.

    Raises:
        ValueError: A tool has no name, or its parameters are not a schema or nested too deeply.
    """
    calls = [_call_schema(tool, index) for index, tool in enumerate(tools)]
    if not calls:
        raise ValueError("the list of tools is empty")
    call: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return call if single else {"type": "array", "items": call, "minItems": 1}


def _call_schema(tool: Tool, index: int) -> dict[str, Any]:
    function = tool.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        raise ValueError(f"tools[{index}] must have a function with a name")
    assert isinstance(function, Mapping)
    return {
        "title": name,  # for errors
        "type": "object",
        "properties": {"name": {"const": name}, "parameters": _arguments_schema(function.get("parameters"), index)},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def _arguments_schema(parameters: Any, index: int) -> dict[str, Any]:
    """The schema of a tool's arguments, as part of another schema. Arguments are always an object."""
    place = f"tools[{index}].function.parameters"
    if parameters is None:
        return _NO_PARAMETERS
    if parameters is True:
        return {"type": "object"}
    if not isinstance(parameters, Mapping):
        raise ValueError(f"{place} must be a JSON schema of an object")
    schema = dict(parameters)
    kind = schema.get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise ValueError(f'{place} must have the type "object"')
    schema["type"] = "object"
    if _has_identifiers(schema, MAX_DEPTH):
        # References are relative to the tool's schema, which an id makes a resource of its own (JSON Schema
        # 2020-12, 9.2). Older drafts ignore siblings of a reference.
        schema["$id"] = f"octavo:tool/{index}" if "$id" not in schema else _with_fragment_dropped(schema["$id"])
        if "$ref" in schema:
            also = schema.get("allOf")
            schema["allOf"] = [*(also if isinstance(also, list) else ()), {"$ref": schema.pop("$ref")}]
    return schema


def _with_fragment_dropped(identifier: Any) -> Any:
    """An id without the empty fragment at the end in older drafts."""
    return identifier.removesuffix("#") if isinstance(identifier, str) else identifier


def _has_identifiers(schema: Any, depth: int) -> bool:
    """Whether a schema references or names parts of itself."""
    if not depth:
        raise ValueError("a tool's JSON schema is nested too deeply")
    if isinstance(schema, list):
        parts: Iterable[Any] = schema
    elif isinstance(schema, Mapping):
        if any(isinstance(schema.get(key), str) for key in _IDENTIFIERS):
            return True
        parts = schema.values()
    else:
        return False
    return any(_has_identifiers(part, depth - 1) for part in parts)


def _tool_of(tools: Sequence[Tool], choice: Any) -> Tool:
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    by_name = {_name_of(tool): tool for tool in tools}
    if not isinstance(name, str) or name not in by_name:
        names = ", ".join(str(name) for name in by_name)
        raise ValueError(f"unknown tool {name!r}; the request has {names or 'none'}")
    return by_name[name]


def _name_of(tool: Tool) -> Any:
    function = tool.get("function")
    return function.get("name") if isinstance(function, Mapping) else None
