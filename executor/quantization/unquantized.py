"""Weights in the dtype of the activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

import ops
from executor.layers.parameter import WeightParameter, single
from executor.quantization.base import LinearMethod, LinearShape, Options, QuantizationConfig, TableShape
from executor.quantization.packed import (
    PackedEmbedding,
    PackedLinear,
    PackedWeights,
    linear_bias,
    memory_of,
    stored,
    table_bias,
)


class PlainLinear(PackedWeights):
    """``weight`` [out_features, in_features] and ``bias``."""

    weight: nn.Parameter

    def __init__(self, shape: LinearShape) -> None:
        super().__init__()
        self.paired = shape.paired
        weight = {shard_id: (rows, shape.input) for shard_id, rows in shape.outputs.items()}
        self.weight = WeightParameter.empty(weight, dtype=shape.dtype, device=shape.device)
        self.bias = linear_bias(shape)

    def pack(self) -> None:
        self.packed = ops.pack_linear(self.weight.data, self.paired)
        self.weight = stored(memory_of(self.packed)[0])


class UnquantizedLinear(PackedLinear[PlainLinear]):
    def create(self, shape: LinearShape) -> PlainLinear:
        return PlainLinear(shape)


class PlainTable(PackedWeights):
    """``weight`` [vocab_size, hidden_size] and ``bias`` [vocab_size].

    The weight is packed if it computes logits, and then kept only in that form.
    """

    weight: nn.Parameter

    def __init__(self, shape: TableShape) -> None:
        super().__init__()
        self.makes_logits = shape.makes_logits
        self.weight = WeightParameter.empty(single(shape.vocab, shape.hidden), dtype=shape.dtype, device=shape.device)
        self.bias = table_bias(shape)

    def pack(self) -> None:
        self.packed = ops.pack_linear(self.weight.data) if self.makes_logits else self.weight.data
        self.weight = stored(memory_of(self.packed)[0])


class UnquantizedEmbedding(PackedEmbedding[PlainTable]):
    def create(self, shape: TableShape) -> PlainTable:
        return PlainTable(shape)


class Unquantized(QuantizationConfig):
    """The method of models that are not quantised."""

    def __init__(self, fields: Mapping[str, Any], options: Options) -> None:
        pass

    def linear_method(self, names: Sequence[str]) -> LinearMethod[PlainLinear]:
        return UnquantizedLinear()

    def embedding_method(self, name: str) -> UnquantizedEmbedding:
        return UnquantizedEmbedding()
