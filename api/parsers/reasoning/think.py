"""Reasoning between ``<think>`` and ``</think>``, before the answer.

Line breaks next to the tags are layout and are omitted. Everything after the closing tag is content, even tags.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Final

from api.parsers.base import Content, Event, Reasoning
from api.parsers.machine import Markers, Steps, marker_at, skip_space

_OPEN: Final = "<think>"
_CLOSE: Final = "</think>"
_CLOSING: Final = Markers(_CLOSE)


def think_opened_by(turn: str) -> bool | None:
    """See ``prompt_opens_reasoning``."""
    opening, closing = turn.rfind(_OPEN), turn.rfind(_CLOSE)
    return None if opening == closing else opening > closing


class ThinkSection:
    """Parses a section of reasoning, followed by content.

    Attributes:
        is_reasoning: Whether the next text is reasoning, as far as is known.
    """

    def __init__(self, *, needs_tag: bool, skip: bool) -> None:
        """Prepares for the beginning of an answer.

        Args:
            needs_tag: Whether reasoning requires an opening tag; without it, all is content. If false, everything up to
                the closing tag is reasoning.
            skip: All is content, regardless of tags.
        """
        self.is_reasoning = not needs_tag and not skip
        self._needs_tag = needs_tag
        self._steps = Steps(self._content if skip else self._beginning)
        self._events: list[Event] = []
        self._held: list[str] = []
        self._num_breaks: int | None = None
        """Number of line breaks that may be the last ones of the section; None before its first text."""

    def feed(self, text: str, /) -> list[Event]:
        """Takes the next piece of text; returns its events."""
        self._steps.run(text)
        events, self._events = self._events, []
        return events

    def finish(self) -> list[Event]:
        """Ends the text; returns the remaining events."""
        rest = "".join(self._held) + self._steps.rest()
        if self.is_reasoning:
            self._reason(rest)
            if self._num_breaks:
                self._events.append(Reasoning("\n" * self._num_breaks))
        elif rest:
            self._events.append(Content(rest))
        events, self._events = self._events, []
        return events

    def _beginning(self, text: str, pos: int) -> int:
        end = skip_space(text, pos)
        self._held.append(text[pos:end])
        if end == len(text):
            return end
        tag = marker_at(text, end, _OPEN)
        if tag is None:
            return end
        before = "".join(self._held)
        self._held.clear()
        if tag or not self._needs_tag:
            self.is_reasoning = True
            self._steps.state = self._inside
            if not tag:
                self._reason(before)
        else:
            self._steps.state = self._content
            if before:
                self._events.append(Content(before))
        return end + len(tag)

    def _inside(self, text: str, pos: int) -> int:
        end, marker = _CLOSING.find(text, pos)
        self._reason(text[pos:end])
        if marker:
            self.is_reasoning = False
            self._steps.state = self._after
        return end + len(marker)

    def _reason(self, text: str) -> None:
        if self._num_breaks is None:
            text = text.lstrip("\n")
            if not text:
                return
            self._num_breaks = 0
        stripped = text.rstrip("\n")
        if stripped:
            self._events.append(Reasoning("\n" * self._num_breaks + stripped))
            self._num_breaks = 0
        self._num_breaks += len(text) - len(stripped)

    def _after(self, text: str, pos: int) -> int:
        while pos < len(text) and text[pos] == "\n":
            pos += 1
        if pos < len(text):
            self._steps.state = self._content
        return pos

    def _content(self, text: str, pos: int) -> int:
        self._events.append(Content(text[pos:]))
        return len(text)


class DeepSeekR1Parser:
    """DeepSeek-R1 and its distillations: an answer begins with reasoning, with or without the opening tag.

    Chat templates put the tag in the prompt. An answer without the closing tag is all reasoning.
    """

    special_tokens: ClassVar[tuple[str, ...]] = (_OPEN, _CLOSE)
    opened_by = staticmethod(think_opened_by)

    def __init__(self, prompt_opened: bool | None, *, needs_mark: bool = False) -> None:
        self._section = ThinkSection(needs_tag=needs_mark and not prompt_opened, skip=prompt_opened is False)
        self.feed: Callable[[str], list[Event]] = self._section.feed
        self.finish: Callable[[], list[Event]] = self._section.finish

    @property
    def is_reasoning(self) -> bool:
        """See ``ReasoningParser``."""
        return self._section.is_reasoning


class Qwen3Parser:
    """Qwen3 and other models with optional reasoning, which begins with a tag in the prompt or in the answer."""

    special_tokens: ClassVar[tuple[str, ...]] = (_OPEN, _CLOSE)
    opened_by = staticmethod(think_opened_by)

    def __init__(self, prompt_opened: bool | None, *, needs_mark: bool = False) -> None:
        self._section = ThinkSection(needs_tag=not prompt_opened, skip=prompt_opened is False)
        self.feed: Callable[[str], list[Event]] = self._section.feed
        self.finish: Callable[[], list[Event]] = self._section.finish

    @property
    def is_reasoning(self) -> bool:
        """See ``ReasoningParser``."""
        return self._section.is_reasoning
