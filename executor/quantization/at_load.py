"""Quantises the weights of a model while they are loaded: ``--quantization int8``, ``int4`` and ``fp8``.

``--imatrix`` says how large the inputs of each column are, so that 4 bits lose less where it matters; without it, the
model is measured on a short text first (``executor/calibration.py``).
Layers are quantised from the files' memory as they are packed, some rows at a time, and tables as they are read: memory
never holds the weights in another form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import ops
from executor.base import ModelError
from executor.input_batch import InputBatch
from executor.layers.parameter import Part, Parts, Range, ShardId, WeightParameter, single
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
    log_float_only,
    table_bias,
)
from executor.quantization.probe import Probe
from executor.quantization.unquantized import UnquantizedEmbedding, UnquantizedLinear
from ops.packed import Encoding, QuantizedWeight, RowSource, Segment

GROUP = 32
"""Columns that share a scale."""
NUMBERS = 1 << 17
"""Numbers quantised at a time: few enough for a core's cache."""
PIECES = 16
"""Pieces in which a table is packed, of whole units of rows of the kernels."""
UNIT = 32


LEAST_IMPORTANCE = 1e-4
"""Of a column, against the mean: one without activations in the calibration may have some later."""


@dataclass(frozen=True)
class Scheme:
    """How weights are written."""

    encoding: Encoding
    group_bytes: int
    """What a group has beside its codes."""
    quantize: Callable[[Tensor, Tensor | None], Tensor]
    """Takes rows of any floating-point type, and what errors of their columns count where it is known. Returns rows as
    ``ops.pack_segment`` takes them."""
    is_float: bool = False
    """Numbers are floating-point, a row is one group, and activations stay in floating point."""

    def group_size(self, columns: int) -> int:
        return columns if self.is_float else GROUP

    def of(self, columns: int) -> Encoding:
        """The encoding of rows."""
        return replace(self.encoding, group_size=self.group_size(columns))


