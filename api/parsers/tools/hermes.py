"""``<tool_call>{"name": "f", "arguments": {...}}</tool_call>``: Hermes, Qwen2.5, Qwen3 and many others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Final

from api.parsers.base import Event, MakeId, Tool
from api.parsers.ids import new_id
from api.parsers.machine import Markers, Output, Steps, skip_space
from api.parsers.tools.json_calls import JsonCall

_OPEN: Final = "<tool_call>"
_CLOSE: Final = "</tool_call>"
_OPENING: Final = Markers(_OPEN)
_CLOSING: Final = Markers(_OPEN, _CLOSE)


class HermesParser:
    """Parses calls between tags, with text before, between and after them."""

    special_tokens: ClassVar[tuple[str, ...]] = (_OPEN, _CLOSE)
    new_id = staticmethod(new_id)

    def __init__(self, tools: Iterable[Tool], make_id: MakeId) -> None:
        self._out = Output(make_id)
        self._steps = Steps(self._content)
        self._call = JsonCall(self._out)

    def feed(self, text: str, /) -> list[Event]:
        """Takes the next piece of text; returns its events."""
        self._steps.run(text)
        return self._out.take()

    def finish(self) -> list[Event]:
        """Ends the text; returns the remaining events."""
        if self._steps.state == self._object:
            self._call.finish()
        rest = self._steps.rest()
        # A partial closing tag after a complete call is not content.
        return self._out.finish("" if self._steps.state == self._after and _CLOSE.startswith(rest) else rest)

    def _content(self, text: str, pos: int) -> int:
        return self._until(_OPENING, text, pos)

    def _after(self, text: str, pos: int) -> int:
        """After a call: the closing tag may be missing, or unexpected text may precede it."""
        return self._until(_CLOSING, text, pos)

    def _until(self, markers: Markers, text: str, pos: int) -> int:
        end, marker = markers.find(text, pos)
        self._out.text(text[pos:end])
        if marker == _OPEN:
            self._out.hold(marker)
            self._begin()
        elif marker == _CLOSE:
            self._out.end_layout()
            self._steps.state = self._content
        return end + len(marker)

    def _begin(self) -> None:
        self._call = JsonCall(self._out)
        self._steps.state = self._object

    def _object(self, text: str, pos: int) -> int:
        end = self._call.feed(text, pos)
        if self._call.done:
            self._steps.state = self._another
        elif self._call.failed:
            self._out.release()
            self._steps.state = self._after if self._call.started else self._content
        return end

    def _another(self, text: str, pos: int) -> int:
        """After a complete call: another call may follow between the same tags."""
        end = skip_space(text, pos)
        self._out.text(text[pos:end])
        if end < len(text):
            if text[end] == "{":
                self._begin()
            else:
                self._steps.state = self._after
        return end
