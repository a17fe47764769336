"""Communication between the ranks that share a model's layers.

``ops.all_reduce``, ``ops.all_gather`` and ``ops.select_rows`` take a ``Communicator``, supplied by whoever builds the
model. On eager tensors the ranks communicate at once; under capture the collective becomes a node of the program. A
single rank has nothing to exchange, so no node is recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Communicator(Protocol):
    """One rank's end of a group whose members call the same operations in the same order."""

    rank: int
    size: int
    cuts_sums: bool
    """How layers are divided. True: each rank adds up a share of a product's terms, and the ranks' sums are added
    (``all_reduce``). False: each rank computes a share of the columns, from whole rows of inputs (``all_gather``); no
    result then depends on the number of ranks."""

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

    def select_rows(self, x: Tensor, is_here: Tensor) -> Tensor:
        """Each row from the rank that has it.

        Args:
            x: [rows, width]; rows that are not here may hold anything.
            is_here: bool [rows]: the rows that this rank has. Exactly one rank has each row.

        Returns:
            [rows, width].
        """

    def broadcast(self, x: Tensor) -> Tensor:
        """The tensor of rank 0. All ranks pass one of its shape and dtype."""

    def wait(self) -> None:
        """Returns once all ranks have called it."""


class SingleRank:
    """A group of one."""

    rank = 0
    size = 1
    cuts_sums = False

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        return x

    def select_rows(self, x: Tensor, is_here: Tensor) -> Tensor:
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        return x

    def wait(self) -> None:
        pass


class NotConnected:
    """A rank of a group without a transport, for a model that is loaded but not run."""

    def __init__(self, rank: int, size: int, *, cuts_sums: bool = True) -> None:
        self.rank = rank
        self.size = size
        self.cuts_sums = cuts_sums

    def all_reduce(self, x: Tensor) -> Tensor:
        raise self._error()

    def all_gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        raise self._error()

    def select_rows(self, x: Tensor, is_here: Tensor) -> Tensor:
        raise self._error()

    def broadcast(self, x: Tensor) -> Tensor:
        raise self._error()

    def wait(self) -> None:
        raise self._error()

    def _error(self) -> RuntimeError:
        return RuntimeError(f"rank {self.rank} of {self.size} is not connected to the others")
