"""Weights that know where the tensors of a checkpoint go in them.

A parameter may hold several tensors of a checkpoint (q, k and v of one projection, the experts of a layer), and a rank
may hold a share of each. Both are said as ranges of dimensions, so loading needs no code in layers or models. A
parameter has a type of its own: what a checkpoint stores as integers is loaded as integers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import product
from math import ceil

import torch
from torch import Tensor, nn

from executor.parallel import ParallelState

ShardId = str | None
"""Which tensor of the checkpoint, of those that share a parameter: the name of its module, beside the layer's.

``q_proj`` for a ``qkv_proj``, ``experts.3.up_proj`` for ``experts``; None: there is only one, under the layer's name.
"""


def stored_module(module: str, shard_id: ShardId) -> str:
    """The module of the checkpoint that a shard comes from.

    Args:
        module: Full name of the layer here: ``model.layers.0.self_attn.qkv_proj``.
        shard_id: ``k_proj`` gives ``model.layers.0.self_attn.k_proj``.
    """
    if shard_id is None:
        return module
    parent, dot, _ = module.rpartition(".")
    return f"{parent}{dot}{shard_id}"


@dataclass(frozen=True)
class Range:
    """Consecutive elements of one dimension: where they lie in the checkpoint's tensor, and where in the parameter."""

    start: int
    size: int
    offset: int


@dataclass(frozen=True)
class Part:
    """This rank's elements of one dimension: any ranges, in the order of the parameter."""

    full: int
    """Size of the dimension in the checkpoint."""
    ranges: tuple[Range, ...]
    is_stacked: bool = False
    """The checkpoint's tensor lacks this dimension, as the parameter is a stack of such tensors."""

    @classmethod
    def whole(cls, size: int, offset: int = 0) -> Part:
        """A dimension that every rank holds in full."""
        return cls.piece(size, 0, size, offset)

    @classmethod
    def piece(cls, full: int, start: int, size: int, offset: int = 0) -> Part:
        """``size`` elements from ``start`` on."""
        return cls(full, (Range(start, size, offset),))

    @classmethod
    def shard(cls, full: int, parallel: ParallelState, what: str, offset: int = 0) -> Part:
        """This rank's equal share of a dimension.

        Raises:
            ValueError: It does not divide; the message says ``what`` does not.
        """
        size = parallel.divide(full, what)
        return cls.piece(full, parallel.tp_rank * size, size, offset)

    @classmethod
    def element(cls, index: int) -> Part:
        """Number ``index`` of a stack, such as an expert: the checkpoint has one tensor for each."""
        return cls(1, (Range(0, 1, index),), is_stacked=True)

    @classmethod
    def joined(cls, parts: Sequence[Part]) -> Part:
        """Parts of dimensions that follow one another in one tensor of the checkpoint, such as q, k and v of Phi-3."""
        ranges, full = [], 0
        for part in parts:
            ranges += [replace(each, start=full + each.start) for each in part.ranges]
            full += part.full
        return cls(full, tuple(ranges))

    def alone(self) -> Part:
        """The same elements, at the beginning of a parameter."""
        first = min(each.offset for each in self.ranges)
        return replace(self, ranges=tuple(replace(each, offset=each.offset - first) for each in self.ranges))

    @property
    def size(self) -> int:
        return sum(each.size for each in self.ranges)

    @property
    def end(self) -> int:
        """Where the part ends in the parameter."""
        return max(each.offset + each.size for each in self.ranges)

    def in_units_of(self, count: int | Fraction) -> Part:
        """The same elements of a tensor that has one for every ``count`` of this dimension.

        Args:
            count: How many numbers a word holds (8 of 4 bits in an int32, 32/3 of 3 bits), or how many share a scale.

        Raises:
            ValueError: A range begins or ends within a unit. Only the dimension itself may end within one.
        """

        def units(each: Range) -> Range:
            start, size, offset = (Fraction(number) / count for number in (each.start, each.size, each.offset))
            if each.start + each.size == self.full:
                size = Fraction(ceil(size))
            if any(number.denominator != 1 for number in (start, size, offset)):
                raise ValueError(
                    f"{each.size} of {self.full} elements from {each.start} on are not whole units of {count}"
                )
            return Range(int(start), int(size), int(offset))

        return replace(self, full=ceil(Fraction(self.full) / count), ranges=tuple(map(units, self.ranges)))


Parts = Mapping[ShardId, tuple[Part, ...]]
"""For each tensor of the checkpoint, a part per dimension of the parameter."""


def single(*dims: Part) -> Parts:
    """The parts of a parameter that is one tensor of the checkpoint."""
    return {None: dims}


class WeightParameter(nn.Parameter):
    """A parameter that is filled from the tensors of a checkpoint.

    Its type says which tensors it takes (``StoredTensor.read``): numbers of any floating type where it has 16 bits or
    more, rounded to its own; otherwise only tensors of the very same type.
    """

    parts: Parts

    def __new__(cls, data: Tensor, parts: Parts) -> WeightParameter:
        parameter = super().__new__(cls, data, requires_grad=False)
        parameter.parts = parts
        return parameter

    @classmethod
    def empty(cls, parts: Parts, *, dtype: torch.dtype, device: torch.device) -> WeightParameter:
        """A parameter just large enough for its parts, with undefined content."""
        shape = [max(part.end for part in dim) for dim in zip(*parts.values(), strict=True)]
        return cls(torch.empty(shape, dtype=dtype, device=device), parts)

    def load(self, tensor: Tensor, shard_id: ShardId = None) -> None:
        """Copies this rank's share of a checkpoint's tensor, rounding to the parameter's type.

        Raises:
            ValueError: The tensor's shape is not the model's.
        """
        dims = self.parts[shard_id]
        expected = [part.full for part in dims if not part.is_stacked]
        if list(tensor.shape) != expected:
            raise ValueError(f"has shape {list(tensor.shape)}, the model needs {expected}")
        tensor = tensor.reshape([part.full for part in dims])
        for block in product(*(part.ranges for part in dims)):
            source, target = tensor, self.data
            for dim, each in enumerate(block):
                source = source.narrow(dim, each.start, each.size)
                target = target.narrow(dim, each.offset, each.size)
            target.copy_(source)


class Weights(nn.Module, ABC):
    """The weights of one layer: parameters that the loader fills, then what the kernels of the device read.

    Parameters are named as the checkpoint names the last part of its tensors: ``weight``, ``bias``, ``scales``. They
    belong to the layer's name, not to one of this module (``named_weights``). What is left in parameters after ``pack``
    is what the weights take in memory.
    """

    @abstractmethod
    def pack(self) -> None:
        """Brings the loaded weights into the layout that the device reads and frees the unpacked copy. Called once."""


def named_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """All parameters with the names of the layers that they belong to.

    Parameters that hold different shards of a layer may have one name.
    """
    inner = {name for name, module in model.named_modules() if isinstance(module, Weights)}
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        while module in inner:
            module = module.rpartition(".")[0]
        yield f"{module}.{leaf}".lstrip("."), parameter
