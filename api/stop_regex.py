"""Stop regular expressions: regular expressions that end a completion, searched in a text that arrives in pieces.

No library finds matches in a stream in linear time and reports how much of the text may still become part of a match.
So an automaton (Thompson 1968) follows all possible matches at once: the cost per character does not depend on the
length of the text, and no pattern causes exponential time. Each thread of the automaton records where its match would
begin. A transition depends only on the set of threads and the character, so it is computed once and then looked up.

Constructs that look ahead or back (``$``, ``\\b``, assertions, back references), possessive quantifiers and atomic
groups are not supported; the error names them. ``^`` is supported, also with ``(?m)``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from api.regex_syntax import Begin, Char, CharTest, Node, Repeat, UnsupportedError, parse_regex

MAX_PATTERN_CHARS = 1024
MAX_STATES = 256
"""Maximum character nodes in all patterns of a request, which limits the number of threads."""
_MAX_NODES = 20_000
_MAX_TRANSITIONS = 4096
"""Maximum transitions cached per automaton."""


class StopRegexError(ValueError):
    """A pattern that cannot be used; the message says why."""


class _Node:
    """A node of the automaton: it expects a character, forks, or ends a pattern."""

    __slots__ = ("after", "at_line", "at_start", "pattern", "test")

    def __init__(self) -> None:
        self.test: CharTest | None = None
        self.after: list[_Node] = []
        self.pattern: int | None = None
        self.at_start = False
        """It can be passed only at the beginning of the text."""
        self.at_line = False
        """It can be passed only at the beginning of a line."""


class _Compiler:
    """Compiles parsed patterns to nodes, from their end to their beginning."""

    def __init__(self) -> None:
        self._num_nodes = 0
        self._num_tests = 0

    def pattern(self, index: int, source: str) -> _Node:
        if len(source) > MAX_PATTERN_CHARS:
            raise StopRegexError(f"is longer than {MAX_PATTERN_CHARS} characters")
        try:
            parsed = parse_regex(source)
        except UnsupportedError as error:
            raise StopRegexError(f"{error}, which a stream cannot be searched for") from None
        except (re.error, OverflowError, RecursionError) as error:
            raise StopRegexError(f"is not a regular expression: {error}") from None
        end = self._node()
        end.pattern = index
        try:
            return self._sequence(parsed, end)
        except RecursionError:
            raise StopRegexError("is nested too deeply") from None

    def text(self, index: int, text: str) -> _Node:
        """Compiles a plain stop string, of any length."""
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
            raise StopRegexError("is too large; shorten its repetitions")
        return _Node()

    def _sequence(self, items: Sequence[Node], after: _Node) -> _Node:
        for item in reversed(items):
            after = self._item(item, after)
        return after

    def _item(self, item: Node, after: _Node) -> _Node:
        if isinstance(item, Char):
            self._num_tests += 1
            if self._num_tests > MAX_STATES:
                raise StopRegexError(f"is too large; expanded, it may have at most {MAX_STATES} characters")
            node = self._node()
            node.test, node.after = item.test, [after]
            return node
        if isinstance(item, Repeat):
            return self._repeat(item, after)
        if isinstance(item, Begin):
            gate = self._node()
            gate.at_line, gate.at_start = item.of_line, not item.of_line
            gate.after = [after]
            return gate
        if len(item.options) == 1:
            return self._sequence(item.options[0], after)
        fork = self._node()
        fork.after = [self._sequence(option, after) for option in item.options]
        return fork

    def _repeat(self, repeat: Repeat, after: _Node) -> _Node:
        if repeat.most is None:
            loop = self._node()
            loop.after = [self._item(repeat.item, loop), after]
            after = loop
        else:
            end = after
            for _ in range(repeat.most - repeat.least):
                fork = self._node()
                fork.after = [self._item(repeat.item, after), end]
                after = fork
        for _ in range(repeat.least):
            self._node()
            after = self._item(repeat.item, after)
        return after


class _Transition(NamedTuple):
    """The effect of a character on a set of threads."""

    state: int
    sources: tuple[int, ...]
    """For each new thread, the old thread that it continues, or -1 if it begins after the character. Empty: all -1."""
    pattern: int
    """The pattern that matches here, or -1."""
    matched: int
    """The thread that matched, or -1."""


class StopAutomaton:
    """Compiled patterns and stop strings. Threads are ordered by where they began, earliest first."""

    def __init__(self, texts: Sequence[str], patterns: Sequence[str]) -> None:
        """Compiles stop strings and patterns.

        Raises:
            StopRegexError: A pattern is not a regular expression, is too large, uses an unsupported construct, or
                matches the empty string.
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
                raise StopRegexError("matches the empty string")
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
        """Follows forks to the nodes that expect a character, each with the thread it comes from; and the first match.

        Args:
            entries: Nodes that were reached, each with the thread that reached it.
            before: The character before this position; None at the beginning of the text.
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
        """Computes the transition of a state for a character, and caches it if there is room."""
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
    """The cached automaton for stop strings and patterns; raises what ``StopAutomaton`` raises."""
    return StopAutomaton(texts, patterns)


class StopRegexChecker:
    """Finds the first match in a text that arrives in pieces; ``StopChecker`` does the same for stop strings alone.

    The first match is the one that ends first; of several that end at the same character, the longest. So the result
    depends only on the text, not on how it was divided into pieces.

    Attributes:
        matched: The pattern or stop string that was found, if any.
    """

    __slots__ = ("_automaton", "_begins", "_held", "_include", "_state", "matched")

    def __init__(self, stop: Iterable[str], stop_regex: Iterable[str], include_stop_str_in_output: bool) -> None:
        self._automaton = stop_automaton(tuple(stop), tuple(stop_regex))
        self._include = include_stop_str_in_output
        self._state = self._automaton.first
        self._begins: list[int] = []
        """Where in the held text each thread began; empty: none has begun."""
        self._held = ""
        self.matched: str | None = None

    @property
    def held(self) -> str:
        """The text that is held back."""
        return self._held

    def feed(self, delta: str, armed: bool = True) -> tuple[str, str | None]:
        """Takes the next piece; returns the text that can be sent, and the stop that ended it, if any.

        A match that ends in a piece that is not ``armed`` is ignored; one that begins there and ends later is found.
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
        """Returns the text that was held back; no more text may follow."""
        held, self._held = self._held, ""
        self._begins, self._state = [], self._automaton.first
        return held
