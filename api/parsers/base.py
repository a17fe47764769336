"""The seam between a model's text and the fields of a message.

A parser is pushed the text of one choice as it arrives and says what each part of it is. Whatever the pieces, the
events joined are the same: a client may stream or not. Text that could still turn out to be markup is held back, and
text that looked like a tool call but is none becomes content, as the client must not lose what the model wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeAlias

import msgspec

Tool: TypeAlias = Mapping[str, Any]
"""A tool as requests have it: ``{"type": "function", "function": {"name": ..., "parameters": {JSON schema}}}``."""

MakeId: TypeAlias = Callable[[], str]

MAX_DEPTH = 128
"""How deep arguments may nest. What is deeper is malformed."""
MAX_NAME = 256
"""Characters of a function's name. A longer one is malformed: names are held back until they end."""


class Content(msgspec.Struct, frozen=True, gc=False):
    """Text for the reader."""

    text: str


class Reasoning(msgspec.Struct, frozen=True, gc=False):
    """Text that the model thinks to itself."""

    text: str


class ToolCallStart(msgspec.Struct, frozen=True, gc=False):
    """A call begins. Calls do not overlap; indices count from 0."""

    index: int
    id: str
    name: str
    """What the model wrote; not checked against the request's tools, as only the client can tell what to do."""


class ToolCallArguments(msgspec.Struct, frozen=True, gc=False):
    """A piece of the JSON text of a call's arguments."""

    index: int
    text: str


class ToolCallEnd(msgspec.Struct, frozen=True, gc=False):
    """A call ends."""

    index: int
    complete: bool = True
    """Whether the arguments are whole, rather than cut off by the end of the text or by something malformed."""
    text: str = ""
    """Of a call that is not complete: what the model wrote, markup included."""


Event: TypeAlias = Content | Reasoning | ToolCallStart | ToolCallArguments | ToolCallEnd


class Parser(Protocol):
    """Parses the text of one choice."""

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Markers that may be special tokens of a tokenizer, which must not be left out of the text then."""

    def feed(self, text: str, /) -> list[Event]:
        """Takes the next piece; returns what it settles."""

    def finish(self) -> list[Event]:
        """Returns what was held back, and ends a call that is open; nothing may follow."""


class ReasoningParser(Parser, Protocol):
    """Tells reasoning from the rest, which it calls content."""

    @property
    def is_reasoning(self) -> bool:
        """Whether the text that comes next is reasoning, as far as is known."""


class ReasoningParserClass(Protocol):
    """What the registry of reasoning parsers names."""

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """See ``Parser``."""

    def __call__(self, prompt_opened: bool | None, *, needs_mark: bool = False) -> ReasoningParser:
        """Makes a parser for one choice; see ``create_parser``."""

    def opened_by(self, turn: str) -> bool | None:
        """See ``prompt_opens_reasoning``."""


class ToolParserClass(Protocol):
    """What the registry of tool parsers names."""

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """See ``Parser``."""

    def __call__(self, tools: Iterable[Tool], make_id: MakeId) -> Parser:
        """Makes a parser for one choice."""

    def new_id(self) -> str:
        """A new id for a call, of the form that the model's chat template expects."""


class ToolCall(msgspec.Struct):
    """A call, put together."""

    id: str
    name: str
    arguments: str = ""
    complete: bool = False


class Parsed(msgspec.Struct):
    """All events of a text, put together."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = msgspec.field(default_factory=list)


def merge(events: Iterable[Event]) -> list[Event]:
    """Joins events of a kind that follow each other, so that it no longer shows in which pieces the text came."""
    merged: list[Event] = []
    texts: list[str] = []

    def close() -> None:
        if texts:
            merged[-1] = msgspec.structs.replace(merged[-1], text="".join(texts))
            texts.clear()

    for event in events:
        has_text = isinstance(event, (Content, Reasoning, ToolCallArguments))
        if not (has_text and texts and type(event) is type(merged[-1])):
            close()
            merged.append(event)
        if isinstance(event, (Content, Reasoning, ToolCallArguments)):
            texts.append(event.text)
    close()
    return merged


def collect(events: Iterable[Event]) -> Parsed:
    """Puts the events of one choice together, for an answer that is not streamed."""
    parsed = Parsed()
    content, reasoning, arguments = [], [], []
    for event in merge(events):
        match event:
            case Content(text):
                content.append(text)
            case Reasoning(text):
                reasoning.append(text)
            case ToolCallStart(_, id, name):
                parsed.tool_calls.append(ToolCall(id, name))
            case ToolCallArguments(_, text):
                arguments.append(text)
            case ToolCallEnd(_, complete, _):
                call = parsed.tool_calls[-1]
                call.arguments, call.complete = "".join(arguments), complete
                arguments.clear()
    parsed.content, parsed.reasoning = "".join(content), "".join(reasoning)
    return parsed
