"""Eager ops on CPU tensors, one kernel call each."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ops.collective import PeerLostError
from ops.cpu import instructions, library, memory
from ops.cpu.instructions import Instruction
from ops.cpu.library import ROWS, TYPES, Group, Library, Matrix, Node, Step
from ops.dispatch import Op
from ops.metadata import AdapterRows, AttentionMetadata
from ops.packed import GROUP, Encoding, PackedWeight, RowSource, Segment, shares_in_groups

_SERIAL_WORK = 1 << 15
"""Operations below which waking a second thread costs more than it saves."""


def implementation(op: Op[Any, Any], kernels: Library) -> Callable[..., Tensor]:
    """The CPU implementation of an op: the kernel if it supports the arguments, else the reference."""
    describe: Callable[..., Instruction | None] = instructions.BY_NAME[op.name]

    def run(*args: Any, **kwargs: Any) -> Tensor:
        instruction = describe(*args, **kwargs)
        if instruction is None:
            result: Tensor = op.reference(*args, **kwargs)
            return result
        return execute(kernels, instruction)

    return run


def execute(kernels: Library, instruction: Instruction) -> Tensor:
    """Runs an instruction whose arguments are tensors."""
    step = Step()
    keep = fill_step(step, instruction.step)
    for x in instruction.matrices.values():
        step.num_tokens = x.shape[0]
        break
    rows = step.num_samples if "logits_rows" in instruction.step else step.num_tokens
    out = torch.empty((rows, instruction.width), dtype=instruction.dtype)
    matrices = {name: Matrix(x.data_ptr(), x.stride(0)) for name, x in instruction.matrices.items()}
    matrices["out"] = Matrix(out.data_ptr(), instruction.width)
    args = instruction.struct(matrices)
    node = Node(instruction.op, 0, ctypes.addressof(args))
    if instruction.inside is not None:
        step.ranks = ctypes.pointer(instruction.inside.struct)
    threads = 1 if rows * instruction.work < _SERIAL_WORK else 0
    if kernels.run(ctypes.addressof(node), 1, ctypes.addressof(step), threads):
        raise PeerLostError("another rank has left")
    del keep
    return out


def fill_step(step: Step, values: dict[str, Any]) -> list[Any]:
    """Sets the step descriptor's fields that an eager op reads. Returns objects to keep alive until the call ends."""
    keep: list[Any] = []
    for name, value in values.items():
        if name == "group":
            group = Group()
            fill_group(group, value)
            step.groups = ctypes.pointer(group)
            keep.append(group)
            continue
        if name == "adapters":
            fill_adapters(step.adapters[ROWS["tokens"]], value)
            continue
        tensor = value.to(torch.int64 if name == "logits_rows" else torch.int32).contiguous()
        keep.append(tensor)
        if name == "input_ids":
            step.input_ids, step.num_tokens = tensor.data_ptr(), len(tensor)
        elif name == "positions":
            step.positions = tensor.data_ptr()
        else:
            step.logits_rows, step.num_samples = tensor.data_ptr(), len(tensor)
    return keep


def fill_group(group: Group, meta: AttentionMetadata) -> None:
    """Points a group of the step descriptor to a step's metadata."""
    group.query_start_loc = meta.query_start_loc.data_ptr()
    group.seq_lens = meta.seq_lens.data_ptr()
    group.block_table = meta.block_table.data_ptr()
    group.block_table_stride = meta.block_table.stride(0)
    group.slot_mapping = meta.slot_mapping.data_ptr()
    group.num_reqs = meta.num_reqs
    group.block_size = meta.block_size
    group.num_replayed = None if meta.num_replayed is None else meta.num_replayed.data_ptr()
    group.num_drafts = None if meta.num_drafts is None else meta.num_drafts.data_ptr()


