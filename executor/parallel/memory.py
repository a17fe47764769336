"""What the ranks of a machine share: memory, and events between pipeline stages. Needs no torch."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

from executor.parallel.state import ParallelState, hidden_event, tokens_event

MOST_BYTES = 1 << 40
"""Size of the memory. Pages exist once they are written."""
RANKS, STAGES, RENDEZVOUS = "ranks", "stages", "rendezvous"
"""Names of the descriptors of memory in which the ranks of a stage meet, of that between stages, and of an empty file
through which ranks with memory of their own find each other."""


def create_shared_memory() -> int:
    """A descriptor of zeroed memory, which lasts as long as a process has it open or mapped.

    Raises:
        OSError: The system refuses.
    """
    descriptor = os.memfd_create("octavo-ranks")
    os.ftruncate(descriptor, MOST_BYTES)
    return descriptor


class SharedByRanks:
    """Descriptors for the ranks of one model on one machine, created when their workers start."""

    def __init__(self, ranks: Sequence[ParallelState]) -> None:
        """
        Args:
            ranks: All ranks of the machine, in order.

        Raises:
            OSError: The system refuses.
        """
        self._ranks = ranks
        self._between: dict[str, int] = {}
        self._of_all = {RENDEZVOUS: os.memfd_create("octavo-rendezvous")} if len(ranks) > 1 else {}
        sizes = Counter(each.pp_rank for each in ranks)
        stages = sorted(sizes)
        shared = [stage for stage in stages if ranks[0].tp_size > 1 and sizes[stage] > 1]
        self._of_stages = {stage: create_shared_memory() for stage in shared}
        if len(stages) > 1:
            self._between = {STAGES: create_shared_memory()}
            has_output_rank = any(each.is_output_rank for each in ranks)
            for each in ranks:
                if each.pp_rank > stages[0]:
                    self._between[hidden_event(each.rank)] = _event()
                if has_output_rank and each.pp_rank < each.pp_size - 1:
                    self._between[tokens_event(each.rank)] = _event()

    def of(self, own: ParallelState) -> dict[str, int]:
        """The descriptors that a rank gets, by name: it waits for its own events, and causes those of others."""
        result = dict(self._of_all)
        if own.pp_rank in self._of_stages:
            result[RANKS] = self._of_stages[own.pp_rank]
        if not self._between:
            return result
        names = [STAGES, hidden_event(own.rank), tokens_event(own.rank)]
        if own.tp_rank == 0:
            names += [hidden_event(each.rank) for each in self._ranks if each.pp_rank == own.pp_rank + 1]
        if own.is_output_rank:
            names += [tokens_event(each.rank) for each in self._ranks]
        return result | {name: self._between[name] for name in names if name in self._between}

    def close(self) -> None:
        """Closes the descriptors: workers have got them."""
        for descriptor in (*self._of_stages.values(), *self._between.values(), *self._of_all.values()):
            os.close(descriptor)


def _event() -> int:
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
