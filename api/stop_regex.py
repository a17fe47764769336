"""Regular expressions that end a completion, searched in a text that arrives in pieces.

No library finds matches in a stream in linear time and says how much of the text may still become part of one. So the
standard library parses a pattern, and an automaton (Thompson 1968) follows all ways to match at once: a character
costs the same however long the text is, and no pattern makes it explode. Each thread of the automaton knows where its
match would begin. What happens for a character depends on the set of threads alone, so it is worked out once and then
looked up.

Not supported, and refused by name: what needs to look ahead or back (``$``, ``\\b``, assertions, back references) and
possessive or atomic groups. ``^`` is, also with ``(?m)``.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

_parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
_constants: Any = importlib.import_module("re._constants" if sys.version_info >= (3, 11) else "sre_constants")

MAX_PATTERN_CHARS = 1024
MAX_STATES = 256
"""Characters that all patterns of a request can wait for at a time: the most threads that there can be."""
_MAX_NODES = 20_000
_MAX_TRANSITIONS = 4096
"""Transitions that an automaton remembers."""

Test: TypeAlias = Callable[[str], bool]


class StopRegexError(ValueError):
    """A pattern that cannot be searched for; the message says why."""


class _Node:
    """A state of the automaton: a character that is waited for, or a fork, or the end of a pattern."""

    __slots__ = ("after", "at_line", "at_start", "pattern", "test")

    def __init__(self) -> None:
        self.test: Test | None = None
        self.after: list[_Node] = []
        self.pattern: int | None = None
        self.at_start = False
        """It is only passed at the beginning of the text."""
        self.at_line = False
        """It is only passed at the beginning of a line."""


class _Compiler:
    """Makes nodes of parsed patterns, from the end to the beginning."""

    def __init__(self) -> None:
        self._num_nodes = 0
        self._num_tests = 0

    def pattern(self, index: int, source: str) -> _Node:
        if len(source) > MAX_PATTERN_CHARS:
            raise StopRegexError(f"is longer than {MAX_PATTERN_CHARS} characters")
        try:
            parsed = _parser.parse(source)
        except (re.error, OverflowError, RecursionError) as error:
            raise StopRegexError(f"is not a regular expression: {error}") from None
        end = self._node()
        end.pattern = index
        try:
            return self._sequence(parsed, end, int(parsed.state.flags))
        except RecursionError:
            raise StopRegexError("is nested too deeply") from None

    def text(self, index: int, text: str) -> _Node:
        """A plain text as a pattern; it may be of any length."""
        node = self._node()
        node.pattern = index
        for char in reversed(text):
            before = _Node()
            before.test, before.after = char.__eq__, [node]
            node = before
        return node

    def _node(self) -> _Node:
        self._num_nodes += 1
        if self._num_nodes > _MAX_NODES:
            raise StopRegexError("is too large: make repetitions shorter")
        return _Node()

    def _sequence(self, items: Any, after: _Node, flags: int) -> _Node:
        for op, value in reversed(list(items)):
            after = self._item(op, value, after, flags)
        return after

    def _item(self, op: Any, value: Any, after: _Node, flags: int) -> _Node:
        if op in (_constants.LITERAL, _constants.NOT_LITERAL, _constants.ANY, _constants.IN):
            self._num_tests += 1
            if self._num_tests > MAX_STATES:
                raise StopRegexError(f"is too large: with repetitions written out it may have {MAX_STATES} characters")
            node = self._node()
            node.test, node.after = _test(op, value, flags), [after]
            return node
        if op is _constants.BRANCH:
            fork = self._node()
            fork.after = [self._sequence(option, after, flags) for option in value[1]]
            return fork
        if op is _constants.SUBPATTERN:
            _, added, removed, items = value
            return self._sequence(items, after, (flags | added) & ~removed)
        if op in (_constants.MAX_REPEAT, _constants.MIN_REPEAT):
            least, most, items = value
            return self._repeat(least, most, items, after, flags)
        if op is _constants.AT and value in (_constants.AT_BEGINNING, _constants.AT_BEGINNING_STRING):
            gate = self._node()
            gate.at_line = value is _constants.AT_BEGINNING and bool(flags & re.MULTILINE)
            gate.at_start = not gate.at_line
            gate.after = [after]
            return gate
        raise StopRegexError(f"uses {_NAMES.get(str(op), str(op).lower())}, which a stream cannot be searched for")

    def _repeat(self, least: int, most: int, items: Any, after: _Node, flags: int) -> _Node:
        if most is _constants.MAXREPEAT:
            loop = self._node()
            loop.after = [self._sequence(items, loop, flags), after]
            after = loop
        else:
            end = after
            for _ in range(most - least):
                fork = self._node()
                fork.after = [self._sequence(items, after, flags), end]
                after = fork
        for _ in range(least):
            self._node()
            after = self._sequence(items, after, flags)
        return after


_NAMES = {
    "AT": "an anchor other than ^",
    "GROUPREF": "a back reference",
    "GROUPREF_EXISTS": "a conditional group",
    "ASSERT": "a look-around assertion",
    "ASSERT_NOT": "a look-around assertion",
    "ATOMIC_GROUP": "an atomic group",
    "POSSESSIVE_REPEAT": "a possessive quantifier",
}


def _test(op: Any, value: Any, flags: int) -> Test:
    """Whether a character is one that an item of a pattern stands for."""
    if op is _constants.ANY:
        return (lambda char: True) if flags & re.DOTALL else (lambda char: char != "\n")
    if op is _constants.IN:
        items = list(value)
        negated = items[0][0] is _constants.NEGATE
        tests = [_member(item_op, item, flags) for item_op, item in items[negated:]]
    else:
        negated = op is _constants.NOT_LITERAL
        tests = [_member(_constants.LITERAL, value, flags)]

    def is_one(char: str) -> bool:
        forms = {char, char.lower(), char.upper()} if flags & re.IGNORECASE else (char,)
        return any(test(form) for form in forms for test in tests) != negated

    return is_one


def _member(op: Any, value: Any, flags: int) -> Test:
    if op is _constants.LITERAL:
        return chr(value).__eq__
    if op is _constants.RANGE:
        low, high = chr(value[0]), chr(value[1])
        return lambda char: low <= char <= high
    if op is not _constants.CATEGORY:
        raise StopRegexError(f"uses {op} in a set, which is not supported")
    name = str(value)
    kind = _CATEGORIES[name.rsplit("_", 1)[1]]
    only_ascii = bool(flags & re.ASCII)

    def belongs(char: str) -> bool:
        return (kind(char) and (char.isascii() or not only_ascii)) != ("NOT" in name)

    return belongs


_CATEGORIES: dict[str, Test] = {
    "DIGIT": str.isdecimal,
    "SPACE": str.isspace,
    "WORD": lambda char: char.isalnum() or char == "_",
}


class _Transition(NamedTuple):
    """What a character does to a set of threads."""

    state: int
    sources: tuple[int, ...]
    """For each new thread the old one that it continues, -1 for those that begin after the character. Empty: all."""
    pattern: int
    """The pattern that matches here, or -1."""
    matched: int
    """The thread that does."""


class StopAutomaton:
    """Patterns and texts, compiled. Threads are ordered by where they began, the earliest first."""

    def __init__(self, texts: Sequence[str], patterns: Sequence[str]) -> None:
        """Compiles.

        Raises:
            StopRegexError: A pattern is no regular expression, is too large, needs more than one look at the text, or
                matches an empty text.
        """
        compiler = _Compiler()
        self.sources = (*texts, *patterns)
        self._starts = [compiler.text(i, text) for i, text in enumerate(texts)]
        self._starts += [compiler.pattern(len(texts) + i, source) for i, source in enumerate(patterns)]
        self._states: list[tuple[_Node, ...]] = []
        self._numbers: dict[tuple[_Node, ...], int] = {}
        self.tables: list[dict[str, _Transition]] = []
        self._num_transitions = 0
        for before in (None, "\n", "x"):
            _, pattern = self._closure([(node, -1) for node in self._starts], before)
            if pattern is not None:
                raise StopRegexError("matches an empty text")
        self.first = self._number(self._begin(None))

    def _begin(self, before: str | None) -> list[_Node]:
        return [node for node, _ in self._closure([(node, -1) for node in self._starts], before)[0]]

    def _number(self, nodes: Sequence[_Node]) -> int:
        key = tuple(nodes)
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self._states)
            self._states.append(key)
            self.tables.append({})
        return number

    def _closure(
        self, entries: Iterable[tuple[_Node, int]], before: str | None
    ) -> tuple[list[tuple[_Node, int]], tuple[int, int] | None]:
        """The nodes that wait for a character, with the thread that each comes from, and the first match.

        Args:
            entries: Nodes that are reached, with the thread that reached them.
            before: The character before this place; None at the beginning of the text.
        """
        seen: set[int] = set()
        waiting: list[tuple[_Node, int]] = []
        match: tuple[int, int] | None = None
        for entry, source in entries:
            stack = [entry]
            while stack:
                node = stack.pop()
                if id(node) in seen:
                    continue
                seen.add(id(node))
                if (node.at_start and before is not None) or (node.at_line and before not in (None, "\n")):
                    continue
                if node.pattern is not None:
                    match = match or (node.pattern, source)
                elif node.test is not None:
                    waiting.append((node, source))
                else:
                    stack += reversed(node.after)
        return waiting, match

    def transition(self, state: int, char: str) -> _Transition:
        """What a character does, worked out for the first time."""
        entries = [
            (node.after[0], source)
            for source, node in enumerate(self._states[state])
            if node.test is not None and node.test(char)
        ]
        entries += [(node, -1) for node in self._starts]
        waiting, match = self._closure(entries, char)
        sources = tuple(source for _, source in waiting)
        result = _Transition(
            self._number([node for node, _ in waiting]),
            sources if any(source >= 0 for source in sources) else (),
            -1 if match is None else match[0],
            -1 if match is None else match[1],
        )
        self._num_transitions += 1
        if self._num_transitions <= _MAX_TRANSITIONS:
            self.tables[state][char] = result
        return result


@lru_cache(maxsize=32)
def stop_automaton(texts: tuple[str, ...], patterns: tuple[str, ...]) -> StopAutomaton:
    """The automaton of some stop strings and patterns; see ``StopAutomaton`` for what it raises."""
    return StopAutomaton(texts, patterns)


class StopRegexChecker:
    """Finds the first match in a text that arrives in pieces; ``StopChecker`` does the same for texts alone.

    First means the one that ends first, and of several that end together the longest: so the result depends on the
    text alone, not on how it was cut.

    Attributes:
        matched: The pattern or the text that was found, if any.
    """

    __slots__ = ("_automaton", "_begins", "_held", "_include", "_state", "matched")

    def __init__(self, stop: Iterable[str], stop_regex: Iterable[str], include_stop_str_in_output: bool) -> None:
        self._automaton = stop_automaton(tuple(stop), tuple(stop_regex))
        self._include = include_stop_str_in_output
        self._state = self._automaton.first
        self._begins: list[int] = []
        """Where in the held text the threads began; empty: none has begun."""
        self._held = ""
        self.matched: str | None = None

    @property
    def held(self) -> str:
        """The text that is held back."""
        return self._held

    def feed(self, delta: str, armed: bool = True) -> tuple[str, str | None]:
        """Takes the next piece; returns the text that may go out and the stop that ends it, if any.

        A match that ends in a piece that is not ``armed`` is passed over; one that begins there and ends later is
        found.
        """
        if self.matched is not None:
            return "", self.matched
        automaton, state, begins = self._automaton, self._state, self._begins
        tables = automaton.tables
        position = len(self._held)
        text = self._held + delta
        for char in delta:
            found = tables[state].get(char)
            if found is None:
                found = automaton.transition(state, char)
            if armed and found.pattern >= 0:
                begin = begins[found.matched] if begins else position
                self.matched, self._held = automaton.sources[found.pattern], ""
                return text[: position + 1 if self._include else begin], self.matched
            sources = found.sources
            after = position + 1
            if not sources:
                begins = []
            elif begins:
                begins = [begins[source] if source >= 0 else after for source in sources]
            else:
                begins = [position if source >= 0 else after for source in sources]
            state, position = found.state, after
        self._state = state
        cut = begins[0] if begins else position
        self._begins = [begin - cut for begin in begins]
        self._held = text[cut:]
        return text[:cut], None

    def finish(self) -> str:
        """The text that was held back; nothing may follow."""
        held, self._held = self._held, ""
        self._begins, self._state = [], self._automaton.first
        return held