def nearest_fp8(source: Tensor, importance: Tensor | None = None) -> Tensor:
    """8 bits (E4M3), rounded to the nearest."""
    result = torch.empty((source.shape[0], source.shape[1] + 4), dtype=torch.uint8)
    step = max(1, NUMBERS // source.shape[1])
    for rows, target in zip(source.split(step), result.split(step), strict=True):
        numbers = rows.float()
        scales = numbers.abs().amax(-1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
        codes = (numbers / torch.where(scales > 0, scales, 1)).to(torch.float8_e4m3fn)
        torch.cat([codes.view(torch.uint8), scales.view(torch.uint8)], dim=1, out=target)
    return result


def int8_rows(source: Tensor, importance: Tensor | None = None) -> Tensor:
    """8 bits, rounded to the nearest."""
    return ops.quantize_groups(source, 8)


def int4_rows(source: Tensor, importance: Tensor | None = None) -> Tensor:
    """4 bits; see ``ops.quantize_groups``."""
    return ops.quantize_groups(source, 4, importance)


def read_imatrix(file: str) -> dict[str, Tensor]:
    """The importance of the columns of each module, as ``octavo imatrix`` writes it: float32, positive, about 1.

    Raises:
        ModelError: The file cannot be read.
    """
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"--imatrix {file}: {error}; octavo imatrix makes such files") from None
    return {name: importance_of(squares.float().flatten()) for name, squares in tensors.items()}


def importance_of(squares: Tensor) -> Tensor:
    """What errors of columns count, positive, about 1, from the mean squares of their inputs."""
    relative = squares / squares.mean().clamp_min(1e-30)
    return relative.nan_to_num(1, 1, 1).clamp_min(LEAST_IMPORTANCE)


INT8 = Scheme(Encoding("int8", GROUP, torch.float16), 2, int8_rows)
INT4 = Scheme(Encoding("int4", GROUP, torch.float16, "minimums"), 4, int4_rows)

FP8_ROWS = Scheme(Encoding("fp8_e4m3", 0, torch.float32), 4, nearest_fp8, is_float=True)


class Int8(QuantizationConfig):
    """8 bits with a scale for each 32 columns."""

    scheme = INT8

    def __init__(self, fields: Mapping[str, Any], options: Options) -> None:
        self.options = options

    def linear_method(self, names: Sequence[str]) -> LinearMethod[Any]:
        return QuantizingLinear(self.scheme, self.options)

    def plain_linear_method(self, names: Sequence[str]) -> LinearMethod[Any]:
        return UnquantizedLinear()

    def embedding_method(self, name: str) -> EmbeddingMethod[Any]:
        return QuantizingEmbedding(self.options)


GATES = ("gate_proj", "up_proj", "w1", "w3")
"""Projections of experts that are given the hidden states."""


class Int4(Int8):
    """4 bits with a scale and a minimum for each 32 columns. Tables have 8 bits: they lose most."""

    scheme = INT4

    def __init__(self, fields: Mapping[str, Any], options: Options) -> None:
        super().__init__(fields, options)
        self.importance = read_imatrix(options.imatrix) if options.imatrix else None
        self.calibration = () if options.imatrix else options.calibration

    def linear_method(self, names: Sequence[str]) -> LinearMethod[Any]:
        if self.importance is None:
            return super().linear_method(names)
        found = next((self.importance[name] for name in names if name in self.importance), None)
        if found is None:
            block, dot, projection = names[0].rpartition(".experts.")
            found = self.importance.get(f"{block}.experts") if projection.endswith(GATES) else None
            if dot and found is None:
                return super().linear_method(names)  # nobody has measured what lies between their products
        if found is None:
            raise ModelError(f"--imatrix {self.options.imatrix} has no {names[0]}; make it from this model")
        return QuantizingLinear(self.scheme, self.options, found)


class FP8(Int8):
    """8-bit floating-point numbers with a scale for each row. Tables have integers, which are closer."""

    scheme = FP8_ROWS

    def __init__(self, fields: Mapping[str, Any], options: Options) -> None:
        super().__init__(fields, options)
        log_float_only("fp8", options)


# ---------------------------------------------------------------------------------------------------------
# parameters


class QuantizingParameter(WeightParameter):
    """Rows as ``ops.pack_segment`` takes them, uint8 [rows, bytes]: codes, then the fields of the groups.

    They are made as they are packed (``rows``); the parameter's own memory is only used for random weights.
    """

    keeps_tensors = True
    scheme: Scheme
    columns: int
    importance: Tensor | None
    """Of the checkpoint's columns, float32."""
    loaded: list[tuple[Range, Range, Tensor]]
    """Rows and columns of each piece of the checkpoint, and its numbers."""

    @classmethod
    def of(
        cls, scheme: Scheme, parts: Parts, columns: Part, device: torch.device, importance: Tensor | None = None
    ) -> QuantizingParameter:
        """Uninitialised.

        Raises:
            ValueError: The columns are not whole groups, or not those of ``importance``.
        """
        groups = Part.whole(1) if scheme.is_float else columns.in_units_of(GROUP)
        if importance is not None and len(importance) != columns.full:
            raise ValueError(f"--imatrix has {len(importance)} columns, not {columns.full}; make it from this model")
        rows = max(part.end for part, _ in parts.values())
        row_bytes = columns.size + groups.size * scheme.group_bytes
        parameter = cls.empty(single(Part.whole(rows), Part.whole(row_bytes)), dtype=torch.uint8, device=device)
        parameter.parts, parameter.columns, parameter.scheme = parts, columns.size, scheme
        parameter.importance = importance
        parameter.loaded = []
        return parameter

    @property
    def stored_dtype(self) -> torch.dtype:
        return torch.float32

    def load(self, tensor: Tensor, shard_id: ShardId = None) -> None:
        for source, (rows, columns) in self.shares(tensor, shard_id):
            assert columns.size == self.columns, "only rows are merged"
            self.loaded.append((rows, columns, source))

    def rows(self) -> RowSource:
        """All rows; made as they are asked for."""
        return RowSource(self.device, len(self), self._quantized if self.loaded else self._as_filled)

    def _quantized(self, first: int, end: int) -> Tensor:
        pieces = []  # each right after the one before it
        for rows, columns, source in sorted(self.loaded, key=lambda each: each[0].offset):
            begin, stop = max(first, rows.offset), min(end, rows.offset + rows.size)
            if begin < stop:
                importance = None if self.importance is None else self.importance.narrow(0, columns.start, columns.size)
                numbers = source[begin - rows.offset : stop - rows.offset]
                pieces.append(self.scheme.quantize(numbers, importance))
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).to(self.device)

    def _as_filled(self, first: int, end: int) -> Tensor:
        return self.data[first:end]

    def fill_randomly(self, generator: torch.Generator) -> None:
        super().fill_randomly(generator)
        if self.scheme.is_float:
            self.data[:, : self.columns] &= 0xBF  # no NaN
            self.data[:, self.columns :].view(torch.float32).fill_(0.05)
            return
        end = self.columns + self.columns // GROUP * 2
        self.data[:, self.columns : end].view(torch.float16).fill_(0.05 / 127)
        self.data[:, end:].view(torch.float16).fill_(-0.05 * 8 / 127)


