"""``<tool_call>f<arg_key>a</arg_key><arg_value>x</arg_value></tool_call>``: GLM-4.5 and later.

Values have no quotes and are converted with their type in the tool's schema. Each is emitted when it is complete. A
value may contain tags itself, so a closing tag ends it only if the next expected tag follows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import ClassVar, Final

from api.parsers.base import Event, MakeId, Tool
from api.parsers.ids import new_id
from api.parsers.machine import CallWriter, Markers, Name, Output, State, Steps, marker_at
from api.parsers.tools.values import Parameters

_OPEN: Final = "<tool_call>"
_CLOSE: Final = "</tool_call>"
_KEY: Final = "<arg_key>"
_KEY_END: Final = "</arg_key>"
_VALUE: Final = "<arg_value>"
_VALUE_END: Final = "</arg_value>"

_OPENING: Final = Markers(_OPEN)
_KEY_ENDS: Final = Markers(_KEY_END)
_VALUE_ENDS: Final = Markers(_VALUE_END)
_WORD: Final = re.compile(r"[\w.:/-]*")


class Glm45Parser:
    """Parses calls between tags, with text before, between and after them."""

    special_tokens: ClassVar[tuple[str, ...]] = (_OPEN, _CLOSE, _KEY, _KEY_END, _VALUE, _VALUE_END)
    new_id = staticmethod(new_id)

    def __init__(self, tools: Iterable[Tool], make_id: MakeId) -> None:
        self._out = Output(make_id)
        self._steps = Steps(self._content)
        self._parameters = Parameters(tools)
        self._name = Name(self._out)
        self._call = CallWriter(self._out)
        self._key = ""
        self._value: list[str] = []
        self._tail: list[str] = []
        """Text that ends the value, unless it turns out to be part of the value."""

    def feed(self, text: str, /) -> list[Event]:
        """Takes the next piece of text; returns its events."""
        self._steps.run(text)
        return self._out.take()

    def finish(self) -> list[Event]:
        """Ends the text; returns the remaining events."""
        rest = self._steps.rest()
        if not rest and self._steps.state == self._after_value:
            self._end_value()
        return self._out.finish(rest)

    def _content(self, text: str, pos: int) -> int:
        end, marker = _OPENING.find(text, pos)
        self._out.text(text[pos:end])
        return self._take(marker, end, self._function_name) if marker else end

    def _take(self, tag: str, pos: int, state: State) -> int:
        """Takes a tag that is part of a call."""
        self._out.hold(tag)
        self._name.clear()
        self._steps.state = state
        return pos + len(tag)

    def _give_up(self, pos: int) -> int:
        self._out.release()
        self._steps.state = self._content
        return pos

    def _function_name(self, text: str, pos: int) -> int:
        if not self._name.text():
            pos = self._out.hold_space(text, pos)
        match = _WORD.match(text, pos)
        assert match is not None
        end = match.end()
        if not self._name.read(match.group()) or (end < len(text) and not self._name.text()):
            return self._give_up(end)
        if end < len(text):
            self._call.name(self._name.text())
            self._steps.state = self._body
        return end

    def _body(self, text: str, pos: int) -> int:
        """In a call, outside its arguments."""
        end = self._out.hold_space(text, pos)
        if end == len(text):
            return end
        tag = marker_at(text, end, _KEY, _CLOSE)
        if tag is None:
            return end
        if tag == _KEY:
            return self._take(tag, end, self._key_name)
        if not tag:
            return self._give_up(end)
        self._call.end()
        self._steps.state = self._content
        return end + len(tag)

    def _key_name(self, text: str, pos: int) -> int:
        end, tag = _KEY_ENDS.find(text, pos)
        if not self._name.read(text[pos:end]):
            return self._give_up(end)
        if not tag:
            return end
        self._key = self._name.text().strip()
        if not self._key:
            return self._give_up(end)
        return self._take(tag, end, self._before_value)

    def _before_value(self, text: str, pos: int) -> int:
        end = self._out.hold_space(text, pos)
        if end == len(text):
            return end
        tag = marker_at(text, end, _VALUE)
        if tag is None:
            return end
        self._value.clear()
        return self._take(tag, end, self._read_value) if tag else self._give_up(end)

    def _read_value(self, text: str, pos: int) -> int:
        end, tag = _VALUE_ENDS.find(text, pos)
        self._value.append(text[pos:end])
        self._out.hold(text[pos:end])
        if tag:
            self._tail = [tag]
            return self._take(tag, end, self._after_value)
        return end

    def _after_value(self, text: str, pos: int) -> int:
        end = self._out.hold_space(text, pos)
        self._tail.append(text[pos:end])
        if end == len(text):
            return end
        tag = marker_at(text, end, _KEY, _CLOSE)
        if tag:
            self._end_value()
        elif tag is not None:
            self._value += self._tail
            self._steps.state = self._read_value
        return end

    def _end_value(self) -> None:
        """Ends the value and emits it."""
        json = self._parameters.json(self._call.function, self._key, "".join(self._value))
        self._call.add(self._key, json)
        self._steps.state = self._body
