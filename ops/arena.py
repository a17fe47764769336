"""Places for the values of a captured program, fixed before the step that computes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from ops.dispatch import Spec


class Arena:
    """Memory for the values of a program.

    A value has room for a number of rows of its kind (``tokens``, ``samples``). Values whose lifetimes do not overlap
    share a place.
    """

    def __init__(
        self, specs: list[Spec], stride_bytes: Callable[[Spec], int], make: Callable[[int], Tensor], unit: int = 1
    ) -> None:
        """
        Args:
            specs: Of all values.
            stride_bytes: Distance from one row of a value to the next.
            make: Memory of that many bytes, uint8.
            unit: Each kind has room for a multiple of this many rows.
        """
        self._specs = specs
        self._stride_bytes = stride_bytes
        self._make = make
        self._unit = unit
        self._offsets: dict[int, int] = {}
        self._row_bytes = {"tokens": 0, "samples": 0}
        self._free: dict[str, list[tuple[int, int]]] = {"tokens": [], "samples": []}
        self.capacity = {"tokens": 0, "samples": 0}
        self._memory: dict[str, Tensor] = {}

    def elsewhere(self, make: Callable[[int], Tensor]) -> Arena:
        """An arena with the same places in other memory."""
        other = Arena(self._specs, self._stride_bytes, make, self._unit)
        other._offsets, other._row_bytes = self._offsets, self._row_bytes
        return other

    def stride_bytes(self, index: int) -> int:
        """Distance from one row of a value to the next."""
        return self._stride_bytes(self._specs[index])

    def allocate(self, index: int) -> None:
        """Finds a place for a value: first fit."""
        rows, size = self._specs[index].rows, self.stride_bytes(index)
        free = self._free[rows]
        for i, (offset, room) in enumerate(free):
            if room >= size:
                free[i : i + 1] = [(offset + size, room - size)] if room > size else []
                self._offsets[index] = offset
                return
        self._offsets[index] = self._row_bytes[rows]
        self._row_bytes[rows] += size

    def release(self, index: int) -> None:
        """Frees the place of a value."""
        free = self._free[self._specs[index].rows]
        free.append((self._offsets[index], self.stride_bytes(index)))
        free.sort()
        merged: list[tuple[int, int]] = []
        for offset, size in free:
            if merged and sum(merged[-1]) == offset:
                merged[-1] = (merged[-1][0], merged[-1][1] + size)
            else:
                merged.append((offset, size))
        free[:] = merged

    def places(self) -> dict[int, int]:
        """Offset of each value, for one row, that has a place."""
        return dict(sorted(self._offsets.items()))

    def num_bytes(self, rows: Mapping[str, int]) -> int:
        """Memory that this many rows take."""
        return sum(self._row_bytes[kind] * self._rounded(count) for kind, count in rows.items())

    def reserve(self, rows: Mapping[str, int]) -> bool:
        """Makes room for this many rows. True: all addresses changed."""
        moved = False
        for kind, count in rows.items():
            if count > self.capacity[kind] or kind not in self._memory:
                self.capacity[kind] = self._rounded(max(count, 2 * self.capacity[kind]))
                self._memory[kind] = self._make(self._row_bytes[kind] * self.capacity[kind])
                moved = True
        return moved

    def _rounded(self, count: int) -> int:
        return -(-count // self._unit) * self._unit

    def tensor(self, index: int) -> Tensor:
        """A value's memory, [capacity, width]."""
        spec = self._specs[index]
        capacity, stride = self.capacity[spec.rows], self.stride_bytes(index)
        start = self._offsets[index] * capacity
        rows = self._memory[spec.rows][start : start + capacity * stride].view(spec.dtype)
        return rows.view(capacity, stride // spec.dtype.itemsize)[:, : spec.width]
