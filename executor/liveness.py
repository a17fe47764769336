"""Whether a process that says nothing hangs, or merely has a slow machine.

Time counts only as far as the process could have used it: not while the watcher itself stood still (the whole machine
was suspended, or all processes were stopped), not while threads wait for a processor, not while they wait for a disk.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import NamedTuple

MAX_TICK = 2.0
"""Seconds between two looks that count at most; whoever watches means to look once a second."""
STOPPED_TIMEOUT = 10.0
"""Seconds after which a process that is stopped (SIGSTOP) while its watcher runs counts as hung."""

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class ProcessSample(NamedTuple):
    """A look at a process."""

    state: str
    """As /proc says it: R, S, D, T and so on; of all its threads the one that tells most."""
    processor_seconds: float
    """Of all its threads since it was started."""


def sample_process(pid: int) -> ProcessSample | None:
    """Looks at a process; None if it is gone or this system has no /proc."""
    main = _read_stat(f"/proc/{pid}/stat")
    if main is None:
        return None
    state = main[0]
    if state in "SI":
        try:
            threads = os.listdir(f"/proc/{pid}/task")
        except OSError:
            threads = []
        states = {stat[0] for thread in threads if (stat := _read_stat(f"/proc/{pid}/task/{thread}/stat"))}
        state = next((busy for busy in "RD" if busy in states), state)
    return ProcessSample(state, (int(main[11]) + int(main[12])) / _TICKS_PER_SECOND)


def _read_stat(path: str) -> list[str] | None:
    try:
        with open(path, "rb") as file:
            return file.read().decode("ascii", "replace").rpartition(")")[2].split()
    except OSError:
        return None


class ProcessWatch:
    """Counts the time that a process had since it was last heard of."""

    def __init__(
        self,
        pid: int,
        clock: Callable[[], float] = time.monotonic,
        sample: Callable[[int], ProcessSample | None] = sample_process,
    ) -> None:
        """Starts to count.

        Args:
            pid: The process.
            clock: Seconds that never go back.
            sample: Looks at a process.
        """
        self.pid = pid
        self.waited = 0.0
        """Seconds that the process could have used since it was heard of."""
        self.idle = 0.0
        """Of these, the last ones in which it used no processor."""
        self.stopped = 0.0
        """Seconds that it has been stopped."""
        self._clock = clock
        self._sample = sample
        self._looked_at = clock()
        self._last = sample(pid)

    def heard(self) -> None:
        """It said something."""
        self.waited = self.idle = 0.0

    def tick(self) -> None:
        """Looks at the process. To be called about once a second."""
        now = self._clock()
        seconds = min(now - self._looked_at, MAX_TICK)
        self._looked_at = now
        before, sample = self._last, self._sample(self.pid)
        self._last = sample
        if sample is None or before is None:
            self.waited += seconds
            return
        used = sample.processor_seconds - before.processor_seconds
        self.stopped = self.stopped + seconds if sample.state == "T" else 0.0
        if sample.state == "R":
            seconds = min(seconds, used)
        elif sample.state in "DtZX":  # a disk, a debugger, or its end, which is noticed otherwise
            seconds = 0.0
        self.waited += seconds
        self.idle = 0.0 if used > 0 else self.idle + seconds
