"""``[f(a=1, b="x"), g()]``: Llama 3.2 and 4, Gemma 3, OLMo 3, LFM2 and others that write calls in Python syntax.

A family's format is a ``Pythonic``. A list of calls may begin at the start of a line or in a block; brackets elsewhere
are text. In a block, calls may also follow each other without brackets. Each argument is emitted as JSON when it is
complete.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

import msgspec

from api.parsers.base import Event, MakeId, Tool
from api.parsers.ids import new_id
from api.parsers.machine import CallWriter, Markers, Name, Output, State, Steps, marker_at, skip_space
from api.parsers.python_literal import PythonLiteral

_WORD: Final = re.compile(r"[\w.-]*")


class Pythonic(msgspec.Struct, frozen=True):
    """Where a family writes calls. Calling it creates a parser; see ``ToolParserClass``."""

    blocks: tuple[tuple[str, str], ...]
    """Marks around calls. The second may be missing."""
    in_lines: bool = False
    """A list of calls may begin at the start of a line."""
    special_tokens: tuple[str, ...] = ()
    """See ``Parser``."""

    def __call__(self, tools: Iterable[Tool], make_id: MakeId) -> PythonicParser:
        """Creates a parser for one choice."""
        return PythonicParser(self, make_id)

    def new_id(self) -> str:
        """See ``ToolParserClass``."""
        return new_id()


class PythonicParser:
    """Parses lists of calls within text. Only keyword arguments are supported: positions do not tell the parameter."""

    def __init__(self, format: Pythonic, make_id: MakeId) -> None:
        self.special_tokens = format.special_tokens
        self._format = format
        self._out = Output(make_id)
        self._in_line = Markers(*(("\n",) if format.in_lines else ()), *(start for start, _ in format.blocks))
        self._text_state = self._line_start if format.in_lines else self._line
        self._steps = Steps(self._text_state)
        self._closing = ""
        """The end of the block; empty outside blocks."""
        self._is_list = True
        self._word = Name(self._out)
        self._call = CallWriter(self._out)
        self._argument = ""
        self._literal = PythonLiteral()

    def feed(self, text: str, /) -> list[Event]:
        """Takes the next piece of text; returns its events."""
        self._steps.run(text)
        return self._out.take()

    def finish(self) -> list[Event]:
        """Ends the text; returns the remaining events."""
        rest = self._steps.rest()
        # A partial mark after complete calls is not content.
        is_mark = self._steps.state == self._after_list or (self._steps.state == self._after_call and not self._is_list)
        return self._out.finish("" if is_mark and self._closing.startswith(rest) else rest)

    # -- text ------------------------------------------------------------------------------------------------

    def _line_start(self, text: str, pos: int) -> int:
        end = skip_space(text, pos)
        self._out.text(text[pos:end])
        if end < len(text):
            self._steps.state = self._line
            if text[end] == "[":
                self._closing = ""
                return self._open(end)
        return end

    def _line(self, text: str, pos: int) -> int:
        end, marker = self._in_line.find(text, pos)
        if marker == "\n":
            self._steps.state = self._line_start
            end += 1
        self._out.text(text[pos:end])
        if marker not in ("", "\n"):
            self._out.hold(marker)
            self._closing = dict(self._format.blocks)[marker]
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

    def _before_list(self, text: str, pos: int) -> int:
        end = self._out.hold_space(text, pos)
        if end == len(text):
            return end
        if text[end] == "[":
            return self._open(end)
        self._is_list = False
        self._word.clear()
        self._steps.state = self._name
        return end

    def _open(self, pos: int) -> int:
        self._is_list = True
        self._word.clear()
        return self._take("[", pos, self._name)

    def _read_word(self, text: str, pos: int) -> tuple[int, str | None]:
        """Reads a name and the white space before it. Returns the end position and the name: None if incomplete."""
        if not self._word.text():
            pos = self._out.hold_space(text, pos)
        match = _WORD.match(text, pos)
        assert match is not None
        end = match.end()
        if not self._word.read(match.group()):
            return end, ""
        return end, None if end == len(text) else self._word.text()

    def _name(self, text: str, pos: int) -> int:
        end, name = self._read_word(text, pos)
        if name is None:
            return end
        if not name or text[end] != "(" or name[0] in "0123456789.-":
            return self._give_up(end)
        self._call.name(name)
        self._word.clear()
        return self._take("(", end, self._argument_name)

    def _argument_name(self, text: str, pos: int) -> int:
        end, name = self._read_word(text, pos)
        if name is None:
            return end
        if not name:
            return self._end_call(end) if text.startswith(")", end) and not self._word.text() else self._give_up(end)
        self._argument = name
        self._steps.state = self._equals
        return end

    def _equals(self, text: str, pos: int) -> int:
        end = self._out.hold_space(text, pos)
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
        end = self._out.hold_space(text, pos)
        if end == len(text):
            return end
        if text[end] not in ",)":
            return self._give_up(end)
        self._call.add(self._argument, self._literal.json())
        if text[end] == ")":
            return self._end_call(end)
        self._word.clear()
        return self._take(",", end, self._argument_name)

    def _end_call(self, pos: int) -> int:
        self._call.end()
        self._steps.state = self._after_call
        return pos + 1

    def _after_call(self, text: str, pos: int) -> int:
        end = self._out.hold_space(text, pos)
        if end == len(text):
            return end
        if not self._is_list:
            return self._next_call(text, end)
        if text[end] == ",":
            self._word.clear()
            return self._take(",", end, self._name)
        if text[end] != "]":
            return self._give_up(end)
        self._out.drop()
        self._steps.state = self._after_list
        return end + 1

    def _next_call(self, text: str, pos: int) -> int:
        """In a block without brackets, after a call: another call, or the end of the block."""
        closing = marker_at(text, pos, self._closing)
        if closing is None:
            return pos
        self._out.drop()
        if closing:
            return self._close(pos + len(closing))
        self._word.clear()
        self._steps.state = self._name
        return pos

    def _close(self, pos: int) -> int:
        self._out.end_layout()
        self._steps.state = self._text_state
        return pos

    def _after_list(self, text: str, pos: int) -> int:
        end = skip_space(text, pos)
        self._out.text(text[pos:end])
        if end < len(text):
            closing = marker_at(text, end, self._closing) if self._closing else ""
            if closing:
                return self._close(end + len(closing))
            if closing is not None:
                self._steps.state = self._text_state
        return end


PYTHONIC: Final = Pythonic(
    (("<|python_start|>", "<|python_end|>"), ("```tool_code", "```")),
    in_lines=True,
    special_tokens=("<|python_start|>", "<|python_end|>"),
)
"""Llama 3.2 and 4, ToolACE, and Gemma 3, which puts code in a Markdown block of its own."""
OLMO3: Final = Pythonic((("<function_calls>", "</function_calls>"),))
LFM2: Final = Pythonic(
    (("<|tool_call_start|>", "<|tool_call_end|>"),), special_tokens=("<|tool_call_start|>", "<|tool_call_end|>")
)
