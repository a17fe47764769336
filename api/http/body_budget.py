"""What the bodies that are being read may take together, in memory and in time.

Bodies grow as they come, until they hold the budget between them; then they wait, and nothing more is read from their
connections. The oldest goes on in any case, so one after the other is complete. Small bodies have a part of the budget
to themselves and do not wait behind large ones. Whoever stops or trickles is cut; sooner, if others wait for what it
holds.
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
"""About what a body grows by before it looks at the budget again."""


class BodyLimits(NamedTuple):
    """Bytes and seconds."""

    total: int = 256 << 20
    """Held by all bodies together. The oldest may exceed it."""
    small: int = 256 << 10
    """Bodies up to this size have a quarter of it to themselves."""
    idle: float = 30.0
    """Without a byte, and the time in which at least ``least`` bytes must come."""
    least: int = 16 << 10
    idle_pressed: float = 5.0
    """The same for those that hold more than their share while others wait."""
    least_pressed: int = 320 << 10
    wait: float = 10.0
    """For memory, before the request is refused."""


class BodyBudget:
    """Shared by all requests of a server."""

    def __init__(self, limits: BodyLimits | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits or BodyLimits()
        self.clock = clock
        self.num_bytes = 0
        """Held by all bodies that are being read."""
        self._num_small_bytes = 0
        """Held by the small ones among them."""
        self.bodies: dict[HeldBody, None] = {}
        """The oldest first."""
        self.waiting: dict[HeldBody, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def open(self) -> HeldBody:
        """A body that is about to be read: a context manager, to be left when its bytes are no longer held."""
        return HeldBody(self)

    def add(self, body: HeldBody) -> None:
        """Its reading begins."""
        self.bodies[body] = None
        if self._timer is None:
            self._start_timer()

    def discard(self, body: HeldBody) -> None:
        """Its bytes are gone."""
        del self.bodies[body]
        self._count(body, -body.size)
        self.wake()

    def _count(self, body: HeldBody, size: int) -> None:
        self.num_bytes += size
        if body.size <= self.limits.small:
            self._num_small_bytes += size

    async def grow(self, body: HeldBody, size: int) -> None:
        """Takes note of bytes that came, and waits until more may come.

        Raises:
            RequestError: 503: that took too long.
        """
        self._count(body, -body.size)  # as what it was; it may be a large one now
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
        """Lets those go on for whom there is room now: the oldest, then those that wait longest."""
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
        """Ends those that came to a stop, and those that waited long enough."""
        now = self.clock()
        is_pressed = bool(self.waiting)
        num_large = sum(body.size > self.limits.small for body in self.bodies)
        share = max(self.limits.small, self.limits.total * 3 // 4 // max(num_large, 1))
        for body in list(self.bodies):
            body.check(now, is_pressed=is_pressed and body.size > share)
        self.wake()

    def _room(self, body: HeldBody) -> int:
        """Bytes that are left for bodies of its kind; negative if they hold too much."""
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
    """One body, from the first byte until it is decoded."""

    def __init__(self, budget: BodyBudget) -> None:
        self.size = 0
        self.waiter: asyncio.Future[None] | None = None
        """Set while the body waits for room."""
        self._budget = budget
        self._too_slow: tuple[float, int] | None = None
        """Seconds, and bytes that did not come in them, if it was ended for that."""
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
        """Takes note of bytes that came, and waits until more may come.

        Raises:
            RequestError: 503: that took too long.
        """
        await self._budget.grow(self, size)

    def complete(self) -> None:
        """All bytes came; what follows takes its time here, not at the client's."""
        self._is_complete = True

    def check(self, now: float, *, is_pressed: bool) -> None:
        """Ends the reading if it came to a stop; ``is_pressed`` says that others could use what it holds."""
        limits = self._budget.limits
        if self.waiter is not None:
            self._last_progress = self._window_begin = now  # it is us who do not read
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
        f"the request body came to a stop, or came with less than {least} bytes in {seconds:g} s",
        status=408,
        kind=KINDS[408],
        headers={"Connection": "close"},
    )


def _no_memory() -> RequestError:
    return RequestError(
        "the server is reading too many large request bodies; try again later", status=503, kind=KINDS[503]
    )
