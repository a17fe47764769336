"""Translates Python and ECMAScript regular expressions to Rust's dialect, which the engine uses.

The dialects differ inside character classes: Rust has nested classes (``[a[bc]]``), set operations (``&&``, ``--``,
``~~``) and POSIX names (``[:digit:]``), which are plain characters in the others. So these are escaped.
"""

from __future__ import annotations

import re
from typing import Final

_ESCAPE: Final = re.compile(
    r"\\(?:x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|u\{[0-9A-Fa-f]+\}|U[0-9A-Fa-f]{8}|[pP]\{[^}]*\}|c[A-Za-z]|.)", re.DOTALL
)
_SPECIAL: Final = frozenset("[&~-")
"""Characters that may have a special meaning in a class in Rust."""


def translate(pattern: str) -> str:
    """Translates a pattern to Rust's dialect. A malformed pattern stays malformed, and the engine rejects it."""
    if "[" not in pattern:
        return pattern
    result: list[str] = []
    pos = 0
    while pos < len(pattern):
        char = pattern[pos]
        if char == "\\":
            escape = _escape_at(pattern, pos)
            result.append(escape)
            pos += len(escape)
        elif char == "[":
            pos = _class(pattern, pos, result)
        else:
            result.append(char)
            pos += 1
    return "".join(result)


def _class(pattern: str, pos: int, result: list[str]) -> int:
    """Translates the class that begins at ``pos``; returns the position after it."""
    start = pos
    parts = ["["]
    pos += 1
    if pattern.startswith("^", pos):
        parts.append("^")
        pos += 1
    is_first = True
    while pos < len(pattern):
        if pattern[pos] == "]" and not is_first:
            result += [*parts, "]"]
            return pos + 1
        is_first = False
        atom, pos = _atom(pattern, pos)
        parts.append(atom)
        if pattern.startswith("-", pos) and not pattern.startswith("-]", pos) and pos + 1 < len(pattern):
            atom, pos = _atom(pattern, pos + 1)
            parts += ["-", atom]
    result.append(pattern[start:])  # the class is not closed
    return pos


def _atom(pattern: str, pos: int) -> tuple[str, int]:
    """One member of a class, or one end of a range, and the position after it."""
    char = pattern[pos]
    if char == "\\":
        escape = _escape_at(pattern, pos)
        return "\\x08" if escape == "\\b" else escape, pos + len(escape)
    return f"\\{char}" if char in _SPECIAL or char == "]" else char, pos + 1


def _escape_at(pattern: str, pos: int) -> str:
    match = _ESCAPE.match(pattern, pos)
    return pattern[pos:] if match is None else match.group()
