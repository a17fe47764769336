"""A shared budget of memory and time for all bodies being read.

Bodies grow as they arrive until they use up the budget; then they wait, and nothing more is read from their
connections. The oldest always continues, so that one after the other completes. Small bodies have a part of the budget
to themselves and do not wait behind large ones. A body that stalls or trickles is rejected, sooner if others wait for
its memory.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple

from api.errors import KINDS, RequestError

SWEEP_INTERVAL = 1.0
_CHUNK = 256 << 10
"""Approximate growth of a body between checks of the budget."""


class BodyLimits(NamedTuple):
    """Limits in bytes and seconds."""

    total: int = 256 << 20
    """Bytes of all bodies together. The oldest may exceed it."""
    small: int = 256 << 10
    """Bodies up to this size have a quarter of the budget to themselves."""
    idle: float = 30.0
    """Seconds without a byte, and the time within which at least ``least`` bytes must arrive."""
    least: int = 16 << 10
    idle_pressed: float = 5.0
    """Same, for bodies that hold more than their share while others wait."""
    least_pressed: int = 320 << 10
    wait: float = 10.0
    """Seconds to wait for memory before the request is rejected."""


class BodyBudget:
    """The budget, shared by all requests of a server."""

    def __init__(self, limits: BodyLimits | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits or BodyLimits()
        self.clock = clock
        self.num_bytes = 0
        """Bytes held by all bodies being read."""
        self._num_small_bytes = 0
        """Bytes held by the small ones."""
        self.bodies: dict[HeldBody, None] = {}
        """Oldest first."""
        self.waiting: dict[HeldBody, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def open(self) -> HeldBody:
        """A body to read: a context manager, to be exited when its bytes are released."""
        return HeldBody(self)

    def add(self, body: HeldBody) -> None:
        """Starts reading a body."""
        self.bodies[body] = None
        if self._timer is None:
            self._start_timer()

    def discard(self, body: HeldBody) -> None:
        """Releases a body's bytes."""
        del self.bodies[body]
        self._count(body, -body.size)
        self.wake()

    def _count(self, body: HeldBody, size: int) -> None:
        self.num_bytes += size
        if body.size <= self.limits.small:
            self._num_small_bytes += size

    async def grow(self, body: HeldBody, size: int) -> None:
        """Records received bytes, and waits until more may be read.

        Raises:
            RequestError: 503: waiting took too long.
        """
        self._count(body, -body.size)  # in its old class; it may be a large one now
        body.size += size
        self._count(body, body.size)
        if self._room(body) >= 0 or body is self._oldest_large():
            return
        body.waiter = asyncio.get_running_loop().create_future()
        self.waiting[body] = None
        try:
            await body.waiter
        finally:
            body.waiter = None
            self.waiting.pop(body, None)

    def wake(self) -> None:
        """Resumes bodies for which there is room: the oldest, then the longest waiting."""
        if not self.waiting:
            return
        oldest = self._oldest_large()
        room_taken = 0
        for body in list(self.waiting):
            if body is not oldest:
                if self._room(body) < room_taken:
                    continue
                room_taken += _CHUNK
            del self.waiting[body]
            if body.waiter is not None and not body.waiter.done():
                body.waiter.set_result(None)

    def sweep(self) -> None:
        """Rejects bodies that have stalled or waited too long."""
        now = self.clock()
        is_pressed = bool(self.waiting)
        num_large = sum(body.size > self.limits.small for body in self.bodies)
        share = max(self.limits.small, self.limits.total * 3 // 4 // max(num_large, 1))
        for body in list(self.bodies):
            body.check(now, is_pressed=is_pressed and body.size > share)
        self.wake()

    def _room(self, body: HeldBody) -> int:
        """Bytes left for bodies of its class; negative if they hold too much."""
        small = self.limits.total // 4
        if body.size <= self.limits.small:
            return small - self._num_small_bytes
        return self.limits.total - small - (self.num_bytes - self._num_small_bytes)

    def _oldest_large(self) -> HeldBody | None:
        return next((body for body in self.bodies if body.size > self.limits.small), None)

    def _start_timer(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(SWEEP_INTERVAL, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.sweep()
        if self.bodies:
            self._start_timer()


class HeldBody:
    """A body, from its first byte until it is decoded."""

    def __init__(self, budget: BodyBudget) -> None:
        self.size = 0
        self.waiter: asyncio.Future[None] | None = None
        """Set while the body waits for room."""
        self._budget = budget
        self._too_slow: tuple[float, int] | None = None
        """Seconds, and the bytes missing within them, if it was rejected for stalling."""
        self._task: asyncio.Task[object] | None = None
        self._last_size = 0
        self._window_size = 0
        self._last_progress = self._window_begin = budget.clock()
        self._waits_since: float | None = None
        self._is_complete = False

    def __enter__(self) -> HeldBody:
        self._task = asyncio.current_task()
        self._budget.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._budget.discard(self)
        if self._too_slow is not None and isinstance(error, asyncio.CancelledError):
            if sys.version_info >= (3, 11) and self._task is not None:
                self._task.uncancel()
            raise _too_slow(*self._too_slow) from None

    async def grow(self, size: int) -> None:
        """Records received bytes, and waits until more may be read.

        Raises:
            RequestError: 503: waiting took too long.
        """
        await self._budget.grow(self, size)

    def complete(self) -> None:
        """All bytes have arrived; from here on time is ours, not the client's."""
        self._is_complete = True

    def check(self, now: float, *, is_pressed: bool) -> None:
        """Rejects the body if it has stalled; ``is_pressed``: others need its memory."""
        limits = self._budget.limits
        if self.waiter is not None:
            self._last_progress = self._window_begin = now  # we are not reading
            if self._waits_since is None:
                self._waits_since = now
            elif now - self._waits_since >= limits.wait and not self.waiter.done():
                self.waiter.set_exception(_no_memory())
            return
        self._waits_since = None
        if self._is_complete or self._too_slow is not None:
            return
        seconds, least = (limits.idle_pressed, limits.least_pressed) if is_pressed else (limits.idle, limits.least)
        if self.size != self._last_size:
            self._last_size, self._last_progress = self.size, now
        is_idle = now - self._last_progress >= seconds
        if now - self._window_begin >= seconds:
            is_idle = is_idle or self.size - self._window_size < least
            self._window_begin, self._window_size = now, self.size
        if is_idle and self._task is not None:
            self._too_slow = seconds, least
            self._task.cancel()


def _too_slow(seconds: float, least: int) -> RequestError:
    return RequestError(
        f"the request body stalled: less than {least} bytes in {seconds:g} s",
        status=408,
        kind=KINDS[408],
        headers={"Connection": "close"},
    )


def _no_memory() -> RequestError:
    return RequestError(
        "the server is reading too many large request bodies; try again later", status=503, kind=KINDS[503]
    )
