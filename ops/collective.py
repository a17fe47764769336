"""Communication between the ranks that share a model's layers.

``ops.all_reduce``, ``ops.all_gather`` and ``ops.select_rows`` take a ``Communicator``, supplied by whoever builds the
model. On eager tensors the ranks communicate at once; under capture the collective becomes a node of the program. A
single rank has nothing to exchange, so no node is recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class PeerLostError(RuntimeError):
    """Another rank has left."""


class Communicator(Protocol):
    """One rank's end of a group whose members call the same operations in the same order."""

    rank: int
    size: int
    cuts_sums: bool
    """How layers are divided. True: each rank adds up a share of a product's terms, and the ranks' sums are added
    (``all_reduce``). False: each rank computes a share of the columns, from whole rows of inputs (``all_gather``); no
    result then depends on the number of ranks."""
    shares_rows: bool
    """Whether what was gathered lies in memory of all ranks. True: rank 0 samples, which changes logits, and the others
    get its tokens. False: each rank samples on its own, and all get the same tokens from the same numbers."""

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

    def agree(self, number: int, what: str) -> None:
        """Checks that all ranks have the same number.

        Raises:
            RuntimeError: One has another; the message names ``what``.
            PeerLostError: One has left.
        """


class Transport(Protocol):
    """What a ``Communicator`` of ranks with memory of their own offers to kernels."""

    rank: int
    size: int

    def exchange(self, x: Tensor, out: Tensor) -> None:
        """Puts the ranks' tensors one after the other, in the order of the device's work.

        Args:
            x: Of any shape, contiguous, and the same shape and dtype on all ranks.
            out: Contiguous, with room for those of all ranks.

        Raises:
            PeerLostError: A rank has left.
        """

    def swap(self, x: Tensor, out: Tensor) -> None:
        """Gives each rank its part of this one's tensor, in the order of the device's work.

        Args:
            x: [ranks, *shape], contiguous, and the same shape and dtype on all ranks.
            out: Likewise: of each rank, the part for this one.

        Raises:
            PeerLostError: A rank has left.
        """


class SingleRank:
    """A group of one."""

    rank = 0
    size = 1
    cuts_sums = False
    shares_rows = False

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

    def agree(self, number: int, what: str) -> None:
        pass


class NotConnected:
    """A rank of a group without a transport, for a model that is loaded but not run."""

    shares_rows = False

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

    def agree(self, number: int, what: str) -> None:
        raise self._error()

    def _error(self) -> RuntimeError:
        return RuntimeError(f"rank {self.rank} of {self.size} is not connected to the others")
