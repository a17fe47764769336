"""Calls forced by a grammar, for any model: ``[{"name": "f", "parameters": {...}}]``, or one call without the list.

See ``forced_calls_schema`` for the grammar. Text that does not match it, because the grammar did not apply, is content.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from api.parsers.base import Event, MakeId, Tool
from api.parsers.ids import new_id
from api.parsers.machine import Output, Steps
from api.parsers.tools.json_calls import JsonCalls


class JsonForcedParser:
    """Parses text that consists of calls only."""

    special_tokens: ClassVar[tuple[str, ...]] = ()
    new_id = staticmethod(new_id)

    def __init__(self, tools: Iterable[Tool], make_id: MakeId) -> None:
        self._out = Output(make_id)
        self._steps = Steps(self._list)
        self._calls = JsonCalls(self._out)

    def feed(self, text: str, /) -> list[Event]:
        """Takes the next piece of text; returns its events."""
        self._steps.run(text)
        return self._out.take()

    def finish(self) -> list[Event]:
        """Ends the text; returns the remaining events."""
        if self._steps.state == self._list:
            self._calls.finish()
        return self._out.finish(self._steps.rest())

    def _list(self, text: str, pos: int) -> int:
        end = self._calls.feed(text, pos)
        if self._calls.done or self._calls.failed:
            self._out.release()
            self._steps.state = self._content
        return end

    def _content(self, text: str, pos: int) -> int:
        self._out.text(text[pos:])
        return len(text)
