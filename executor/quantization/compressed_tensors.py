"""Checkpoints of compressed-tensors (llm-compressor) whose weights are integers: ``pack-quantized``, ``int-quantized``.

Activations are multiplied as ``--quantized-activations`` says, also where the checkpoint asks for 8 bits per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from executor.layers.parameter import Part, WeightParameter
from executor.quantization.base import EmbeddingMethod, LinearMethod, LinearShape, Options
from executor.quantization.fields import IntegerScheme, compressed_fields
from executor.quantization.gptq import unpack_bits
from executor.quantization.groups import GroupEmbedding, GroupLinear, Groups, PlainSource, Source
from executor.quantization.unquantized import UnquantizedEmbedding


class CompressedTensors:
    def __init__(self, fields: Mapping[str, Any], options: Options) -> None:
        self.fields = compressed_fields(fields)
        self.options = options

    def linear_method(self, names: Sequence[str]) -> LinearMethod[Any]:
        own = [self.fields.of_module(name) for name in names]
        sources = [PlainSource if each is None else partial(IntegerSource, each) for each in own]
        return GroupLinear(sources, self.options)

    def embedding_method(self, name: str) -> EmbeddingMethod[Any]:
        scheme = self.fields.of_module(name) if name.endswith("lm_head") else None
        if scheme is None:
            return UnquantizedEmbedding()
        return GroupEmbedding(partial(IntegerSource, scheme), self.options)


class IntegerSource(Source):
    """Codes and zero points count from the middle of their range, which is added where they are packed."""

    weight_scale: nn.Parameter
    """[out_features, groups]."""

    def __init__(self, scheme: IntegerScheme, shape: LinearShape) -> None:
        super().__init__()
        self.bits = scheme.num_bits
        columns = shape.input
        size = scheme.group_size or columns.full
        groups = Part.whole(1) if size == columns.full else columns.in_units_of(size)
        per_word = Fraction(32, self.bits)

        def parameter(dtype: torch.dtype, columns: Part, unit: Fraction = Fraction(1)) -> WeightParameter:
            parts = {shard_id: (rows.in_units_of(unit), columns) for shard_id, rows in shape.outputs.items()}
            return WeightParameter.empty(parts, dtype=dtype, device=shape.device)

        if scheme.is_packed:
            self.weight_packed = parameter(torch.int32, columns.in_units_of(per_word))
            two = {shard_id: (Part.whole(2),) for shard_id in shape.outputs}
            self.weight_shape = WeightParameter.empty(two, dtype=torch.int64, device=shape.device)
        else:
            self.weight = parameter(torch.int8, columns)
        self.weight_scale = parameter(torch.float32, groups)
        self.weight_zero_point: WeightParameter | None = None
        if not scheme.symmetric:
            self.weight_zero_point = parameter(torch.int32, groups, per_word)

    def unpack(self) -> Groups:
        scales = self.weight_scale.data
        if isinstance(packed := self._parameters.get("weight_packed"), Tensor):
            columns = packed.shape[1] * 32 // self.bits
            codes = unpack_bits(packed.data, self.bits, columns)
        else:
            codes = (self.weight.data.to(torch.int16) + 128).to(torch.uint8)
        zeros = torch.full(scales.shape, 1 << self.bits - 1, dtype=torch.uint8)
        if self.weight_zero_point is not None:
            words = self.weight_zero_point.data.t().contiguous()
            zeros = unpack_bits(words, self.bits, len(scales)).t().contiguous()
        group_of = torch.arange(codes.shape[1]) // (codes.shape[1] // scales.shape[1])
        return Groups(codes, scales, zeros, group_of, self.bits)
