"""Parameters that know which checkpoint tensors fill them.

A parameter may hold several tensors of a checkpoint (q, k and v of one projection, the experts of a layer), and a rank
may hold a share of each. Both are described as ranges of dimensions, so loading needs no code in layers or models. Each
parameter has its own dtype: integers in a checkpoint are loaded as integers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import product
from math import ceil, prod
from typing import TypeVar

import torch
from torch import Tensor, nn

from executor.parallel import Share
from ops import AdapterTable, TableAdapter
from ops.cpu.memory import map_zeros

MISFIT = "; weights and configuration do not fit: check the configuration, or download the model again"
"""Advice in messages about tensors that the model does not have, or has in another shape."""

HUGE = 2 << 20
"""Bytes from which memory is worth a mapping in huge pages: most of the time of loading was spent in page faults."""

PATTERN = 1 << 20
"""Random numbers that are repeated to fill a parameter."""

ShardId = str | None
"""Identifies one of the checkpoint tensors that share a parameter, by the name of its module, a sibling of the layer's.

``q_proj`` for a ``qkv_proj``, ``experts.3.up_proj`` for ``experts``; None: a single tensor under the layer's name.
"""


def stored_module(module: str, shard_id: ShardId) -> str:
    """The module in the checkpoint that a shard comes from.

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
    """Consecutive elements of one dimension: their place in the checkpoint's tensor and in the parameter."""

    start: int
    size: int
    offset: int


@dataclass(frozen=True)
class Part:
    """This rank's elements of one dimension: arbitrary ranges, in the parameter's order."""

    full: int
    """Size of the dimension in the checkpoint."""
    ranges: tuple[Range, ...]
    is_stacked: bool = False
    """The checkpoint's tensor lacks this dimension, since the parameter stacks such tensors."""

    @classmethod
    def whole(cls, size: int, offset: int = 0) -> Part:
        """A dimension that every rank holds in full."""
        return cls.piece(size, 0, size, offset)

    @classmethod
    def piece(cls, full: int, start: int, size: int, offset: int = 0) -> Part:
        """``size`` elements starting at ``start``."""
        return cls(full, (Range(start, size, offset),))

    @classmethod
    def share(cls, full: int, share: Share, offset: int = 0) -> Part:
        """The elements of a rank's share."""
        return cls.piece(full, share.start, share.size, offset)

    @classmethod
    def element(cls, index: int, *, is_here: bool = True) -> Part:
        """Element ``index`` of a stack, such as an expert, with one checkpoint tensor for each element.

        ``is_here`` is false for an element that another rank holds.
        """
        return cls(1, (Range(0, 1, index),) if is_here else (), is_stacked=True)

    @classmethod
    def joined(cls, parts: Sequence[Part]) -> Part:
        """Parts of dimensions that are concatenated in one checkpoint tensor, such as q, k and v of Phi-3."""
        ranges, full = [], 0
        for part in parts:
            ranges += [replace(each, start=full + each.start) for each in part.ranges]
            full += part.full
        return cls(full, tuple(ranges))

    def alone(self) -> Part:
        """The same elements, placed at the beginning of a parameter."""
        return self.moved(-self.start)

    def moved(self, distance: int) -> Part:
        """The same elements, further along in the parameter."""
        return replace(self, ranges=tuple(replace(each, offset=each.offset + distance) for each in self.ranges))

    def times(self, count: int) -> Part:
        """The same elements in a tensor with ``count`` entries for each element of this dimension."""
        ranges = (Range(each.start * count, each.size * count, each.offset * count) for each in self.ranges)
        return replace(self, full=self.full * count, ranges=tuple(ranges))

    @property
    def size(self) -> int:
        return sum(each.size for each in self.ranges)

    @property
    def start(self) -> int:
        """Start of the part in the parameter."""
        return min((each.offset for each in self.ranges), default=0)

    @property
    def end(self) -> int:
        """End of the part in the parameter."""
        return max((each.offset + each.size for each in self.ranges), default=0)

    def in_units_of(self, count: int | Fraction) -> Part:
        """The same elements in a tensor with one entry per ``count`` elements of this dimension.

        Args:
            count: Numbers per word (8 of 4 bits in an int32, 32/3 of 3 bits) or per scale.

        Raises:
            ValueError: A range begins or ends inside a unit. Only the last unit of the dimension may be incomplete.
        """

        def units(each: Range) -> Range:
            start, size, offset = (Fraction(number) / count for number in (each.start, each.size, each.offset))
            if each.start + each.size == self.full:
                size = Fraction(ceil(size))
            if any(number.denominator != 1 for number in (start, size, offset)):
                raise ValueError(
                    f"{each.size} of {self.full} elements starting at {each.start} are not whole units of {count}"
                )
            return Range(int(start), int(size), int(offset))

        return replace(self, full=ceil(Fraction(self.full) / count), ranges=tuple(map(units, self.ranges)))


Parts = Mapping[ShardId, tuple[Part, ...]]
"""For each checkpoint tensor, one part per dimension of the parameter."""


def single(*dims: Part) -> Parts:
    """The parts of a parameter filled by a single checkpoint tensor."""
    return {None: dims}


P = TypeVar("P", bound="WeightParameter")


