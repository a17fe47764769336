"""``<tool_call><function=f><parameter=a>value</parameter></function></tool_call>``: Qwen3-Coder and later Qwen models.

Each value is written verbatim on its own lines, without quotes or escapes, and converted using its type in the tool's
schema. It is emitted when it is complete. Closing tags may be missing, since models forget them.

A value may contain tags itself, such as code about this format. So a closing tag ends a value only if the next expected
tag follows it, and an opening tag only if it names a parameter of the tool.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Final

from api.parsers.base import MAX_NAME, Event, MakeId, Tool
from api.parsers.ids import new_id
from api.parsers.json_text import json_string
from api.parsers.machine import Markers, Output, State, Steps, marker_at, skip_space
from api.parsers.tools.values import Parameters

_OPEN: Final = "<tool_call>"
_CLOSE: Final = "</tool_call>"
_FUNCTION: Final = "<function="
_FUNCTION_END: Final = "</function>"
_PARAMETER: Final = "<parameter="
_PARAMETER_END: Final = "</parameter>"

_OPENING: Final = Markers(_OPEN, _FUNCTION)
_CLOSING: Final = Markers(_OPEN, _FUNCTION, _CLOSE)
_NAME_END: Final = Markers(">", "<", "\n")
# A value without its closing tag ends at another tag at the start of a line.
_VALUE_END: Final = Markers(_PARAMETER_END, "\n" + _PARAMETER, "\n" + _FUNCTION_END, "\n" + _CLOSE)


class Qwen3CoderParser:
    """Parses calls between tags, with text before, between and after them."""

    special_tokens: ClassVar[tuple[str, ...]] = (_OPEN, _CLOSE)
    new_id = staticmethod(new_id)

    def __init__(self, tools: Iterable[Tool], make_id: MakeId) -> None:
        self._out = Output(make_id)
        self._steps = Steps(self._content)
        self._parameters = Parameters(tools)
        self._name: list[str] = []
        self._size = 0
        self._is_wrapped = False
        """Whether the function is inside ``<tool_call>``."""
        self._function = ""
        self._parameter = ""
        self._num_parameters = 0
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
        if not rest and self._steps.state in (self._after_value, self._after_function):
            is_whole = self._steps.state == self._after_function
            self._end_value()
            if is_whole:
                self._end_call()
        # A partial closing tag after a complete call is not content.
        return self._out.finish("" if self._steps.state == self._after and _CLOSE.startswith(rest) else rest)

    # -- text ------------------------------------------------------------------------------------------------

    def _content(self, text: str, pos: int) -> int:
        return self._until(_OPENING, text, pos)

    def _after(self, text: str, pos: int) -> int:
        """After a call: another may follow between the same tags."""
        return self._until(_CLOSING, text, pos)

    def _until(self, markers: Markers, text: str, pos: int) -> int:
        end, marker = markers.find(text, pos)
        self._out.text(text[pos:end])
        if marker == _CLOSE:
            self._out.end_layout()
            self._steps.state = self._content
        elif marker == _OPEN:
            self._out.hold(marker)
            self._is_wrapped = True
            self._steps.state = self._opened
        elif marker == _FUNCTION:
            self._is_wrapped = self._is_wrapped and self._steps.state == self._after
            return self._take(marker, end, self._function_name)
        return end + len(marker)

    def _give_up(self, pos: int, state: State) -> int:
        self._out.release()
        self._steps.state = state
        return pos

    # -- calls -----------------------------------------------------------------------------------------------

    def _take(self, tag: str, pos: int, state: State) -> int:
        """Consumes the beginning of a tag, up to the name in it."""
        self._out.hold(tag)
        self._name.clear()
        self._size = 0
        self._steps.state = state
        return pos + len(tag)

    def _opened(self, text: str, pos: int) -> int:
        end = skip_space(text, pos)
        self._out.hold(text[pos:end])
        if end == len(text):
            return end
        tag = marker_at(text, end, _FUNCTION)
        if tag is None:
            return end
        return self._take(tag, end, self._function_name) if tag else self._give_up(end, self._content)

    def _read_name(self, text: str, pos: int) -> tuple[int, str | None]:
        """Reads the name in a tag. Returns the end position and the name: None if incomplete, empty if malformed."""
        end, marker = _NAME_END.find(text, pos)
        self._name.append(text[pos:end])
        self._out.hold(text[pos:end])
        self._size += end - pos
        if self._size > MAX_NAME:
            return end, ""
        if not marker:
            return end, None
        if marker != ">":
            return end, ""
        self._out.hold(marker)
        return end + 1, "".join(self._name).strip()

    def _function_name(self, text: str, pos: int) -> int:
        end, name = self._read_name(text, pos)
        if name is None:
            return end
        self._function = name
        self._num_parameters = 0
        self._steps.state = self._body
        return end if name else self._give_up(end, self._content)

    def _body(self, text: str, pos: int) -> int:
        """In a function, outside its parameters."""
        end = skip_space(text, pos)
        self._out.hold(text[pos:end])
        if end == len(text):
            return end
        tag = marker_at(text, end, _PARAMETER, _FUNCTION_END, _CLOSE)
        if tag is None:
            return end
        if not tag:
            return self._give_up(end, self._after if self._num_parameters else self._content)
        if tag == _PARAMETER:
            return self._take(tag, end, self._parameter_name)
        self._end_call()
        return end + len(tag) if tag == _FUNCTION_END else end

    def _end_call(self) -> None:
        self._begin_call()
        self._out.drop()
        self._out.arguments("}" if self._num_parameters else "{}")
        self._out.end()
        self._steps.state = self._after

    def _begin_call(self) -> None:
        if not self._num_parameters:
            self._out.start(self._function)

    def _parameter_name(self, text: str, pos: int) -> int:
        end, name = self._read_name(text, pos)
        if name is None:
            return end
        if not name:
            return self._give_up(end, self._after if self._num_parameters else self._content)
        self._parameter = name
        self._value.clear()
        self._steps.state = self._read_value
        return end

    # -- values ----------------------------------------------------------------------------------------------

    def _read_value(self, text: str, pos: int) -> int:
        end, marker = _VALUE_END.find(text, pos)
        self._value.append(text[pos:end])
        self._out.hold(text[pos:end])
        if not marker:
            return end
        if marker == "\n" + _CLOSE:
            self._end_value()
            return end
        self._tail = [marker]
        self._out.hold(marker)
        if marker == _PARAMETER_END:
            self._steps.state = self._after_value
        elif marker == "\n" + _FUNCTION_END:
            self._steps.state = self._after_function
        else:
            self._name.clear()
            self._size = 0
            self._steps.state = self._next_name
        return end + len(marker)

    def _resume_value(self) -> None:
        """Continues the value: the text that looked like its end is part of it."""
        self._value += self._tail
        self._steps.state = self._read_value

    def _tag_behind(self, text: str, pos: int, *tags: str) -> tuple[int, str | None]:
        """Skips white space. Returns its end and the tag there: empty if there is none, None if more text is needed."""
        end = skip_space(text, pos)
        self._tail.append(text[pos:end])
        self._out.hold(text[pos:end])
        return end, None if end == len(text) else marker_at(text, end, *tags)

    def _after_value(self, text: str, pos: int) -> int:
        """After a closing tag of the parameter."""
        end, tag = self._tag_behind(text, pos, _PARAMETER, _FUNCTION_END, _CLOSE)
        if tag:
            self._end_value()
        elif tag is not None:
            self._resume_value()
        return end

    def _after_function(self, text: str, pos: int) -> int:
        """After a closing tag of the function, if that of the parameter is missing."""
        end, tag = self._tag_behind(text, pos, _CLOSE, _OPEN, _FUNCTION)
        if tag or (tag is not None and not self._is_wrapped):
            self._end_value()
            self._end_call()
        elif tag is not None:
            self._resume_value()
        return end

    def _next_name(self, text: str, pos: int) -> int:
        """In the opening tag of a parameter, if the closing tag of the previous one is missing."""
        end, name = self._read_name(text, pos)
        if name is None:
            return end
        if name and self._parameters.may_have(self._function, name):
            self._end_value()
            self._parameter = name
            self._value.clear()
            self._steps.state = self._read_value
            return end
        self._tail += self._name
        if name:
            self._tail.append(">")
        self._resume_value()
        return end

    def _end_value(self) -> None:
        """Ends the value and emits it."""
        value = "".join(self._value).removeprefix("\n")
        if self._tail[:1] == [_PARAMETER_END]:
            value = value.removesuffix("\n")
        json = self._parameters.json(self._function, self._parameter, value)
        self._begin_call()
        self._out.drop()
        opening = ", " if self._num_parameters else "{"
        self._out.arguments(f"{opening}{json_string(self._parameter)}: {json}")
        self._num_parameters += 1
        self._tail = []
        self._steps.state = self._body
