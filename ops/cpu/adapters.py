"""Adapters in the layout of the kernels; see ``csrc/octavo.h``."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ops.adapters import Adapter, PackedAdapter
from ops.cpu import instructions, memory
from ops.cpu import library as lib
from ops.packed import PackedWeight, QuantizedWeight, Weight

HALF = 16
"""Columns of a result that are computed together; two make a block."""
RANKS = 4
"""Rows of A that lie side by side."""
BLOCK = 32
"""Columns of A in a block."""


def pack_adapter(adapter: Adapter, weight: Weight) -> Adapter | PackedAdapter:
    """The op ``pack_adapter``."""
    packed = instructions.packed_weight(weight if adapter.weight is None else adapter.weight)
    if packed is None or adapter.a.dtype != packed.dtype:
        return adapter
    columns = result_columns(packed)
    rank, in_features = adapter.a.shape
    ranks = -(-rank // RANKS) * RANKS
    blocks = -(-in_features // BLOCK)
    a = torch.zeros(ranks, blocks * BLOCK, dtype=adapter.a.dtype)
    a[:rank, :in_features] = adapter.a
    a = _kept(a.view(ranks // RANKS, RANKS, blocks, BLOCK).transpose(1, 2))
    factors = torch.zeros(ranks)
    factors[:rank] = adapter.factors
    b, halves = _pack_b(adapter.b, adapter.spans, columns)
    magnitude, bias = _by_half(adapter.magnitude, columns, 1.0), _by_half(adapter.bias, columns, 0.0)
    own, keep = (None, None) if adapter.weight is None else instructions.weight_struct(packed)
    struct = lib.Adapter(
        a.data_ptr(),
        b.data_ptr(),
        ctypes.addressof(halves),
        factors.data_ptr(),
        None if magnitude is None else magnitude.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None if own is None else ctypes.addressof(own),
        ranks,
        len(halves),
    )
    tensors = tuple(each for each in (a, b, factors, magnitude, bias) if each is not None)
    return PackedAdapter(ctypes.addressof(struct), tensors, (struct, halves, own, keep), adapter.rank)


def result_columns(weight: PackedWeight | QuantizedWeight) -> Tensor:
    """The columns of a product's result in the order of the weight's blocks, int64 [halves, 16]; -1: padding."""
    sizes = [weight.shape[0]] if isinstance(weight, PackedWeight) else [each.rows for each in weight.segments]
    found, first = [], 0
    for size in sizes:
        step = HALF if weight.paired else 2 * HALF
        end = size // 2 if weight.paired else size
        block = torch.arange(0, end, step)[:, None, None]
        half = torch.arange(2)[None, :, None]
        place = block + (0 if weight.paired else half * HALF) + torch.arange(HALF)
        columns = torch.where(place < end, place + (half * end if weight.paired else 0), -1 - first)
        found.append((columns + first).view(-1, HALF))
        first += size
    return torch.cat(found)


def _kept(tensor: Tensor) -> Tensor:
    """A copy where steps read it: in huge pages."""
    return memory.adapters.empty(tensor.numel(), tensor.dtype).view(tensor.shape).copy_(tensor)


def _by_half(vector: Tensor | None, columns: Tensor, padding: float) -> Tensor | None:
    """A number for each column of the result, in the order of the halves: float32 [halves, 16]."""
    if vector is None:
        return None
    return torch.cat((vector.float(), torch.tensor([padding])))[columns].contiguous()


def _pack_b(b: Tensor, spans: Tensor | None, columns: Tensor) -> tuple[Tensor, ctypes.Array[lib.AdapterHalf]]:
    """B half by half, each with the ranks alone that its rows have, and where each half is."""
    rank, num_halves = b.shape[1], len(columns)
    places = torch.where(columns < 0, len(b), columns).flatten()
    rows = torch.cat((b, b.new_zeros(1, rank))).index_select(0, places).view(num_halves, HALF, rank)
    if spans is None:
        spans = torch.tensor([0, rank]).expand(len(b), 2)
    of_rows = torch.cat((spans, torch.tensor([[rank, 0]]))).index_select(0, places).view(num_halves, HALF, 2)
    first = of_rows[:, :, 0].masked_fill(of_rows[:, :, 0] >= of_rows[:, :, 1], rank).amin(1)
    counts = (of_rows[:, :, 1].amax(1) - first).clamp(min=0)
    most = int(counts.max())
    kept = counts > 0
    num_kept = max(1, int(kept.sum()))
    data = memory.adapters.empty(num_kept * most * HALF, b.dtype).view(num_kept, most, HALF).zero_()
    for begin in first[kept].unique().tolist():
        end = min(begin + most, rank)
        chosen = first == begin
        data[chosen[kept], : end - begin] = rows[chosen & kept][:, :, begin:end].transpose(1, 2)
    offsets = (kept.cumsum(0) - 1).clamp(min=0) * most * HALF
    each = zip(offsets.tolist(), first.tolist(), counts.tolist(), strict=True)
    return data, (lib.AdapterHalf * num_halves)(*(lib.AdapterHalf(*half) for half in each))
