"""Products with adapters in Triton, interpreted: against the reference, and rows against themselves alone."""

from __future__ import annotations

import pytest
import torch

import ops
from ops import Adapter, AdapterTable, OpSet
from tests import tiny
from tests.lora import write_adapter
from tests.models.harness import Chunk, Runner, random_tokens
from tests.models.test_lora import adapted
from tests.ops.cpu import randn, using
from tests.ops.test_adapters import some_rows

pytest.importorskip("triton", reason="Triton is not installed")

from ops.triton import adapters, linear
from tests import triton_interpreter  # noqa: F401  # amends the interpreter

IN, OUT = 48, 70
OF_ROW = [0, 3, 1, 1, 2, 4]


def found(dtype: torch.dtype) -> list[Adapter]:
    """Of one tile of ranks and of two, with lengths and biases, and one of rank 0."""
    kinds = []
    for index, rank in enumerate((5, 18, 8, 0)):
        a, b = randn(rank, IN, seed=index, dtype=dtype), randn(OUT, rank, seed=10 + index, dtype=dtype)
        magnitude = 1 + 0.1 * randn(OUT, seed=20 + index) if index == 2 else None
        bias = randn(OUT, seed=30 + index) if index > 1 else None
        kinds.append(Adapter(a, b, 0.5 + randn(rank, seed=40 + index).abs(), magnitude, bias))
    return kinds


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_with_adapters(dtype: torch.dtype) -> None:
    x, weight, bias = randn(6, IN, dtype=dtype), randn(OUT, IN, seed=1, dtype=dtype), randn(OUT, seed=2, dtype=dtype)
    plain, packed = AdapterTable(5), AdapterTable(5)
    for number, adapter in enumerate(found(dtype), 1):
        plain.put(number, adapter)
        packed.put(number, adapters.pack_adapter(adapter, weight))
    rows = some_rows(OF_ROW)
    with using(OpSet()):
        expected = ops.adapted_logits(x, weight, bias, plain, rows)
    sums = adapters.adapted_logits(x, weight, bias, packed, rows)
    torch.testing.assert_close(sums[1:], expected[1:], rtol=1e-4, atol=1e-4)
    assert torch.equal(sums[:1], linear.logits(x[:1], weight, bias))
    rounded = adapters.adapted_linear(x, weight, bias, packed, rows)
    assert rounded.dtype == dtype and torch.equal(rounded, sums.to(dtype))
    assert torch.equal(rounded[:1], linear.linear(x[:1], weight, bias))
    assert torch.equal(adapters.adapted_linear(x, weight, bias, packed, None), linear.linear(x, weight, bias))
    for row in (1, 4):
        alone = adapters.adapted_logits(x[row : row + 1], weight, bias, packed, some_rows(OF_ROW[row : row + 1]))
        assert torch.equal(alone[0], sums[row])


def test_what_is_not_supported_is_named() -> None:
    weight = randn(OUT, IN)
    whole = Adapter(randn(3, IN), randn(OUT, 3), torch.ones(3), weight=weight)
    with pytest.raises(NotImplementedError, match="modules_to_save"):
        adapters.pack_adapter(whole, weight)


def test_a_model_with_adapters() -> None:
    base = tiny.checkpoint("llama", num_hidden_layers=1)
    path = write_adapter(base)
    step = [Chunk(0, random_tokens(3), 1), Chunk(1, random_tokens(2, 2))]
    results = []
    for op_set in (OpSet(), "triton"):
        before = ops.op_set("cpu")
        ops.use("cpu", op_set)
        results.append(Runner(adapted(base, path)[0], captured=False).step(step))
        ops.use("cpu", before)
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
