"""Integer codes with a scale for each group of columns: the form to which GPTQ's and AWQ's tensors are unpacked."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

import ops
from executor.input_batch import InputBatch
from executor.layers.parameter import WeightParameter, Weights
from executor.quantization.base import LinearShape, Options, TableShape
from executor.quantization.packed import (
    PackedEmbedding,
    PackedLinear,
    PackedWeights,
    chosen_activations,
    keep,
    linear_bias,
    table_bias,
)

ROWS = 256
"""Rows dequantised at a time."""
BLOCK = 32
"""Groups of so many columns, or a multiple, have kernels."""


@dataclass(frozen=True)
class Groups:
    """A weight ``scales * (codes - zeros)`` [rows, columns]."""

    codes: Tensor
    """uint8 [rows, columns]."""
    scales: Tensor
    """float32 [rows, groups]."""
    zeros: Tensor
    """uint8 [rows, groups]."""
    group_of: Tensor
    """int64 [columns]: the group of each column."""
    bits: int

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight, exact in float32 and rounded once."""
        out = torch.empty(self.codes.shape, dtype=dtype)
        for first in range(0, len(out), ROWS):
            rows = slice(first, first + ROWS)
            codes = self.codes[rows].to(torch.int16) - self.zeros[rows].to(torch.int16)[:, self.group_of]
            out[rows] = codes * self.scales[rows][:, self.group_of]
        return out


class Source(Weights):
    """The tensors of one module of the checkpoint; packed with the layer that the module is a part of."""

    @abstractmethod
    def unpack(self) -> Groups | Tensor:
        """Codes, or numbers of a module that is not quantised."""

    def pack(self) -> None:
        for name, _ in list(self.named_parameters(recurse=False)):
            setattr(self, name, None)


class PlainSource(Source):
    """A module that is not quantised."""

    weight: nn.Parameter

    def __init__(self, shape: LinearShape) -> None:
        super().__init__()
        weight = {shard_id: (rows, shape.input) for shard_id, rows in shape.outputs.items()}
        self.weight = WeightParameter.empty(weight, dtype=shape.dtype, device=shape.device)

    def unpack(self) -> Tensor:
        return self.weight.data


MakeSource = Callable[[LinearShape], Source]
"""Creates the source of one of a layer's projections."""


class GroupWeights(PackedWeights):
    """A weight with one source for each projection of its layer."""

    order: Tensor | None = None
    """int64 [in_features]: the column of x that each column of the packed weight is multiplied with."""

    def __init__(self, sources: Sequence[Source], shape: LinearShape, options: Options) -> None:
        super().__init__()
        for index, source in enumerate(sources):
            self.add_module(str(index), source)
        self.dtype = shape.dtype
        self.paired = shape.paired
        self.dequantizes = options.dequantize
        self.activations = chosen_activations(options, shape.dtype, shape.device)

    def pack(self) -> None:
        """Runs before the sources' own ``pack``, which frees their tensors."""
        sources = [source.unpack() for source in self.children() if isinstance(source, Source)]
        groups = [each for each in sources if isinstance(each, Groups)]
        is_quantized = len(groups) == len(sources) and not self.dequantizes
        order = common_order(groups) if is_quantized else None
        if order is None:
            plain = [each.dequantize(self.dtype) if isinstance(each, Groups) else each for each in sources]
            self.packed = ops.pack_linear(torch.cat(plain) if len(plain) > 1 else plain[0], self.paired)
        else:
            self._pack_groups(groups, order)
        keep(self, self.packed)

    def _pack_groups(self, groups: Sequence[Groups], order: Tensor) -> None:
        if not torch.equal(order, torch.arange(len(order))):
            self.order = order
        parts: list[ops.QuantizedWeight] = []
        for (bits, _), run in groupby(groups, key=lambda each: (4 if each.bits < 8 else 8, each.scales.shape[1])):
            rows = list(run)
            codes = torch.cat([each.codes for each in rows])
            middle = 1 << bits - 1
            zeros = torch.cat([each.zeros for each in rows])
            middles = torch.cat([torch.full_like(each.zeros, 1 << each.bits - 1) for each in rows])
            is_symmetric = torch.equal(zeros, middles)
            if is_symmetric:
                codes = codes + (middle - middles[:, :1])
            parts.append(
                ops.pack_groups(
                    codes if self.order is None else codes[:, self.order],
                    smallest_dtype(torch.cat([each.scales for each in rows])),
                    None if is_symmetric else zeros,
                    bits=bits,
                    dtype=self.dtype,
                    activations=self.activations,
                    paired=self.paired and len(rows) == len(groups),
                )
            )
        self.packed = ops.join_rows(parts)


def common_order(groups: Sequence[Groups]) -> Tensor | None:
    """An order in which the columns of each group follow one another, int64 [columns].

    None: there is none for all of them, or no kernel for groups of that size.
    """
    first = groups[0].group_of
    counts = first.bincount()
    is_even = len(counts) == 1 or (bool((counts == counts[0]).all()) and int(counts[0]) % BLOCK == 0)
    if not is_even or not all(torch.equal(each.group_of, first) for each in groups):
        return None
    return first.argsort(stable=True)


def smallest_dtype(scales: Tensor) -> Tensor:
    """Scales in the smallest dtype that has the same numbers."""
    for dtype in (torch.float16, torch.bfloat16):
        small = scales.to(dtype)
        if torch.equal(small.float(), scales):
            return small
    return scales


class GroupLinear(PackedLinear[GroupWeights]):
    def __init__(self, sources: Sequence[MakeSource], options: Options) -> None:
        self.sources = sources
        self.options = options

    def create(self, shape: LinearShape) -> GroupWeights:
        pairs = zip(shape.outputs, self.sources, strict=True)
        sources = [make(shape.projection(shard_id)) for shard_id, make in pairs]
        weights = GroupWeights(sources, shape, self.options)
        weights.bias = linear_bias(shape)
        return weights

    def apply(self, weights: GroupWeights, x: Tensor, batch: InputBatch) -> Tensor:
        if weights.order is not None:
            x = ops.select_columns(x, weights.order)
        return super().apply(weights, x, batch)


class GroupEmbedding(PackedEmbedding[GroupWeights]):
    """For output layers alone."""

    def __init__(self, source: MakeSource, options: Options) -> None:
        self.source = source
        self.options = options

    def create(self, shape: TableShape) -> GroupWeights:
        layer = LinearShape(shape.hidden, {None: shape.vocab}, shape.bias, False, shape.dtype, shape.device)
        weights = GroupWeights([self.source(layer)], layer, self.options)
        weights.bias = table_bias(shape)
        return weights

    def logits(self, weights: GroupWeights, hidden: Tensor, batch: InputBatch) -> Tensor:
        if weights.order is not None:
            hidden = ops.select_columns(hidden, weights.order)
        return super().logits(weights, hidden, batch)
