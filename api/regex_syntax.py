"""Parser for the regular expressions of the standard library's ``re``.

The parser of ``re`` is private and changes between versions. So ``re`` itself validates an expression and reports
syntax errors, and this module parses what ``re`` accepts, following its documentation.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn, TypeAlias

CharTest: TypeAlias = Callable[[str], bool]
"""Tells whether an expression matches a character."""


class UnsupportedError(ValueError):
    """An expression that depends on more than the characters of its match; the message names the construct."""


@dataclass(frozen=True)
class Char:
    """One character."""

    test: CharTest


@dataclass(frozen=True)
class Begin:
    """The beginning of the text or of a line."""

    of_line: bool


@dataclass(frozen=True)
class Repeat:
    item: Node
    least: int
    most: int | None
    """None: no limit."""


@dataclass(frozen=True)
class Choice:
    """One of several sequences."""

    options: list[list[Node]]


Node: TypeAlias = "Char | Begin | Repeat | Choice"

_FLAGS = {"a": re.A, "i": re.I, "L": re.L, "m": re.M, "s": re.S, "u": re.U, "x": re.X}
_KINDS_OF_TEXT = re.A | re.L | re.U
_SPACES = " \t\n\r\v\f"
_CONTROL = {"a": "\a", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\\": "\\"}
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}
_CLASSES: dict[str, CharTest] = {
    "d": str.isdecimal,
    "s": str.isspace,
    "w": lambda char: char.isalnum() or char == "_",
}
_ANCHOR = "an anchor other than ^"
_LOOK_AROUND = "a look-around assertion"
_GROUPS = {
    "(?=": _LOOK_AROUND,
    "(?!": _LOOK_AROUND,
    "(?<=": _LOOK_AROUND,
    "(?<!": _LOOK_AROUND,
    "(?>": "an atomic group",
    "(?P=": "a back reference",
    "(?(": "a conditional group",
}
"""Openings of groups that are not supported, with their names."""
_COUNT = re.compile(r"\{(?!\})(\d*)(?:(,)(\d*))?\}", re.A)
_OCTAL = re.compile("0[0-7]{0,2}|[0-7]{3}")
"""Any other digits after a backslash are a back reference."""
_OCTAL_IN_SET = re.compile("[0-7]{1,3}")
_FLAG_GROUP = re.compile(r"\(\?([aiLmsux]*)(?:-([imsx]+))?([:)])")


def parse_regex(source: str) -> list[Node]:
    """Parses an expression.

    Raises:
        re.error: It is not a valid expression.
        OverflowError, RecursionError: It is too large for ``re``.
        UnsupportedError: It uses look-around, back references, anchors other than ``^``, conditional groups, or
            constructs that forbid backtracking.
    """
    return _Parser(source, re.compile(source).flags).parse()


@dataclass
class _Level:
    """An open group."""

    flags: int
    """Flags in effect inside it."""
    options: list[list[Node]] = field(default_factory=lambda: [[]])


class _Parser:
    """Parses an expression that ``re`` accepts. Open groups are on an explicit stack, so nesting needs no recursion."""

    def __init__(self, source: str, flags: int) -> None:
        self._source = source
        self._position = 0
        self._levels = [_Level(flags)]

    def parse(self) -> list[Node]:
        while self._position < len(self._source):
            self._step()
        (level,) = self._levels
        return _sequence(level)

    @property
    def _items(self) -> list[Node]:
        return self._levels[-1].options[-1]

    @property
    def _flags(self) -> int:
        return self._levels[-1].flags

    def _take(self) -> str:
        char = self._source[self._position]
        self._position += 1
        return char

    def _step(self) -> None:
        """Parses one item, or the quantifier of the last one."""
        char = self._take()
        if self._flags & re.X and char in _SPACES:
            return
        if self._flags & re.X and char == "#":
            end = self._source.find("\n", self._position)
            self._position = len(self._source) if end < 0 else end + 1
        elif char in "*+?":
            self._repeat(*{"*": (0, None), "+": (1, None), "?": (0, 1)}[char])
        elif char == "{" and (count := _COUNT.match(self._source, self._position - 1)) is not None:
            self._position = count.end()
            least, comma, most = count.groups()
            self._repeat(int(least or 0), (int(most) if most else None) if comma else int(least))
        elif char == "(":
            self._open()
        elif char == ")":
            level = self._levels.pop()
            self._items.append(Choice(level.options))
        elif char == "|":
            self._levels[-1].options.append([])
        elif char == "^":
            self._items.append(Begin(of_line=bool(self._flags & re.M)))
        elif char == "$":
            _refuse(_ANCHOR)
        else:
            self._items.append(self._char(char))

    def _char(self, char: str) -> Node:
        if char == ".":
            return Char(_any if self._flags & re.S else _any_in_line)
        if char == "[":
            return Char(self._set())
        if char != "\\":
            return Char(self._matching([char.__eq__]))
        char = self._take()
        if char == "A":
            return Begin(of_line=False)
        if char in "bBZz":
            _refuse(_ANCHOR)
        if char.lower() in _CLASSES:
            return Char(self._matching([self._class(char)]))
        return Char(self._matching([self._escaped(char, in_set=False).__eq__]))

    def _escaped(self, char: str, *, in_set: bool) -> str:
        """The character that an escape sequence stands for; ``char`` is the one after the backslash."""
        if char in _CONTROL:
            return _CONTROL[char]
        if char == "b" and in_set:
            return "\b"
        if char in _HEX_DIGITS:
            return chr(int(self._digits(_HEX_DIGITS[char]), 16))
        if char == "N":
            end = self._source.index("}", self._position)
            name, self._position = self._source[self._position + 1 : end], end + 1
            return unicodedata.lookup(name)
        if char in string.digits:
            octal = (_OCTAL_IN_SET if in_set else _OCTAL).match(self._source, self._position - 1)
            if octal is None:
                _refuse(_GROUPS["(?P="])
            self._position = octal.end()
            return chr(int(octal.group(), 8))
        return char

    def _digits(self, count: int) -> str:
        begin, self._position = self._position, self._position + count
        return self._source[begin : self._position]

    def _class(self, char: str) -> CharTest:
        r"""A class such as ``\d``; an upper-case letter negates it."""
        kind, negated, only_ascii = _CLASSES[char.lower()], char.isupper(), bool(self._flags & re.A)
        return lambda char: (kind(char) and (char.isascii() or not only_ascii)) != negated

    def _set(self) -> CharTest:
        negated = self._source.startswith("^", self._position)
        self._position += negated
        tests: list[CharTest] = []
        begin = self._position
        while (char := self._take()) != "]" or self._position == begin + 1:
            low = self._member(char)
            following = self._source[self._position : self._position + 2]
            if isinstance(low, str) and following.startswith("-") and following != "-]":
                self._position += 1
                high = self._member(self._take())
                assert isinstance(high, str)  # re rejects a range that ends in a class
                tests.append(_range(low, high))
            else:
                tests.append(low.__eq__ if isinstance(low, str) else low)
        return self._matching(tests, negated=negated)

    def _member(self, char: str) -> str | CharTest:
        """One member of a set: a character or a class."""
        if char != "\\":
            return char
        char = self._take()
        return self._class(char) if char.lower() in _CLASSES else self._escaped(char, in_set=True)

    def _matching(self, tests: list[CharTest], *, negated: bool = False) -> CharTest:
        """A test that passes if any of the given ones does, under the current flags."""
        ignores_case = bool(self._flags & re.I)
        if not ignores_case and not negated and len(tests) == 1:
            return tests[0]

        def is_one(char: str) -> bool:
            forms = {char, char.lower(), char.upper()} if ignores_case else (char,)
            return any(test(form) for form in forms for test in tests) != negated

        return is_one

    def _repeat(self, least: int, most: int | None) -> None:
        following = self._source[self._position : self._position + 1]
        if following == "+":
            _refuse("a possessive quantifier")
        self._position += following == "?"  # greedy or lazy makes no difference here
        self._items.append(Repeat(self._items.pop(), least, most))

    def _open(self) -> None:
        begin = self._position - 1
        for opening, name in _GROUPS.items():
            if self._source.startswith(opening, begin):
                _refuse(name)
        if self._source.startswith("(?#", begin):
            self._position = self._source.index(")", begin) + 1
            return
        flags = self._flags
        if self._source.startswith("(?P<", begin):
            self._position = self._source.index(">", begin) + 1
        elif (group := _FLAG_GROUP.match(self._source, begin)) is not None:
            self._position = group.end()
            if group[3] == ")":
                return  # global flags, already taken from the compiled expression
            flags = _changed(flags, group[1], group[2] or "")
        self._levels.append(_Level(flags))


def _changed(flags: int, added: str, removed: str) -> int:
    on, off = (sum(_FLAGS[letter] for letter in set(letters)) for letters in (added, removed))
    if on & _KINDS_OF_TEXT:
        flags &= ~_KINDS_OF_TEXT
    return (flags | on) & ~off


def _sequence(level: _Level) -> list[Node]:
    return level.options[0] if len(level.options) == 1 else [Choice(level.options)]


def _range(low: str, high: str) -> CharTest:
    return lambda char: low <= char <= high


def _any(char: str) -> bool:
    return True


def _any_in_line(char: str) -> bool:
    return char != "\n"


def _refuse(name: str) -> NoReturn:
    raise UnsupportedError(f"uses {name}")
