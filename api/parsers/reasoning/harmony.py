"""The reasoning of gpt-oss: messages of the channel ``analysis``, of which an answer may have several."""

from __future__ import annotations

from typing import Final

import msgspec

from api.parsers.base import Content, Event, Reasoning
from api.parsers.harmony import CHANNEL, ENDS, MARKS, MAX_HEADER, MESSAGE, START, Header
from api.parsers.machine import Markers, Steps, marker_at

_ANALYSIS: Final = f"{CHANNEL}analysis{MESSAGE}"
_FINAL: Final = f"{CHANNEL}final{MESSAGE}"
_FIRST: Final = (START, CHANNEL, " to=")
"""What the header of the first message begins with: the prompt has its start and role."""


class HarmonyFormat(msgspec.Struct, frozen=True):
    """Calling it creates a parser; see ``ReasoningParserClass``."""

    special_tokens: tuple[str, ...] = (_ANALYSIS, ENDS[0], *MARKS)
    """See ``Parser``. The first two begin and end reasoning."""
    thought: tuple[str, str] | None = (_ANALYSIS, _FINAL)
    """See ``ReasoningParserClass``."""

    def __call__(self, prompt_opened: bool | None, *, needs_mark: bool = False) -> HarmonyReasoning:
        """Creates a parser for one choice; see ``create_parser``."""
        return HarmonyReasoning(prompt_opened)

    def opened_by(self, turn: str) -> bool | None:
        """See ``prompt_opens_reasoning``."""
        last = max((START, MESSAGE, *ENDS), key=turn.rfind)
        place = turn.rfind(last)
        if place < 0 or last == START:
            return None
        return last == MESSAGE and Header.of(turn[max(0, turn.rfind(CHANNEL, 0, place)) : place]).is_reasoning


HARMONY: Final = HarmonyFormat()


class HarmonyReasoning:
    """Parses messages. The answer's own marks are omitted; calls keep theirs, for the tool parser.

    Attributes:
        is_reasoning: Whether the next text is reasoning, as far as is known.
        special_tokens: See ``Parser``.
    """

    def __init__(self, prompt_opened: bool | None) -> None:
        self.special_tokens = HARMONY.special_tokens
        self.is_reasoning = bool(prompt_opened)
        self._events: list[Event] = []
        self._header: list[str] = []
        self._size = 0
        self._is_call = False
        self._steps = Steps(self._first if prompt_opened is None else self._body)

    def feed(self, text: str, /) -> list[Event]:
        """Takes the next piece of text; returns its events."""
        self._steps.run(text)
        events, self._events = self._events, []
        return events

    def finish(self) -> list[Event]:
        """Ends the text; returns the remaining events."""
        self._add("".join(self._header) + self._steps.rest())
        events, self._events = self._events, []
        return events

    def _add(self, text: str) -> None:
        if text:
            self._events.append(Reasoning(text) if self.is_reasoning else Content(text))

    def _first(self, text: str, pos: int) -> int:
        mark = marker_at(text, pos, *_FIRST)
        if mark:
            if mark != START:
                self._keep(f"{START}assistant")
            self._steps.state = self._in_header
        elif mark == "":
            self._steps.state = self._body
        return pos

    def _keep(self, text: str) -> None:
        self._header.append(text)
        self._size += len(text)

    def _in_header(self, text: str, pos: int) -> int:
        end, mark = _HEADER_MARKS.find(text, pos)
        most = pos + MAX_HEADER - self._size
        self._keep(text[pos : min(end, most)])
        if end > most or mark in ENDS:
            return self._give_up(min(end, most))
        self._keep(mark)
        if mark == MESSAGE:
            written = "".join(self._header)
            self._clear()
            header = Header.of(written)
            self.is_reasoning, self._is_call = header.is_reasoning, bool(header.recipient)
            if self._is_call:
                self._add(written)
            self._steps.state = self._body
        return end + len(mark)

    def _give_up(self, pos: int) -> int:
        """The header is none: it is part of the answer."""
        text = "".join(self._header)
        self._clear()
        self._add(text)
        self._steps.state = self._body
        return pos

    def _clear(self) -> None:
        self._header.clear()
        self._size = 0

    def _body(self, text: str, pos: int) -> int:
        end, mark = _BODY_MARKS.find(text, pos)
        self._add(text[pos:end])
        if mark and self._is_call and mark in ENDS:
            self._add(mark)
        if mark:
            self.is_reasoning = self._is_call = False
        if mark in (START, CHANNEL):
            self._keep(mark if mark == START else f"{START}assistant{mark}")
            self._steps.state = self._in_header
        return end + len(mark)


_HEADER_MARKS: Final = Markers(MESSAGE, *ENDS)
_BODY_MARKS: Final = Markers(START, CHANNEL, *ENDS)
