"""Products in Triton, interpreted with a model of tensor cores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ops.reference import basic as reference
from tests.ops.cpu import randn
from tests.triton_interpreter import ORDERS, Order, grid_order

gemm: Any = pytest.importorskip("ops.triton.gemm")
linear: Any = pytest.importorskip("ops.triton.linear")
pointwise: Any = pytest.importorskip("ops.triton.pointwise")
configs: Any = pytest.importorskip("ops.triton.configs")

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets small weights have several segments."""
    monkeypatch.setattr(gemm, "MIN_SEGMENT", 128)


def exact(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    total = x.double() @ weight.double().T
    return total if bias is None else total + bias.double()


def assert_close(result: Tensor, truth: Tensor, ulps: float = 2.0) -> None:
    """Within some units in the last place, and of what sums of this size lose in float32."""
    unit = torch.finfo(result.dtype).eps
    error = (result.double() - truth).abs()
    assert torch.isfinite(result).all()
    assert (error <= ulps * unit * truth.abs() + 1e-5 * truth.abs().max()).all(), error.max()


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("m", "n", "k"), [(3, 200, 384), (20, 64, 416), (5, 128, 72)])
def test_linear(order: Order, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    x, weight, bias = randn(m, k, dtype=dtype), randn(n, k, seed=1, dtype=dtype), randn(n, seed=2, dtype=dtype)
    assert gemm.num_segments(n, k) == {384: 3, 416: 3, 72: 1}[k]
    with grid_order(order):
        result = linear.linear(x, weight, bias)
    assert_close(result, exact(x, weight, bias))


def test_logits_are_sums_in_float32() -> None:
    x, weight = randn(3, 384, dtype=BF16), randn(200, 384, seed=1, dtype=BF16)
    result = linear.logits(x, weight)
    assert result.dtype == torch.float32
    assert_close(result, exact(x, weight), ulps=64)
    assert torch.equal(result.to(BF16), linear.linear(x, weight))


def tiles(rows: Sequence[int] = (8, 16, 64)) -> list[Any]:
    return [
        configs.Config(4, 2, (("TILE_M", m), ("TILE_N", n), ("TILE_K", k)))
        for m, n, k in zip(rows, (64, 32, 128), (128, 64, 32), strict=True)
    ]


@pytest.mark.parametrize("splits", [True, False])
def test_bits_depend_neither_on_rows_nor_on_tiles(monkeypatch: pytest.MonkeyPatch, splits: bool) -> None:
    x, weight = randn(40, 416, dtype=BF16), randn(96, 416, seed=1, dtype=BF16)
    expected = linear.logits(x, weight)
    if not splits:
        monkeypatch.setattr(gemm, "MAX_SPLIT_PROGRAMS", 0)
    for count in (1, 2, 7, 9, 17, 33, 40):
        assert torch.equal(linear.logits(x[:count], weight), expected[:count])
        assert torch.equal(linear.logits(x[-count:], weight), expected[-count:])
    for config in tiles():
        assert torch.equal(gemm.matmul(x, weight, dtype=torch.float32, config=config), expected)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("k", [384, 64])
def test_epilogues_equal_the_ops_one_by_one(order: Order, has_bias: bool, k: int) -> None:
    x, weight, residual = randn(6, k, dtype=BF16), randn(96, k, seed=1, dtype=BF16), randn(6, 96, seed=3, dtype=BF16)
    bias = randn(96, seed=2, dtype=BF16) if has_bias else None
    plain = linear.linear(x, weight, bias)
    with grid_order(order, seed=1):
        added = gemm.matmul(x, weight, gemm.Epilogue(bias, residual=residual))
        active = gemm.matmul(x, weight, gemm.Epilogue(bias, activation="gelu_tanh", residual=residual))
        gated = gemm.matmul(x, weight, gemm.Epilogue(bias, activation="silu", is_gated=True))
    assert torch.equal(added, pointwise.add(plain, residual))
    assert torch.equal(active, pointwise.add(pointwise.activation(plain, "gelu_tanh"), residual))
    assert torch.equal(gated, pointwise.act_and_mul(plain, "silu"))


def test_selected_rows() -> None:
    x, weight = randn(9, 384, dtype=BF16), randn(96, 384, seed=1, dtype=BF16)
    rows = torch.tensor([8, 0, 3])
    result = gemm.matmul(x, weight, rows=rows, dtype=torch.float32)
    assert torch.equal(result, linear.logits(x[rows], weight))


def test_views_and_results_in_place() -> None:
    wide, weight = randn(4, 512, dtype=BF16), randn(65, 128, seed=1, dtype=BF16)
    out = torch.full((4, 96), torch.nan, dtype=BF16)
    view = out[:, 8:73]
    assert linear.linear(wide[:, 128:256], weight, out=view) is view
    assert_close(view, exact(wide[:, 128:256], weight))
    assert out[:, :8].isnan().all() and out[:, 73:].isnan().all()


def test_a_single_output() -> None:
    x, weight = randn(3, 384, dtype=BF16), randn(1, 384, seed=1, dtype=BF16)
    assert_close(linear.linear(x, weight), exact(x, weight))


def test_errors_are_no_larger_than_the_references() -> None:
    x, weight = randn(4, 512, dtype=BF16), randn(64, 512, seed=1, dtype=BF16)
    truth = exact(x, weight)
    own = (linear.linear(x, weight).double() - truth).abs().mean()
    assert own <= 1.5 * (reference.linear.reference(x, weight).double() - truth).abs().mean()
