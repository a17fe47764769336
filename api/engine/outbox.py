"""Resubmits requests to a new engine core, a few per iteration of the event loop.

After a restart there may be thousands of requests to resubmit, each with its prompt and its output so far. New requests
queue behind them until all are sent.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable

from api.engine.request_state import RequestState

REQUESTS_PER_TURN = 128
"""Requests sent per iteration of the event loop, which takes some milliseconds."""
BYTES_PER_REQUEST = 1 << 14
"""Bytes of token ids that count as one more request."""


class Outbox:
    """An ordered queue of requests to send."""

    def __init__(self, send: Callable[[RequestState], None]) -> None:
        """Creates an empty queue; ``send`` is called with each request that has not finished."""
        self._send = send
        self._states: deque[RequestState] = deque()
        self._indices: set[int] = set()
        self._next_turn: asyncio.Handle | None = None

    def __bool__(self) -> bool:
        return bool(self._states)

    def add(self, states: Iterable[RequestState]) -> None:
        """Appends requests and starts sending; requests that are already queued keep their position."""
        for state in states:
            if state.index not in self._indices:
                self._indices.add(state.index)
                self._states.append(state)
        if self._next_turn is None:
            self._take_turn()

    def discard(self, indices: Iterable[int]) -> None:
        """Drops these requests if they are queued."""
        dropped = self._indices.intersection(indices)
        if dropped:
            self._indices -= dropped
            self._states = deque(state for state in self._states if state.index not in dropped)

    def clear(self) -> None:
        """Drops all queued requests."""
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
