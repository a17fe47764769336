"""Weights that know where the tensors of a checkpoint go in them.

A parameter may hold several tensors of a checkpoint (q, k and v of one projection), and a rank may hold a share of
each. Both are said as ranges of dimensions, so loading needs no code in layers or models.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from executor.parallel import ParallelState

ShardId = str | int | None
"""Which tensor of the checkpoint, of those that share a parameter; None: there is only one."""


@dataclass(frozen=True)
class Part:
    """A range of one dimension: where it lies in the checkpoint's tensor, and where in the parameter."""

    full: int
    """Size of the dimension in the checkpoint."""
    start: int
    size: int
    offset: int = 0

    @classmethod
    def whole(cls, size: int, offset: int = 0) -> Part:
        """A dimension that every rank holds in full."""
        return cls(size, 0, size, offset)

    @classmethod
    def shard(cls, full: int, parallel: ParallelState, what: str, offset: int = 0) -> Part:
        """This rank's equal share of a dimension."""
        size = parallel.divide(full, what)
        return cls(full, parallel.tp_rank * size, size, offset)


Parts = Mapping[ShardId, tuple[Part, ...]]
"""For each tensor of the checkpoint, a range per dimension."""


def single(*ranges: Part) -> Parts:
    """The parts of a parameter that is one tensor of the checkpoint."""
    return {None: ranges}


class WeightParameter(nn.Parameter):
    """A parameter that is filled from the tensors of a checkpoint."""

    parts: Parts

    def __new__(cls, data: Tensor, parts: Parts) -> WeightParameter:
        parameter = super().__new__(cls, data, requires_grad=False)
        parameter.parts = parts
        return parameter

    @classmethod
    def empty(cls, parts: Parts, *, dtype: torch.dtype, device: torch.device) -> WeightParameter:
        """A parameter just large enough for its parts, with undefined content."""
        ends = ([part.offset + part.size for part in ranges] for ranges in parts.values())
        shape = [max(sizes) for sizes in zip(*ends, strict=True)]
        return cls(torch.empty(shape, dtype=dtype, device=device), parts)

    def load(self, tensor: Tensor, shard_id: ShardId = None) -> None:
        """Copies this rank's share of a checkpoint's tensor, converting its type.

        Raises:
            ValueError: The tensor's shape is not the model's.
        """
        ranges = self.parts[shard_id]
        expected = [part.full for part in ranges]
        if list(tensor.shape) != expected:
            raise ValueError(f"has shape {list(tensor.shape)}, the model needs {expected}")
        source, target = tensor, self.data
        for dim, part in enumerate(ranges):
            source = source.narrow(dim, part.start, part.size)
            target = target.narrow(dim, part.offset, part.size)
        target.copy_(source)


class WeightedLayer(nn.Module, ABC):
    """A layer whose weights may need another layout once they are loaded."""

    @abstractmethod
    def process_weights_after_loading(self) -> None:
        """Brings the weights into the layout that the device reads. Called once."""
