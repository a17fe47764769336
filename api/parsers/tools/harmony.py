"""Calls of gpt-oss: messages to tools, of any channel; see ``api/parsers/harmony.py``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Final

from api.parsers.base import MAX_NAME, Event, MakeId, Tool
from api.parsers.harmony import CHANNEL, ENDS, MARKS, MAX_HEADER, MESSAGE, START, Header
from api.parsers.ids import new_id
from api.parsers.machine import Markers, Output, Steps, marker_at
from api.parsers.tools.json_calls import ArgumentsObject

_BEGINNINGS: Final = Markers(START, CHANNEL, *ENDS)
_HEADER_ENDS: Final = Markers(MESSAGE, *ENDS)


class HarmonyParser:
    """Parses messages. Marks of messages to the user are omitted, those of reasoning are kept."""

    special_tokens: ClassVar[tuple[str, ...]] = MARKS
    new_id = staticmethod(new_id)

    def __init__(self, tools: Iterable[Tool], make_id: MakeId) -> None:
        self._out = Output(make_id)
        self._steps = Steps(self._first)
        self._header: list[str] = []
        self._size = 0
        self._arguments = ArgumentsObject(self._out, None)
        self._ends_message = False
        """Whether the next mark of an end is that of a message whose header was parsed."""

    def feed(self, text: str, /) -> list[Event]:
        """Takes the next piece of text; returns its events."""
        self._steps.run(text)
        return self._out.take()

    def finish(self) -> list[Event]:
        """Ends the text; returns the remaining events."""
        if self._steps.state == self._object:
            self._arguments.finish()
        return self._out.finish("" if self._steps.state == self._after else self._steps.rest())

    def _first(self, text: str, pos: int) -> int:
        """The first message may lack the mark before its recipient, which the prompt has."""
        mark = marker_at(text, pos, " to=")
        if mark is not None:
            self._steps.state = self._in_header if mark else self._content
        return pos

    def _content(self, text: str, pos: int) -> int:
        end, mark = _BEGINNINGS.find(text, pos)
        self._out.text(text[pos:end])
        if mark in (START, CHANNEL):
            self._keep(mark)
            self._steps.state = self._in_header
        elif mark and not self._ends_message:
            self._out.text(mark)
        if mark:
            self._ends_message = False
        return end + len(mark)

    def _keep(self, text: str) -> None:
        self._header.append(text)
        self._size += len(text)
        self._out.hold(text)

    def _in_header(self, text: str, pos: int) -> int:
        end, mark = _HEADER_ENDS.find(text, pos)
        most = pos + MAX_HEADER - self._size
        self._keep(text[pos : min(end, most)])
        if end > most or mark in ENDS:
            return self._give_up(min(end, most))
        self._keep(mark)
        if mark:
            header = Header.of("".join(self._header))
            if header.function and len(header.function) <= MAX_NAME:
                self._clear()
                self._arguments = ArgumentsObject(self._out, header.function)
                self._steps.state = self._before_arguments
            elif header.is_reasoning:
                self._give_up(end)
            else:
                self._clear()
                self._out.drop()
                self._ends_message = True
                self._steps.state = self._content
        return end + len(mark)

    def _clear(self) -> None:
        self._header.clear()
        self._size = 0

    def _give_up(self, pos: int) -> int:
        """What was held is no call."""
        self._clear()
        self._out.release()
        self._steps.state = self._content
        return pos

    def _before_arguments(self, text: str, pos: int) -> int:
        end = self._out.hold_space(text, pos)
        if end < len(text):
            if text[end] != "{":
                return self._give_up(end)
            self._steps.state = self._object
        return end

    def _after(self, text: str, pos: int) -> int:
        """After a call, whose mark of the end is layout."""
        mark = marker_at(text, pos, *ENDS)
        if mark is None:
            return pos
        self._steps.state = self._content
        return pos + len(mark)

    def _object(self, text: str, pos: int) -> int:
        end = self._arguments.feed(text, pos)
        if self._arguments.done:
            self._steps.state = self._after
        return self._give_up(end) if self._arguments.failed else end
