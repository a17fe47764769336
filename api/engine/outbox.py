"""What a new engine core has to hear first, told in turns of the event loop.

After a restart there may be thousands of requests to submit again, each with its prompt and its output so far. While
some are left, requests that come meanwhile queue behind them.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable

from api.engine.request_state import RequestState

REQUESTS_PER_TURN = 128
"""Requests that are sent in one go: some milliseconds."""
BYTES_PER_REQUEST = 1 << 14
"""Tokens of so many bytes count as one request more."""


class Outbox:
    """Requests that wait to be sent, in this order."""

    def __init__(self, send: Callable[[RequestState], None]) -> None:
        """``send`` sends one that is not over."""
        self._send = send
        self._states: deque[RequestState] = deque()
        self._indices: set[int] = set()
        self._next_turn: asyncio.Handle | None = None

    def __bool__(self) -> bool:
        return bool(self._states)

    def add(self, states: Iterable[RequestState]) -> None:
        """Puts requests behind those that wait, and sends some; those that wait already stay where they are."""
        for state in states:
            if state.index not in self._indices:
                self._indices.add(state.index)
                self._states.append(state)
        if self._next_turn is None:
            self._take_turn()

    def clear(self) -> None:
        """Forgets all of them."""
        self._states.clear()
        self._indices.clear()
        if self._next_turn is not None:
            self._next_turn.cancel()
            self._next_turn = None

    def _take_turn(self) -> None:
        self._next_turn = None
        room = float(REQUESTS_PER_TURN)
        while self._states and room > 0:
            state = self._states.popleft()
            self._indices.discard(state.index)
            if not state.finished:
                num_bytes = 4 * len(state.output_token_ids) + len(state.message.prompt_token_ids)
                room -= 1 + num_bytes / BYTES_PER_REQUEST
                self._send(state)
        if self._states:
            self._next_turn = asyncio.get_running_loop().call_soon(self._take_turn)
