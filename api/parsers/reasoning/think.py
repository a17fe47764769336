"""Reasoning between two marks, such as ``<think>`` and ``</think>``, before the answer.

A family's format is a ``ThinkFormat``. Line breaks next to the marks are layout and are omitted. Everything after the
end of the reasoning is content, even marks.
"""

from __future__ import annotations

from typing import Final

import msgspec

from api.parsers.base import Content, Event, Reasoning
from api.parsers.machine import Markers, Steps, marker_at, skip_space


class ThinkFormat(msgspec.Struct, frozen=True):
    """How a family marks reasoning. Calling it creates a parser; see ``ReasoningParserClass``."""

    start: str = "<think>"
    end: str = "</think>"
    may_begin_inside: bool = False
    """An answer that does not begin with a mark is reasoning, up to its end."""
    label: str = ""
    """A line after the start that is layout."""
    phrases: tuple[tuple[str, str], ...] = ()
    """Other starts and ends that the family writes."""
    calls: tuple[str, ...] = ()
    """Marks of tool calls, at which reasoning ends without its own mark."""
    answers: tuple[tuple[str, str], ...] = ()
    """Marks around the answer, which are layout. The first may be the end of the reasoning as well."""
    thought: tuple[str, str] | None = None
    """See ``ReasoningParserClass``."""

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """See ``Parser``."""
        return (self.start, self.end)

    @property
    def starts(self) -> tuple[str, ...]:
        """All marks that begin reasoning."""
        return (self.start, *(start for start, _ in self.phrases))

    @property
    def ends(self) -> tuple[str, ...]:
        """All marks that end reasoning."""
        return (self.end, *(end for _, end in self.phrases))

    def __call__(self, prompt_opened: bool | None, *, needs_mark: bool = False) -> ThinkParser:
        """Creates a parser for one choice; see ``create_parser``."""
        may_begin_inside = self.may_begin_inside and not needs_mark
        return ThinkParser(self, needs_start=not (prompt_opened or may_begin_inside), skip=prompt_opened is False)

    def opened_by(self, turn: str) -> bool | None:
        """See ``prompt_opens_reasoning``."""
        start, end = max(map(turn.rfind, self.starts)), max(map(turn.rfind, self.ends))
        return None if start == end else start > end


