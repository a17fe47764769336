"""What the ranks that share a model's layers tell each other.

``ops.all_reduce`` and ``ops.all_gather`` take a ``Communicator``, which whoever builds the model hands in: on eager
tensors the ranks meet at once, and under capture the meeting becomes a node of the program. With one rank there is
nothing to say and no node.
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
        """The sum of what the ranks give, all of one shape, in an order that depends on the ranks alone."""

    def all_gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """What the ranks give, side by side in the order of the ranks.

        Args:
            x: [rows, widths[rank]].
            widths: Columns that each rank gives.

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
    """A rank of a group that has no means to meet: for a model that is loaded and not run."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    def all_reduce(self, x: Tensor) -> Tensor:
        raise RuntimeError(f"rank {self.rank} of {self.size} is not connected to the others")

    def all_gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        return self.all_reduce(x)
