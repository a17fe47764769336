"""Tells a hung process from one on a slow machine.

Only time that the process could have used counts: not while the watcher itself did not run (the machine was suspended,
or all processes were stopped), nor while threads wait for a CPU or a disk.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import NamedTuple

MAX_TICK = 2.0
"""Maximum seconds counted between two samples; watchers sample about once a second."""
STOPPED_TIMEOUT = 10.0
"""Seconds after which a process that is stopped (SIGSTOP) while its watcher runs counts as hung."""

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class ProcessSample(NamedTuple):
    """A sample of a process's state."""

    state: str
    """State from /proc (R, S, D, T, ...): the most significant one of all threads."""
    processor_seconds: float
    """CPU time of all threads since the start."""


def sample_process(pid: int) -> ProcessSample | None:
    """Samples a process; None if it is gone or this system has no /proc."""
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
    """Measures the time that a silent process could have used since it was last heard from."""

    def __init__(
        self,
        pid: int,
        clock: Callable[[], float] = time.monotonic,
        sample: Callable[[int], ProcessSample | None] = sample_process,
    ) -> None:
        """Starts the measurement.

        Args:
            pid: The process.
            clock: Monotonic clock in seconds.
            sample: Samples a process.
        """
        self.pid = pid
        self.waited = 0.0
        """Seconds that the process could have used since it was last heard from."""
        self.idle = 0.0
        """Trailing part of these in which it used no CPU."""
        self.stopped = 0.0
        """Seconds for which it has been stopped."""
        self._clock = clock
        self._sample = sample
        self._looked_at = clock()
        self._last = sample(pid)

    def heard(self) -> None:
        """Resets the measurement: a message arrived."""
        self.waited = self.idle = 0.0

    def tick(self) -> None:
        """Samples the process. Call about once a second."""
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
        elif sample.state in "DtZX":  # disk wait, a debugger, or its end, which is noticed elsewhere
            seconds = 0.0
        self.waited += seconds
        self.idle = 0.0 if used > 0 else self.idle + seconds
