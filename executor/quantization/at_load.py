"""Quantises the weights of a model while they are loaded: ``--quantization int8``.

Each checkpoint tensor is quantised as it is read, so that memory never holds the weights in another form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import ops
from executor.layers.parameter import Part, Parts, ShardId, WeightParameter, single
from executor.quantization.base import EmbeddingMethod, LinearMethod, LinearShape, Options, TableShape
from executor.quantization.packed import (
    PackedEmbedding,
    PackedLinear,
    PackedWeights,
    chosen_activations,
    keep,
    linear_bias,
    table_bias,
)
from executor.quantization.unquantized import UnquantizedEmbedding, UnquantizedLinear

GROUP = 32
"""Columns that share a scale."""
ROWS = 1 << 20
"""Numbers quantised at a time."""


class Int8:
    """Codes of 8 bits with a float16 scale for each 32 columns."""

    def __init__(self, fields: Mapping[str, Any], options: Options) -> None:
        self.options = options

    def linear_method(self, names: Sequence[str]) -> LinearMethod[Any]:
        return Int8Linear(self.options)

    def embedding_method(self, name: str) -> EmbeddingMethod[Any]:
        return Int8Embedding(self.options)


class QuantizingParameter(WeightParameter):
    """Codes, uint8 [rows, columns], which count from 128, and beside them the bytes of the scales."""

    columns: int

    @classmethod
    def of(cls, parts: Parts, columns: Part, device: torch.device) -> QuantizingParameter:
        """Uninitialised.

        Raises:
            ValueError: The columns are not whole groups.
        """
        groups = columns.in_units_of(GROUP)
        rows = max(part.end for part, _ in parts.values())
        row_bytes = columns.size + groups.size * torch.float16.itemsize
        parameter = cls.empty(single(Part.whole(rows), Part.whole(row_bytes)), dtype=torch.uint8, device=device)
        parameter.parts = parts
        parameter.columns = columns.size
        return parameter

    @property
    def stored_dtype(self) -> torch.dtype:
        return torch.float32

    def load(self, tensor: Tensor, shard_id: ShardId = None) -> None:
        scales = self.data[:, self.columns :].view(torch.float16)
        for source, (rows, columns) in self.shares(tensor, shard_id):
            step = max(1, ROWS // columns.size)
            groups = slice(columns.offset // GROUP, (columns.offset + columns.size) // GROUP)
            for first in range(0, rows.size, step):
                piece = source[first : first + step]
                here = slice(rows.offset + first, rows.offset + first + len(piece))
                codes, scale = quantize(piece)
                self.data[here, columns.offset : columns.offset + columns.size] = codes
                scales[here, groups] = scale

    def fill_randomly(self, generator: torch.Generator) -> None:
        super().fill_randomly(generator)
        self.data[:, self.columns :].view(torch.float16).fill_(0.05 / 127)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds to 8 bits: uint8 [rows, columns], counting from 128, and float16 scales [rows, columns / 32]."""
    groups = weight.float().unflatten(-1, (-1, GROUP))
    scales = (groups.abs().amax(-1) / 127).half()
    divisors = torch.where(scales > 0, scales.float(), 1)[..., None]
    codes = (groups / divisors).round_().clamp_(-127, 127).add_(128)
    return codes.to(torch.uint8).flatten(-2), scales


class Int8Weights(PackedWeights):
    def __init__(self, weight: QuantizingParameter, dtype: torch.dtype, options: Options, paired: bool) -> None:
        super().__init__()
        self.weight: Any = weight
        self.dtype = dtype
        self.activations = chosen_activations(options, dtype, weight.device)
        self.paired = paired

    def pack(self) -> None:
        weight: QuantizingParameter = self.weight
        codes, scales = weight.data[:, : weight.columns], weight.data[:, weight.columns :].view(torch.float16)
        self.packed = ops.pack_groups(
            codes, scales, bits=8, dtype=self.dtype, activations=self.activations, paired=self.paired
        )
        self.weight = None
        keep(self, self.packed)


class Int8Linear(PackedLinear[PackedWeights]):
    def __init__(self, options: Options) -> None:
        self.options = options

    def create(self, shape: LinearShape) -> PackedWeights:
        if shape.input.size % GROUP:
            return UnquantizedLinear().create(shape)
        parts = {shard_id: (rows, shape.input) for shard_id, rows in shape.outputs.items()}
        weight = QuantizingParameter.of(parts, shape.input, shape.device)
        weights = Int8Weights(weight, shape.dtype, self.options, shape.paired)
        weights.bias = linear_bias(shape)
        return weights


class Int8Embedding(PackedEmbedding[PackedWeights]):
    def __init__(self, options: Options) -> None:
        self.options = options

    def create(self, shape: TableShape) -> PackedWeights:
        if shape.hidden.size % GROUP:
            return UnquantizedEmbedding().create(shape)
        weight = QuantizingParameter.of(single(shape.vocab, shape.hidden), shape.hidden, shape.device)
        weights = Int8Weights(weight, shape.dtype, self.options, paired=False)
        weights.bias = table_bias(shape)
        return weights
