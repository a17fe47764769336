"""Building blocks of parsers: a state machine over pieces of text, a search for markers, a collector of events."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeAlias

from api.parsers.base import MAX_NAME, Content, Event, MakeId, ToolCallArguments, ToolCallEnd, ToolCallStart
from api.parsers.json_text import json_string

State: TypeAlias = Callable[[str, int], int]
"""Takes a text and a position in it; returns the position up to which it has consumed the text."""

_SPACE = re.compile(r"[ \t\r\n]*")


class Steps:
    """Runs the states of a parser.

    A state that consumes nothing and does not change the state needs more text. It must leave little text unconsumed:
    the rest is joined with the next piece, so waiting for the end of something long would take quadratic time.

    Attributes:
        state: The state that gets the next text.
    """

    __slots__ = ("_rest", "state")

    def __init__(self, state: State) -> None:
        self.state = state
        self._rest = ""

    def run(self, text: str) -> None:
        """Runs the states on the next piece of text."""
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
        """The end of the text, not consumed because a state needs more."""
        return self._rest


class Markers:
    """Finds the first of several markers. No marker may be part of another."""

    __slots__ = ("_first", "_longest", "_markers", "_pattern")

    def __init__(self, *markers: str) -> None:
        self._markers = markers
        self._pattern = re.compile("|".join(map(re.escape, markers)))
        self._first = re.compile(f"[{''.join(re.escape(marker[0]) for marker in markers)}]")
        self._longest = max(map(len, markers))

    def find(self, text: str, pos: int) -> tuple[int, str]:
        """Position and text of the first marker. If there is none, where a marker cut off at the end may begin, and
        an empty string."""
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
    """The position of the next character that is not JSON white space."""
    match = _SPACE.match(text, pos)
    assert match is not None
    return match.end()


def marker_at(text: str, pos: int, *markers: str) -> str | None:
    """The marker at a position; empty if there is none, None if more text is needed to tell."""
    for marker in markers:
        if text.startswith(marker, pos):
            return marker
    rest = text[pos : pos + max(map(len, markers))]
    return None if any(marker.startswith(rest) for marker in markers) else ""


class Output:
    """Collects the events of a tool parser.

    White space before a call, between calls and after the last call is layout and is omitted, unless other text
    precedes or follows it.

    Attributes:
        num_calls: Number of calls that have begun.
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
        """The text of the open call that has been parsed, as the model wrote it."""
        self._blank: list[str] | None = []
        """White space that may be layout; None after other text."""

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
        """Drops white space since the last call: it is between tags, and so layout whatever follows."""
        if self._blank is not None:
            self._blank.clear()

    def hold(self, text: str) -> None:
        """Holds back text that may be part of a call."""
        self._held.append(text)

    def hold_space(self, text: str, pos: int) -> int:
        """Holds back the white space at a position; returns its end."""
        end = skip_space(text, pos)
        if end > pos:
            self._held.append(text[pos:end])
        return end

    def release(self) -> None:
        """Turns held text into content, since it was not part of a call. Ends an open call."""
        self.end(complete=False)
        if self._held:
            held = "".join(self._held)
            self._held.clear()
            self.text(held)

    def drop(self) -> None:
        """Drops held text, which was parsed as markup."""
        if self._is_open:
            self._written += self._held
        self._held.clear()

    def start(self, name: str, id: str | None = None) -> None:
        """Begins a call, which includes the held text. It gets a new id if it has none."""
        self._written, self._held = self._held, []
        self._blank = []
        self._flush()
        self._events.append(ToolCallStart(self.num_calls, id or self._make_id(), name))
        self.num_calls += 1
        self._is_open = True

    def arguments(self, text: str, written: str = "") -> None:
        """Adds a piece of the open call's arguments.

        Args:
            text: JSON.
            written: The same as the model wrote it, unless that text is or was held back.
        """
        assert self._is_open
        if written:
            self._written.append(written)
        self._add("arguments", text)

    def end(self, *, complete: bool = True) -> None:
        """Ends the open call, if any."""
        if self._is_open:
            self._is_open = False
            self._flush()
            self._events.append(ToolCallEnd(self.num_calls - 1, complete, "" if complete else "".join(self._written)))
            self._written.clear()

    def take(self) -> list[Event]:
        """Takes the events since the last call of this method."""
        self._flush()
        events, self._events = self._events, []
        return events

    def finish(self, rest: str) -> list[Event]:
        """Ends the text.

        Args:
            rest: The unconsumed end of the text, which is not markup.
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


class Name:
    """A name that is read in pieces, which are held back."""

    __slots__ = ("_out", "_pieces", "_size")

    def __init__(self, out: Output) -> None:
        self._out = out
        self._pieces: list[str] = []
        self._size = 0

    def clear(self) -> None:
        """Prepares for another name."""
        self._pieces.clear()
        self._size = 0

    def read(self, piece: str) -> bool:
        """Takes a piece. Returns False if the name is too long."""
        self._out.hold(piece)
        self._pieces.append(piece)
        self._size += len(piece)
        return self._size <= MAX_NAME

    def text(self) -> str:
        """The name, as far as it has been read."""
        return "".join(self._pieces)


class CallWriter:
    """Writes calls whose arguments become known one by one, in formats that are not JSON.

    Attributes:
        function: Name of the function that is called.
        num_arguments: Number of its arguments so far. The call begins with the first one.
    """

    __slots__ = ("_out", "function", "num_arguments")

    def __init__(self, out: Output) -> None:
        self.function = ""
        self.num_arguments = 0
        self._out = out

    def name(self, function: str) -> None:
        """Prepares for the arguments of a function."""
        self.function = function
        self.num_arguments = 0

    def add(self, argument: str, json: str) -> None:
        """Writes an argument; the held text is its markup.

        Args:
            argument: Its name.
            json: Its value.
        """
        self._begin()
        self._out.arguments(f"{', ' if self.num_arguments else '{'}{json_string(argument)}: {json}")
        self.num_arguments += 1

    def end(self) -> None:
        """Ends the call; the held text is its markup."""
        self._begin()
        self._out.arguments("}" if self.num_arguments else "{}")
        self._out.end()

    def _begin(self) -> None:
        if not self.num_arguments:
            self._out.start(self.function)
        self._out.drop()
