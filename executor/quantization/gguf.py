"""Weights in the blocks of a GGUF file.

Rows of blocks are moved as they are; the ops read them in a layout of their own. Projections that share a layer may
have different types, as in the mixes of llama.cpp (Q4_K_M).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from torch import Tensor, nn

import ops
from executor.layers.parameter import Part, Parts, ShardId, WeightParameter, Weights
from executor.quantization.base import (
    EmbeddingMethod,
    LinearMethod,
    LinearShape,
    Options,
    QuantizationConfig,
    TableShape,
)
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

logger = logging.getLogger(__name__)

SPARE = "Q8_0"
"""The type to which weights of types without kernels are converted."""
CONVERTED_ROWS = 256
"""Rows converted at a time."""


class GGUF(QuantizationConfig):
    """``types`` maps modules to the types of their weights; a module without one is not quantised."""

    def __init__(self, fields: Mapping[str, Any], options: Options) -> None:
        self.types: Mapping[str, str] = {} if options.dequantize else fields.get("types", {})
        self.options = options
        for kind in sorted(set(self.types.values()) - ops.block_types(options.device_type)):
            logger.info(
                "weights of type %s have no kernel: they are converted to %s while they are loaded", kind, SPARE
            )

    def linear_method(self, names: Sequence[str]) -> LinearMethod[Any]:
        types = [self.types[name] for name in names if name in self.types]
        # A layer with projections in both forms is rare, and has few weights: it is not quantised.
        return BlockLinearMethod(types, self.options) if len(types) == len(names) else UnquantizedLinear()

    def plain_linear_method(self, names: Sequence[str]) -> LinearMethod[Any]:
        return UnquantizedLinear()

    def embedding_method(self, name: str) -> EmbeddingMethod[Any]:
        kind = self.types.get(name)
        return UnquantizedEmbedding() if kind is None else BlockEmbeddingMethod(kind, self.options)


# ---------------------------------------------------------------------------------------------------------
# parameters

SCALES: Mapping[str, Mapping[int, float]] = {
    "Q4_0": {0: 8},
    "Q4_1": {0: 15, 2: 1},
    "Q5_0": {0: 16},
    "Q5_1": {0: 31, 2: 1},
    "Q8_0": {0: 127},
    "Q2_K": {80: 3 * 15, 82: 15},
    "Q3_K": {108: 4 * 32},
    "Q4_K": {0: 15 * 63, 2: 63},
    "Q5_K": {0: 31 * 63, 2: 63},
    "Q6_K": {208: 32 * 127},
    "IQ4_NL": {0: 127},
    "IQ4_XS": {0: 127 * 32},
}
"""Where a block has float16 scales, and the largest number that each is multiplied with."""


class BlockParameter(WeightParameter):
    """Rows of blocks, uint8 [rows, bytes of a row]."""

    kind: str
    """Name of the type: ``Q4_K``."""
    stored_kind: str
    """The type in the file."""

    @classmethod
    def of(cls, kind: str, rows: Mapping[Any, Part], columns: Part, device: torch.device) -> BlockParameter:
        """Uninitialised rows.

        Args:
            kind: Type of the blocks in the file.
            rows: This rank's rows of each checkpoint tensor.
            columns: This rank's columns.
            device: Where they lie.

        Raises:
            ValueError: The columns are not whole blocks.
        """
        own = kind if kind in ops.block_types(device.type) else SPARE
        block, block_bytes = sizes(own)
        row_bytes = columns.in_units_of(block).times(block_bytes)
        parts: Parts = {shard_id: (part, row_bytes) for shard_id, part in rows.items()}
        parameter = cls.empty(parts, dtype=torch.uint8, device=device)
        parameter.kind, parameter.stored_kind = own, kind
        return parameter

    def load(self, tensor: Tensor, shard_id: ShardId = None) -> None:
        if self.kind != self.stored_kind:
            tensor = converted(tensor, self.stored_kind)
        if len(self.parts) == 1 and self.parts[shard_id] == tuple(map(Part.whole, tensor.shape)):
            self.data = tensor  # packed from the mapped file: a large table needs no memory in this form
        else:
            super().load(tensor, shard_id)

    def in_numbers(self, shape: list[int]) -> list[int]:
        block, block_bytes = sizes(self.kind)
        return [*shape[:-1], shape[-1] // block_bytes * block]

    def fill_randomly(self, generator: torch.Generator) -> None:
        super().fill_randomly(generator)
        _, block_bytes = sizes(self.kind)
        blocks = self.data.view(-1, block_bytes)
        if self.kind == "MXFP4":
            blocks[:, 0] = 121  # an exponent
        for offset, most in SCALES.get(self.kind, {}).items():
            scale = torch.tensor([0.05 / most], dtype=torch.float16)
            blocks[:, offset : offset + 2] = scale.view(torch.uint8)


def sizes(kind: str) -> tuple[int, int]:
    """Numbers and bytes of a block."""
    return GGML_QUANT_SIZES[GGMLQuantizationType[kind]]


def converted(rows: Tensor, kind: str) -> Tensor:
    """Rows of blocks as rows of ``SPARE``.

    Raises:
        ValueError: The type cannot be read.
    """
    source, target = GGMLQuantizationType[kind], GGMLQuantizationType[SPARE]
    try:
        parts = [
            torch.from_numpy(quantize(dequantize(part.numpy(), source), target)) for part in rows.split(CONVERTED_ROWS)
        ]
    except NotImplementedError as error:
        raise ValueError(f"has type {kind}, which is not supported") from error
    return torch.cat(parts)


class BlockRows(Weights):
    """Consecutive rows of a layer whose blocks have one type; packed with the layer."""

    weight: nn.Parameter | None

    def __init__(self, weight: BlockParameter) -> None:
        super().__init__()
        self.weight = weight

    def pack(self) -> None:
        self.weight = None


# ---------------------------------------------------------------------------------------------------------
# layers


class BlockWeights(PackedWeights):
    """A weight in one or more segments of rows, each with the type of its blocks."""

    def __init__(self, segments: Sequence[BlockParameter], dtype: torch.dtype, options: Options, paired: bool) -> None:
        super().__init__()
        for index, weight in enumerate(segments):
            self.add_module(str(index), BlockRows(weight))
        self.paired = paired
        self.dtype = dtype
        self.activations = chosen_activations(options, dtype, segments[0].device, prefers_int8=True)

    def pack(self) -> None:
        """Runs before the segments' own ``pack``, which frees them."""
        segments: list[tuple[Tensor, str]] = []
        for child in self.children():
            assert isinstance(child, BlockRows) and isinstance(child.weight, BlockParameter)
            segments.append((child.weight.data, child.weight.kind))
        self.packed = ops.pack_blocks(segments, dtype=self.dtype, activations=self.activations, paired=self.paired)
        keep(self, self.packed)


class BlockLinearMethod(PackedLinear[BlockWeights]):
    def __init__(self, types: Sequence[str], options: Options) -> None:
        self.types = types
        self.options = options

    def create(self, shape: LinearShape) -> BlockWeights:
        segments = []
        projections = zip(shape.outputs.items(), self.types, strict=True)
        for kind, group in groupby(projections, key=lambda pair: pair[1]):
            rows = dict(pair for pair, _ in group)
            first = min(part.start for part in rows.values())
            own = {shard_id: part.moved(-first) for shard_id, part in rows.items()}
            segments.append(BlockParameter.of(kind, own, shape.input, shape.device))
        weights = BlockWeights(segments, shape.dtype, self.options, shape.paired and len(segments) == 1)
        weights.bias = linear_bias(shape)
        return weights


class BlockEmbeddingMethod(PackedEmbedding[BlockWeights]):
    def __init__(self, kind: str, options: Options) -> None:
        self.kind = kind
        self.options = options

    def create(self, shape: TableShape) -> BlockWeights:
        rows = BlockParameter.of(self.kind, {None: shape.vocab}, shape.hidden, shape.device)
        weights = BlockWeights([rows], shape.dtype, self.options, paired=False)
        weights.bias = table_bias(shape)
        return weights