class ThinkParser:
    """Parses a section of reasoning, followed by content.

    Attributes:
        is_reasoning: Whether the next text is reasoning, as far as is known.
        special_tokens: See ``Parser``.
    """

    def __init__(self, format: ThinkFormat, *, needs_start: bool, skip: bool) -> None:
        """Prepares for the beginning of an answer.

        Args:
            format: The marks.
            needs_start: Whether reasoning requires a start; without it, all is content. If false, everything up to the
                end of the reasoning is reasoning.
            skip: All is content, regardless of marks of reasoning.
        """
        self.special_tokens = format.special_tokens
        self.is_reasoning = not needs_start and not skip
        self._format = format
        self._needs_start = needs_start
        self._ends = Markers(*format.ends, *format.calls)
        self._steps = Steps(self._answer_start if skip else self._beginning)
        self._events: list[Event] = []
        self._held: list[str] = []
        self._num_breaks: int | None = None
        """Number of line breaks that may be the last ones of the section; None before its first text."""
        self._answer_end = Markers(format.end)

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

    # -- reasoning -------------------------------------------------------------------------------------------

    def _beginning(self, text: str, pos: int) -> int:
        end = skip_space(text, pos)
        self._held.append(text[pos:end])
        if end == len(text):
            return end
        mark = marker_at(text, end, *self._format.starts)
        if mark is None:
            return end
        if mark or not self._needs_start:
            self.is_reasoning = True
            self._steps.state = self._label if mark == self._format.start and self._format.label else self._inside
            before = "".join(self._held)
            self._held.clear()
            if not mark:
                self._reason(before)
            return end + len(mark)
        self._steps.state = self._answer_start
        return end

    def _label(self, text: str, pos: int) -> int:
        label = marker_at(text, pos, self._format.label)
        if label is None:
            return pos
        self._steps.state = self._inside
        return pos + len(label)

    def _inside(self, text: str, pos: int) -> int:
        end, mark = self._ends.find(text, pos)
        self._reason(text[pos:end])
        if mark:
            self.is_reasoning = False
            self._steps.state = self._after
        is_kept = mark in self._format.calls or any(mark == start for start, _ in self._format.answers)
        return end if is_kept else end + len(mark)

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

    # -- the answer ------------------------------------------------------------------------------------------

    def _after(self, text: str, pos: int) -> int:
        while pos < len(text) and text[pos] == "\n":
            pos += 1
        if pos < len(text):
            self._steps.state = self._answer_start
        return pos

    def _answer_start(self, text: str, pos: int) -> int:
        """Before the answer, or white space in front of it that is held back."""
        if not self._format.answers:
            return self._begin_content(pos)
        end = skip_space(text, pos)
        self._held.append(text[pos:end])
        if end == len(text):
            return end
        for start, close in self._format.answers:
            mark = marker_at(text, end, start)
            if mark is None:
                return end
            if mark:
                self._held.clear()
                self._answer_end = Markers(close)
                self._steps.state = self._before_answer
                return end + len(mark)
        return self._begin_content(end)

    def _begin_content(self, pos: int) -> int:
        if any(self._held):
            self._events.append(Content("".join(self._held)))
        self._held.clear()
        self._steps.state = self._content
        return pos

    def _before_answer(self, text: str, pos: int) -> int:
        pos = self._after(text, pos)
        if pos < len(text):
            self._steps.state = self._answer
        return pos

    def _answer(self, text: str, pos: int) -> int:
        end, mark = self._answer_end.find(text, pos)
        if end > pos:
            self._events.append(Content(text[pos:end]))
        if mark:
            self._steps.state = self._content
        return end + len(mark)

    def _content(self, text: str, pos: int) -> int:
        self._events.append(Content(text[pos:]))
        return len(text)


DEEPSEEK_R1: Final = ThinkFormat(may_begin_inside=True)
"""DeepSeek-R1 and its distillations: an answer begins with reasoning, with or without the start.

Chat templates put the start in the prompt. An answer without the end is all reasoning.
"""
THINK: Final = ThinkFormat()
"""Qwen3 and other models with optional reasoning, whose start is in the prompt or in the answer."""
KIMI_K2: Final = ThinkFormat(calls=("<|tool_calls_section_begin|>",))
SEED_OSS: Final = ThinkFormat("<seed:think>", "</seed:think>")
MISTRAL: Final = ThinkFormat("[THINK]", "[/THINK]", calls=("[TOOL_CALLS]",))
"""Magistral and Ministral 3, whose marks are special tokens."""
GEMMA4: Final = ThinkFormat("<|channel>", "<channel|>", label="thought\n", calls=("<|tool_call>",))
GRANITE: Final = ThinkFormat(
    phrases=(
        ("Here is my thought process:", "Here is my response:"),
        ("Here's my thought process:", "Here's my response:"),
    ),
    answers=(("<response>", "</response>"),),
)
"""Granite 3.2 introduces both parts with phrases, Granite 3.3 puts both in tags."""
COHERE_COMMAND: Final = ThinkFormat(
    "<|START_THINKING|>",
    "<|END_THINKING|>",
    calls=("<|START_ACTION|>",),
    answers=(("<|START_RESPONSE|>", "<|END_RESPONSE|>"), ("<|START_TEXT|>", "<|END_TEXT|>")),
)
"""Command R7B and Command A mark the answer as a response, later models as text."""
APRIEL: Final = ThinkFormat(
    "Here are my reasoning steps:",
    "[BEGIN FINAL RESPONSE]",
    calls=("<tool_calls>",),
    answers=(("[BEGIN FINAL RESPONSE]", "[END FINAL RESPONSE]"),),
)
"""Apriel 1.5 and 1.6, whose prompt has the start. Only Apriel 1.5 marks the end of its answer."""
ANSWER: Final = ThinkFormat(answers=(("<answer>", "</answer>"), ("<response>", "</response>")))
"""Hunyuan A13B and ERNIE 4.5, which put both parts in tags."""
