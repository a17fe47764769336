"""How requests are computed that may have killed a worker or an engine core.

After one death, which is most often bad luck, a suspect runs beside all others, but the positions at which it happened
get a step of their own: so the next death says whether it was them. After more of them it runs alone until it has got
past that place, one suspect after another. What is computed on trial would have to be computed again in any case, and
stays, so others wait for little more than their turn; and the next death, if there is one, has one suspect.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from engine_core.messages import I32
from engine_core.request import Request

if TYPE_CHECKING:
    from engine_core.in_flight import InFlight

I64 = npt.NDArray[np.int64]


class Suspects:
    """Requests that have a ``Suspicion``, and whose turn it is to run alone."""

    def __init__(self) -> None:
        self.current: Request | None = None
        """On trial: nobody else is planned."""
        self._waiting: deque[Request] = deque()
        """For their trial."""
        self._confirmed: dict[int, tuple[Request, int]] = {}
        """By slot: running suspects, and how many tokens of each are known to be computed."""

    @property
    def is_isolating(self) -> bool:
        """Whether somebody is on trial or will be."""
        return self.current is not None or bool(self._waiting)

    def isolate(self, requests: Iterable[Request]) -> None:
        """These have to run alone, each by itself."""
        known = {self.current, *self._waiting}
        self._waiting += [request for request in requests if request not in known]

    def restart(self) -> None:
        """The workers are new. Whoever was on trial has another one when all others have had theirs."""
        self._confirmed.clear()
        if self.current is not None:
            self._waiting.append(self.current)
            self.current = None

    def next_trial(self, *, may_convict: bool = True) -> None:
        """Begins the next trial if none is under way. No step may be in flight.

        Args:
            may_convict: Begin also one in which the request may be found guilty.
        """
        while self.current is None and self._waiting:
            suspicion = self._waiting[0].suspicion
            if suspicion is not None and suspicion.is_grave and not may_convict:
                return
            request = self._waiting.popleft()
            if suspicion is not None:
                self.current = request

    def forget(self, request: Request) -> None:
        """A request is over."""
        if request is self.current:
            self.current = None
        elif request in self._waiting:
            self._waiting.remove(request)

    # -- what runs -----------------------------------------------------------------------------------------

    def __bool__(self) -> bool:
        """Whether a running request is suspected of anything, or waits for its trial."""
        return bool(self._confirmed) or self.is_isolating

    def started(self, request: Request, num_computed: int) -> None:
        """A suspect got a slot; so many of its tokens are in the cache."""
        self._confirmed[request.slot] = request, num_computed

    def stopped(self, slot: int) -> None:
        """A slot is free."""
        self._confirmed.pop(slot, None)

    def limit(self, slots: I32, counts: I64, num_computed: I64) -> I64:
        """How many tokens of each row may be computed: suspicious positions come in steps that have no others before.

        Args:
            slots: int32 [num_rows].
            counts: int64 [num_rows], tokens that are wanted.
            num_computed: int64 [num_rows], tokens that are planned or computed.
        """
        counts = counts.copy()
        for row, slot in enumerate(slots.tolist()):
            if slot in self._confirmed:
                request, confirmed = self._confirmed[slot]
                counts[row] = allowed(request, int(counts[row]), int(num_computed[row]), confirmed)
        return counts

    def computed(self, slots: I32, ends: I64, is_current: npt.NDArray[np.bool_]) -> None:
        """A step is done. Suspects that got past the place in question are none any more.

        Args:
            slots: int32 [num_rows].
            ends: int64 [num_rows], tokens of each row's request that are computed by now.
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
    """How many of the ``count`` tokens that are wanted of a request may be in the next step."""
    suspicion = request.suspicion
    if suspicion is None or num_computed >= suspicion.last:
        return count
    if num_computed < suspicion.first:
        return min(count, suspicion.first - num_computed)
    return count if num_confirmed >= suspicion.first else 0


def lost_requests(
    steps: Iterable[InFlight], owner: Callable[[InFlight, int], Request | None]
) -> list[tuple[Request, int, int]]:
    """The requests of steps that will have no result, and which positions were being computed of each.

    Args:
        steps: In the order in which they were planned.
        owner: Finds the request of a row; None: it is gone.

    Returns:
        The request, the first position, and one more than the last.
    """
    lost: dict[int, tuple[Request, int, int]] = {}
    for step in steps:
        for row, (begin, end) in enumerate(zip(step.begins.tolist(), step.ends.tolist(), strict=True)):
            request = owner(step, row)
            if request is not None:
                _, first, _ = lost.get(request.index, (request, begin, end))
                lost[request.index] = request, first, end
    return list(lost.values())
