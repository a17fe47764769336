"""``[TOOL_CALLS]`` and the calls after it, in the format of the tokenizer's version.

* up to 7: a list, ``[TOOL_CALLS] [{"name": "f", "arguments": {...}}, ...]``;
* 11: ``[TOOL_CALLS]f[CALL_ID]a1b2c3d4e[ARGS]{...}`` for each call;
* 13: ``[TOOL_CALLS]f[ARGS]{...}`` for each call; some templates omit ``[ARGS]``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import ClassVar, Final

from api.parsers.base import Event, MakeId, Tool
from api.parsers.ids import new_short_id
from api.parsers.machine import Markers, Name, Output, Steps, marker_at
from api.parsers.tools.json_calls import ArgumentsObject, JsonCalls

_OPEN: Final = "[TOOL_CALLS]"
_CALL_ID: Final = "[CALL_ID]"
_ARGS: Final = "[ARGS]"
_OPENING: Final = Markers(_OPEN)
_NAME: Final = re.compile(r"[\w.:/-]*")


class MistralParser:
    """Parses text followed by calls. New ids are generated for calls, since only version 11 has ids."""

    special_tokens: ClassVar[tuple[str, ...]] = (_OPEN, _CALL_ID, _ARGS)
    new_id = staticmethod(new_short_id)

    def __init__(self, tools: Iterable[Tool], make_id: MakeId) -> None:
        self._out = Output(make_id)
        self._steps = Steps(self._content)
        self._calls = JsonCalls(self._out)
        self._arguments = ArgumentsObject(self._out, None)
        self._name = Name(self._out)
        self._call_id = Name(self._out)

    def feed(self, text: str, /) -> list[Event]:
        """Takes the next piece of text; returns its events."""
        self._steps.run(text)
        return self._out.take()

    def finish(self) -> list[Event]:
        """Ends the text; returns the remaining events."""
        if self._steps.state == self._list:
            self._calls.finish()
        elif self._steps.state == self._object:
            self._arguments.finish()
        return self._out.finish(self._steps.rest())

    def _content(self, text: str, pos: int) -> int:
        end, marker = _OPENING.find(text, pos)
        self._out.text(text[pos:end])
        if marker:
            self._out.hold(marker)
            self._steps.state = self._opened
        return end + len(marker)

    def _give_up(self, pos: int) -> int:
        self._out.release()
        self._steps.state = self._content
        return pos

    def _opened(self, text: str, pos: int) -> int:
        end = self._out.hold_space(text, pos)
        if end < len(text):
            if text[end] in "[{":
                self._calls = JsonCalls(self._out)
                self._steps.state = self._list
            else:
                self._name.clear()
                self._steps.state = self._function
        return end

    def _list(self, text: str, pos: int) -> int:
        end = self._calls.feed(text, pos)
        if self._calls.done:
            self._steps.state = self._content
        return self._give_up(end) if self._calls.failed else end

    def _function(self, text: str, pos: int) -> int:
        return self._word(self._name, text, pos)

    def _read_id(self, text: str, pos: int) -> int:
        return self._word(self._call_id, text, pos)

    def _word(self, word: Name, text: str, pos: int) -> int:
        match = _NAME.match(text, pos)
        assert match is not None
        end = match.end()
        if not word.read(match.group()):
            return self._give_up(end)
        if end < len(text):
            if not self._name.text():
                return self._give_up(end)
            self._steps.state = self._after_name
        return end

    def _after_name(self, text: str, pos: int) -> int:
        end = self._out.hold_space(text, pos)
        if end == len(text):
            return end
        marker = marker_at(text, end, "{", _ARGS, _CALL_ID)
        if marker is None:
            return end
        if not marker:
            return self._give_up(end)
        if marker == _CALL_ID:
            self._call_id.clear()
            self._steps.state = self._read_id
        else:
            self._steps.state = self._before_arguments
            if marker == "{":
                return end
        self._out.hold(marker)
        return end + len(marker)

    def _before_arguments(self, text: str, pos: int) -> int:
        end = self._out.hold_space(text, pos)
        if end < len(text):
            if text[end] != "{":
                return self._give_up(end)
            self._arguments = ArgumentsObject(self._out, self._name.text())
            self._steps.state = self._object
        return end

    def _object(self, text: str, pos: int) -> int:
        end = self._arguments.feed(text, pos)
        if self._arguments.done:
            self._steps.state = self._content
        return self._give_up(end) if self._arguments.failed else end
