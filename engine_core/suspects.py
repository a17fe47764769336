"""Scheduling of requests that may have killed a worker or an engine core.

After one death, usually bad luck, a suspect runs alongside all others, but the positions at which it happened get a
step of their own, so that the next death tells whether they are to blame. After more deaths it runs alone until it has
passed these positions, one suspect at a time. Trial computations would have to be redone in any case and are kept, so
others wait for little more than their turn; and the next death, if any, has a single suspect.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from engine_core.messages import I32
from engine_core.request import Request

if TYPE_CHECKING:
    from engine_core.in_flight import I64, Bools, InFlight


class Suspects:
    """Requests under suspicion, and whose turn it is to run alone."""

    def __init__(self) -> None:
        self.current: Request | None = None
        """The request on trial: no other is planned."""
        self._waiting: deque[Request] = deque()
        """Requests waiting for their trials."""
        self._confirmed: dict[int, tuple[Request, int]] = {}
        """By slot: running suspects and the confirmed number of computed tokens of each."""

    @property
    def is_isolating(self) -> bool:
        """Whether a request is on trial or waiting for one."""
        return self.current is not None or bool(self._waiting)

    def isolate(self, requests: Iterable[Request]) -> None:
        """Makes these requests run alone, one at a time."""
        known = {self.current, *self._waiting}
        self._waiting += [request for request in requests if request not in known]

    def restart(self) -> None:
        """Adapts to new workers. A request that was on trial gets another one after all others have had theirs."""
        self._confirmed.clear()
        if self.current is not None:
            self._waiting.append(self.current)
            self.current = None

    def next_trial(self, *, may_convict: bool = True) -> None:
        """Begins the next trial if none is in progress. No step may be in flight.

        Args:
            may_convict: Whether to begin a trial that may convict its request.
        """
        while self.current is None and self._waiting:
            suspicion = self._waiting[0].suspicion
            if suspicion is not None and suspicion.is_grave and not may_convict:
                return
            request = self._waiting.popleft()
            if suspicion is not None:
                self.current = request

    def forget(self, request: Request) -> None:
        """Drops a finished request."""
        if request is self.current:
            self.current = None
        elif request in self._waiting:
            self._waiting.remove(request)

    # -- what runs -----------------------------------------------------------------------------------------

    def __bool__(self) -> bool:
        """Whether any running request is under suspicion or any request waits for a trial."""
        return bool(self._confirmed) or self.is_isolating

    def started(self, request: Request, num_computed: int) -> None:
        """Records that a suspect got a slot, with this many of its tokens in the cache."""
        self._confirmed[request.slot] = request, num_computed

    def stopped(self, slot: int) -> None:
        """Records that a slot is free."""
        self._confirmed.pop(slot, None)

    def limit(self, slots: I32, counts: I64, num_computed: I64) -> I64:
        """Limits the tokens of each row so that suspicious positions come first in a step of their own.

        Args:
            slots: int32 [num_rows].
            counts: int64 [num_rows], requested tokens.
            num_computed: int64 [num_rows], tokens planned or computed.
        """
        counts = counts.copy()
        for row, slot in enumerate(slots.tolist()):
            if slot in self._confirmed:
                request, confirmed = self._confirmed[slot]
                counts[row] = allowed(request, int(counts[row]), int(num_computed[row]), confirmed)
        return counts

    def computed(self, slots: I32, ends: I64, is_current: Bools) -> None:
        """Handles a finished step: clears suspects that have passed the positions in question.

        Args:
            slots: int32 [num_rows].
            ends: int64 [num_rows], tokens of each row's request computed so far.
            is_current: bool [num_rows], the request still has its slot.
        """
        for slot, end, current in zip(slots.tolist(), ends.tolist(), is_current.tolist(), strict=True):
            if not current or slot not in self._confirmed:
                continue
            request, _ = self._confirmed[slot]
            self._confirmed[slot] = request, end
            if request.suspicion is None or end >= request.suspicion.last:
                request.suspicion = None
                del self._confirmed[slot]
                if request is self.current:
                    self.current = None


def allowed(request: Request, count: int, num_computed: int, num_confirmed: int) -> int:
    """How many of a request's ``count`` wanted tokens the next step may compute."""
    suspicion = request.suspicion
    if suspicion is None or num_computed >= suspicion.last:
        return count
    if num_computed < suspicion.first:
        return min(count, suspicion.first - num_computed)
    return count if num_confirmed >= suspicion.first else 0


def lost_requests(
    steps: Iterable[InFlight], owner: Callable[[InFlight, int], Request | None]
) -> list[tuple[Request, int, int]]:
    """The requests of lost steps, with the positions being computed of each.

    Args:
        steps: The lost steps, in planning order.
        owner: Returns the request of a row, or None if it is gone.

    Returns:
        Requests with the range of positions (first, last + 1).
    """
    lost: dict[int, tuple[Request, int, int]] = {}
    for step in steps:
        for row, (begin, end) in enumerate(zip(step.begins.tolist(), step.ends.tolist(), strict=True)):
            request = owner(step, row)
            if request is not None:
                _, first, _ = lost.get(request.index, (request, begin, end))
                lost[request.index] = request, first, end
    return list(lost.values())
