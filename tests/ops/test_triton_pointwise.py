"""Ops on one number at a time in Triton, interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ops.reference import basic as reference
from tests.ops.cpu import randn
from tests.triton_interpreter import ORDERS, Order, grid_order

pointwise: Any = pytest.importorskip("ops.triton.pointwise")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def assert_close(result: torch.Tensor, expected: torch.Tensor) -> None:
    assert result.dtype == expected.dtype
    torch.testing.assert_close(result, expected, rtol=4 * torch.finfo(expected.dtype).eps, atol=1e-6)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_arithmetic(order: Order, dtype: torch.dtype) -> None:
    x, y, row = randn(3, 1100, dtype=dtype), randn(3, 1100, seed=1, dtype=dtype), randn(1100, seed=2, dtype=dtype)
    with grid_order(order):
        assert torch.equal(pointwise.add(x, y), x + y)
        assert torch.equal(pointwise.add(x, row), x + row)
        assert torch.equal(pointwise.multiply(x, y), x * y)
        assert_close(pointwise.scale(x, 0.37), x * 0.37)
        assert torch.equal(pointwise.clip(x, 0.7), reference.clip.reference(x, 0.7))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2"])
def test_activations(dtype: torch.dtype, kind: Any) -> None:
    x = torch.cat([randn(2, 96, dtype=dtype), torch.linspace(-90, 90, 96).to(dtype).unsqueeze(0)])
    assert_close(pointwise.activation(x, kind), reference.activation.reference(x, kind))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
def test_gated_activations(dtype: torch.dtype, kind: Any) -> None:
    x = randn(3, 192, dtype=dtype)
    assert_close(pointwise.act_and_mul(x, kind), reference.act_and_mul.reference(x, kind))


def test_softcap() -> None:
    x = torch.cat([randn(1, 200) * 100, randn(1, 200) * 0.01, torch.linspace(-3e4, 3e4, 200).unsqueeze(0)])
    result = pointwise.softcap(x, 30.0)
    torch.testing.assert_close(result, reference.softcap.reference(x, 30.0), rtol=1e-5, atol=1e-6)


def test_infinities_and_nan_pass() -> None:
    x = torch.tensor([[torch.inf, -torch.inf, torch.nan, 0.0]])
    assert pointwise.clip(x, 2.0).tolist()[0][:2] == [2.0, -2.0]
    assert pointwise.clip(x, 2.0)[0, 2].isnan()
    assert pointwise.softcap(x, 2.0)[0, :2].tolist() == [2.0, -2.0]
