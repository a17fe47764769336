"""Calls as JSON after a tag: ``<tool_call>{"name": "f", "arguments": {...}}</tool_call>`` and its relatives.

A family's format is a ``JsonTags``. Between its tags are one call, a list of calls, or several of these.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from api.parsers.base import Event, MakeId, Tool
from api.parsers.ids import new_id
from api.parsers.machine import Markers, Output, Steps, marker_at, skip_space
from api.parsers.tools.json_calls import PLAIN_KEYS, JsonCalls

_FENCE: Final = "```json"
_FENCE_END: Final = "```"


class JsonTags(msgspec.Struct, frozen=True):
    """How a family marks calls. Calling it creates a parser; see ``ToolParserClass``."""

    openings: tuple[str, ...]
    """Tags before calls. If one ends with a bracket, that begins the list."""
    closings: tuple[str, ...] = ()
    """Tags after calls, which may be missing."""
    special_tokens: tuple[str, ...] = ()
    """See ``Parser``."""
    name_key: str = "name"
    """The key of a function's name."""
    has_bare_lists: bool = False
    """A list of calls at the beginning of the text needs no tag; one in a Markdown block of JSON neither."""

    def __call__(self, tools: Iterable[Tool], make_id: MakeId) -> JsonTagsParser:
        """Creates a parser for one choice."""
        return JsonTagsParser(self, make_id)

    def new_id(self) -> str:
        """See ``ToolParserClass``."""
        return new_id()


class JsonTagsParser:
    """Parses calls between tags, with text before, between and after them."""

    def __init__(self, format: JsonTags, make_id: MakeId) -> None:
        self.special_tokens = format.special_tokens
        self._format = format
        self._out = Output(make_id)
        self._steps = Steps(self._beginning if format.has_bare_lists else self._content)
        fences = (_FENCE,) if format.has_bare_lists else ()
        self._opening = Markers(*format.openings, *fences)
        self._closing = Markers(*format.openings, *fences, *format.closings)
        self._calls = JsonCalls(self._out)
        self._closings = format.closings
        """What ends the calls being read."""

    def feed(self, text: str, /) -> list[Event]:
        """Takes the next piece of text; returns its events."""
        self._steps.run(text)
        return self._out.take()

    def finish(self) -> list[Event]:
        """Ends the text; returns the remaining events."""
        if self._steps.state == self._read_calls:
            self._calls.finish()
        rest = self._steps.rest()
        # A partial closing tag after a complete call is not content.
        is_closing = self._steps.state in (self._another, self._after) and any(
            closing.startswith(rest) for closing in self._closings
        )
        return self._out.finish("" if is_closing else rest)

    def _beginning(self, text: str, pos: int) -> int:
        end = skip_space(text, pos)
        self._out.text(text[pos:end])
        if end < len(text):
            opening = marker_at(text, end, *self._format.openings) if text[end] == "[" else ""
            if opening is not None:
                self._steps.state = self._content
                if text[end] == "[" and not opening:
                    return self._begin(end, ())
        return end

    def _content(self, text: str, pos: int) -> int:
        return self._until(self._opening, text, pos)

    def _after(self, text: str, pos: int) -> int:
        """After a call: the closing tag may be missing, or unexpected text may precede it."""
        return self._until(self._closing, text, pos)

    def _until(self, markers: Markers, text: str, pos: int) -> int:
        end, marker = markers.find(text, pos)
        self._out.text(text[pos:end])
        if not marker:
            return end
        if marker in self._format.closings:
            return self._close(end + len(marker))
        tag = marker.removesuffix("[")
        self._out.hold(tag)
        return self._begin(end + len(tag), (_FENCE_END,) if marker == _FENCE else self._format.closings)

    def _close(self, pos: int) -> int:
        self._out.end_layout()
        self._steps.state = self._content
        return pos

    def _begin(self, pos: int, closings: tuple[str, ...]) -> int:
        """Begins calls. Where other JSON may be as well, only the keys of calls tell them."""
        is_tagged = closings == self._format.closings
        self._closings = closings
        self._calls = JsonCalls(
            self._out,
            name_key=self._format.name_key,
            keys=None if is_tagged else PLAIN_KEYS,
            needs_arguments=not is_tagged,
        )
        self._steps.state = self._read_calls
        return pos

    def _read_calls(self, text: str, pos: int) -> int:
        end = self._calls.feed(text, pos)
        if self._calls.done:
            self._steps.state = self._another
        elif self._calls.failed:
            self._out.release()
            self._steps.state = self._after if self._calls.started else self._content
        return end

    def _another(self, text: str, pos: int) -> int:
        """After complete calls: others may follow between the same tags."""
        end = skip_space(text, pos)
        self._out.text(text[pos:end])
        if end == len(text):
            return end
        closing = marker_at(text, end, *self._closings) if self._closings else ""
        if closing is None:
            return end
        if closing:
            return self._close(end + len(closing))
        if self._closings != self._format.closings:
            self._steps.state = self._content
        elif text[end] in "{[":
            return self._begin(end, self._closings)
        else:
            self._steps.state = self._after
        return end


HERMES: Final = JsonTags(("<tool_call>",), ("</tool_call>",), ("<tool_call>", "</tool_call>"))
GRANITE: Final = JsonTags(
    ("<|tool_call|>", "<tool_call>"), ("</tool_call>",), ("<|tool_call|>", "<tool_call>"), has_bare_lists=True
)
"""Granite 3. Granite 4 writes what Hermes does."""
GRANITE_20B_FC: Final = JsonTags(("<function_call>",), ("</function_call>",), ("<function_call>",))
PHI4_MINI_JSON: Final = JsonTags(
    ("functools[", "<|tool_call|>"), ("<|/tool_call|>",), ("<|tool_call|>", "<|/tool_call|>")
)
"""Phi-4-mini writes calls after a word of its own, or between the tokens that its tokenizer has for them."""
INTERNLM: Final = JsonTags(
    ("<|action_start|><|plugin|>",), ("<|action_end|>",), ("<|action_start|>", "<|plugin|>", "<|action_end|>")
)
COHERE_COMMAND: Final = JsonTags(
    ("<|START_ACTION|>",), ("<|END_ACTION|>",), ("<|START_ACTION|>", "<|END_ACTION|>"), name_key="tool_name"
)
JAMBA: Final = JsonTags(("<tool_calls>",), ("</tool_calls>",), ("<tool_calls>", "</tool_calls>"))
"""Jamba, Hunyuan A13B and Apriel."""
LONGCAT: Final = JsonTags(
    ("<longcat_tool_call>",), ("</longcat_tool_call>",), ("<longcat_tool_call>", "</longcat_tool_call>")
)
NEMOTRON: Final = JsonTags(("<TOOLCALL>",), ("</TOOLCALL>",), ("<TOOLCALL>", "</TOOLCALL>"))
XLAM: Final = JsonTags(("<tool_call>", "[TOOL_CALLS]"), ("</tool_call>",), ("[TOOL_CALLS]",), has_bare_lists=True)
