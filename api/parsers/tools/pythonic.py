"""``[f(a=1, b="x"), g()]``: Llama 3.2 and 4, ToolACE and others that write calls in Python syntax.

A list of calls may begin at the start of a line or after ``<|python_start|>``; brackets elsewhere are text. Each
argument is emitted as JSON when it is complete.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import ClassVar, Final

from api.parsers.base import MAX_NAME, Event, MakeId, Tool
from api.parsers.ids import new_id
from api.parsers.json_text import json_string
from api.parsers.machine import Markers, Output, State, Steps, marker_at, skip_space
from api.parsers.python_literal import PythonLiteral

_START: Final = "<|python_start|>"
_END: Final = "<|python_end|>"
_IN_LINE: Final = Markers("\n", _START)
_WORD: Final = re.compile(r"[\w.-]*")


class PythonicParser:
    """Parses lists of calls within text. Only keyword arguments are supported: positions do not tell the parameter."""

    special_tokens: ClassVar[tuple[str, ...]] = (_START, _END)
    new_id = staticmethod(new_id)

    def __init__(self, tools: Iterable[Tool], make_id: MakeId) -> None:
        self._out = Output(make_id)
        self._steps = Steps(self._line_start)
        self._word: list[str] = []
        self._size = 0
        self._function = ""
        self._argument = ""
        self._num_arguments = 0
        self._literal = PythonLiteral()

    def feed(self, text: str, /) -> list[Event]:
        """Takes the next piece of text; returns its events."""
        self._steps.run(text)
        return self._out.take()

    def finish(self) -> list[Event]:
        """Ends the text; returns the remaining events."""
        return self._out.finish(self._steps.rest())

    # -- text ------------------------------------------------------------------------------------------------

    def _line_start(self, text: str, pos: int) -> int:
        end = skip_space(text, pos)
        self._out.text(text[pos:end])
        if end < len(text):
            self._steps.state = self._line
            if text[end] == "[":
                return self._open(end)
        return end

    def _line(self, text: str, pos: int) -> int:
        end, marker = _IN_LINE.find(text, pos)
        if marker == "\n":
            self._steps.state = self._line_start
            end += 1
        self._out.text(text[pos:end])
        if marker == _START:
            self._out.hold(marker)
            self._steps.state = self._before_list
            end += len(marker)
        return end

    def _give_up(self, pos: int) -> int:
        self._out.release()
        self._steps.state = self._line
        return pos

    # -- calls -----------------------------------------------------------------------------------------------

    def _take(self, char: str, pos: int, state: State) -> int:
        """Takes a character that is part of a call."""
        self._out.hold(char)
        self._steps.state = state
        return pos + 1

    def _space(self, text: str, pos: int) -> int:
        end = skip_space(text, pos)
        self._out.hold(text[pos:end])
        return end

    def _before_list(self, text: str, pos: int) -> int:
        end = self._space(text, pos)
        if end == len(text):
            return end
        return self._open(end) if text[end] == "[" else self._give_up(end)

    def _open(self, pos: int) -> int:
        self._begin_word()
        return self._take("[", pos, self._name)

    def _begin_word(self) -> None:
        self._word.clear()
        self._size = 0

    def _read_word(self, text: str, pos: int) -> int:
        """Reads a name and the white space before it; returns the position after it."""
        if not self._word:
            pos = self._space(text, pos)
        match = _WORD.match(text, pos)
        assert match is not None
        if match.group():
            self._word.append(match.group())
            self._size += len(match.group())
            self._out.hold(match.group())
        return match.end()

    def _name(self, text: str, pos: int) -> int:
        end = self._read_word(text, pos)
        if self._size > MAX_NAME:
            return self._give_up(end)
        if end == len(text):
            return end
        self._function = "".join(self._word)
        self._num_arguments = 0
        if text[end] != "(" or not self._function or self._function[0] in "0123456789.-":
            return self._give_up(end)
        self._begin_word()
        return self._take("(", end, self._argument_name)

    def _argument_name(self, text: str, pos: int) -> int:
        end = self._read_word(text, pos)
        if self._size > MAX_NAME:
            return self._give_up(end)
        if end == len(text):
            return end
        self._argument = "".join(self._word)
        if text[end] == ")" and not self._argument:
            return self._end_call(end)
        self._steps.state = self._equals
        return end if self._argument else self._give_up(end)

    def _equals(self, text: str, pos: int) -> int:
        end = self._space(text, pos)
        if end == len(text):
            return end
        if text[end] != "=":
            return self._give_up(end)
        self._literal = PythonLiteral()
        return self._take("=", end, self._value)

    def _value(self, text: str, pos: int) -> int:
        end = self._literal.feed(text, pos)
        self._out.hold(text[pos:end])
        if self._literal.failed:
            return self._give_up(end)
        if self._literal.done:
            self._steps.state = self._after_value
        return end

    def _after_value(self, text: str, pos: int) -> int:
        end = self._space(text, pos)
        if end == len(text):
            return end
        if text[end] not in ",)":
            return self._give_up(end)
        if not self._num_arguments:
            self._out.start(self._function)
        self._out.drop()
        opening = ", " if self._num_arguments else "{"
        self._out.arguments(f"{opening}{json_string(self._argument)}: {self._literal.json()}")
        self._num_arguments += 1
        if text[end] == ")":
            return self._end_call(end)
        self._begin_word()
        return self._take(",", end, self._argument_name)

    def _end_call(self, pos: int) -> int:
        if not self._num_arguments:
            self._out.start(self._function)
        self._out.drop()
        self._out.arguments("}" if self._num_arguments else "{}")
        self._out.end()
        self._steps.state = self._after_call
        return pos + 1

    def _after_call(self, text: str, pos: int) -> int:
        end = self._space(text, pos)
        if end == len(text):
            return end
        if text[end] == ",":
            self._begin_word()
            return self._take(",", end, self._name)
        if text[end] != "]":
            return self._give_up(end)
        self._out.drop()
        self._steps.state = self._after_list
        return end + 1

    def _after_list(self, text: str, pos: int) -> int:
        end = skip_space(text, pos)
        self._out.text(text[pos:end])
        if end < len(text):
            marker = marker_at(text, end, _END)
            if marker is not None:
                if marker:
                    self._out.end_layout()
                self._steps.state = self._line_start
                return end + len(marker)
        return end
