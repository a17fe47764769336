"""``{"name": "f", "parameters": {...}}`` without tags: Llama 3.1 to 3.3, Llama 4.

Several calls are separated by ``;``, ``,`` or white space; ``<|python_tag|>`` may precede them. Since an answer may
contain other JSON, an object without the tag is a call only if it has a name, arguments and no keys that calls do not
have. A quoted tool definition, for example, has a description.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import ClassVar, Final

from api.parsers.base import Event, MakeId, Tool
from api.parsers.ids import new_id
from api.parsers.machine import Markers, Output, Steps, marker_at, skip_space
from api.parsers.tools.json_calls import PLAIN_KEYS, JsonCall

_TAG: Final = "<|python_tag|>"
_OPENING: Final = Markers("{", _TAG)
_SEPARATORS: Final = re.compile(r"[ \t\r\n;,]*")


class Llama3JsonParser:
    """Parses calls within text."""

    special_tokens: ClassVar[tuple[str, ...]] = (_TAG,)
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
        if self._steps.state == self._separators and not self._steps.rest():
            self._out.drop()
        return self._out.finish(self._steps.rest())

    def _content(self, text: str, pos: int) -> int:
        end, marker = _OPENING.find(text, pos)
        self._out.text(text[pos:end])
        return self._begin(marker, end) if marker else end

    def _begin(self, marker: str, pos: int) -> int:
        if marker == _TAG:
            self._out.hold(marker)
            self._steps.state = self._tagged
            return pos + len(marker)
        self._call = JsonCall(self._out, keys=PLAIN_KEYS, needs_arguments=True)
        self._steps.state = self._object
        return pos

    def _tagged(self, text: str, pos: int) -> int:
        end = skip_space(text, pos)
        self._out.hold(text[pos:end])
        if end < len(text):
            if text[end] == "{":
                self._call = JsonCall(self._out, keys=PLAIN_KEYS)
                self._steps.state = self._object
            else:  # such as code for a built-in tool
                self._out.release()
                self._steps.state = self._content
        return end

    def _object(self, text: str, pos: int) -> int:
        end = self._call.feed(text, pos)
        if self._call.done:
            self._steps.state = self._separators
        elif self._call.failed:
            self._out.release()
            self._steps.state = self._content
        return end

    def _separators(self, text: str, pos: int) -> int:
        """After a call: the separators before the next call, if any."""
        match = _SEPARATORS.match(text, pos)
        assert match is not None
        end = match.end()
        self._out.hold(text[pos:end])
        if end < len(text):
            marker = marker_at(text, end, "{", _TAG)
            if marker:
                return self._begin(marker, end)
            if marker is not None:
                self._out.release()
                self._steps.state = self._content
        return end
