"""Values that the host computes from a device's results once they arrive. Needs no torch."""

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
    """A value that depends on device tensors still to be transferred."""

    tensors: Sequence[Tensor]
    make: Callable[[Sequence[Array]], T]
    """Computes the value from the tensors as arrays. Called once."""

    @classmethod
    def known(cls, value: T) -> Deferred[T]:
        """A value that is already available."""
        return cls((), lambda arrays: value)


class Together:
    """Several deferred values that share one transfer."""

    def __init__(self, parts: Sequence[Deferred[Any]]) -> None:
        self._parts = parts
        self.tensors = [tensor for part in parts for tensor in part.tensors]

    def make(self, arrays: Sequence[Array]) -> list[Any]:
        """Computes the values from the arrays of all ``tensors``."""
        values = []
        start = 0
        for part in self._parts:
            end = start + len(part.tensors)
            values.append(part.make(arrays[start:end]))
            start = end
        return values
