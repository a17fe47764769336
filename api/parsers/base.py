"""The interface of parsers, which turn a model's text into events for the fields of a message.

A parser receives the text of one choice in pieces, as it is generated. However the text is divided, the merged events
are the same, so streamed and whole answers agree. Text that may still turn out to be markup is held back. Text that
looked like a tool call but is not one becomes content, so that nothing the model wrote is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeAlias

import msgspec

Tool: TypeAlias = Mapping[str, Any]
"""A tool as in requests: ``{"type": "function", "function": {"name": ..., "parameters": {JSON schema}}}``."""

MakeId: TypeAlias = Callable[[], str]

MAX_DEPTH = 128
"""Maximum nesting depth of arguments. Deeper ones are malformed."""
MAX_NAME = 256
"""Maximum characters of a function's name. Longer names are malformed, since a name is held back until it ends."""


class Content(msgspec.Struct, frozen=True, gc=False):
    """Text of the answer."""

    text: str


class Reasoning(msgspec.Struct, frozen=True, gc=False):
    """Text of the reasoning."""

    text: str


class ToolCallStart(msgspec.Struct, frozen=True, gc=False):
    """The start of a tool call. Calls do not overlap; indices count from 0."""

    index: int
    id: str
    name: str
    """As the model wrote it. Not checked against the request's tools: only the client knows how to handle others."""


class ToolCallArguments(msgspec.Struct, frozen=True, gc=False):
    """A piece of the JSON text of a call's arguments."""

    index: int
    text: str


class ToolCallEnd(msgspec.Struct, frozen=True, gc=False):
    """The end of a tool call."""

    index: int
    complete: bool = True
    """Whether the arguments are complete, not cut off by the end of the text or by malformed text."""
    text: str = ""
    """For an incomplete call, its text as the model wrote it, including markup."""


Event: TypeAlias = Content | Reasoning | ToolCallStart | ToolCallArguments | ToolCallEnd


class Parser(Protocol):
    """Parses the text of one choice."""

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Markers that may be special tokens of the tokenizer and must then be kept in the text."""

    def feed(self, text: str, /) -> list[Event]:
        """Takes the next piece of text; returns the events that it completes."""

    def finish(self) -> list[Event]:
        """Ends the text: returns events for text that was held back, and ends an open call."""


class ReasoningParser(Parser, Protocol):
    """Separates reasoning from all other text, which it reports as content."""

    @property
    def is_reasoning(self) -> bool:
        """Whether the next text is reasoning, as far as is known."""


class ReasoningParserClass(Protocol):
    """The interface of classes in the registry of reasoning parsers."""

    @property
    def thought(self) -> tuple[str, str] | None:
        """What begins and ends a thought before an answer in a format that a grammar enforces. The first token of the
        start begins nothing else that is then allowed. None: the first two special tokens."""

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """See ``Parser``."""

    def __call__(self, prompt_opened: bool | None, *, needs_mark: bool = False) -> ReasoningParser:
        """Creates a parser for one choice; see ``create_parser``."""

    def opened_by(self, turn: str) -> bool | None:
        """See ``prompt_opens_reasoning``."""


class ToolParserClass(Protocol):
    """The interface of classes in the registry of tool parsers."""

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """See ``Parser``."""

    def __call__(self, tools: Iterable[Tool], make_id: MakeId) -> Parser:
        """Creates a parser for one choice."""

    def new_id(self) -> str:
        """A new id for a call, in the format that the model's chat template expects."""


class ToolCall(msgspec.Struct):
    """A tool call, collected from its events."""

    id: str
    name: str
    arguments: str = ""
    complete: bool = False


class Parsed(msgspec.Struct):
    """The fields of a message, collected from all events of a text."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = msgspec.field(default_factory=list)


def merge(events: Iterable[Event]) -> list[Event]:
    """Merges adjacent events of the same kind, so that the result does not depend on how the text was divided."""
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
    """Collects the events of one choice, for an answer that is not streamed."""
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
