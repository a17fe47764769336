"""Weights in the type of the activations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import ops
from executor.layers.embedding import VocabParallelEmbedding
from executor.layers.linear import LinearLayer
from executor.layers.parameter import Part, WeightParameter, single
from executor.quantization.base import EmbeddingMethod, LinearMethod


class UnquantizedLinear:
    """``weight`` [out_features, in_features] and ``bias`` [out_features] or None."""

    def create_weights(
        self, layer: LinearLayer, in_features: int, out_partition_sizes: list[int], bias: bool, dtype: torch.dtype
    ) -> None:
        rows = layer.output_parts
        weight = {shard_id: (part, layer.input_part) for shard_id, part in rows.items()}
        layer.weight = WeightParameter.empty(weight, dtype=dtype, device=layer.device)
        assert layer.weight.shape == (sum(out_partition_sizes), in_features)
        biases = {shard_id: (part,) for shard_id, part in rows.items()}
        layer.bias = WeightParameter.empty(biases, dtype=dtype, device=layer.device) if bias else None

    def process_weights_after_loading(self, layer: LinearLayer) -> None:
        layer.packed = ops.pack_linear(layer.weight.data, layer.is_pair)
        layer.weight = stored(layer.packed)

    def apply(self, layer: LinearLayer, x: Tensor) -> Tensor:
        return ops.linear(x, layer.packed, layer.bias)


class UnquantizedEmbedding:
    """``weight`` [vocab_size, hidden_size], packed if logits are made of it: then that is the one copy."""

    def create_weights(self, layer: VocabParallelEmbedding, dtype: torch.dtype) -> None:
        parts = single(layer.vocab_part, Part.whole(layer.hidden_size))
        layer.weight = WeightParameter.empty(parts, dtype=dtype, device=layer.device)

    def process_weights_after_loading(self, layer: VocabParallelEmbedding) -> None:
        layer.packed = ops.pack_linear(layer.weight.data) if layer.makes_logits else layer.weight.data
        layer.weight = stored(layer.packed)

    def embed(self, layer: VocabParallelEmbedding, ids: Tensor) -> Tensor:
        return ops.embedding(ids, layer.packed)

    def logits(self, layer: VocabParallelEmbedding, hidden: Tensor) -> Tensor:
        return ops.logits(hidden, layer.packed)


def stored(weight: ops.Weight) -> nn.Parameter:
    """The numbers of a weight as a parameter: the one copy that is left."""
    data = weight.data
    return nn.Parameter(data, requires_grad=False)


class Unquantized:
    """The method of models that are not quantised."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        pass

    def linear_method(self, prefix: str) -> LinearMethod:
        return UnquantizedLinear()

    def embedding_method(self, prefix: str) -> EmbeddingMethod:
        return UnquantizedEmbedding()
