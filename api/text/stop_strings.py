"""Searches a text that arrives in pieces for stop strings. Runs for every token of requests with stop strings."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable
from functools import lru_cache


class _StopAutomaton:
    """The stop strings of a request as one automaton (Aho-Corasick).

    A state is the longest suffix of the text that begins a stop string. ``depth`` is its length, which
    is the amount of text to hold back; ``match`` is the longest stop string that ends there.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.next: list[dict[str, int]] = [{}]
        self.fail: list[int] = [0]
        self.depth: list[int] = [0]
        self.match: list[str | None] = [None]
        for stop in stops:
            self._insert(stop)
        self._link()
        self.first_char = re.compile(f"[{''.join(re.escape(char) for char in {stop[0] for stop in stops})}]")

    def _insert(self, stop: str) -> None:
        state = 0
        for char in stop:
            child = self.next[state].get(char)
            if child is None:
                child = len(self.next)
                self.next[state][char] = child
                self.next.append({})
                self.fail.append(0)
                self.depth.append(self.depth[state] + 1)
                self.match.append(None)
            state = child
        self.match[state] = stop

    def _link(self) -> None:
        queue = deque(self.next[0].values())
        while queue:
            state = queue.popleft()
            for char, child in self.next[state].items():
                self.fail[child] = self.step(self.fail[state], char)
                if self.match[child] is None:
                    self.match[child] = self.match[self.fail[child]]
                queue.append(child)

    def step(self, state: int, char: str) -> int:
        while True:
            child = self.next[state].get(char)
            if child is not None:
                return child
            if state == 0:
                return 0
            state = self.fail[state]


@lru_cache(maxsize=64)
def _stop_automaton(stops: tuple[str, ...]) -> _StopAutomaton:
    return _StopAutomaton(stops)


class StopChecker:
    """Finds the first stop string in a text that arrives in pieces.

    The first stop string is the one that ends first; of several that end at the same character, the longest.
    So the result depends only on the text, not on how it was divided into pieces. Only text that may be the
    beginning of a stop string is held back. The time is linear in the length of the text, whatever the stop
    strings.

    Attributes:
        matched: The stop string that was found, if any.
    """

    __slots__ = ("_automaton", "_held", "_include", "_state", "matched")

    def __init__(self, stop: Iterable[str], include_stop_str_in_output: bool = False) -> None:
        stops = tuple(stop)
        if "" in stops:
            raise ValueError("stop strings must not be empty")
        self._automaton = _stop_automaton(stops) if stops else None
        self._include = include_stop_str_in_output
        self._state = 0
        self._held = ""
        self.matched: str | None = None

    @property
    def held(self) -> str:
        """The text that is held back."""
        return self._held

    def feed(self, delta: str, armed: bool = True) -> tuple[str, str | None]:
        """Takes the next piece; returns the text that can be sent, and the stop string that ended it, if any.

        A stop string that ends in a piece that is not ``armed`` is ignored; one that begins there and ends later is
        found. After a match all further text is dropped.
        """
        automaton = self._automaton
        if automaton is None:
            return delta, None
        if self.matched is not None:
            return "", self.matched
        state, position = self._state, 0
        if state == 0:
            found = automaton.first_char.search(delta)
            if found is None:
                return delta, None
            position = found.start()
        children, depth, match = automaton.next, automaton.depth, automaton.match
        end = len(delta)
        while position < end:
            child = children[state].get(delta[position])
            state = automaton.step(state, delta[position]) if child is None else child
            position += 1
            if armed and match[state] is not None:
                return self._match(delta[:position], match[state])
            if state == 0:
                found = automaton.first_char.search(delta, position)
                position = end if found is None else found.start()
        self._state = state
        text = self._held + delta
        cut = len(text) - depth[state]
        self._held = text[cut:]
        return text[:cut], None

    def finish(self) -> str:
        """Returns the text that was held back; no more text may follow."""
        held, self._held, self._state = self._held, "", 0
        return held

    def _match(self, delta: str, stop: str | None) -> tuple[str, str]:
        assert stop is not None
        self.matched = stop
        text = self._held + delta
        self._held = ""
        return text if self._include else text[: len(text) - len(stop)], stop
