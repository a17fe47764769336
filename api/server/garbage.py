"""When the garbage collector looks at everything: not while requests wait for it.

Requests leave no circles of references, so a full collection finds nothing, and with thousands of open connections it
stops every stream for a quarter of a second. Young objects are looked at as usual. All others are when no request is
open, and now and then anyway, as a fault somewhere must not fill the memory.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable

INTERVAL = 5.0
"""Seconds between two looks for a quiet moment."""
MAX_BUSY_TIME = 900.0
"""Seconds without a quiet moment after which everything is looked at nevertheless."""
NEVER = 1 << 30


def keep_what_lives() -> None:
    """What lives now lives as long as the server: the collector need not look at it again, nor at all of the rest."""
    gc.collect()
    gc.freeze()
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, NEVER)


class Collector:
    """Does full collections at quiet moments."""

    def __init__(self, num_open: Callable[[], int], clock: Callable[[], float] = time.monotonic) -> None:
        """Prepares.

        Args:
            num_open: Tells how many requests are open.
            clock: Seconds.
        """
        self._num_open = num_open
        self._clock = clock
        self._done_at = clock()
        self._has_worked = False

    def look(self) -> bool:
        """Collects if this is the moment for it; whether it was."""
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
        """Looks again and again until it is cancelled."""
        while True:
            await asyncio.sleep(INTERVAL)
            self.look()
