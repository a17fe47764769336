"""Values that the host makes of a device's results, once these have come. Runs without torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

Array = npt.NDArray[Any]
T = TypeVar("T")


@dataclass
class Deferred(Generic[T]):
    """A value, and the tensors of the device that it waits for."""

    tensors: Sequence[Tensor]
    make: Callable[[Sequence[Array]], T]
    """Takes the tensors as arrays, and is called once."""

    @classmethod
    def known(cls, value: T) -> Deferred[T]:
        """A value that is there already."""
        return cls((), lambda arrays: value)


class Together:
    """Several deferred values that come with one transfer."""

    def __init__(self, parts: Sequence[Deferred[Any]]) -> None:
        self._parts = parts
        self.tensors = [tensor for part in parts for tensor in part.tensors]

    def make(self, arrays: Sequence[Array]) -> list[Any]:
        """The values, of the arrays of all ``tensors``."""
        values = []
        start = 0
        for part in self._parts:
            end = start + len(part.tensors)
            values.append(part.make(arrays[start:end]))
            start = end
        return values
