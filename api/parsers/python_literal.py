"""Incremental translation of Python literals, as models write them, to JSON.

Nothing is evaluated. Strings, numbers, ``None``, ``True``, ``False`` (or their JSON spellings), lists, tuples and
dictionaries are supported; a tuple becomes a list.
"""

from __future__ import annotations

import re
from enum import Enum, auto
from typing import Final

from api.parsers.base import MAX_DEPTH
from api.parsers.json_text import json_string
from api.parsers.machine import skip_space

_MAX_WORD: Final = 1024
_CONSTANTS: Final = {"None": "null", "True": "true", "False": "false", "null": "null", "true": "true", "false": "false"}
_CLOSERS: Final = {"[": "]", "(": ")", "{": "}"}
_WORD: Final = re.compile(r"[A-Za-z0-9_.+-]*")
_NUMBER: Final = re.compile(r"([+-]?)([0-9][0-9_]*)?(\.[0-9_]*)?([eE][+-]?[0-9]+)?")
_ESCAPE: Final = re.compile(
    r"""\\(?:[\n\\'"abfnrtv]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U000[0-9a-fA-F]{5}|U0010[0-9a-fA-F]{4}|[0-7]{1,3})"""
)
_SIMPLE: Final = {"\n": "", "a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
_UNTIL: Final = {quote: re.compile(rf"[^{quote}\\]*") for quote in "'\""}


class _Expects(Enum):
    VALUE = auto()
    ITEM = auto()
    """A value or the end of its container."""
    COLON = auto()
    NEXT = auto()
    """A comma or the end of the container."""


class _Container:
    __slots__ = ("closer", "is_key", "num_commas", "opening")

    def __init__(self, closer: str, opening: int) -> None:
        self.closer = closer
        self.opening = opening
        """Index in the output at which it begins."""
        self.is_key = closer == "}"
        """Whether the next value is a key."""
        self.num_commas = 0


class PythonLiteral:
    """Translates one literal.

    Attributes:
        done: The literal is complete.
        failed: The text is malformed, nested too deeply, or not a literal.
    """

    __slots__ = ("_containers", "_expects", "_json", "_size", "_string", "_word", "done", "failed")

    def __init__(self) -> None:
        self.done = False
        self.failed = False
        self._json: list[str] = []
        self._containers: list[_Container] = []
        self._expects = _Expects.VALUE
        self._string: PythonString | None = None
        self._word: list[str] = []
        self._size = 0

    def feed(self, text: str, pos: int) -> int:
        """Reads from a position up to the end of the literal, the end of the text or an error; returns that position.

        A number is complete only when something else follows it.
        """
        while pos < len(text) and not self.done and not self.failed:
            if self._string is not None:
                pos = self._feed_string(self._string, text, pos)
                continue
            if not self._word:
                pos = skip_space(text, pos)
            match = _WORD.match(text, pos)
            assert match is not None
            if match.group():
                self._feed_word(match.group())
                pos = match.end()
            elif pos < len(text):
                pos = self._punctuation(text[pos], pos)
        return pos

    def json(self) -> str:
        """The literal as JSON."""
        assert self.done
        return "".join(self._json)

    def _feed_word(self, word: str) -> None:
        self._word.append(word)
        self._size += len(word)
        self.failed = self._size > _MAX_WORD or self._expects not in (_Expects.VALUE, _Expects.ITEM)

    def _punctuation(self, char: str, pos: int) -> int:
        word = "".join(self._word)
        self._word.clear()
        self._size = 0
        if char in "'\"":
            self.failed = self._expects not in (_Expects.VALUE, _Expects.ITEM) or word not in ("", "r", "u")
            self._string = PythonString(char, is_raw=word == "r")
            return pos if self.failed else pos + 1
        if word:
            json = _CONSTANTS.get(word) or _number(word)
            if json is None:
                self.failed = True
            else:
                self._add(json)
            return pos
        container = self._containers[-1] if self._containers else None
        if char in _CLOSERS and self._expects in (_Expects.VALUE, _Expects.ITEM):
            self._open(char, container)
        elif container is None:
            self.failed = True
        elif char == "," and self._expects is _Expects.NEXT:
            container.num_commas += 1
            container.is_key = container.closer == "}"
            self._expects = _Expects.ITEM
        elif char == ":" and self._expects is _Expects.COLON:
            container.is_key = False
            self._json.append(": ")
            self._expects = _Expects.VALUE
        elif char == container.closer and self._expects in (_Expects.ITEM, _Expects.NEXT):
            self._close(self._containers.pop())
        else:
            self.failed = True
        return pos if self.failed else pos + 1

    def _feed_string(self, string: PythonString, text: str, pos: int) -> int:
        pos = string.feed(text, pos)
        if string.done:
            self._string = None
            self._add(json_string(string.value()), is_string=True)
        return pos

    def _open(self, char: str, container: _Container | None) -> None:
        if len(self._containers) == MAX_DEPTH or (container is not None and container.is_key):
            self.failed = True
            return
        self._separate()
        self._containers.append(_Container(_CLOSERS[char], len(self._json)))
        self._json.append("{" if char == "{" else "[")
        self._expects = _Expects.ITEM

    def _close(self, container: _Container) -> None:
        is_empty = container.opening == len(self._json) - 1
        if container.closer == ")" and not container.num_commas and not is_empty:
            self._json[container.opening] = ""  # parentheses around a value
        else:
            self._json.append("}" if container.closer == "}" else "]")
        self._end_value()

    def _add(self, json: str, *, is_string: bool = False) -> None:
        self._separate()
        if self._containers and self._containers[-1].is_key:
            self._json.append(json if is_string else f'"{json}"')
            self._expects = _Expects.COLON
        else:
            self._json.append(json)
            self._end_value()

    def _separate(self) -> None:
        """Writes a comma before a value, not after the previous one: Python allows trailing commas, JSON does not."""
        if self._expects is _Expects.ITEM and self._containers[-1].num_commas:
            self._json.append(", ")

    def _end_value(self) -> None:
        self._expects = _Expects.NEXT
        self.done = not self._containers


class PythonString:
    """A string literal, from the character after its first quote.

    Attributes:
        done: The string is complete.
    """

    __slots__ = ("_is_escape", "_is_raw", "_num_closing", "_num_opening", "_pieces", "_quote", "_run", "done")

    def __init__(self, quote: str, *, is_raw: bool) -> None:
        self.done = False
        self._quote = quote
        self._is_raw = is_raw
        self._is_escape = False
        self._num_opening = 1
        """Number of quotes at the start: two are an empty string, or the beginning of three."""
        self._num_closing = 0
        """Number of quotes that close it; 0 while unknown."""
        self._run = 0
        """Number of consecutive quotes read last."""
        self._pieces: list[str] = []

    def feed(self, text: str, pos: int) -> int:
        """Reads up to the end of the string or of the text; returns that position."""
        while pos < len(text) and not self.done:
            pos = self._inside(text, pos) if self._num_closing else self._open(text[pos], pos)
        return pos

    def value(self) -> str:
        """The value of the literal."""
        text = "".join(self._pieces)
        return text if self._is_raw else _ESCAPE.sub(_unescape, text)

    def _open(self, char: str, pos: int) -> int:
        if char == self._quote:
            self._num_opening += 1
            if self._num_opening == 3:
                self._num_closing = 3
            return pos + 1
        if self._num_opening == 2:
            self.done = True
        else:
            self._num_closing = 1
        return pos

    def _inside(self, text: str, pos: int) -> int:
        char = text[pos]
        if char == self._quote and not self._is_escape:
            self._run += 1
            self.done = self._run == self._num_closing
            return pos + 1
        if self._run:
            self._pieces.append(self._quote * self._run)
            self._run = 0
        if self._is_escape or char == "\\":
            self._is_escape = not self._is_escape
            self._pieces.append(char)
            return pos + 1
        match = _UNTIL[self._quote].match(text, pos)
        assert match is not None
        self._pieces.append(match.group())
        return match.end()


def _unescape(match: re.Match[str]) -> str:
    text = match.group()[1:]
    if text[0] in "xuU":
        return chr(int(text[1:], 16))
    if text[0] in "01234567":
        return chr(int(text, 8))
    return _SIMPLE.get(text, text)


def _number(word: str) -> str | None:
    match = _NUMBER.fullmatch(word)
    if match is None:
        return None
    sign, whole, fraction, exponent = (group or "" for group in match.groups())
    whole = whole.replace("_", "")
    digits = fraction[1:].replace("_", "")
    if not whole and not digits:
        return None
    return (
        f"{sign.strip('+')}{whole.lstrip('0') or '0'}{fraction and '.'}{digits or ('0' if fraction else '')}{exponent}"
    )


def to_json(text: str) -> str | None:
    """The JSON of a Python literal; None if the text is not a literal."""
    literal = PythonLiteral()
    end = literal.feed(text + "\n", 0)
    return literal.json() if literal.done and skip_space(text, end) >= len(text) else None