class WeightParameter(nn.Parameter):
    """A parameter filled from checkpoint tensors.

    Its dtype decides which tensors it accepts (``StoredTensor.read``): if floating-point with at least 16 bits, any
    floating-point tensor, rounded to it; otherwise only tensors of the same dtype.
    """

    parts: Parts
    is_optional: bool = False
    """Its content is right already if the checkpoint has no such tensor."""
    keeps_tensors: bool = False
    """``load`` keeps the tensors that it is given until the weights are packed."""

    def __new__(cls: type[P], data: Tensor, parts: Parts) -> P:
        parameter = super().__new__(cls, data, requires_grad=False)
        parameter.parts = parts
        return parameter

    @classmethod
    def empty(cls: type[P], parts: Parts, *, dtype: torch.dtype, device: torch.device) -> P:
        """An uninitialised parameter of exactly the size of its parts."""
        shape = [max(part.end for part in dim) for dim in zip(*parts.values(), strict=True)]
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        if device.type == "cpu" and num_bytes >= HUGE:
            return cls(map_zeros(num_bytes).view(dtype).view(shape), parts)
        return cls(torch.empty(shape, dtype=dtype, device=device), parts)

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype as which ``load`` takes tensors; see ``StoredTensor.read``."""
        return self.dtype

    def load(self, tensor: Tensor, shard_id: ShardId = None) -> None:
        """Copies this rank's share of a checkpoint tensor, rounding to the parameter's dtype.

        Raises:
            ValueError: The tensor's shape does not match the model.
        """
        for source, place in self.shares(tensor, shard_id):
            target = self.data
            for dim, each in enumerate(place):
                target = target.narrow(dim, each.offset, each.size)
            target.copy_(source)

    def shares(self, tensor: Tensor, shard_id: ShardId) -> Iterator[tuple[Tensor, tuple[Range, ...]]]:
        """The pieces of a checkpoint tensor that this rank holds, and where they belong. Raises as ``load`` does."""
        dims = self.parts[shard_id]
        expected = [part.full for part in dims if not part.is_stacked]
        if list(tensor.shape) != expected:
            shape, needed = self.in_numbers(list(tensor.shape)), self.in_numbers(expected)
            raise ValueError(f"has shape {shape}, the model needs {needed}{MISFIT}")
        tensor = tensor.reshape([part.full for part in dims])
        for place in product(*(part.ranges for part in dims)):
            source = tensor
            for dim, each in enumerate(place):
                source = source.narrow(dim, each.start, each.size)
            yield source, place

    def in_numbers(self, shape: list[int]) -> list[int]:
        """A tensor's shape, for messages: in a format of blocks that of its numbers."""
        return shape

    def fill_randomly(self, generator: torch.Generator) -> None:
        """Fills in small numbers, or arbitrary bytes if they are no numbers: a short pattern, repeated.

        It is repeated along the checkpoint's tensors, so that ranks have the shares of one model.
        """
        data = self.data
        count = min(PATTERN, max(prod(part.full for part in dims) for dims in self.parts.values()))
        if not data.dtype.is_floating_point or data.dtype == torch.float4_e2m1fn_x2:
            data = data.view(torch.uint8)
            pattern = torch.empty(count, dtype=torch.uint8).random_(0, 256, generator=generator)
        else:
            numbers = torch.empty(count, dtype=torch.float32).uniform_(-0.05, 0.05, generator=generator)
            pattern = numbers.half().to(data.dtype)  # scales are stored in as few bits as those of checkpoints
        width = data[0].numel() if data.dim() > 1 and len(data) else 1
        flat = data.view(-1)
        for rows in {each for part in self.parts.values() for each in part[0].ranges}:
            _repeat(pattern, rows.start * width, flat[rows.offset * width : (rows.offset + rows.size) * width])


class ZeroParameter(WeightParameter):
    """Zeros, in the place of a checkpoint's tensor that another rank adds."""

    def load(self, tensor: Tensor, shard_id: ShardId = None) -> None:
        list(self.shares(tensor, shard_id))  # checks the shape

    def fill_randomly(self, generator: torch.Generator) -> None:
        pass


def _repeat(pattern: Tensor, start: int, target: Tensor) -> None:
    """Fills a target with the part of an endlessly repeated pattern that begins at ``start``."""
    first = pattern[start % len(pattern) :][: len(target)]
    target[: len(first)] = first
    for part in target[len(first) :].split(len(pattern)):
        part.copy_(pattern[: len(part)])


class Weights(nn.Module, ABC):
    """The weights of one layer: parameters for the loader to fill, then packed for the device's kernels.

    Parameters have the last component of their checkpoint tensors' names: ``weight``, ``bias``, ``scales``. Their full
    names begin with the layer's name, not this module's (``named_weights``). The parameters that remain after ``pack``
    are what the weights take in memory.
    """

    order: Tensor | None = None
    """int64 [in_features]: the column of x that each column of the packed weight is multiplied with; None: the same."""
    adapters: AdapterTable | None = None
    """Low-rank adapters of the layer, or of the logits; None: the server has none."""
    table_adapters: dict[int, TableAdapter] | None = None
    """Likewise of lookups, by number."""

    @abstractmethod
    def pack(self) -> None:
        """Converts the loaded weights to the device's layout and frees the unpacked copy. Called once."""


def named_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """All parameters, named after the layers that they belong to.

    Parameters that hold different shards of a layer may share a name.
    """
    inner = {name for name, module in model.named_modules() if isinstance(module, Weights)}
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        while module in inner:
            module = module.rpartition(".")[0]
        yield f"{module}.{leaf}".lstrip("."), parameter
