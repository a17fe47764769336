"""Products of rows of which each may have an adapter of its own.

The layer's own sums stay in float32; what the row's adapter adds is added to them, and the result is rounded once. A
row's bits depend on its own numbers and its adapter alone, and one without an adapter has those of ``linear``.

Rows find their adapters on the device: a row's number leads to the address of a list of addresses. As Punica does it:
Chen et al., arXiv:2310.18547.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ops.adapters import Adapter, AdapterTable, PackedAdapter, TableAdapter
from ops.metadata import AdapterRows
from ops.packed import QuantizedWeight, Weight
from ops.triton import linear
from ops.triton.catalog import Case, meta
from ops.triton.configs import Config
from ops.triton.launch import launch, result, row_stride, scratch, target

_RANKS = 16
"""Ranks of a tile, of which packed adapters have whole ones."""
_CHUNK = 512
_COLUMNS = 256
_FIELDS = ("a", "b", "factors", "magnitude", "bias")
"""Tensors whose addresses a packed adapter lists, 0 if it lacks one; its rank follows."""


@triton.jit
def _adapter(addresses_ptr, of_row_ptr, row):
    """The list of addresses of the row's adapter; 0: it has none."""
    return tl.load(addresses_ptr + tl.load(of_row_ptr + row))


@triton.jit
def shrink_kernel(
    x_ptr, addresses_ptr, of_row_ptr, out_ptr, K, x_stride, out_stride, RANKS: tl.constexpr, CHUNK: tl.constexpr
):
    """A program per row and tile of ranks: the row times A, times the factors, in float32."""
    row = tl.program_id(0).to(tl.int64)
    fields = _adapter(addresses_ptr, of_row_ptr, row)
    if fields != 0:
        listed = fields.to(tl.pointer_type(tl.int64))
        own = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
        if tl.program_id(1) * RANKS < tl.load(listed + 5):
            a_ptr = tl.multiple_of(tl.load(listed).to(tl.pointer_type(x_ptr.dtype.element_ty)), 16)
            factors_ptr = tl.load(listed + 2).to(tl.pointer_type(tl.float32))
            sums = tl.zeros([RANKS, CHUNK], tl.float32)
            for start in range(0, K, CHUNK):
                k = start + tl.arange(0, CHUNK)
                x = tl.load(x_ptr + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
                places = own.to(tl.int64)[:, None] * K + k[None, :]
                a = tl.load(a_ptr + places, mask=(k < K)[None, :], other=0.0)
                sums += a.to(tl.float32) * x[None, :]
            projected = tl.sum(sums, 1) * tl.load(factors_ptr + own)
            tl.store(out_ptr + row * out_stride + own, projected)


@triton.jit
def expand_kernel(
    x_ptr, sums_ptr, projected_ptr, addresses_ptr, of_row_ptr, bias_ptr, out_ptr, N, projected_stride, out_stride,
    RANKS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program per row and tile of columns: adds what the adapter adds, and rounds. B has the type of x."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < N
    value = tl.load(sums_ptr + row * N + column, mask=mask, other=0.0)
    fields = _adapter(addresses_ptr, of_row_ptr, row)
    if fields != 0:
        listed = fields.to(tl.pointer_type(tl.int64))
        rank = tl.multiple_of(tl.load(listed + 5).to(tl.int32), 16)
        b_ptr = tl.multiple_of(tl.load(listed + 1).to(tl.pointer_type(x_ptr.dtype.element_ty)), 16)
        added = tl.zeros([COLUMNS], tl.float32)
        for start in range(0, rank, RANKS):
            own = start + tl.arange(0, RANKS)
            projected = tl.load(projected_ptr + row * projected_stride + own)
            places = column.to(tl.int64)[:, None] * rank + own[None, :]
            b = tl.load(b_ptr + places, mask=mask[:, None], other=0.0)
            added += tl.sum(b.to(tl.float32) * projected[None, :], 1)
        value += added
        magnitude = tl.load(listed + 3)
        if magnitude != 0:
            value = value * tl.load(magnitude.to(tl.pointer_type(tl.float32)) + column, mask=mask, other=1.0)
        bias = tl.load(listed + 4)
        if bias != 0:
            value = value + tl.load(bias.to(tl.pointer_type(tl.float32)) + column, mask=mask, other=0.0)
    if bias_ptr is not None:
        value += tl.load(bias_ptr + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_stride + column, value.to(out_ptr.dtype.element_ty), mask=mask)


def pack_adapter(adapter: Adapter, weight: Weight) -> PackedAdapter:
    """The op ``pack_adapter``.

    Raises:
        NotImplementedError: There are no kernels for such adapters.
    """
    if adapter.weight is not None:
        raise NotImplementedError("GPUs do not compute adapters that replace the weights of layers (modules_to_save)")
    device = _device_of(weight)
    padding = -adapter.rank % _RANKS
    found = {
        "a": F.pad(adapter.a, (0, 0, 0, padding)),
        "b": F.pad(adapter.b, (0, padding)),
        "factors": F.pad(adapter.factors, (0, padding)),
        "magnitude": adapter.magnitude,
        "bias": adapter.bias,
    }
    tensors = {name: each.to(device).contiguous() for name, each in found.items() if each is not None}
    places = [tensors[name].data_ptr() if name in tensors else 0 for name in _FIELDS]
    fields = torch.tensor([*places, adapter.rank + padding], dtype=torch.int64).to(device)
    return PackedAdapter(fields.data_ptr(), (*tensors.values(), fields), None, adapter.rank + padding)


def _device_of(weight: Weight) -> torch.device:
    assert isinstance(weight, Tensor | QuantizedWeight)
    return weight.device if isinstance(weight, Tensor) else weight.segments[0].data.device


def _adapted(
    x: Tensor, weight: Weight, bias: Tensor | None, table: AdapterTable, rows: AdapterRows, out: Tensor
) -> Tensor:
    count, width = out.shape
    sums = scratch.get("adapters.sums", count * width, torch.float32, x.device)[: count * width].view(count, width)
    linear.matmul(x, weight, dtype=torch.float32, out=sums)
    rank = max(_RANKS, table.max_rank)
    projected = scratch.get("adapters.projected", count * rank, torch.float32, x.device)
    shared = {"addresses_ptr": scratch.keep(table.addresses), "of_row_ptr": rows.of_row, "x_ptr": x}
    args: dict[str, Any] = shared | {"out_ptr": projected, "K": x.shape[1]}
    args |= {"x_stride": row_stride(x), "out_stride": rank}
    grid = (count, triton.cdiv(rank, _RANKS))
    warps = 4 if target().backend == "cuda" else 2  # of 32 and of 64 threads
    launch(shrink_kernel, grid, args, Config(2 * warps, 2, (("RANKS", _RANKS), ("CHUNK", _CHUNK))))
    args = shared | {"sums_ptr": sums, "projected_ptr": projected, "bias_ptr": bias, "out_ptr": out, "N": width}
    args |= {"projected_stride": rank, "out_stride": row_stride(out)}
    grid = (count, triton.cdiv(width, _COLUMNS))
    launch(expand_kernel, grid, args, Config(warps, 1, (("RANKS", _RANKS), ("COLUMNS", _COLUMNS))))
    return out


def adapted_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    table: AdapterTable,
    rows: AdapterRows | None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The op ``adapted_linear``."""
    if rows is None:
        return linear.linear(x, weight, bias, out=out)
    return _adapted(x, weight, bias, table, rows, result(out, (len(x), weight.shape[0]), x.dtype, x))


def adapted_logits(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    table: AdapterTable,
    rows: AdapterRows | None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The op ``adapted_logits``."""
    if rows is None:
        return linear.logits(x, weight, bias, out=out)
    return _adapted(x, weight, bias, table, rows, result(out, (len(x), weight.shape[0]), torch.float32, x))


def adapted_embedding(
    ids: Tensor,
    weight: Weight,
    table: dict[int, TableAdapter],
    rows: AdapterRows | None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The op ``adapted_embedding``. Adapters that change the table are refused when they are loaded."""
    assert not table
    return linear.embedding(ids, weight, out=out)


def cases() -> Iterator[Case]:
    """Calls for the catalogue."""
    for dtype in (torch.bfloat16, torch.float32):
        x, weight = meta(64, 4096, dtype=dtype), meta(4096, 4096, dtype=dtype)
        numbers = meta(64, dtype=torch.int32)
        rows = AdapterRows(numbers, numbers, numbers, numbers)
        table = AdapterTable(8, torch.device("meta"))

        def call(x: Tensor = x, weight: Tensor = weight, table: AdapterTable = table, rows: Any = rows) -> Tensor:
            return adapted_linear(x, weight, x[0], table, rows)

        yield Case(str(dtype).removeprefix("torch."), call)
