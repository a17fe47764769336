"""Estimates the cost of a grammar from its text: which are certainly cheap, and which nest too deeply.

A grammar that is not known to be cheap is first compiled in a helper process (``trial.py``), so this may be
conservative, but it must never call an expensive grammar cheap.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from engine_core.messages import GrammarSpec
from engine_core.structured.grammar import GrammarError

MAX_REFERENCE_DEPTH = 1024
"""Deepest nesting of objects and lists, references followed: each level takes up to 4 KiB of stack to compile."""

_CHEAP_BYTES = 16 << 10
_CHEAP_NODES = 2000
_CHEAP_DEPTH = 96
_CHEAP_PATTERN_CHARS = 200
_CHEAP_COUNT = 1000
"""Bound on the product of the counts in a pattern, and on its sum over a schema, since a matching text is searched for,
too."""
_CHEAP_LENGTH = 10_000
_CHEAP_MIN_LENGTH = 1000
_CHEAP_MIN_ITEMS = 256
"""Bound on the product of required counts, since an output is completed with them."""
_CHEAP_BRANCHES = 128
_CHEAP_BRANCHES_TO_MERGE = 8
"""Bound on alternatives in a schema that also has ``allOf``, which multiplies them."""

_COUNT = re.compile(r"\{(\d*),?(\d*)\}")
_UNBOUNDED = ("maxLength", "maxItems", "maxProperties")
_LEAST = ("minItems", "minProperties", "minContains")
_COSTLY = (
    *("not", "if", "multipleOf", "dependentSchemas", "unevaluatedProperties", "unevaluatedItems", "contains"),
    *("$anchor", "$dynamicRef", "$recursiveRef"),
)


def is_cheap(spec: GrammarSpec) -> bool:
    """Whether a grammar is known to compile and compute its first mask within about 50 ms and little memory.

    Raises:
        GrammarError: The schema is known to nest too deeply.
    """
    if spec.kind == "regex":
        return _is_cheap_pattern(spec.text)
    if spec.kind == "choice":
        return len(spec.text) <= _CHEAP_BYTES
    if spec.kind != "json" or (spec.whitespace_pattern is not None and not _is_cheap_pattern(spec.whitespace_pattern)):
        return False
    try:
        schema = json.loads(spec.text)
    except (ValueError, RecursionError):
        schema = None
    if not isinstance(schema, dict):
        return True  # cheap, or rejected before anything is compiled
    depth = reference_depth(schema)
    if depth > MAX_REFERENCE_DEPTH:
        raise GrammarError(
            f"is {depth} levels deep with references followed; at most {MAX_REFERENCE_DEPTH} are supported"
        )
    return len(spec.text) <= _CHEAP_BYTES and depth <= _CHEAP_DEPTH and _is_cheap_schema(schema)


def _is_cheap_pattern(pattern: str) -> bool:
    return _pattern_cost(pattern) <= _CHEAP_COUNT


def _pattern_cost(pattern: str) -> float:
    """The product of a pattern's counts; infinite if it is too long to analyse."""
    if len(pattern) > _CHEAP_PATTERN_CHARS:
        return math.inf
    product = 1
    for least, most in _COUNT.findall(pattern):
        if len(least) > 6 or len(most) > 6:
            return math.inf
        product *= max(int(least or 1), int(most or 1), 1)
    return product


def _is_cheap_schema(schema: Any) -> bool:
    num_nodes = num_branches = num_merged = 0
    least = 1
    pattern_cost = 0.0
    pending = [schema]
    while pending:
        node = pending.pop()
        num_nodes += 1
        if num_nodes > _CHEAP_NODES:
            return False
        if isinstance(node, list):
            pending += node
        if not isinstance(node, dict):
            continue
        pending += node.values()
        if any(key in node for key in _COSTLY) or ("$id" in node and node is not schema):
            return False
        if "$ref" in node and _target(node["$ref"], schema) is None:
            return False
        if any(_number(node.get(key)) > _CHEAP_LENGTH for key in _UNBOUNDED):
            return False
        if _number(node.get("minLength")) > _CHEAP_MIN_LENGTH:
            return False
        least *= math.prod(max(1, _number(node.get(key))) for key in _LEAST)
        patterns = node.get("patternProperties")
        for pattern in (node.get("pattern"), *(patterns if isinstance(patterns, dict) else ())):
            if isinstance(pattern, str):
                pattern_cost += _pattern_cost(pattern)
        if pattern_cost > _CHEAP_COUNT:
            return False
        num_branches += sum(len(node[key]) for key in ("anyOf", "oneOf") if isinstance(node.get(key), list))
        num_merged += len(node["allOf"]) if isinstance(node.get("allOf"), list) else 0
    limit = _CHEAP_BRANCHES_TO_MERGE if num_merged else _CHEAP_BRANCHES
    return least <= _CHEAP_MIN_ITEMS and num_branches <= limit and num_merged <= _CHEAP_BRANCHES_TO_MERGE


def _number(value: Any) -> int:
    """A count in a schema, clamped to a large number; 0 if missing."""
    return int(min(value, 1 << 30)) if isinstance(value, (int, float)) and value > 0 else 0


def reference_depth(schema: Any) -> int:
    """Nesting depth of a schema on the path that a compiler takes: it follows local references, each target once."""
    entered: set[int] = {id(schema)}
    stack = [(schema, iter(_inner(schema, schema)))]
    deepest = 1
    while stack:
        _, parts = stack[-1]
        part = next(parts, None)
        if part is None:
            stack.pop()
        elif id(part) not in entered:
            entered.add(id(part))
            stack.append((part, iter(_inner(part, schema))))
            deepest = max(deepest, len(stack))
    return deepest


def _inner(node: Any, root: Any) -> list[Any]:
    """The objects and lists inside a node, and its reference's target; definitions count where they are used."""
    if isinstance(node, list):
        return [item for item in node if isinstance(item, (dict, list))]
    inner = [
        value
        for key, value in node.items()
        if isinstance(value, (dict, list)) and key not in ("$defs", "definitions", "enum", "const", "examples")
    ]
    target = _target(node.get("$ref"), root)
    return inner if target is None else [*inner, target]


def _target(reference: Any, root: Any) -> Any:
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    node = root
    for part in reference[1:].split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, dict) and name in node:
            node = node[name]
        elif isinstance(node, list) and name.isdecimal() and int(name[:9]) < len(node):
            node = node[int(name[:9])]
        else:
            return None
    return node if isinstance(node, (dict, list)) else None
