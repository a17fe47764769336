"""When a process that died is started again, and which request its deaths point at.

Two questions, kept apart. A ``RestartBudget`` asks whether anything is gained by starting again: deaths count only as
long as no work gets done between them. A ``Suspicion`` asks whether one request is to blame: a computation that kills
dies at the same place each time, so deaths count only while they have a place in common. Bad luck has neither.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from executor.messages import Message

MAX_RESTARTS = 5
"""Restarts without any progress in between."""
RESTART_WINDOW = 600.0
"""Seconds after which a death is forgotten in any case."""
STABLE_TIME = 10.0
"""Seconds of service that count as progress although nobody asked for anything."""

ISOLATE_DEATHS = 2
"""A request that this many deaths point at runs alone. The first death is most often bad luck, and costs nothing."""
MAX_DEATHS = 4
"""A request that this many deaths point at, the last of them while it ran alone, is the culprit."""
PROBATION_TIME = 5.0
"""Seconds that new workers have to live before the trial in which a request may be found guilty: whoever kills them for
another reason, again and again and soon after each start, does it within that time."""


class RestartBudget:
    """How many more times it is worth while to start a process again."""

    def __init__(self, limit: int = MAX_RESTARTS, clock: Callable[[], float] = time.monotonic) -> None:
        """Starts with nothing spent.

        Args:
            limit: Restarts per cause without progress between them.
            clock: Seconds that never go back.
        """
        self.limit = limit
        self._clock = clock
        self._deaths: dict[str, list[float]] = {}
        """By cause: the times of the deaths since the last progress."""
        self._serving_since: float | None = None
        self._has_progressed = False

    def serves(self) -> None:
        """The process is loaded and takes work."""
        self._serving_since = self._clock()
        self._deaths.pop("loading", None)

    def progress(self) -> None:
        """Work got done, so whatever died before was no crash loop."""
        self._has_progressed = True
        if self._deaths:
            self._deaths.clear()

    def explained(self) -> None:
        """The request that is to blame was found. An engine that never did anything is not excused by that."""
        if self._has_progressed:
            self._deaths.clear()

    def spend(self, cause: str) -> bool:
        """Counts a death.

        Args:
            cause: What kind it is; ``loading`` for one before the process served.

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
    """Deaths that happened while a request was being computed, and where in it."""

    num_deaths: int
    first: int
    last: int
    """Positions first <= position < last of the request's tokens were being computed at each of the deaths. Before
    position 0 it is taken in and its grammar is compiled."""

    @property
    def is_grave(self) -> bool:
        """Whether the next death would find the request guilty."""
        return self.num_deaths >= MAX_DEATHS - 1

    def after_death(self, first: int, last: int) -> Suspicion:
        """What is left of it when the process dies again while positions from ``first`` to ``last`` are computed.

        If none of them was being computed at the deaths before, these were of another cause: what they point at has
        been computed meanwhile, or was not reached yet.
        """
        common = max(first, self.first), min(last, self.last)
        if common[0] >= common[1]:
            return Suspicion(1, first, last)
        return Suspicion(self.num_deaths + 1, *common)


def suspect(before: Suspicion | None, first: int, last: int) -> Suspicion:
    """The suspicion of a request after another death."""
    return Suspicion(1, first, last) if before is None else before.after_death(first, last)
