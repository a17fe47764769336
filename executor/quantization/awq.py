"""AWQ's tensors (Lin et al., arXiv:2306.00978), as AutoAWQ writes them for its GEMM kernels."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from executor.layers.parameter import Part, WeightParameter
from executor.quantization.base import EmbeddingMethod, LinearShape, Options
from executor.quantization.codes import Groups
from executor.quantization.fields import AWQFields, read
from executor.quantization.groups import MakeSource, PlainSource, Source, SourceMethod
from executor.quantization.unquantized import UnquantizedEmbedding

PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where a word has the code of each of its 8 columns, in units of 4 bits from the lowest."""


class AWQ(SourceMethod):
    """The method of models quantised with AWQ."""

    def __init__(self, fields: Mapping[str, Any], options: Options) -> None:
        self.fields = read(AWQFields, fields)
        self.options = options

    def source(self, name: str) -> MakeSource:
        fields = self.fields.of_module(name)
        return PlainSource if fields is None else partial(AWQSource, fields)

    def embedding_method(self, name: str) -> EmbeddingMethod[Any]:
        return UnquantizedEmbedding()


class AWQSource(Source):
    """Codes and zero points of 8 outputs lie in an int32 word."""

    qweight: nn.Parameter
    """[in_features, out_features / 8]."""
    qzeros: nn.Parameter
    """[groups, out_features / 8]."""
    scales: nn.Parameter
    """[groups, out_features]."""

    def __init__(self, fields: AWQFields, shape: LinearShape) -> None:
        super().__init__()
        columns = shape.input
        groups = columns.in_units_of(columns.full if fields.group_size == -1 else fields.group_size)
        rows = shape.outputs

        def parameter(dtype: torch.dtype, parts: Mapping[Any, tuple[Part, ...]]) -> WeightParameter:
            return WeightParameter.empty(parts, dtype=dtype, device=shape.device)

        words = {shard_id: part.in_units_of(8) for shard_id, part in rows.items()}
        self.qweight = parameter(torch.int32, {shard_id: (columns, part) for shard_id, part in words.items()})
        self.qzeros = parameter(torch.int32, {shard_id: (groups, part) for shard_id, part in words.items()})
        self.scales = parameter(torch.float32, {shard_id: (groups, part) for shard_id, part in rows.items()})

    def unpack(self) -> Groups:
        codes, zeros, scales = self.qweight.data, self.qzeros.data, self.scales.data
        group_of = torch.arange(len(codes)) // (len(codes) // len(scales))
        return Groups(unpack_words(codes), scales.t().contiguous(), unpack_words(zeros), group_of, bits=4)


def unpack_words(words: Tensor) -> Tensor:
    """uint8 [8 * words, rows] from int32 [rows, words]."""
    data = words.t().contiguous()  # [words, rows]
    return torch.stack([data >> 4 * place & 15 for place in PLACES], dim=1).flatten(0, 1).to(torch.uint8)
