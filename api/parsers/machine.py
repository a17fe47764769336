"""What parsers are made of: states that run over pieces of text, a search for markers, and a collector of events."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeAlias

from api.parsers.base import Content, Event, MakeId, ToolCallArguments, ToolCallEnd, ToolCallStart

State: TypeAlias = Callable[[str, int], int]
"""Takes a text and a place in it, returns the place up to which it is done with the text."""

_SPACE = re.compile(r"[ \t\r\n]*")


class Steps:
    """Runs the states of a parser.

    A state that neither moves nor hands over to another needs more text. It must not leave much: what is left is
    joined with the next piece, so that a state that waits for the end of something long would take quadratic time.

    Attributes:
        state: What the next text is given to.
    """

    __slots__ = ("_rest", "state")

    def __init__(self, state: State) -> None:
        self.state = state
        self._rest = ""

    def run(self, text: str) -> None:
        """Gives a piece of text to the states."""
        if self._rest:
            text = self._rest + text
        pos = 0
        while pos < len(text):
            state = self.state
            end = state(text, pos)
            if end == pos and self.state == state:
                break
            pos = end
        self._rest = text[pos:]

    def rest(self) -> str:
        """The end of the text, which a state was waiting to see more of."""
        return self._rest


class Markers:
    """Finds the first of several markers, none of which is part of another."""

    __slots__ = ("_first", "_longest", "_markers", "_pattern")

    def __init__(self, *markers: str) -> None:
        self._markers = markers
        self._pattern = re.compile("|".join(map(re.escape, markers)))
        self._first = re.compile(f"[{''.join(re.escape(marker[0]) for marker in markers)}]")
        self._longest = max(map(len, markers))

    def find(self, text: str, pos: int) -> tuple[int, str]:
        """Where a marker is, and which; if there is none, from where on the text may be the beginning of one."""
        match = self._pattern.search(text, pos)
        if match is not None:
            return match.start(), match.group()
        tail = max(pos, len(text) - self._longest + 1)
        while True:
            first = self._first.search(text, tail)
            if first is None:
                return len(text), ""
            tail = first.start()
            rest = text[tail:]
            if any(marker.startswith(rest) for marker in self._markers):
                return tail, ""
            tail += 1


def skip_space(text: str, pos: int) -> int:
    """The place of the next character that is no white space of JSON."""
    match = _SPACE.match(text, pos)
    assert match is not None
    return match.end()


def marker_at(text: str, pos: int, *markers: str) -> str | None:
    """Which marker is at a place: empty if there is none, None if that takes more text."""
    for marker in markers:
        if text.startswith(marker, pos):
            return marker
    rest = text[pos : pos + max(map(len, markers))]
    return None if any(marker.startswith(rest) for marker in markers) else ""


class Output:
    """Collects the events of a tool parser.

    White space before a call, between calls and after the last one is layout and left out, unless text has preceded
    it or follows.

    Attributes:
        num_calls: Calls that have begun.
    """

    __slots__ = (
        "_blank",
        "_events",
        "_held",
        "_is_open",
        "_make_id",
        "_pieces",
        "_pieces_kind",
        "_written",
        "num_calls",
    )

    def __init__(self, make_id: MakeId) -> None:
        self.num_calls = 0
        self._make_id = make_id
        self._is_open = False
        self._events: list[Event] = []
        self._pieces: list[str] = []
        self._pieces_kind = ""
        self._held: list[str] = []
        self._written: list[str] = []
        """The text of the call that is open, as far as it has been understood."""
        self._blank: list[str] | None = []
        """White space that may be layout; None once there is text."""

    def text(self, text: str) -> None:
        """Adds content."""
        if self._blank is not None:
            self._blank.append(text)
            if text.isspace() or not text:
                return
            text = "".join(self._blank)
            self._blank = None
        self._add("content", text)

    def end_layout(self) -> None:
        """What white space there is since the last call is between tags: it is layout, whatever follows."""
        if self._blank is not None:
            self._blank.clear()

    def hold(self, text: str) -> None:
        """Keeps text that is part of a call if there is one."""
        self._held.append(text)

    def release(self) -> None:
        """What is held back was no call: it becomes content. A call that is open ends here."""
        self.end(complete=False)
        if self._held:
            held = "".join(self._held)
            self._held.clear()
            self.text(held)

    def drop(self) -> None:
        """What is held back is markup that has been understood."""
        if self._is_open:
            self._written += self._held
        self._held.clear()

    def start(self, name: str) -> None:
        """Begins a call; what is held back belongs to it."""
        self._written, self._held = self._held, []
        self._blank = []
        self._flush()
        self._events.append(ToolCallStart(self.num_calls, self._make_id(), name))
        self.num_calls += 1
        self._is_open = True

    def arguments(self, text: str, written: str = "") -> None:
        """Adds a piece of the arguments of the call that is open.

        Args:
            text: JSON.
            written: What the model wrote for it, unless that is or was held back.
        """
        assert self._is_open
        if written:
            self._written.append(written)
        self._add("arguments", text)

    def end(self, *, complete: bool = True) -> None:
        """Ends the call that is open, if one is."""
        if self._is_open:
            self._is_open = False
            self._flush()
            self._events.append(ToolCallEnd(self.num_calls - 1, complete, "" if complete else "".join(self._written)))
            self._written.clear()

    def take(self) -> list[Event]:
        """The events since the last time."""
        self._flush()
        events, self._events = self._events, []
        return events

    def finish(self, rest: str) -> list[Event]:
        """The text is over.

        Args:
            rest: Its end, which is no markup.
        """
        self.hold(rest)
        self.release()
        if self._blank and not self.num_calls:
            self._add("content", "".join(self._blank))
        return self.take()

    def _add(self, kind: str, text: str) -> None:
        if not text:
            return
        if kind != self._pieces_kind:
            self._flush()
            self._pieces_kind = kind
        self._pieces.append(text)

    def _flush(self) -> None:
        if self._pieces:
            text = "".join(self._pieces)
            self._pieces.clear()
            is_content = self._pieces_kind == "content"
            self._events.append(Content(text) if is_content else ToolCallArguments(self.num_calls - 1, text))
