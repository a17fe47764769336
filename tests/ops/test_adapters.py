"""Products of rows with adapters: kernels against the reference, and rows against themselves alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ops
from executor.input_batch import adapter_columns, adapter_rows
from ops import Adapter, AdapterRows, AdapterTable, OpSet
from tests.ops.cpu import NAMES, NEEDS_KERNELS, randn, use, using

pytestmark = NEEDS_KERNELS

IN, OUT = 72, 100
"""Neither a multiple of a block."""
OF_ROW = [0, 3, 1, 1, 0, 2, 4, 1, 5, 1, 1, 4, 0, 3]


def some_rows(of_row: list[int]) -> AdapterRows | None:
    columns = adapter_columns("x", np.array(of_row, np.int32))
    return adapter_rows("x", {name: torch.from_numpy(column) for name, column in columns.items()})


def adapters(dtype: torch.dtype) -> list[Adapter]:
    """Of all kinds: of a low rank, of a rank that is no multiple of four, of merged projections, with lengths and
    biases, and with a weight of its own."""
    found = []
    for index, rank in enumerate((8, 5, 12, 7)):
        a, b = randn(rank, IN, seed=index, dtype=dtype), randn(OUT, rank, seed=10 + index, dtype=dtype)
        if index == 2:
            b[:52, :4], b[52:, 4:] = 0, 0
        magnitude = 1 + 0.1 * randn(OUT, seed=20 + index) if index == 3 else None
        bias = randn(OUT, seed=30 + index) if index in (1, 3) else None
        found.append(Adapter(a, b, 0.5 + randn(rank, seed=40 + index).abs(), magnitude, bias))
    return found


def table(dtype: torch.dtype, weight: ops.Weight, paired: bool) -> AdapterTable:
    """Adapters 1 to 5; 6 leaves the layer alone."""
    result = AdapterTable(6)
    for number, adapter in enumerate(adapters(dtype), 1):
        result.put(number, ops.pack_adapter(adapter, weight))
    own = ops.pack_linear(randn(OUT, IN, seed=50, dtype=dtype), paired)
    whole = Adapter(randn(3, IN, seed=51, dtype=dtype), randn(OUT, 3, seed=52, dtype=dtype), torch.ones(3), weight=own)
    result.put(5, ops.pack_adapter(whole, weight))
    return result


@pytest.mark.parametrize("paired", [False, True], ids=["plain", "paired"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("capability", NAMES)
def test_kernels_and_reference(capability: str, dtype: torch.dtype, paired: bool) -> None:
    x, weight = randn(len(OF_ROW), IN, dtype=dtype), randn(OUT, IN, seed=1, dtype=dtype)
    bias = randn(OUT, seed=2, dtype=dtype)
    with using(OpSet()):
        expected = ops.adapted_logits(x, weight, bias, table(dtype, weight, False), some_rows(OF_ROW))
    with use(capability):
        packed = ops.pack_linear(weight, paired)
        found = table(dtype, packed, paired)
        results = ops.adapted_logits(x, packed, bias, found, some_rows(OF_ROW))
        plain = ops.logits(x, packed, bias)
        torch.testing.assert_close(results, expected, rtol=1e-4 if dtype == torch.float32 else 2e-2, atol=2e-3)
        without = [row for row, number in enumerate(OF_ROW) if not number]
        assert torch.equal(results[without], plain[without])
        rounded = ops.adapted_linear(x, packed, bias, found, some_rows(OF_ROW))
        assert torch.equal(rounded, results.to(dtype))
        for row, number in enumerate(OF_ROW):
            alone = ops.adapted_logits(x[row : row + 1], packed, bias, found, some_rows([number]))
            assert torch.equal(alone[0], results[row])
        many = x.repeat(9, 1)  # several tiles
        assert torch.equal(ops.adapted_logits(many, packed, bias, found, some_rows(OF_ROW * 9)), results.repeat(9, 1))
        found.put(1, None)
        gone = [row for row, number in enumerate(OF_ROW) if number in (0, 1)]
        results = ops.adapted_logits(x, packed, bias, found, some_rows(OF_ROW))
        assert torch.equal(results[gone], plain[gone])


@pytest.mark.parametrize("activations", ["float", "int8", "int8_per_token"])
def test_quantised_weights(activations: ops.QuantizedActivations) -> None:
    """What an adapter adds is computed with activations as they are."""
    columns, generator = 64, torch.Generator().manual_seed(3)
    groups = 1 if activations == "int8_per_token" else 2
    segments = [
        ops.pack_groups(
            torch.randint(-128, 128, (rows, columns), generator=generator).to(torch.int8),
            0.01 + 0.001 * randn(rows, groups).abs(),
            bits=8,
            dtype=torch.float32,
            activations=activations,
        )
        for rows in (40, 60)
    ]
    weight = ops.join_rows(segments)
    x = randn(len(OF_ROW), columns)
    a, b = randn(8, columns, seed=1), randn(100, 8, seed=2)
    b[:40, 4:], b[40:, :4] = 0, 0
    adapter = Adapter(a, b, torch.full((8,), 0.5), bias=randn(100, seed=3))
    found = AdapterTable(5)
    for number in (1, 3):
        found.put(number, ops.pack_adapter(adapter, weight))
    plain = ops.linear(x, weight)
    results = ops.adapted_linear(x, weight, None, found, some_rows(OF_ROW))
    for row, number in enumerate(OF_ROW):
        expected = plain[row]
        if number in (1, 3):
            assert adapter.bias is not None
            expected = expected + 0.5 * b @ (a @ x[row]) + adapter.bias
        torch.testing.assert_close(results[row], expected, rtol=1e-5, atol=1e-4 if number in (1, 3) else 0)
        assert number in (1, 3) or torch.equal(results[row], plain[row])
