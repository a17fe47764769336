"""A name and JSON arguments between special tokens: DeepSeek V3, R1 and V3.1, Kimi K2.

* DeepSeek V3: ``function<sep>f``, then the arguments in a Markdown block;
* DeepSeek V3.1: ``f<sep>{...}``;
* Kimi K2: ``functions.f:0<sep>{...}``, where the text before the separator is the call's id.

A family's tokens are a ``NamedJson``. Tokens around all calls, and those after a call, may be missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

import msgspec

from api.parsers.base import Event, MakeId, Tool
from api.parsers.ids import new_id
from api.parsers.machine import Markers, Name, Output, State, Steps, marker_at, skip_space
from api.parsers.tools.json_calls import ArgumentsObject

_FENCE: Final = "```json"
_FENCE_END: Final = "```"
_WORD: Final = re.compile(r"[\w.:/-]*")
_ID_PREFIX: Final = "functions."


class NamedJson(msgspec.Struct, frozen=True):
    """The special tokens of a family. Calling it creates a parser; see ``ToolParserClass``."""

    opening: str
    """Before all calls."""
    closing: str
    """After all calls."""
    call: str
    """Before a call."""
    call_end: str
    """After a call."""
    separator: str
    """Between the name and the arguments."""
    has_ids: bool = False
    """The model writes the ids of calls, which have the name in them."""

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """See ``Parser``."""
        return self.opening, self.closing, self.call, self.call_end, self.separator

    def __call__(self, tools: Iterable[Tool], make_id: MakeId) -> NamedJsonParser:
        """Creates a parser for one choice."""
        return NamedJsonParser(self, make_id)

    def new_id(self) -> str:
        """See ``ToolParserClass``."""
        return new_id()


class NamedJsonParser:
    """Parses text followed by calls."""

    def __init__(self, format: NamedJson, make_id: MakeId) -> None:
        self.special_tokens = format.special_tokens
        self._format = format
        self._out = Output(make_id)
        self._steps = Steps(self._content)
        self._opening = Markers(format.opening, format.call)
        self._separator = Markers(format.separator)
        self._tails = (format.call_end, _FENCE_END, format.call, format.closing)
        self._arguments = ArgumentsObject(self._out, None)
        self._name = Name(self._out)

    def feed(self, text: str, /) -> list[Event]:
        """Takes the next piece of text; returns its events."""
        self._steps.run(text)
        return self._out.take()

    def finish(self) -> list[Event]:
        """Ends the text; returns the remaining events."""
        if self._steps.state == self._object:
            self._arguments.finish()
        rest = self._steps.rest()
        # A partial token after a complete call is not content.
        is_markup = self._steps.state == self._after and any(tail.startswith(rest) for tail in self._tails)
        return self._out.finish("" if is_markup else rest)

    def _content(self, text: str, pos: int) -> int:
        end, marker = self._opening.find(text, pos)
        self._out.text(text[pos:end])
        if marker:
            return self._take(marker, end, self._opened if marker == self._format.opening else self._head)
        return end

    def _take(self, markup: str, pos: int, state: State) -> int:
        """Takes text that is part of a call."""
        self._out.hold(markup)
        self._name.clear()
        self._steps.state = state
        return pos + len(markup)

    def _give_up(self, pos: int) -> int:
        self._out.release()
        self._steps.state = self._content
        return pos

    def _opened(self, text: str, pos: int) -> int:
        end = self._out.hold_space(text, pos)
        if end == len(text):
            return end
        call = marker_at(text, end, self._format.call)
        if call is None:
            return end
        return self._take(call, end, self._head) if call else self._give_up(end)

    def _head(self, text: str, pos: int) -> int:
        """What is before the separator: the name, an id with the name in it, or the kind of call."""
        end, separator = self._separator.find(text, pos)
        if not self._name.read(text[pos:end]):
            return self._give_up(end)
        if separator:
            self._out.hold(separator)
            self._steps.state = self._after_head
        return end + len(separator)

    def _after_head(self, text: str, pos: int) -> int:
        end = self._out.hold_space(text, pos)
        if end < len(text):
            if text[end] == "{":
                self._steps.state = self._before_arguments
            else:
                self._name.clear()
                self._steps.state = self._function
        return end

    def _function(self, text: str, pos: int) -> int:
        """The name, if a kind of call is before the separator."""
        match = _WORD.match(text, pos)
        assert match is not None
        if not self._name.read(match.group()):
            return self._give_up(match.end())
        if match.end() < len(text):
            self._steps.state = self._before_arguments
        return match.end()

    def _before_arguments(self, text: str, pos: int) -> int:
        end = self._out.hold_space(text, pos)
        if end == len(text):
            return end
        marker = marker_at(text, end, "{", _FENCE)
        if marker is None:
            return end
        if marker == _FENCE:
            self._out.hold(marker)
            return end + len(marker)
        head = self._name.text().strip()
        name = head
        if self._format.has_ids:
            name = head.removeprefix(_ID_PREFIX).rpartition(":")[0] or head.removeprefix(_ID_PREFIX)
        if not marker or not name:
            return self._give_up(end)
        self._arguments = ArgumentsObject(self._out, name, id=head if self._format.has_ids else None)
        self._steps.state = self._object
        return end

    def _object(self, text: str, pos: int) -> int:
        end = self._arguments.feed(text, pos)
        if self._arguments.done:
            self._steps.state = self._after
        return self._give_up(end) if self._arguments.failed else end

    def _after(self, text: str, pos: int) -> int:
        """After a call: its end, another call, or the end of all calls."""
        end = skip_space(text, pos)
        self._out.text(text[pos:end])
        if end == len(text):
            return end
        marker = marker_at(text, end, *self._tails)
        if marker is None:
            return end
        if marker == self._format.call:
            return self._take(marker, end, self._head)
        if marker:
            self._out.end_layout()
        if marker in ("", self._format.closing):
            self._steps.state = self._content
        return end + len(marker)


DEEPSEEK: Final = NamedJson(
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
)
KIMI_K2: Final = NamedJson(
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    "<|tool_call_begin|>",
    "<|tool_call_end|>",
    "<|tool_call_argument_begin|>",
    has_ids=True,
)
