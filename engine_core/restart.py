"""Decides whether to restart a process that died, and which request its deaths implicate.

Two separate questions. A ``RestartBudget`` decides whether a restart is worthwhile: deaths count only while no work
gets done between them. A ``Suspicion`` tracks whether one request is to blame: a fatal computation dies at the same
position each time, so deaths count only while they have positions in common. Random failures meet neither condition.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from executor.messages import Message

MAX_RESTARTS = 5
"""Maximum restarts without progress in between."""
RESTART_WINDOW = 600.0
"""Seconds after which a death no longer counts."""
STABLE_TIME = 10.0
"""Seconds of uptime that count as progress even without requests."""

ISOLATE_DEATHS = 2
"""A request implicated in this many deaths runs alone. A single death is usually bad luck and has no consequences."""
MAX_DEATHS = 4
"""A request implicated in this many deaths, the last one while it ran alone, is the culprit."""
PROBATION_TIME = 5.0
"""Seconds that new workers must survive before the trial that may convict a request: an unrelated cause that kills
workers soon after each start shows within that time."""


class RestartBudget:
    """Limits the restarts of a process."""

    def __init__(self, limit: int = MAX_RESTARTS, clock: Callable[[], float] = time.monotonic) -> None:
        """Starts with a full budget.

        Args:
            limit: Restarts per cause without progress between them.
            clock: Monotonic clock in seconds.
        """
        self.limit = limit
        self._clock = clock
        self._deaths: dict[str, list[float]] = {}
        """By cause: times of deaths since the last progress."""
        self._serving_since: float | None = None
        self._has_progressed = False

    def serves(self) -> None:
        """Records that the process is loaded and accepts work."""
        self._serving_since = self._clock()
        self._deaths.pop("loading", None)

    def progress(self) -> None:
        """Records completed work, so earlier deaths were no crash loop."""
        self._has_progressed = True
        if self._deaths:
            self._deaths.clear()

    def explained(self) -> None:
        """Records that the culprit was found. This does not excuse an engine that never made progress."""
        if self._has_progressed:
            self._deaths.clear()

    def spend(self, cause: str) -> bool:
        """Counts a death.

        Args:
            cause: Kind of death; ``loading`` if the process never served.

        Returns:
            Whether to start again.
        """
        now = self._clock()
        if self._serving_since is not None and now - self._serving_since >= STABLE_TIME:
            self._deaths.clear()
        self._serving_since = None
        deaths = [death for death in self._deaths.get(cause, ()) if now - death < RESTART_WINDOW]
        self._deaths[cause] = [*deaths, now]
        return len(deaths) < self.limit


class Suspicion(Message, frozen=True):
    """Deaths during the computation of a request, and the positions at which they happened."""

    num_deaths: int
    first: int
    last: int
    """Token positions first <= position < last were being computed at every one of the deaths. Negative positions stand
    for accepting the request and compiling its grammar."""

    @property
    def is_grave(self) -> bool:
        """Whether the next death would convict the request."""
        return self.num_deaths >= MAX_DEATHS - 1

    def after_death(self, first: int, last: int) -> Suspicion:
        """The suspicion after another death, during the computation of positions from ``first`` to ``last``.

        If none of them was being computed at the earlier deaths, those had another cause: the positions that they
        implicate have since been computed, or were not reached yet.
        """
        common = max(first, self.first), min(last, self.last)
        if common[0] >= common[1]:
            return Suspicion(1, first, last)
        return Suspicion(self.num_deaths + 1, *common)


def suspect(before: Suspicion | None, first: int, last: int) -> Suspicion:
    """A request's suspicion after another death."""
    return Suspicion(1, first, last) if before is None else before.after_death(first, last)
