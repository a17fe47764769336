"""Schedules full garbage collections for when no request waits.

Requests leave no reference cycles, so a full collection finds nothing, and with thousands of open connections it stalls
every stream for a quarter of a second. Young generations are collected as usual. A full collection runs when no request
is open, and occasionally anyway, so that a leak cannot fill the memory.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable

INTERVAL = 5.0
"""Seconds between checks for a quiet moment."""
MAX_BUSY_TIME = 900.0
"""Seconds without a quiet moment after which a full collection runs anyway."""
NEVER = 1 << 30


def keep_what_lives() -> None:
    """Freezes all current objects, which live as long as the server, and disables automatic full collections."""
    gc.collect()
    gc.freeze()
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, NEVER)


class Collector:
    """Runs full collections at quiet moments."""

    def __init__(self, num_open: Callable[[], int], clock: Callable[[], float] = time.monotonic) -> None:
        """Prepares.

        Args:
            num_open: Returns the number of open requests.
            clock: Time in seconds.
        """
        self._num_open = num_open
        self._clock = clock
        self._done_at = clock()
        self._has_worked = False

    def look(self) -> bool:
        """Collects if the moment is right; returns whether it did."""
        is_idle = not self._num_open()
        self._has_worked |= not is_idle
        is_due = is_idle or self._clock() - self._done_at > MAX_BUSY_TIME
        if not self._has_worked or not is_due:
            return False
        gc.collect()
        self._has_worked = not is_idle
        self._done_at = self._clock()
        return True

    async def run(self) -> None:
        """Checks periodically until cancelled."""
        while True:
            await asyncio.sleep(INTERVAL)
            self.look()
