"""Ranks that are threads of one process: a communicator without devices."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

MEETING_TIMEOUT = 60.0
"""Seconds that a rank waits for the others."""


class ThreadRank:
    """A rank that runs as a thread and exchanges tensors in memory. Sums are taken in rank order."""

    shares_rows = False

    def __init__(self, rank: int, barrier: threading.Barrier, given: list[Any], *, cuts_sums: bool = True) -> None:
        self.rank = rank
        self.cuts_sums = cuts_sums
        self.size = len(given)
        self._barrier = barrier
        self._given = given

    @classmethod
    def group(cls, size: int, *, cuts_sums: bool = True) -> list[ThreadRank]:
        """One communicator per rank, for a group of that size."""
        barrier, given = threading.Barrier(size, timeout=MEETING_TIMEOUT), [None] * size
        return [cls(rank, barrier, given, cuts_sums=cuts_sums) for rank in range(size)]

    def leave(self) -> None:
        """Leaves the group, so that ranks waiting for this one fail instead of hanging."""
        self._barrier.abort()

    def _exchange(self, x: Any) -> list[Any]:
        self._given[self.rank] = x
        self._barrier.wait()
        result = list(self._given)
        self._barrier.wait()
        return result

    def all_reduce(self, x: Tensor) -> Tensor:
        first, *others = self._exchange(x.clone())  # the rank may overwrite it right after this
        total: Tensor = first.clone()
        for other in others:
            total += other
        return total

    def all_gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        parts = self._exchange(x.clone())
        assert [part.shape[1] for part in parts] == list(widths)
        return torch.cat(parts, dim=1)

    def select_rows(self, x: Tensor, is_here: Tensor) -> Tensor:
        whole = torch.empty_like(x)
        for part, rows in self._exchange((x.clone(), is_here.clone())):
            whole[rows] = part[rows]
        return whole

    def broadcast(self, x: Tensor) -> Tensor:
        first: Tensor = self._exchange(x.clone())[0]
        return first

    def wait(self) -> None:
        self._barrier.wait()

    def agree(self, number: int, what: str) -> None:
        assert set(self._exchange(number)) == {number}, what


def on_ranks(size: int, run: Callable[[ThreadRank], T]) -> list[T]:
    """What each rank returns. If one fails, the others do not wait for it."""

    def guarded(rank: ThreadRank) -> T:
        try:
            return run(rank)
        except BaseException:
            rank.leave()
            raise

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(guarded, ThreadRank.group(size)))
