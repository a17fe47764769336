"""Operations among ranks, and ranks that are threads of one process: the oracle of other transports."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from ops.collective import Communicator
from ops.dispatch import Op, Spec, like_first, op

P = ParamSpec("P")
R = TypeVar("R")

MEETING_TIMEOUT = 60.0
"""Seconds that a rank waits for the others."""


class CollectiveOp(Op[P, R]):
    """An op of all ranks of a communicator, its second argument. Of one rank it is nothing: no node is recorded."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        x: Any = args[0]
        communicator: Any = args[1]
        return x if communicator.size == 1 else super().__call__(*args, **kwargs)


def collective(infer: Callable[..., Spec]) -> Callable[[Callable[P, R]], CollectiveOp[P, R]]:
    """Declares such an op; see ``ops.dispatch.op``."""
    return lambda reference: CollectiveOp(reference, infer)


@collective(like_first)
def all_reduce(x: Tensor, communicator: Communicator) -> Tensor:
    """The sum of the ranks' ``x``; see ``Communicator``."""
    return communicator.all_reduce(x)


@collective(lambda x, communicator, widths: Spec(x.spec.rows, sum(widths), x.spec.dtype))
def all_gather(x: Tensor, communicator: Communicator, widths: tuple[int, ...]) -> Tensor:
    """The ranks' ``x`` side by side; see ``Communicator``."""
    return communicator.all_gather(x, widths)


@op(lambda ids, first, count: (ids.spec, Spec(ids.spec.rows, 1, torch.bool)))
def shard_ids(ids: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Token ids as rows of a rank's part of a table.

    Args:
        ids: int32 [num_tokens].
        first: Id of the part's first row.
        count: Rows of the part.

    Returns:
        int32 [num_tokens], 0 for ids that are not here; bool [num_tokens], whether they are.
    """
    is_here = (ids >= first) & (ids < first + count)
    return torch.where(is_here, ids - first, 0), is_here


@op(like_first)
def keep_rows(x: Tensor, kept: Tensor) -> Tensor:
    """Zeros in the place of other rows: a sum over ranks, each of which keeps its own, then selects.

    Args:
        x: [rows, width].
        kept: bool [rows].
    """
    return torch.where(kept.unsqueeze(1), x, 0)


class ThreadRank:
    """A rank that is a thread, and meets the others in memory. Sums are in the order of the ranks."""

    def __init__(self, rank: int, barrier: threading.Barrier, given: list[Any]) -> None:
        self.rank = rank
        self.size = len(given)
        self._barrier = barrier
        self._given = given

    @classmethod
    def group(cls, size: int) -> list[ThreadRank]:
        """The ends of a group of that size."""
        barrier, given = threading.Barrier(size, timeout=MEETING_TIMEOUT), [None] * size
        return [cls(rank, barrier, given) for rank in range(size)]

    def leave(self) -> None:
        """Ends the waiting of the others, whom this rank will not meet any more."""
        self._barrier.abort()

    def _exchange(self, x: Tensor) -> list[Tensor]:
        self._given[self.rank] = x.clone()  # the rank may overwrite it as soon as it goes on
        self._barrier.wait()
        result = list(self._given)
        self._barrier.wait()
        return result

    def all_reduce(self, x: Tensor) -> Tensor:
        first, *others = self._exchange(x)
        total = first.clone()
        for other in others:
            total += other
        return total

    def all_gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        parts = self._exchange(x)
        assert [part.shape[1] for part in parts] == list(widths)
        return torch.cat(parts, dim=1)
