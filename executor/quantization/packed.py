"""What all methods have in common whose weights are one packed weight for the ops."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

import ops
from executor.input_batch import InputBatch
from executor.layers.parameter import WeightParameter, Weights, single
from executor.quantization.base import LinearShape, Options, TableShape

logger = logging.getLogger(__name__)


class PackedWeights(Weights):
    """The weights of a linear layer, or a table."""

    bias: nn.Parameter | None
    """[out_features] or None."""
    packed: ops.Weight
    """[out_features, in_features] as the ops read it, once the weights are loaded."""


W = TypeVar("W", bound=PackedWeights)


class PackedLinear(ABC, Generic[W]):
    """A ``LinearMethod``."""

    @abstractmethod
    def create(self, shape: LinearShape) -> W: ...

    def apply(self, weights: W, x: Tensor, batch: InputBatch) -> Tensor:
        if weights.adapters is not None:
            return ops.adapted_linear(x, weights.packed, weights.bias, weights.adapters, batch.row_adapters)
        return ops.linear(x, weights.packed, weights.bias)


class PackedEmbedding(ABC, Generic[W]):
    """An ``EmbeddingMethod``."""

    @abstractmethod
    def create(self, shape: TableShape) -> W: ...

    def embed(self, weights: W, ids: Tensor, batch: InputBatch) -> Tensor:
        if weights.table_adapters is not None:
            return ops.adapted_embedding(ids, weights.packed, weights.table_adapters, batch.row_adapters)
        return ops.embedding(ids, weights.packed)

    def logits(self, weights: W, hidden: Tensor, batch: InputBatch) -> Tensor:
        if weights.adapters is not None:
            return ops.adapted_logits(hidden, weights.packed, weights.bias, weights.adapters, batch.sample_adapters)
        return ops.logits(hidden, weights.packed, weights.bias)


def linear_bias(shape: LinearShape) -> WeightParameter | None:
    """The bias of a linear layer."""
    if not shape.bias:
        return None
    bias = {shard_id: (rows,) for shard_id, rows in shape.outputs.items()}
    return WeightParameter.empty(bias, dtype=shape.dtype, device=shape.device)


def table_bias(shape: TableShape) -> WeightParameter | None:
    """The bias of the logits."""
    if not shape.bias:
        return None
    return WeightParameter.empty(single(shape.vocab), dtype=shape.dtype, device=shape.device)


def stored(data: Tensor) -> nn.Parameter:
    """A packed weight's data as a parameter: the only copy that remains."""
    return nn.Parameter(data, requires_grad=False)


def memory_of(packed: ops.Weight) -> tuple[Tensor, ...]:
    """The tensors that a packed weight occupies."""
    return packed.tensors if isinstance(packed, ops.QuantizedWeight) else (packed.data,)


def keep(weights: PackedWeights, packed: ops.Weight) -> None:
    """Registers the memory of a packed weight as parameters."""
    for index, tensor in enumerate(memory_of(packed)):
        weights.register_parameter(f"packed_{index}", stored(tensor))


def describe(model: nn.Module) -> str | None:
    """The formats of a model's quantised weights and what they are multiplied with; None: there are none."""
    packed = [module.packed for module in model.modules() if isinstance(module, PackedWeights)]
    quantized = [each for each in packed if isinstance(each, ops.QuantizedWeight)]
    if not quantized:
        return None
    formats = sorted({segment.encoding.format for each in quantized for segment in each.segments})
    activations = sorted({each.activations for each in quantized})
    return f"{', '.join(formats)}, with activations in {' and '.join(activations)}"


def log_float_only(kind: str, options: Options) -> None:
    """For formats whose products with integers do not exist."""
    if options.activations == "int8":
        logger.info("weights in %s are multiplied with activations in float: they have no products with int8", kind)


EXACT = ("amx", "reference")
"""Capabilities with which products of floating-point numbers are expected to be as fast as those of integers. With
bfloat16 instructions of AVX-512 they take twice as long, since weights must be made into numbers first."""


def chosen_activations(
    options: Options, dtype: torch.dtype, device: torch.device, *, prefers_int8: bool = False
) -> ops.QuantizedActivations:
    """What quantised weights are multiplied with. Depends on nothing that changes while a model is served.

    Args:
        options: ``auto`` leaves the choice to the format and the machine.
        dtype: Of the activations; float32 asks for exact products.
        device: Where the products are computed.
        prefers_int8: Whether 8 bits are what users of the format expect.
    """
    if options.activations == "fp8":  # of other formats
        return "float"
    if options.activations != "auto":
        return options.activations
    if dtype == torch.float32 or not ops.op_set(device.type).rounds_activations:
        return "float"
    return "int8" if prefers_int8 or ops.op_set(device.type).capability not in EXACT else "float"