def fill_adapters(adapters: library.AdapterRows, rows: AdapterRows | None) -> None:
    """Points the step descriptor to the adapters of its rows."""
    adapters.num_adapters = 0 if rows is None else len(rows.adapters)
    if rows is not None:
        adapters.rows, adapters.of_row = rows.rows.data_ptr(), rows.of_row.data_ptr()
        adapters.adapters, adapters.starts = rows.adapters.data_ptr(), rows.starts.data_ptr()


# ---------------------------------------------------------------------------------------------------------
# packing

BLOCK_ROWS = 32
"""Rows of a block of a packed weight."""
BAND_NUMBERS = 1 << 18
"""Numbers that are packed at a time if their rows are made for it."""


def pack_linear(kernels: Library, weight: Tensor, paired: bool = False) -> Tensor | PackedWeight:
    """The op ``pack_linear``."""
    if weight.dtype not in TYPES or weight.stride(1) != 1:
        return weight
    rows, columns = weight.shape
    paired = paired and rows % 2 == 0
    data = memory.weights.empty(kernels.packed_size(rows, columns, paired), weight.dtype)
    kernels.pack(weight.data_ptr(), weight.stride(0), data.data_ptr(), rows, columns, paired, TYPES[weight.dtype])
    return PackedWeight(data, (rows, columns), paired)


def pack_segment(
    kernels: Library, rows: Tensor | RowSource, encoding: Encoding, columns: int, paired: bool = False
) -> Segment:
    """The op ``pack_segment``."""
    if isinstance(rows, RowSource):
        return _pack_bands(kernels, rows, encoding, columns, paired)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    struct = instructions.encoding_struct(encoding)
    address, num_rows = ctypes.addressof(struct), len(rows)
    data = memory.weights.empty(kernels.quantized_size(address, num_rows, columns, paired), torch.uint8)
    kernels.pack_quantized(address, rows.data_ptr(), rows.stride(0), data.data_ptr(), num_rows, columns, paired)
    return Segment(data, num_rows, encoding)


def _pack_bands(kernels: Library, rows: RowSource, encoding: Encoding, columns: int, paired: bool) -> Segment:
    """Packs some rows at a time; if paired, as many of each half, since blocks have rows of both."""
    struct = instructions.encoding_struct(encoding)
    address, count = ctypes.addressof(struct), rows.rows
    data = memory.weights.empty(kernels.quantized_size(address, count, columns, paired), torch.uint8)
    half = count // 2 if paired else count
    step = max(BAND_NUMBERS // columns // BLOCK_ROWS, 1) * BLOCK_ROWS
    place = data.data_ptr()
    for first in range(0, half, step):
        end = min(first + step, half)
        band = rows.make(first, end)
        if paired:
            band = torch.cat((band, rows.make(half + first, half + end)))
        kernels.pack_quantized(address, band.data_ptr(), band.stride(0), place, len(band), columns, paired)
        place += kernels.quantized_size(address, len(band), columns, paired)
    return Segment(data, count, encoding)


def quantize_groups(kernels: Library, source: Tensor, bits: int, importance: Tensor | None = None) -> Tensor:
    """The op ``quantize_groups``."""
    if source.dtype not in TYPES or source.stride(1) != 1:
        source = source.float().contiguous()
    rows, columns = source.shape
    weights = None if importance is None else shares_in_groups(importance).contiguous()
    num_fields = 1 if bits == 8 else 2
    out = torch.empty((rows, columns + columns // GROUP * num_fields * 2), dtype=torch.uint8)
    address = None if weights is None else weights.data_ptr()
    kernels.quantize_groups(
        source.data_ptr(), source.stride(0), TYPES[source.dtype], address, out.data_ptr(), out.stride(0), rows, columns,
        bits,
    )  # fmt: skip
    return out


def unpack_linear(kernels: Library, weight: Tensor | PackedWeight) -> Tensor:
    """The op ``unpack_linear``."""
    if isinstance(weight, Tensor):
        return weight
    result = torch.empty(weight.shape, dtype=weight.dtype)
    rows, columns = weight.shape
    kernels.unpack(weight.data.data_ptr(), result.data_ptr(), rows, columns, int(weight.paired), TYPES[weight.dtype])
    return result
