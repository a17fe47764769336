"""Turns in which those who wait for few places get them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class FairSlots:
    """A number of places. One that becomes free goes to the owner who has the fewest."""

    def __init__(self, count: int) -> None:
        self._num_free = count
        self._held: dict[str, int] = {}
        """Places of each owner who has any."""
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        """By owner: those who wait, in the order of their arrival."""

    async def run(self, owner: str, begin: Callable[[], asyncio.Future[T]]) -> T:
        """Waits for a place and begins work, which holds it until it ends, even if nobody waits for it any more."""
        if self._num_free:
            self._num_free -= 1
            self._take(owner)
        else:
            await self._wait(owner)
        try:
            work = begin()
        except BaseException:
            self._give_back(owner)
            raise
        work.add_done_callback(lambda _: self._give_back(owner))
        await asyncio.wait((work,))  # does not cancel it: a thread goes on, whoever has left
        return work.result()

    async def _wait(self, owner: str) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(owner, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._forget(owner, turn)
            else:  # it got the place in the same turn of the loop
                self._give_back(owner)
            raise

    def _forget(self, owner: str, turn: asyncio.Future[None]) -> None:
        queue = self._waiting.get(owner)
        if queue is not None and turn in queue:
            queue.remove(turn)
            if not queue:
                del self._waiting[owner]

    def _take(self, owner: str) -> None:
        self._held[owner] = self._held.get(owner, 0) + 1

    def _give_back(self, owner: str) -> None:
        self._held[owner] -= 1
        if not self._held[owner]:
            del self._held[owner]
        while self._waiting:
            chosen = min(self._waiting, key=lambda each: self._held.get(each, 0))
            turn = self._waiting[chosen][0]
            self._forget(chosen, turn)
            if not turn.cancelled():
                self._take(chosen)
                turn.set_result(None)
                return
        self._num_free += 1
