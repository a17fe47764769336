"""Combines parsers: reasoning first, then tool calls in the remaining text."""

from __future__ import annotations

from api.parsers.base import Content, Event, Parser, ReasoningParser


class ParserChain:
    """A reasoning parser followed by a tool parser, both optional."""

    def __init__(self, reasoning: ReasoningParser | None, tools: Parser | None) -> None:
        self._reasoning = reasoning
        self._tools = tools
        self.special_tokens: tuple[str, ...] = (
            *(() if reasoning is None else reasoning.special_tokens),
            *(() if tools is None else tools.special_tokens),
        )

    @property
    def is_reasoning(self) -> bool:
        """Whether the next text is reasoning, as far as is known."""
        return self._reasoning is not None and self._reasoning.is_reasoning

    def feed(self, text: str, /) -> list[Event]:
        """Takes the next piece of text; returns the events that it completes."""
        if not text:
            return []
        if self._reasoning is not None:
            return self._call_tools(self._reasoning.feed(text))
        return [Content(text)] if self._tools is None else self._tools.feed(text)

    def finish(self) -> list[Event]:
        """Ends the text: returns events for text that was held back, and ends an open call."""
        events = [] if self._reasoning is None else self._call_tools(self._reasoning.finish())
        return events if self._tools is None else events + self._tools.finish()

    def _call_tools(self, events: list[Event]) -> list[Event]:
        tools = self._tools
        if tools is None:
            return events
        result: list[Event] = []
        for event in events:
            if isinstance(event, Content):
                result += tools.feed(event.text)
            else:
                result.append(event)
        return result
