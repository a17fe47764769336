"""Linear layers, logits and embeddings of rows of which each may have an adapter of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.adapters import Adapter, AdapterTable, PackedAdapter, TableAdapter
from ops.dispatch import Spec, StepInput, op
from ops.metadata import AdapterRows
from ops.packed import QuantizedWeight, Weight
from ops.reference import basic, quantized


@op(lambda adapter, weight: Spec("", len(adapter.b), adapter.b.dtype))
def pack_adapter(adapter: Adapter, weight: Weight) -> Adapter | PackedAdapter:
    """Converts an adapter to the layout that this device's ``adapted_linear`` reads; the reference, to itself.

    Args:
        adapter: On the device of the weight.
        weight: The packed weight of the layer.
    """
    return adapter


@op(lambda x, weight, bias, table, rows: Spec(x.spec.rows, weight.shape[0], x.spec.dtype))
def adapted_linear(
    x: Tensor, weight: Weight, bias: Tensor | None, table: AdapterTable, rows: AdapterRows | StepInput | None
) -> Tensor:
    """``linear``, with the adapters of rows that have one; others have the same bits.

    Args:
        x: [rows, in_features].
        weight: As of ``linear``.
        bias: As of ``linear``.
        table: The layer's adapters. It may change between steps.
        rows: The adapters of the rows; None: no row has one.

    Returns:
        [rows, out_features] in the type of ``x``: the sum with what the adapter adds is rounded once.
    """
    result = basic.linear(x, weight, bias)
    for selected, adapter in _chosen(table, rows):
        result[selected] = adapted(x[selected], weight, bias, adapter).to(x.dtype)
    return result


@op(lambda x, weight, bias, table, rows: Spec(x.spec.rows, weight.shape[0], torch.float32))
def adapted_logits(
    x: Tensor, weight: Weight, bias: Tensor | None, table: AdapterTable, rows: AdapterRows | StepInput | None
) -> Tensor:
    """``logits``, float32, with the adapters of rows that have one. The arguments are those of ``adapted_linear``."""
    result = basic.logits(x, weight, bias)
    for selected, adapter in _chosen(table, rows):
        result[selected] = adapted(x[selected], weight, bias, adapter)
    return result


def _chosen(table: AdapterTable, rows: AdapterRows | StepInput | None) -> list[tuple[Tensor, Adapter]]:
    """The rows of each adapter that changes the layer."""
    if rows is None:
        return []
    assert isinstance(rows, AdapterRows)
    chosen = []
    for index, number in enumerate(rows.adapters.tolist()):
        adapter = table.adapters[number]
        if adapter is not None:
            assert isinstance(adapter, Adapter), "a packed adapter needs the kernels of its device"
            chosen.append((rows.rows[rows.starts[index] : rows.starts[index + 1]], adapter))
    return chosen


def of_rows(
    table: AdapterTable, rows: AdapterRows | StepInput | None, selected: Tensor
) -> list[tuple[Tensor, Adapter]]:
    """The same for a selection of rows, int64 [n]: places in it."""
    if rows is None:
        return []
    assert isinstance(rows, AdapterRows)
    numbers = rows.of_row[selected]
    found = []
    for number in numbers.unique().tolist():
        adapter = table.adapters[number] if number else None
        if adapter is not None:
            assert isinstance(adapter, Adapter), "a packed adapter needs the kernels of its device"
            found.append(((numbers == number).nonzero().flatten(), adapter))
    return found


def adapted(x: Tensor, weight: Weight, bias: Tensor | None, adapter: Adapter) -> Tensor:
    """A product of rows with the same adapter, float32 [rows, out_features]."""
    if adapter.weight is not None:
        weight = adapter.weight
    if isinstance(weight, QuantizedWeight):
        sums = quantized.logits(x, weight, None)
    else:
        sums = F.linear(x.float(), basic.plain(weight).float())
    projected = F.linear(x.float(), adapter.a.float()) * adapter.factors
    sums = sums + F.linear(projected, adapter.b.float())
    if adapter.magnitude is not None:
        sums = sums * adapter.magnitude
    for term in (adapter.bias, bias):
        sums = sums if term is None else sums + term.float()
    return sums


@op(lambda ids, weight, table, rows: Spec(ids.spec.rows, weight.shape[1], weight.dtype))
def adapted_embedding(
    ids: Tensor, weight: Weight, table: dict[int, TableAdapter], rows: AdapterRows | StepInput | None
) -> Tensor:
    """``embedding``, with the adapters of tokens that have one.

    Args:
        ids: As of ``embedding``.
        weight: As of ``embedding``.
        table: Adapters that change the table, by number. It may change between steps.
        rows: The adapters of the tokens; None: no token has one.

    Returns:
        [num_tokens, hidden_size] in the table's dtype, rounded once.
    """
    result = basic.embedding(ids, weight)
    if rows is None or not table:
        return result
    assert isinstance(rows, AdapterRows)
    for index, number in enumerate(rows.adapters.tolist()):
        adapter = table.get(number)
        if adapter is not None:
            selected = rows.rows[rows.starts[index] : rows.starts[index + 1]]
            result[selected] = _looked_up(ids[selected].long(), result[selected], adapter)
    return result


def _looked_up(ids: Tensor, found: Tensor, adapter: TableAdapter) -> Tensor:
    """[tokens, embedding_dim]: the vectors with an adapter."""
    vectors = found if adapter.table is None else adapter.table[ids]
    if adapter.rows is not None and adapter.vectors is not None and len(adapter.rows):
        places = torch.searchsorted(adapter.rows, ids).clamp(max=len(adapter.rows) - 1)
        is_replaced = adapter.rows[places] == ids
        vectors = torch.where(is_replaced[:, None], adapter.vectors[places], vectors)
    if not adapter.a.shape[1]:
        return vectors.to(found.dtype)
    # An element-wise product and a sum, so that a vector does not depend on how many there are.
    added = (adapter.a[ids].float()[:, None, :] * adapter.b.float()[None]).sum(-1) * adapter.factor
    return (vectors.float() + added).to(found.dtype)
