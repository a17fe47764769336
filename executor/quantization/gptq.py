"""GPTQ's tensors (Frantar et al., arXiv:2210.17323), as AutoGPTQ, GPTQModel and auto-round write them."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from executor.layers.parameter import MISFIT, Part, Parts, Range, ShardId, WeightParameter
from executor.quantization.base import EmbeddingMethod, LinearShape, Options
from executor.quantization.codes import Groups
from executor.quantization.fields import GPTQFields, read
from executor.quantization.groups import GroupEmbedding, MakeSource, PlainSource, Source, SourceMethod
from executor.quantization.unquantized import UnquantizedEmbedding


class GPTQ(SourceMethod):
    """The method of models quantised with GPTQ."""

    def __init__(self, fields: Mapping[str, Any], options: Options) -> None:
        self.fields = read(GPTQFields, fields)
        self.options = options

    def source(self, name: str) -> MakeSource:
        fields = self.fields.of_module(name)
        return PlainSource if fields is None else partial(GPTQSource, fields)

    def embedding_method(self, name: str) -> EmbeddingMethod[Any]:
        if self.fields.lm_head and name.endswith("lm_head"):
            return GroupEmbedding(partial(GPTQSource, self.fields), self.options)
        return UnquantizedEmbedding()


class GroupIndex(WeightParameter):
    """The group of each input, int32 [in_features]. Checkpoints with groups in order may leave it out."""

    is_optional = True
    held: Range
    """The groups that this rank holds."""

    @classmethod
    def of(cls, parts: Parts, group_size: int, groups: Part, device: torch.device) -> GroupIndex:
        """In order until it is loaded."""
        parameter = cls.empty(parts, dtype=torch.int32, device=device)
        (parameter.held,) = groups.ranges
        for shard_id, (columns,) in parts.items():
            parameter.load(torch.arange(columns.full, dtype=torch.int32) // group_size, shard_id)
        return parameter

    def load(self, tensor: Tensor, shard_id: ShardId = None) -> None:
        super().load(tensor, shard_id)
        if self.data.min() < self.held.start or self.data.max() >= self.held.start + self.held.size:
            raise ValueError(f"names groups beyond the {self.held.size} that there are{MISFIT}")


class GPTQSource(Source):
    """Codes and zero points are streams of bits, in int32 words whose lowest bits come first."""

    qweight: nn.Parameter
    """[in_features * bits / 32, out_features]: a stream for each column."""
    qzeros: nn.Parameter
    """[groups, out_features * bits / 32]: a stream for each row; before version 2, of zero points minus 1."""
    scales: nn.Parameter
    """[groups, out_features]."""
    g_idx: GroupIndex

    def __init__(self, fields: GPTQFields, shape: LinearShape) -> None:
        super().__init__()
        self.fields = fields
        columns = shape.input
        size = columns.full if fields.group_size == -1 else fields.group_size
        # With an order of its own, a share of the inputs may have any groups.
        groups = Part.whole(-(-columns.full // size)) if fields.desc_act else columns.in_units_of(size)
        per_word = Fraction(32, fields.bits)
        rows = shape.outputs

        def parameter(dtype: torch.dtype, parts: Mapping[Any, tuple[Part, ...]]) -> WeightParameter:
            return WeightParameter.empty(parts, dtype=dtype, device=shape.device)

        self.qweight = parameter(torch.int32, {i: (columns.in_units_of(per_word), part) for i, part in rows.items()})
        self.qzeros = parameter(torch.int32, {i: (groups, part.in_units_of(per_word)) for i, part in rows.items()})
        self.scales = parameter(torch.float32, {i: (groups, part) for i, part in rows.items()})
        self.g_idx = GroupIndex.of(dict.fromkeys(rows, (columns,)), size, groups, shape.device)

    def unpack(self) -> Groups:
        bits = self.fields.bits
        num_columns, num_rows = len(self.g_idx), self.scales.shape[1]
        codes = unpack_bits(self.qweight.data.t().contiguous(), bits, num_columns)
        zeros = stored_zeros(self.qzeros.data, bits, num_rows, is_v2=self.fields.layout == "gptq_v2")
        group_of = self.g_idx.data.long() - self.g_idx.held.start
        return Groups(codes, self.scales.data.t().contiguous(), zeros.t().contiguous(), group_of, bits)


def unpack_bits(words: Tensor, bits: int, count: int) -> Tensor:
    """Numbers of 2, 3, 4 or 8 bits in streams of bits.

    Args:
        words: int32 [rows, words]; the lowest bits come first.
        bits: Of a number.
        count: Numbers of a row.

    Returns:
        uint8 [rows, count].
    """
    data = words.view(torch.uint8)
    if bits == 3:  # 8 numbers in 3 bytes
        triples = data[:, : data.shape[1] // 3 * 3].unflatten(1, (-1, 3)).to(torch.int32)
        wide = triples[..., 0] | triples[..., 1] << 8 | triples[..., 2] << 16
        numbers = torch.stack([wide >> 3 * index & 7 for index in range(8)], dim=-1).to(torch.uint8)
    else:
        numbers = torch.stack([data >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)], dim=-1)
    return numbers.flatten(1)[:, :count]


ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
"""Words of numbers that are all 1."""


def stored_zeros(words: Tensor, bits: int, count: int, *, is_v2: bool) -> Tensor:
    """Zero points, uint8 [groups, count], from int32 [groups, words].

    Version 1 subtracted ones from whole words, so a zero point of 0 borrowed from its neighbour.
    """
    if is_v2:
        return unpack_bits(words, bits, count)
    if bits == 3:
        return unpack_bits(words, bits, count) + 1 & 7
    return unpack_bits(words + ONES[bits], bits, count)
