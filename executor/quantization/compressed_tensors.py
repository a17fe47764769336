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

from executor.layers.parameter import Part, WeightParameter
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


class IntegerSource(Source):
    """Codes and zero points count from the middle of their range, which is added where they are packed."""

    weight_scale: nn.Parameter
    """[out_features, groups]."""
    weight_zero_point: WeightParameter | None
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
        has_order = scheme.actorder == "group"
        # With an order of its own, a share of the inputs may have any groups.
        groups = (
            Part.whole(-(-columns.full // size)) if has_order or size == columns.full else columns.in_units_of(size)
        )
        per_word = Fraction(32, self.bits)

        def parameter(dtype: torch.dtype, columns: Part, unit: Fraction = Fraction(1)) -> WeightParameter:
            parts = {shard_id: (rows.in_units_of(unit), columns) for shard_id, rows in shape.outputs.items()}
            return WeightParameter.empty(parts, dtype=dtype, device=shape.device)

        if scheme.format == "pack-quantized":
            self.weight_packed = parameter(torch.int32, columns.in_units_of(per_word))
            two = {shard_id: (Part.whole(2),) for shard_id in shape.outputs}
            self.weight_shape = WeightParameter.empty(two, dtype=torch.int64, device=shape.device)
        else:
            self.weight = parameter(torch.int8, columns)
        self.weight_scale = ScaleParameter.of(shape, groups, 1)
        self.weight_zero_point = None if scheme.symmetric else parameter(torch.int32, groups, per_word)
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
