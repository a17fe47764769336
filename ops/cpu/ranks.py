"""Ranks of one machine: processes that meet, and lay whole rows of activations, in memory that all of them map.

The memory has a place to meet (``csrc/ranks.h``), two slots per rank for the operations of ``Communicator``, and
regions for the arenas of programs. Slots are used in turn. Two suffice: whoever posts for the second time from now has
met the others once more, and by then all have read what is posted now.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from ops.collective import PeerLostError
from ops.cpu import library as lib
from ops.cpu.library import Library

SLOT_BYTES = 8 << 20
_PAGE = mmap.ALLOCATIONGRANULARITY


class SharedRank:
    """A rank of a group on one machine; see ``ops.Communicator``."""

    cuts_sums = False
    shares_rows = True

    def __init__(self, library: Library, descriptor: int, rank: int, size: int) -> None:
        """
        Args:
            library: The kernels.
            descriptor: Of shared memory, the same for all ranks, zeroed and of any size that suffices; pages exist once
                they are written. The caller may close it.
            rank: Index of the rank.
            size: Number of ranks.
        """
        self.rank = rank
        self.size = size
        self._library = library
        self._descriptor = os.dup(descriptor)
        self._end = 0
        self._place = self.memory(library.meeting_bytes(size))
        self._slots = self.memory(2 * size * SLOT_BYTES).view(2, size, SLOT_BYTES)
        self._turn = 0
        self.workspace = self.memory(lib.WORKSPACE_BYTES)
        """For experts."""
        self.struct = lib.Ranks(rank, size, self._place.data_ptr())
        """For kernels."""

    def memory(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes] of the memory, zero at first. The ranks ask for the same sizes in the same order."""
        length = -(-max(num_bytes, 1) // _PAGE) * _PAGE
        mapping = mmap.mmap(self._descriptor, length, flags=mmap.MAP_SHARED, offset=self._end)
        self._end += length
        return torch.frombuffer(mapping, dtype=torch.uint8)[:num_bytes]

    def wait(self) -> None:
        """Returns once all ranks have called it.

        Raises:
            PeerLostError: One has left.
        """
        if self._library.meet(ctypes.addressof(self.struct)):
            raise PeerLostError(f"rank {self.rank} of {self.size}: another rank has left")

    def agree(self, number: int, what: str) -> None:
        """Checks that all ranks have the same number.

        Raises:
            RuntimeError: One has another; the message names ``what``.
            PeerLostError: One has left.
        """
        numbers = self.all_gather(torch.tensor([[number]]), (1,) * self.size)
        if (numbers != number).any():
            raise RuntimeError(f"ranks differ in {what}: {numbers.tolist()}")

    def leave(self) -> None:
        """Leaves the group: ranks that wait for this one fail instead."""
        self._library.leave(ctypes.addressof(self.struct))

    def all_reduce(self, x: Tensor) -> Tensor:
        raise NotImplementedError("ranks of CPUs do not add the results of products")

    def all_gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        assert x.shape[1] == widths[self.rank]
        out = torch.empty((len(x), sum(widths)), dtype=x.dtype)
        for first, count in self._bands(len(x), max(widths) * x.itemsize):
            slots = self._post(x[first : first + count])
            columns = out[first : first + count].split(list(widths), dim=1)
            for slot, width, part in zip(slots, widths, columns, strict=True):
                part.copy_(_read(slot, (count, width), x.dtype))
        return out

    def select_rows(self, x: Tensor, is_here: Tensor) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        for first, count in self._bands(len(x), x.shape[1] * x.itemsize + 1):
            own, end = is_here[first : first + count], count * x.shape[1] * x.itemsize
            self._slots[self._turn, self.rank, end : end + count] = own
            slots = self._post(x[first : first + count])
            for slot in slots:
                rows = slot[end : end + count].bool()
                out[first : first + count][rows] = _read(slot, (count, x.shape[1]), x.dtype)[rows]
        return out

    def broadcast(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 1)
        parts = []
        for first, count in self._bands(len(flat), x.itemsize):
            slots = self._post(flat[first : first + (count if self.rank == 0 else 0)])
            parts.append(_read(slots[0], (count, 1), x.dtype).clone())
        return torch.cat(parts).view(x.shape) if parts else x

    def _bands(self, rows: int, row_bytes: int) -> list[tuple[int, int]]:
        """First row and number of rows of the pieces that fit a slot."""
        most = max(1, SLOT_BYTES // max(row_bytes, 1))
        return [(first, min(most, rows - first)) for first in range(0, rows, most)]

    def _post(self, x: Tensor) -> Tensor:
        """Shows a tensor to all ranks and meets them; returns the slots of all, uint8 [ranks, bytes]."""
        slots = self._slots[self._turn]
        self._turn = 1 - self._turn
        _read(slots[self.rank], tuple(x.shape), x.dtype).copy_(x)
        self.wait()
        return slots


def _read(slot: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What lies at the start of a slot."""
    return slot[: torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(shape)
