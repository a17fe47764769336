"""Weights in the dtype of the activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

import ops
from executor.input_batch import InputBatch
from executor.layers.parameter import WeightParameter, Weights, single
from executor.quantization.base import EmbeddingMethod, LinearMethod, LinearShape, TableShape


class PlainLinear(Weights):
    """``weight`` [out_features, in_features] and ``bias`` [out_features] or None."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    packed: Tensor | ops.PackedWeight
    """What the ops read, once the weights are loaded."""

    def __init__(self, shape: LinearShape) -> None:
        super().__init__()
        self.paired = shape.paired
        weight = {shard_id: (rows, shape.input) for shard_id, rows in shape.outputs.items()}
        self.weight = WeightParameter.empty(weight, dtype=shape.dtype, device=shape.device)
        bias = {shard_id: (rows,) for shard_id, rows in shape.outputs.items()}
        self.bias = WeightParameter.empty(bias, dtype=shape.dtype, device=shape.device) if shape.bias else None

    def pack(self) -> None:
        self.packed = ops.pack_linear(self.weight.data, self.paired)
        self.weight = stored(self.packed)


class UnquantizedLinear:
    def create(self, shape: LinearShape) -> PlainLinear:
        return PlainLinear(shape)

    def apply(self, weights: PlainLinear, x: Tensor, batch: InputBatch) -> Tensor:
        return ops.linear(x, weights.packed, weights.bias)


class PlainTable(Weights):
    """``weight`` [vocab_size, hidden_size] and ``bias`` [vocab_size] or None.

    The weight is packed if it computes logits, and then kept only in that form.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    packed: Tensor | ops.PackedWeight
    """What the ops read, once the weights are loaded."""

    def __init__(self, shape: TableShape) -> None:
        super().__init__()
        self.makes_logits = shape.makes_logits
        self.weight = WeightParameter.empty(single(shape.vocab, shape.hidden), dtype=shape.dtype, device=shape.device)
        bias = single(shape.vocab)
        self.bias = WeightParameter.empty(bias, dtype=shape.dtype, device=shape.device) if shape.bias else None

    def pack(self) -> None:
        self.packed = ops.pack_linear(self.weight.data) if self.makes_logits else self.weight.data
        self.weight = stored(self.packed)


class UnquantizedEmbedding:
    def create(self, shape: TableShape) -> PlainTable:
        return PlainTable(shape)

    def embed(self, weights: PlainTable, ids: Tensor, batch: InputBatch) -> Tensor:
        return ops.embedding(ids, weights.packed)

    def logits(self, weights: PlainTable, hidden: Tensor, batch: InputBatch) -> Tensor:
        return ops.logits(hidden, weights.packed, weights.bias)


def stored(weight: Tensor | ops.PackedWeight) -> nn.Parameter:
    """A weight's data as a parameter: the only copy that remains."""
    data = weight.data
    return nn.Parameter(data, requires_grad=False)


class Unquantized:
    """The method of models that are not quantised."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        pass

    def linear_method(self, names: Sequence[str]) -> LinearMethod[PlainLinear]:
        return UnquantizedLinear()

    def embedding_method(self, name: str) -> EmbeddingMethod[PlainTable]:
        return UnquantizedEmbedding()
