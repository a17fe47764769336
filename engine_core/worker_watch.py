"""Detects hung workers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, Protocol

from engine_core.step_times import StepTimes
from executor.liveness import STOPPED_TIMEOUT, ProcessSample, ProcessWatch

TICK = 1.0
"""Seconds between checks."""
LOAD_TIMEOUT = 300.0
"""Seconds for which all loading workers may be silent, one of them without using CPU or disk; a compiler may run."""


def _ask(sampler: Callable[[], ProcessSample | None], pid: int) -> ProcessSample | None:
    return sampler()


class Step(Protocol):
    """The attributes of a step in flight that matter here."""

    @property
    def step_id(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_attended(self) -> int: ...
    @property
    def num_steps(self) -> int: ...


def _size(step: Step) -> tuple[int, int]:
    """Tokens and (token, attended token) pairs of each of the steps in a row: the fixed part of their time recurs."""
    return step.num_tokens // step.num_steps, step.num_attended // step.num_steps


class Hang(NamedTuple):
    """A hung worker."""

    reason: str
    was_stopped: bool
    """The worker was stopped (SIGSTOP), so no computation is to blame."""


class WorkerWatch:
    """Watches the processes of an executor, if it has any."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        watch: Callable[[int], ProcessWatch] = ProcessWatch,
    ) -> None:
        """Creates a watch without workers.

        Args:
            clock: Monotonic clock in seconds.
            watch: Starts watching a process id.
        """
        self.times = StepTimes()
        self._clock = clock
        self._watch = watch
        self.pids: tuple[int, ...] = ()
        """Of the watched workers, by rank."""
        self._watches: list[ProcessWatch] = []
        self._answered: list[int] = []
        """By rank: the last step answered."""
        self._seconds: dict[int, float] = {}
        """By step: how long it took the slowest of the ranks that have answered."""
        self._num_steps = 0
        self._ticked_at = 0.0

    def started(
        self, pids: Sequence[int], remote: Mapping[int, Callable[[], ProcessSample | None]] | None = None
    ) -> None:
        """Records started workers.

        Args:
            pids: The index of a process id is its rank.
            remote: By rank, what samples a worker of another machine.
        """
        samplers = remote or {}
        self.pids = tuple(pids)
        self._watches = [
            ProcessWatch(pid, self._clock, partial(_ask, samplers[rank])) if rank in samplers else self._watch(pid)
            for rank, pid in enumerate(pids)
        ]
        self._answered = [0] * len(pids)
        self._seconds.clear()
        self._num_steps = 0

    @property
    def interval(self) -> float | None:
        """Seconds between calls of ``hung`` while an answer is awaited; None: no need to call it."""
        return TICK if self._watches else None

    def heard(self, rank: int, step_id: int = 0, seconds: float = 0.0) -> None:
        """Records a message from a worker: a finished step, with the time that it took, or loading progress."""
        if step_id:
            self._seconds[step_id] = max(seconds, self._seconds.get(step_id, 0.0))
        if rank < len(self._watches):
            self._watches[rank].heard()
            self._answered[rank] = max(step_id, self._answered[rank])

    def all_answered(self, step_id: int) -> bool:
        """Whether all watched workers have answered the step."""
        return min(self._answered, default=step_id) >= step_id

    def step_done(self, step: Step) -> None:
        """Records the result of a step, which took as long as the slowest rank took that has answered."""
        self._num_steps += 1
        seconds = self._seconds.get(step.step_id)
        self._seconds = {step_id: each for step_id, each in self._seconds.items() if step_id > step.step_id}
        if seconds is not None:
            self.times.add(*_size(step), seconds / step.num_steps)

    def hung(self, steps: Sequence[Step], *, is_loading: bool) -> Hang | None:
        """Checks the workers, at most once a second.

        Args:
            steps: Steps not answered by all workers, oldest first.
            is_loading: Whether the workers are still loading.

        Returns:
            The problem with one of them, or None.
        """
        now = self._clock()
        if now - self._ticked_at < TICK:
            return None
        self._ticked_at = now
        for watch in self._watches:
            watch.tick()
        all_are_silent = all(watch.waited >= LOAD_TIMEOUT for watch in self._watches)
        for rank, watch in enumerate(self._watches):
            if watch.stopped >= STOPPED_TIMEOUT:
                reason = f"worker {rank} (pid {watch.pid}) has been stopped for {watch.stopped:.0f} s"
                return Hang(reason, was_stopped=True)
            if is_loading:
                if all_are_silent and watch.idle >= LOAD_TIMEOUT:  # else it waits for those that load
                    reason = f"worker {rank} (pid {watch.pid}) did nothing for {watch.idle:.0f} s while it loaded"
                    return Hang(reason, was_stopped=False)
                continue
            step = next((step for step in steps if step.step_id > self._answered[rank]), None)
            if step is None:
                watch.heard()
                continue
            limit = self.times.deadline(*_size(step), self._num_steps, step.num_steps)
            if watch.waited >= limit:
                reason = f"worker {rank} (pid {watch.pid}) has not finished a step within {limit:.0f} s"
                return Hang(reason, was_stopped=False)
        return None
