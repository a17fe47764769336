"""Checkpoints of compressed-tensors (llm-compressor).

Activations that were quantised to 8-bit integers, row by row, are so here, too; others stay as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from executor.layers.parameter import MISFIT, Part, Parts, ShardId, WeightParameter
from executor.quantization.base import LinearShape, Options
from executor.quantization.codes import Groups
from executor.quantization.compressed_fields import CompressedFields, Scheme
from executor.quantization.fields import read
from executor.quantization.fp4 import FP4Names, MXFP4Source, NVFP4Source
from executor.quantization.fp8 import (
    CACHE_RENAMES,
    INPUT_SCALES,
    OTHER_SCALES,
    FP8Source,
    ScaleParameter,
    log_activations,
    log_cache,
)
from executor.quantization.gptq import GroupIndex, unpack_bits
from executor.quantization.groups import MakeSource, PlainSource, Source, SourceMethod

logger = logging.getLogger(__name__)

NAMES = FP4Names("weight_packed", "weight_global_scale", divides=True)


class CompressedTensors(SourceMethod):
    renames = CACHE_RENAMES
    ignored = (INPUT_SCALES, OTHER_SCALES)

    def __init__(self, fields: Mapping[str, Any], options: Options) -> None:
        self.fields = read(CompressedFields, fields)
        self.options = options
        for group in self.fields.config_groups.values():
            inputs = group.input_activations
            if inputs is not None and not inputs.is_int8_per_token:
                is_fp8 = all(
                    each is not None and (each.type, each.num_bits) == ("float", 8) for each in (group.weights, inputs)
                )
                log_activations(f"{inputs.type}{inputs.num_bits} ({inputs.strategy})", options, is_fp8=is_fp8)
        if self.fields.kv_cache_scheme:
            self.has_cache_scales = self.fields.kv_cache_scheme.get("type") == "float"
            log_cache(self.has_cache_scales)

    def source(self, name: str) -> MakeSource:
        scheme = self.fields.of_module(name)
        if scheme is None:
            return PlainSource
        match scheme.format:
            case "float-quantized":
                return partial(FP8Source, scheme.block_structure if scheme.strategy == "block" else None)
            case "mxfp4-pack-quantized":
                return MXFP4Source
            case "nvfp4-pack-quantized":
                return partial(NVFP4Source, NAMES)
        return partial(IntegerSource, scheme)


class PackedCodes(WeightParameter):
    """Streams of bits along one dimension, in int32 words.

    Releases up to 0.17 left the rest of a word unused where codes of 3 bits do not fill it.
    """

    bits: int
    counts: Mapping[ShardId, int]
    """Codes of a stream."""
    along: int
    """The dimension of a stream."""

    @classmethod
    def of(
        cls, parts: Parts, bits: int, counts: Mapping[ShardId, int], along: int, device: torch.device
    ) -> PackedCodes:
        """Uninitialised."""
        parameter = cls.empty(parts, dtype=torch.int32, device=device)
        parameter.bits, parameter.counts, parameter.along = bits, counts, along
        return parameter

    def load(self, tensor: Tensor, shard_id: ShardId = None) -> None:
        count = self.counts[shard_id]
        if self.bits == 3 and tensor.dim() == 2 and has_unused_bits(tensor, tensor.shape[self.along], count):
            rows = tensor if self.along == 1 else tensor.t().contiguous()
            rows = filled_words(rows, count)
            tensor = rows if self.along == 1 else rows.t()
        super().load(tensor, shard_id)


class ShapeParameter(WeightParameter):
    """The rows and columns of a weight."""

    sizes: Mapping[ShardId, list[int]]
    """Those that the model has."""

    def load(self, tensor: Tensor, shard_id: ShardId = None) -> None:
        super().load(tensor, shard_id)
        if tensor.tolist() != self.sizes[shard_id]:
            raise ValueError(f"is {tensor.tolist()}, the model needs {self.sizes[shard_id]}{MISFIT}")


def has_unused_bits(words: Tensor, length: int, count: int) -> bool:
    """Whether words have ten codes of 3 bits each. A few numbers of codes take as many words if they fill them, such as
    48 and 80.

    Args:
        words: int32.
        length: Words of a stream.
        count: Codes of a stream.
    """
    if length != -(-count // 10) or words.dtype != torch.int32:
        return False
    return length != -(-count * 3 // 32) or not (words >> 30).any()


def filled_words(words: Tensor, count: int) -> Tensor:
    """Codes of 3 bits, ten in a word, as streams of bits.

    Args:
        words: int32 [rows, words].
        count: Codes of a row.

    Returns:
        int32 [rows, words], the last one filled up with zeros.
    """
    codes = torch.stack([words >> 3 * index & 7 for index in range(10)], dim=-1).flatten(1)[:, :count]
    codes = nn.functional.pad(codes, (0, -count % 32)).unflatten(1, (-1, 8))  # 8 codes are 3 bytes
    eights = sum((codes[..., index] << 3 * index for index in range(1, 8)), codes[..., 0])
    data = torch.stack([(eights >> shift & 255).to(torch.uint8) for shift in (0, 8, 16)], dim=-1)
    return data.flatten(1).view(torch.int32)[:, : -(-count * 3 // 32)]


class IntegerSource(Source):
    """Codes and zero points count from the middle of their range, which is added where they are packed."""

    weight_scale: nn.Parameter
    """[out_features, groups]."""
    weight_zero_point: PackedCodes | None
    """int32 [out_features * bits / 32, groups]: a stream of bits for each column."""
    weight_g_idx: GroupIndex | None
    """The group of each input, int32 [in_features]."""

    def __init__(self, scheme: Scheme, shape: LinearShape) -> None:
        super().__init__()
        self.bits = scheme.num_bits
        self.has_int8_inputs = scheme.has_int8_inputs
        columns = shape.input
        self.num_columns = columns.size
        size = scheme.group_size or columns.full
        has_order = scheme.has_order
        # With an order of its own, a share of the inputs may have any groups.
        groups = (
            Part.whole(-(-columns.full // size)) if has_order or size == columns.full else columns.in_units_of(size)
        )
        per_word = Fraction(32, self.bits)

        if scheme.format == "pack-quantized":
            packed = columns.in_units_of(per_word)
            self.weight_packed = PackedCodes.of(
                {shard_id: (rows, packed) for shard_id, rows in shape.outputs.items()},
                self.bits,
                dict.fromkeys(shape.outputs, columns.full),
                1,
                shape.device,
            )
            two = {shard_id: (Part.whole(2),) for shard_id in shape.outputs}
            self.weight_shape = ShapeParameter.empty(two, dtype=torch.int64, device=shape.device)
            self.weight_shape.sizes = {i: [rows.full, columns.full] for i, rows in shape.outputs.items()}
        else:
            weight = {shard_id: (rows, columns) for shard_id, rows in shape.outputs.items()}
            self.weight = WeightParameter.empty(weight, dtype=torch.int8, device=shape.device)
        self.weight_scale = ScaleParameter.of(shape, groups, 1)
        self.weight_zero_point = None
        if not scheme.symmetric:
            self.weight_zero_point = PackedCodes.of(
                {shard_id: (rows.in_units_of(per_word), groups) for shard_id, rows in shape.outputs.items()},
                self.bits,
                {shard_id: rows.full for shard_id, rows in shape.outputs.items()},
                0,
                shape.device,
            )
        own = dict.fromkeys(shape.outputs, (columns,))
        self.weight_g_idx = GroupIndex.of(own, size, groups, shape.device) if has_order else None

    def unpack(self) -> Groups:
        scales = self.weight_scale.data
        if isinstance(packed := self._parameters.get("weight_packed"), Tensor):
            codes = unpack_bits(packed.data, self.bits, self.num_columns)
        else:
            codes = (self.weight.data.to(torch.int16) + (1 << self.bits - 1)).to(torch.uint8)
        zeros = torch.full(scales.shape, 1 << self.bits - 1, dtype=torch.uint8)
        if self.weight_zero_point is not None:
            words = self.weight_zero_point.data.t().contiguous()
            zeros = unpack_bits(words, self.bits, len(scales)).t().contiguous()
        group_of = torch.arange(codes.shape[1]) // -(-codes.shape[1] // scales.shape[1])
        if self.weight_g_idx is not None:
            group_of = self.weight_g_idx.data.long() - self.weight_g_idx.held.start
        return Groups(codes, scales, zeros, group_of, self.bits, self.has_int8_inputs)
