"""Layers of quantised checkpoints: projections are unpacked and packed together, whatever their tensors look like."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

import ops
from executor.input_batch import InputBatch
from executor.layers.parameter import WeightParameter, Weights
from executor.quantization.base import (
    EmbeddingMethod,
    LinearMethod,
    LinearShape,
    Options,
    QuantizationConfig,
    TableShape,
)
from executor.quantization.codes import Floats, Groups, common_order, pack, with_kernels
from executor.quantization.packed import (
    PackedEmbedding,
    PackedLinear,
    PackedWeights,
    chosen_activations,
    keep,
    linear_bias,
    table_bias,
)
from executor.quantization.unquantized import UnquantizedEmbedding


class Source(Weights):
    """The tensors of one module of the checkpoint; packed with the layer that the module is a part of."""

    @abstractmethod
    def unpack(self) -> Groups | Floats | Tensor:
        """Codes, or numbers of a module that is not quantised.

        Raises:
            ValueError: The tensors do not fit together.
        """

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

    def __init__(self, sources: Sequence[Source], shape: LinearShape, options: Options) -> None:
        super().__init__()
        for index, source in enumerate(sources):
            self.add_module(str(index), source)
        self.dtype = shape.dtype
        self.paired = shape.paired
        self.dequantizes = options.dequantize
        self.follows_checkpoint, self.rounds_to_fp8 = options.activations == "auto", options.activations == "fp8"
        self.activations: ops.QuantizedActivations = chosen_activations(options, shape.dtype, shape.device)

    def pack(self) -> None:
        """Runs before the sources' own ``pack``, which frees their tensors."""
        sources = [source.unpack() for source in self.children() if isinstance(source, Source)]
        if not all(isinstance(each, Tensor) or _is_finite(each.scales) for each in sources):
            raise ValueError("scales of a quantised weight are not finite; download the model again")
        codes = [] if self.dequantizes else with_kernels(sources)
        order = common_order(codes)
        if order is None:
            plain = [each if isinstance(each, Tensor) else each.dequantize(self.dtype) for each in sources]
            self.packed = ops.pack_linear(torch.cat(plain) if len(plain) > 1 else plain[0], self.paired)
        else:
            self._pack_codes(codes, order)
        keep(self, self.packed)

    def _pack_codes(self, codes: Sequence[Groups | Floats], order: Tensor) -> None:
        if not torch.equal(order, torch.arange(len(order))):
            self.order = order
        activations = self.activations
        if self.follows_checkpoint and all(isinstance(each, Groups) and each.is_per_token for each in codes):
            activations = "int8_per_token"
        elif self.rounds_to_fp8 and all(isinstance(each, Floats) and each.has_fp8_products for each in codes):
            activations = "fp8_per_token"
        elif not all(isinstance(each, Groups) or each.has_integers for each in codes):
            activations = "float"
        runs = [list(run) for _, run in groupby(codes, key=lambda each: each.kind)]
        paired = self.paired and len(runs) == 1
        self.packed = ops.join_rows([pack(run, self.order, self.dtype, activations, paired) for run in runs])


def _is_finite(scales: Tensor) -> bool:
    small = scales.float() if scales.dtype.itemsize == 1 else scales  # torch cannot tell for all types of 8 bits
    return bool(small.isfinite().all())


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


class SourceMethod(QuantizationConfig):
    """A method that says of each module in what tensors it is stored."""

    options: Options

    @abstractmethod
    def source(self, name: str) -> MakeSource:
        """``PlainSource`` for a module that is not quantised."""

    def linear_method(self, names: Sequence[str]) -> LinearMethod[Any]:
        return GroupLinear([self.source(name) for name in names], self.options)

    def plain_linear_method(self, names: Sequence[str]) -> LinearMethod[Any]:
        return GroupLinear([self.source(name) for name in names], replace(self.options, dequantize=True))

    def embedding_method(self, name: str) -> EmbeddingMethod[Any]:
        source = self.source(name) if name.endswith("lm_head") else PlainSource
        return UnquantizedEmbedding() if source is PlainSource else GroupEmbedding(source, self.options)
