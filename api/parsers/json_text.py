"""Incremental scanning of JSON as models write it."""

from __future__ import annotations

import json
import re
from enum import Enum, auto
from typing import Any, Final

from api.parsers.base import MAX_DEPTH

_CLOSERS: Final = {"{": "}", "[": "]"}
_ESCAPES: Final = {chr(code): f"u{code:04x}" for code in range(0x20)} | {"\n": "n", "\r": "r", "\t": "t"}
_IN_STRING: Final = re.compile(r'[^"\\\x00-\x1f]*')
_SCALAR: Final = re.compile(r"[A-Za-z0-9_.+-]*")
_BETWEEN: Final = re.compile(r"[A-Za-z0-9_.+\-:, \t\r\n]*")
_SPACE: Final = re.compile(r"[ \t\r\n]*")
_SURROGATES: Final = re.compile("[\ud800-\udfff]")


class _Place(Enum):
    START = auto()
    BETWEEN = auto()
    """In a list or object, outside strings."""
    FIRST = auto()
    """After the opening brace of an object."""
    STRING = auto()
    ESCAPE = auto()
    """In a string, after a backslash."""
    SCALAR = auto()


class JsonScanner:
    """Finds the end of a JSON value.

    It follows only the structure. Details are left to the reader of the value: a ``None`` is a mistake of the model,
    but no reason to hide a call. Line breaks and other control characters in strings, which JSON forbids but models
    write, are escaped.

    Attributes:
        done: The value is complete.
        failed: The text is not a JSON value, or is nested too deeply.
    """

    __slots__ = ("_closers", "_pieces", "_place", "done", "failed")

    def __init__(self) -> None:
        self.done = False
        self.failed = False
        self._closers: list[str] = []
        self._pieces: list[str] = []
        self._place = _Place.START

    def feed(self, text: str, pos: int) -> int:
        """Reads from a position up to the end of the value, the end of the text or an error; returns that position."""
        copied = pos
        while pos < len(text) and not self.done and not self.failed:
            place = self._place
            if place is _Place.STRING:
                pos = _end(_IN_STRING, text, pos)
                if pos == len(text):
                    break
            elif place is _Place.SCALAR:
                pos = _end(_SCALAR, text, pos)
                self.done = pos < len(text)
                continue
            elif place is not _Place.ESCAPE:
                pos = _end(_BETWEEN if place is _Place.BETWEEN else _SPACE, text, pos)
                if pos == len(text):
                    break
                pos = self._structure(text[pos], pos)
                continue
            char = text[pos]
            if char < " ":
                escape = _ESCAPES[char]
                self._pieces += [text[copied:pos], escape if place is _Place.ESCAPE else "\\" + escape]
                copied = pos + 1
            pos += 1
            if place is _Place.ESCAPE:
                self._place = _Place.STRING
            elif char == "\\":
                self._place = _Place.ESCAPE
            elif char == '"':
                self._place = _Place.BETWEEN
                self.done = not self._closers
        self._pieces.append(text[copied:pos])
        return pos

    def take(self) -> str:
        """Takes the value's text since the last call."""
        text = "".join(self._pieces)
        self._pieces.clear()
        return text

    def _structure(self, char: str, pos: int) -> int:
        """Reads a character outside strings; fails if it is not allowed there."""
        place, closers = self._place, self._closers
        if char == '"':
            self._place = _Place.STRING
        elif place is _Place.FIRST and char != "}":
            self.failed = True
        elif char in _CLOSERS and len(closers) < MAX_DEPTH:
            closers.append(_CLOSERS[char])
            self._place = _Place.FIRST if char == "{" else _Place.BETWEEN
        elif closers and char == closers[-1]:
            closers.pop()
            self._place = _Place.BETWEEN
            self.done = not closers
        elif place is _Place.START and _end(_SCALAR, char, 0):
            self._place = _Place.SCALAR
            return pos
        else:
            self.failed = True
        return pos if self.failed else pos + 1


def _end(pattern: re.Pattern[str], text: str, pos: int) -> int:
    match = pattern.match(text, pos)
    assert match is not None  # the patterns also match the empty string
    return match.end()


def json_string(text: str) -> str:
    """The text as a JSON string. If it has lone surrogates, which UTF-8 cannot encode, it is escaped to ASCII."""
    return json.dumps(text, ensure_ascii=has_surrogates(text))


def has_surrogates(text: str) -> bool:
    """Whether a text has lone surrogates and so cannot be encoded as UTF-8."""
    return _SURROGATES.search(text) is not None


def decode_string(text: str) -> str | None:
    """The value of a JSON string; None if it is malformed or cannot be encoded as UTF-8."""
    value = _load(text)
    return value if isinstance(value, str) and not has_surrogates(value) else None


def kind_of(text: str) -> str | None:
    """The JSON schema type of a JSON text (``number`` for integers as well); None if it is not JSON."""
    value = _load(text)
    if isinstance(value, dict):
        return "object"
    if isinstance(value, list):
        return "array"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, float):
        return "number"
    if isinstance(value, str):
        return "string"
    return "null" if value is None else None


class _NotJson:
    pass


def _load(text: str) -> Any:
    try:
        # Numbers are not converted: that would take quadratic time for long ones.
        return json.loads(text, parse_int=_number, parse_float=_number, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _NotJson()


def _number(text: str) -> float:
    return 0.0


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not valid JSON")
