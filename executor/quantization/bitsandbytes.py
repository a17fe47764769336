"""bitsandbytes' tensors (Dettmers et al., arXiv:2208.07339 and 2305.14314), as transformers saves them.

Columns with outliers, which GPUs multiply apart from the others (``llm_int8_threshold``), are not treated differently.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from math import gcd
from typing import Any, TypeVar

import msgspec
import torch
from torch import Tensor, nn

import ops
from executor.layers.parameter import MISFIT, Part, ShardId, WeightParameter
from executor.quantization.base import LinearShape, Options
from executor.quantization.codes import Floats, Groups, taken
from executor.quantization.fields import BitsAndBytesFields, read
from executor.quantization.groups import MakeSource, PlainSource, Source, SourceMethod
from executor.quantization.packed import log_float_only

logger = logging.getLogger(__name__)


class BitsAndBytes(SourceMethod):
    """The method of models quantised with bitsandbytes."""

    renames = (
        (r"\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map)$", r".weight_\1"),
        (r"\.weight\.quant_state\.bitsandbytes__\w+$", r".weight_quant_state"),
    )

    def __init__(self, fields: Mapping[str, Any], options: Options) -> None:
        self.fields = read(BitsAndBytesFields, fields)
        self.options = options
        if self.fields.load_in_4bit:
            log_float_only(self.fields.bnb_4bit_quant_type, options)
        else:
            logger.info("columns with outliers (llm_int8_threshold) are multiplied like all others")

    def source(self, name: str) -> MakeSource:
        if not self.fields.has_module(name):
            return PlainSource
        if self.fields.load_in_8bit:
            return Int8Source
        return lambda shape: FourBitSource(self.fields, shape)


# ---------------------------------------------------------------------------------------------------------
# 8 bits


class FormatParameter(WeightParameter):
    """The order of the codes in memory: 0, or that of some GPU. Old releases left it out."""

    is_optional = True

    def load(self, tensor: Tensor, shard_id: ShardId = None) -> None:
        if int(tensor):
            raise ValueError("is the layout of a GPU; save the model again with a current release of bitsandbytes")


class Int8Source(Source):
    """Codes with a scale for each row."""

    weight: nn.Parameter
    """int8 [out_features, in_features]."""
    SCB: nn.Parameter
    """[out_features]: the number that 127 stands for."""
    weight_format: nn.Parameter

    def __init__(self, shape: LinearShape) -> None:
        super().__init__()
        rows = shape.outputs
        weight = {shard_id: (part, shape.input) for shard_id, part in rows.items()}
        self.weight = WeightParameter.empty(weight, dtype=torch.int8, device=shape.device)
        scales = {shard_id: (part,) for shard_id, part in rows.items()}
        self.SCB = WeightParameter.empty(scales, dtype=torch.float32, device=shape.device)
        one = {shard_id: (Part.whole(1),) for shard_id in rows}
        self.weight_format = FormatParameter.empty(one, dtype=torch.uint8, device=shape.device)

    def unpack(self) -> Groups:
        codes = (self.weight.data.to(torch.int16) + 128).to(torch.uint8)
        zeros = torch.full((len(codes), 1), 128, dtype=torch.uint8)
        return Groups(codes, (self.SCB.data / 127)[:, None], zeros, torch.zeros(codes.shape[1], dtype=torch.int64), 8)


# ---------------------------------------------------------------------------------------------------------
# 4 bits


class State(msgspec.Struct, frozen=True):
    """The JSON beside a weight."""

    quant_type: str
    blocksize: int
    nested_blocksize: int = 256
    nested_offset: float = 0.0


class WholeParameter(WeightParameter):
    """A tensor that every rank holds in full, flattened. Its size is known once all of the weight is loaded."""

    @classmethod
    def of(cls: type[P], size: int, dtype: torch.dtype, shape: LinearShape) -> P:
        """Uninitialised, of the usual size."""
        parts = dict.fromkeys(shape.outputs, (Part.whole(size),))
        return cls.empty(parts, dtype=dtype, device=shape.device)

    def load(self, tensor: Tensor, shard_id: ShardId = None) -> None:
        self.data = tensor.reshape(-1).clone()


P = TypeVar("P", bound=WholeParameter)


class StateParameter(WholeParameter):
    """JSON, as bytes."""

    @property
    def state(self) -> State:
        return msgspec.json.decode(self.data.numpy().tobytes(), type=State)

    def load(self, tensor: Tensor, shard_id: ShardId = None) -> None:
        super().load(tensor, shard_id)
        try:
            state = self.state
        except msgspec.MsgspecError as error:
            raise ValueError(f"describes no quantised weight: {error}") from error
        if state.quant_type not in ("nf4", "fp4") or min(state.blocksize, state.nested_blocksize) < 1:
            raise ValueError(f"has quant_type {state.quant_type!r} with blocks of {state.blocksize}, not nf4 or fp4")

    def fill_randomly(self, generator: torch.Generator) -> None:
        self.data = torch.frombuffer(bytearray(b'{"quant_type": "nf4", "blocksize": 64}'), dtype=torch.uint8)


class TableParameter(WholeParameter):
    """The numbers of the codes."""

    def load(self, tensor: Tensor, shard_id: ShardId = None) -> None:
        super().load(tensor, shard_id)
        known = [ops.float_values(torch.arange(16, dtype=torch.uint8), name) for name in ("nf4", "fp4")]
        if not any(self.shape == each.shape and torch.allclose(self, each, rtol=0, atol=1e-4) for each in known):
            raise ValueError("has other numbers than nf4 and fp4; use one of these")


class FourBitSource(Source):
    """Codes of the whole weight, row after row, in blocks that share a scale; high halves of bytes come first."""

    weight: nn.Parameter
    """[out_features * in_features / 2]."""
    weight_absmax: nn.Parameter
    """float32 [blocks], or codes of 8 bits."""
    weight_quant_map: nn.Parameter
    """[16]."""
    weight_quant_state: StateParameter
    weight_nested_absmax: nn.Parameter
    weight_nested_quant_map: nn.Parameter
    """[256]: the numbers of ``weight_absmax``, in blocks of their own."""

    def __init__(self, fields: BitsAndBytesFields, shape: LinearShape) -> None:
        super().__init__()
        ((_, self.rows),) = shape.outputs.items()
        self.columns = shape.input
        self.is_nested = fields.bnb_4bit_use_double_quant
        count = self.rows.full * self.columns.full
        blocks = -(-count // 64)

        def parameter(size: int, dtype: torch.dtype) -> WholeParameter:
            return WholeParameter.of(size, dtype, shape)

        self.weight = parameter(-(-count // 2), torch.uint8)
        self.weight_absmax = parameter(blocks, torch.uint8 if self.is_nested else torch.float32)
        self.weight_quant_map = TableParameter.of(16, torch.float32, shape)
        self.weight_quant_state = StateParameter.of(64, torch.uint8, shape)
        if self.is_nested:
            self.weight_nested_absmax = parameter(-(-blocks // 256), torch.float32)
            self.weight_nested_quant_map = parameter(256, torch.float32)

    def unpack(self) -> Floats:
        state = self.weight_quant_state.state
        rows, columns = self.rows.full, self.columns.full
        _check_size("weight", self.weight, -(-rows * columns // 2))
        scales = self._scales(state, -(-rows * columns // state.blocksize))
        # Blocks run on from row to row; all columns of a group lie in one.
        group = gcd(state.blocksize, columns)
        scales = scales.repeat_interleave(state.blocksize // group)[: rows * columns // group].view(rows, -1)
        data = self.weight.data
        halves = torch.empty(len(data), 2, dtype=torch.uint8)
        torch.bitwise_right_shift(data, 4, out=halves[:, 0])
        torch.bitwise_and(data, 15, out=halves[:, 1])
        codes = halves.view(-1)[: rows * columns].view(rows, columns)
        codes = taken(taken(codes, self.rows, 0), self.columns, 1)
        scales = taken(taken(scales, self.rows, 0), self.columns.in_units_of(group), 1)
        return Floats(codes, scales, state.quant_type, group)

    def _scales(self, state: State, count: int) -> Tensor:
        """float32 [count]."""
        _check_size("weight.absmax", self.weight_absmax, count)
        codes = self.weight_absmax.data
        if not self.is_nested:
            return codes
        _check_size("weight.nested_absmax", self.weight_nested_absmax, -(-count // state.nested_blocksize))
        _check_size("weight.nested_quant_map", self.weight_nested_quant_map, 256)
        outer = self.weight_nested_absmax.data.repeat_interleave(state.nested_blocksize)[: len(codes)]
        return self.weight_nested_quant_map.data[codes.int()] * outer + state.nested_offset


def _check_size(name: str, parameter: nn.Parameter, expected: int) -> None:
    """Raises ValueError: A tensor does not belong to the weight."""
    if len(parameter) != expected:
        raise ValueError(f"{name} has {len(parameter)} elements, the model needs {expected}{MISFIT}")
