"""FP4 weights: numbers of 4 bits (E2M1), two in a byte, with a scale for each group of columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from executor.checkpoint import EXPONENTS
from executor.layers.parameter import Part, ShardId, WeightParameter
from executor.quantization.base import LinearShape, Options
from executor.quantization.codes import Floats
from executor.quantization.fields import MXFP4Fields, read
from executor.quantization.fp8 import ScaleParameter
from executor.quantization.groups import MakeSource, PlainSource, Source, SourceMethod


class MXFP4(SourceMethod):
    """The method of gpt-oss's experts."""

    def __init__(self, fields: Mapping[str, Any], options: Options) -> None:
        self.fields = read(MXFP4Fields, fields)
        self.options = options

    def source(self, name: str) -> MakeSource:
        return MXFP4Source if self.fields.has_module(name) else PlainSource


@dataclass(frozen=True)
class FP4Names:
    """How a writer of NVFP4 calls its tensors."""

    codes: str
    scale: str
    """Of all of a weight."""
    divides: bool
    """Whether that one divides the scales of the groups instead of multiplying them."""


class ExponentParameter(WeightParameter):
    """Exponents of 2 in uint8, from -127, which checkpoints also store as numbers of 8 bits (F8_E8M0)."""

    @property
    def stored_dtype(self) -> torch.dtype:
        return EXPONENTS

    def load(self, tensor: Tensor, shard_id: ShardId = None) -> None:
        super().load(tensor.view(torch.uint8), shard_id)

    def fill_randomly(self, generator: torch.Generator) -> None:
        """Those of small numbers."""
        self.data.fill_(121)


class MXFP4Source(Source):
    weight_packed: nn.Parameter
    """uint8 [out_features, in_features / 2], low halves first."""
    weight_scale: nn.Parameter
    """uint8 [out_features, in_features / 32]: exponents of 2, from -127."""

    def __init__(self, shape: LinearShape) -> None:
        super().__init__()
        ((shard_id, rows),) = shape.outputs.items()
        columns = shape.input

        def parameter(kind: type[WeightParameter], unit: int) -> WeightParameter:
            parts = {shard_id: (rows, columns.in_units_of(unit))}
            return kind.empty(parts, dtype=torch.uint8, device=shape.device)

        self.weight_packed, self.weight_scale = parameter(WeightParameter, 2), parameter(ExponentParameter, 32)

    def unpack(self) -> Floats:
        scales = self.weight_scale.data.view(torch.float8_e8m0fnu)
        return Floats(halves(self.weight_packed.data), scales, "mxfp4", 32)


class NVFP4Source(Source):
    """Bytes as of MXFP4; float8_e4m3fn [out_features, in_features / 16] in ``weight_scale``, and one scale for all."""

    weight_scale: nn.Parameter

    def __init__(self, names: FP4Names, shape: LinearShape) -> None:
        super().__init__()
        ((shard_id, rows),) = shape.outputs.items()
        columns = shape.input
        self.names = names
        codes = {shard_id: (rows, columns.in_units_of(2))}
        setattr(self, names.codes, WeightParameter.empty(codes, dtype=torch.uint8, device=shape.device))
        scales = {shard_id: (rows, columns.in_units_of(16))}
        self.weight_scale = WeightParameter.empty(scales, dtype=torch.float8_e4m3fn, device=shape.device)
        setattr(self, names.scale, ScaleParameter.of(shape, Part.whole(1), 1))

    def unpack(self) -> Floats:
        codes, scale = self.get_parameter(self.names.codes), self.get_parameter(self.names.scale)
        return Floats(halves(codes.data), self.weight_scale.data, "nvfp4", 16, scale.data.flatten(), self.names.divides)


def halves(packed: Tensor) -> Tensor:
    """uint8 [rows, 2 * bytes]: the low and the high half of each byte."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)