class QuantizingTable(QuantizingParameter):
    """Packed piece by piece as it is loaded; its own memory is never touched."""

    keeps_tensors = False

    pieces: list[Segment]

    def load(self, tensor: Tensor, shard_id: ShardId = None) -> None:
        (rows,) = (source for source, _ in self.shares(tensor, shard_id))
        size = -(-len(rows) // (PIECES * UNIT)) * UNIT
        encoding = self.scheme.of(self.columns)
        self.pieces = [
            ops.pack_segment(self.scheme.quantize(piece, None), encoding, self.columns) for piece in rows.split(size)
        ]

    def fill_randomly(self, generator: torch.Generator) -> None:
        super().fill_randomly(generator)
        self.pieces = [ops.pack_segment(self.data, self.scheme.of(self.columns), self.columns)]


# ---------------------------------------------------------------------------------------------------------
# layers


class QuantizingWeights(PackedWeights):
    def __init__(self, weight: QuantizingParameter, dtype: torch.dtype, options: Options, paired: bool) -> None:
        super().__init__()
        self.weight: Any = weight
        self.dtype = dtype
        chosen = chosen_activations(options, dtype, weight.device)
        of_floats: ops.QuantizedActivations = "fp8_per_token" if options.activations == "fp8" else "float"
        self.activations = of_floats if weight.scheme.is_float else chosen
        self.paired = paired and len(weight) % 2 == 0
        self.probe: Probe | None = None
        """Takes the place of the weight while the model is measured."""

    def calibrated(self) -> None:
        """The model was measured: errors of the weight count as the inputs of its columns are large."""
        assert self.probe is not None
        if self.probe.squares is not None:
            self.weight.importance = importance_of(self.probe.squares.float())
        self.probe = None

    def pack(self) -> None:
        weight: QuantizingParameter = self.weight
        if isinstance(weight, QuantizingTable):
            segments = weight.pieces
        else:
            encoding = weight.scheme.of(weight.columns)
            segments = [ops.pack_segment(weight.rows(), encoding, weight.columns, self.paired)]
        shape = (len(weight), weight.columns)
        self.packed = QuantizedWeight(tuple(segments), shape, self.paired, self.dtype, self.activations)
        self.weight = None
        keep(self, self.packed)


class QuantizingLinear(PackedLinear[PackedWeights]):
    def __init__(self, scheme: Scheme, options: Options, importance: Tensor | None = None) -> None:
        self.scheme = scheme
        self.options = options
        self.importance = importance

    def create(self, shape: LinearShape) -> PackedWeights:
        if shape.input.size % GROUP and not self.scheme.is_float:
            return UnquantizedLinear().create(shape)
        parts = {shard_id: (rows, shape.input) for shard_id, rows in shape.outputs.items()}
        weight = QuantizingParameter.of(self.scheme, parts, shape.input, shape.device, self.importance)
        weights = QuantizingWeights(weight, shape.dtype, self.options, shape.paired)
        weights.bias = linear_bias(shape)
        return weights

    def apply(self, weights: PackedWeights, x: Tensor, batch: InputBatch) -> Tensor:
        if isinstance(weights, QuantizingWeights) and weights.probe is not None:
            return weights.probe.linear(x, len(weights.weight), weights.bias)
        return super().apply(weights, x, batch)


class QuantizingEmbedding(PackedEmbedding[PackedWeights]):
    """Always 8 bits."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def create(self, shape: TableShape) -> PackedWeights:
        if shape.hidden.size % GROUP:
            return UnquantizedEmbedding().create(shape)
        weight = QuantizingTable.of(INT8, single(shape.vocab, shape.hidden), shape.hidden, shape.device)
        weights = QuantizingWeights(weight, shape.dtype, self.options, paired=False)
        weights.bias = table_bias(shape)
        return weights

    def embed(self, weights: PackedWeights, ids: Tensor, batch: InputBatch) -> Tensor:
        if isinstance(weights, QuantizingWeights) and weights.probe is not None:
            return weights.probe.embedding(ids)
        return super().embed(weights, ids, batch)
