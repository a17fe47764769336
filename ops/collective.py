"""Communication between the ranks that share a model's layers.

``ops.all_reduce`` and ``ops.all_gather`` take a ``Communicator``, supplied by whoever builds the model. On eager
tensors the ranks communicate at once; under capture the collective becomes a node of the program. A single rank has
nothing to exchange, so no node is recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Communicator(Protocol):
    """One rank's end of a group whose members call the same operations in the same order."""

    rank: int
    size: int

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum of the ranks' tensors, all of one shape. The order of summation depends only on the ranks."""

    def all_gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """The ranks' tensors side by side, in rank order.

        Args:
            x: [rows, widths[rank]].
            widths: Columns that each rank contributes.

        Returns:
            [rows, sum(widths)].
        """


class SingleRank:
    """A group of one."""

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        return x


class NotConnected:
    """A rank of a group without a transport, for a model that is loaded but not run."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    def all_reduce(self, x: Tensor) -> Tensor:
        raise RuntimeError(f"rank {self.rank} of {self.size} is not connected to the others")

    def all_gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        return self.all_reduce(x)
