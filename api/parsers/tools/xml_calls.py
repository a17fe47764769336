"""``<tool_call><function=f><parameter=a>value</parameter></function></tool_call>`` and its relatives: Qwen3-Coder and
later Qwen models, Seed-OSS, MiniMax M2, DeepSeek V3.2 and V4.

A family's tags are an ``XmlCalls``. Values have no quotes or escapes. They are converted using their type in the tool's
schema and emitted when they are complete. Closing tags may be missing, since models forget them.

A value may contain tags itself, such as code about this format. So a closing tag ends a value only if the next expected
tag follows it, and an opening tag only if it names a parameter of the tool.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, NamedTuple

import msgspec

from api.parsers.base import Event, MakeId, Tool
from api.parsers.ids import new_id
from api.parsers.json_text import json_string, kind_of
from api.parsers.machine import CallWriter, Markers, Name, Output, State, Steps, marker_at
from api.parsers.tools.values import Parameters

_NAME_END: Final = Markers(">", "<", "\n")
_NAME: Final = re.compile(r"""(["']?)(.*?)\1(?:\s+string="(true|false)")?""")
"""A name with or without quotes, and what DeepSeek adds to it: whether the value is a string or JSON."""


class XmlCalls(msgspec.Struct, frozen=True):
    """The tags of a family. Calling it creates a parser; see ``ToolParserClass``."""

    opening: str
    """Before one call or several. It may be missing."""
    closing: str
    """After them."""
    function: str = "<function="
    """The beginning of the tag before a call, up to the function's name."""
    function_end: str = "</function>"
    """After a call."""
    parameter: str = "<parameter="
    """The beginning of the tag before a value, up to the parameter's name."""
    parameter_end: str = "</parameter>"
    """After a value."""
    has_lines: bool = True
    """Line breaks next to the tags of a parameter are not part of its value."""
    special_tokens: tuple[str, ...] = ()
    """See ``Parser``."""

    def __call__(self, tools: Iterable[Tool], make_id: MakeId) -> XmlCallsParser:
        """Creates a parser for one choice."""
        return XmlCallsParser(self, tools, make_id)

    def new_id(self) -> str:
        """See ``ToolParserClass``."""
        return new_id()


class _Tag(NamedTuple):
    name: str
    """Empty if the tag is malformed."""
    is_string: bool | None
    """What the tag says about the value: it is a string, JSON, or nothing."""


class XmlCallsParser:
    """Parses calls between tags, with text before, between and after them."""

    def __init__(self, format: XmlCalls, tools: Iterable[Tool], make_id: MakeId) -> None:
        self.special_tokens = format.special_tokens
        self._format = format
        self._out = Output(make_id)
        self._steps = Steps(self._content)
        self._parameters = Parameters(tools)
        self._opening = Markers(format.opening, format.function)
        self._closing = Markers(format.opening, format.function, format.closing)
        # A value without its closing tag ends at another tag at the start of a line.
        tags = (format.parameter, format.function_end, format.closing)
        self._value_end = Markers(format.parameter_end, *(f"\n{tag}" for tag in tags))
        self._name = Name(self._out)
        self._is_wrapped = False
        """Whether the function is between opening and closing."""
        self._call = CallWriter(self._out)
        self._parameter = _Tag("", None)
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
        is_markup = self._steps.state == self._after and self._format.closing.startswith(rest)
        return self._out.finish("" if is_markup else rest)

    # -- text ------------------------------------------------------------------------------------------------

    def _content(self, text: str, pos: int) -> int:
        return self._until(self._opening, text, pos)

    def _after(self, text: str, pos: int) -> int:
        """After a call: another may follow between the same tags."""
        return self._until(self._closing, text, pos)

    def _until(self, markers: Markers, text: str, pos: int) -> int:
        end, marker = markers.find(text, pos)
        self._out.text(text[pos:end])
        if marker == self._format.closing:
            self._out.end_layout()
            self._steps.state = self._content
        elif marker == self._format.opening:
            self._out.hold(marker)
            self._is_wrapped = True
            self._steps.state = self._opened
        elif marker == self._format.function:
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
        self._steps.state = state
        return pos + len(tag)

    def _opened(self, text: str, pos: int) -> int:
        end = self._out.hold_space(text, pos)
        if end == len(text):
            return end
        tag = marker_at(text, end, self._format.function)
        if tag is None:
            return end
        return self._take(tag, end, self._function_name) if tag else self._give_up(end, self._content)

    def _read_tag(self, text: str, pos: int) -> tuple[int, _Tag | None]:
        """Reads a tag from the name in it. Returns the end position and the tag; None if it is incomplete."""
        end, marker = _NAME_END.find(text, pos)
        if not self._name.read(text[pos:end]):
            return end, _Tag("", None)
        if not marker:
            return end, None
        match = _NAME.fullmatch(self._name.text().strip())
        if marker != ">" or match is None:
            return end, _Tag("", None)
        self._out.hold(marker)
        return end + 1, _Tag(match[2].strip(), None if match[3] is None else match[3] == "true")

    def _function_name(self, text: str, pos: int) -> int:
        end, tag = self._read_tag(text, pos)
        if tag is None:
            return end
        self._call.name(tag.name)
        self._steps.state = self._body
        return end if tag.name else self._give_up(end, self._content)

    def _body(self, text: str, pos: int) -> int:
        """In a function, outside its parameters."""
        end = self._out.hold_space(text, pos)
        if end == len(text):
            return end
        tag = marker_at(text, end, self._format.parameter, self._format.function_end, self._format.closing)
        if tag is None:
            return end
        if not tag:
            return self._give_up(end, self._after if self._call.num_arguments else self._content)
        if tag == self._format.parameter:
            return self._take(tag, end, self._parameter_name)
        self._end_call()
        return end + len(tag) if tag == self._format.function_end else end

    def _end_call(self) -> None:
        self._call.end()
        self._steps.state = self._after

    def _parameter_name(self, text: str, pos: int) -> int:
        end, tag = self._read_tag(text, pos)
        if tag is None:
            return end
        if not tag.name:
            return self._give_up(end, self._after if self._call.num_arguments else self._content)
        return self._begin_value(tag, end)

    def _begin_value(self, tag: _Tag, pos: int) -> int:
        self._parameter = tag
        self._value.clear()
        self._steps.state = self._read_value
        return pos

    # -- values ----------------------------------------------------------------------------------------------

    def _read_value(self, text: str, pos: int) -> int:
        end, marker = self._value_end.find(text, pos)
        self._value.append(text[pos:end])
        self._out.hold(text[pos:end])
        if not marker:
            return end
        if marker == "\n" + self._format.closing:
            self._end_value()
            return end
        self._tail = [marker]
        self._out.hold(marker)
        if marker == self._format.parameter_end:
            self._steps.state = self._after_value
        elif marker == "\n" + self._format.function_end:
            self._steps.state = self._after_function
        else:
            self._name.clear()
            self._steps.state = self._next_name
        return end + len(marker)

    def _resume_value(self) -> None:
        """Continues the value: the text that looked like its end is part of it."""
        self._value += self._tail
        self._steps.state = self._read_value

    def _tag_behind(self, text: str, pos: int, *tags: str) -> tuple[int, str | None]:
        """Skips white space. Returns its end and the tag there: empty if there is none, None if more text is needed."""
        end = self._out.hold_space(text, pos)
        self._tail.append(text[pos:end])
        return end, None if end == len(text) else marker_at(text, end, *tags)

    def _after_value(self, text: str, pos: int) -> int:
        """After a closing tag of the parameter."""
        end, tag = self._tag_behind(text, pos, self._format.parameter, self._format.function_end, self._format.closing)
        if tag:
            self._end_value()
        elif tag is not None:
            self._resume_value()
        return end

    def _after_function(self, text: str, pos: int) -> int:
        """After a closing tag of the function, if that of the parameter is missing."""
        end, tag = self._tag_behind(text, pos, self._format.closing, self._format.opening, self._format.function)
        if tag or (tag is not None and not self._is_wrapped):
            self._end_value()
            self._end_call()
        elif tag is not None:
            self._resume_value()
        return end

    def _next_name(self, text: str, pos: int) -> int:
        """In the opening tag of a parameter, if the closing tag of the previous one is missing."""
        end, tag = self._read_tag(text, pos)
        if tag is None:
            return end
        if tag.name and self._parameters.may_have(self._call.function, tag.name):
            self._end_value()
            return self._begin_value(tag, end)
        self._tail.append(self._name.text())
        if tag.name:
            self._tail.append(">")
        self._resume_value()
        return end

    def _end_value(self) -> None:
        """Ends the value and emits it."""
        value = "".join(self._value)
        if self._format.has_lines:
            value = value.removeprefix("\n")
            if self._tail[:1] == [self._format.parameter_end]:
                value = value.removesuffix("\n")
        name, is_string = self._parameter
        if is_string or (is_string is False and kind_of(value) is not None):
            json = json_string(value) if is_string else value.strip()
        else:
            json = self._parameters.json(self._call.function, name, value)
        self._call.add(name, json)
        self._tail = []
        self._steps.state = self._body


QWEN3_CODER: Final = XmlCalls("<tool_call>", "</tool_call>", special_tokens=("<tool_call>", "</tool_call>"))
SEED_OSS: Final = XmlCalls(
    "<seed:tool_call>", "</seed:tool_call>", special_tokens=("<seed:tool_call>", "</seed:tool_call>")
)
MINIMAX_M2: Final = XmlCalls(
    "<minimax:tool_call>",
    "</minimax:tool_call>",
    "<invoke name=",
    "</invoke>",
    "<parameter name=",
    special_tokens=("<minimax:tool_call>", "</minimax:tool_call>"),
)


def _dsml(calls: str) -> XmlCalls:
    """DeepSeek's tags, which have a token in them."""
    mark = "｜DSML｜"
    return XmlCalls(
        f"<{mark}{calls}>",
        f"</{mark}{calls}>",
        f"<{mark}invoke name=",
        f"</{mark}invoke>",
        f"<{mark}parameter name=",
        f"</{mark}parameter>",
        has_lines=False,
        special_tokens=(mark,),
    )


DEEPSEEK_V32: Final = _dsml("function_calls")
DEEPSEEK_V4: Final = _dsml("tool_calls")
