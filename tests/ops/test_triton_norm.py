"""Norms in Triton, interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ops.reference import norm as reference
from tests.ops.cpu import randn
from tests.triton_interpreter import ORDERS, Order, count_bytes, grid_order

norm: Any = pytest.importorskip("ops.triton.norm")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def assert_close(result: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for two units in the last place of the type."""
    assert result.dtype == expected.dtype
    torch.testing.assert_close(result, expected, rtol=4 * torch.finfo(expected.dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("width", "size", "offset", "round_first"),
    [(576, None, 0.0, True), (576, None, 1.0, False), (192, 64, 0.0, True), (160, 80, 0.0, False)],
)
def test_rms_norm(
    dtype: torch.dtype, order: Order, width: int, size: int | None, offset: float, round_first: bool
) -> None:
    x, weight = randn(7, width, dtype=dtype), randn(size or width, seed=1, dtype=dtype)
    options: dict[str, Any] = {"size": size, "offset": offset, "round_first": round_first}
    with grid_order(order):
        result = norm.rms_norm(x, weight, 1e-5, **options)
    assert_close(result, reference.rms_norm.reference(x, weight, 1e-5, **options))


def test_rms_norm_without_a_weight_reads_and_writes_views() -> None:
    x = randn(5, 256, dtype=torch.bfloat16)[:, 64:128]
    out = torch.full((5, 128), torch.nan, dtype=torch.bfloat16)[:, 32:96]
    assert norm.rms_norm(x, None, 1e-5, out=out) is out
    assert_close(out, reference.rms_norm.reference(x, None, 1e-5))


def test_groups_with_weights_of_their_own() -> None:
    x, weight = randn(7, 240, dtype=torch.bfloat16), randn(240, seed=1, dtype=torch.bfloat16)
    result = norm.rms_norm(x, weight, 1e-5, size=80)
    assert_close(result, reference.rms_norm.reference(x, weight, 1e-5, size=80))


@pytest.mark.parametrize("order", ORDERS)
def test_a_sum_is_normalised(order: Order) -> None:
    x, residual = randn(6, 576, dtype=torch.bfloat16), randn(6, 576, seed=2, dtype=torch.bfloat16)
    weight = randn(576, seed=1, dtype=torch.bfloat16)
    with grid_order(order):
        total, normed = norm.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, norm.rms_norm(total, weight, 1e-5))
    in_place = norm.add_rms_norm(x, residual, weight, 1e-5, out=(residual, x))
    assert in_place[0] is residual and torch.equal(residual, total) and torch.equal(x, normed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "has_values"), [(None, "both"), (64, "one group's"), (64, "each"), (None, "none")])
def test_layer_norm(dtype: torch.dtype, size: int | None, has_values: str) -> None:
    x = randn(5, 192, dtype=dtype)
    values = None if has_values == "none" else size if has_values == "one group's" else 192
    weight, bias = (None if values is None else randn(values, seed=seed, dtype=dtype) for seed in (1, 2))
    result = norm.layer_norm(x, weight, bias, 1e-5, size)
    assert_close(result, reference.layer_norm.reference(x, weight, bias, 1e-5, size))


def test_rows_do_not_depend_on_others() -> None:
    x, weight = randn(9, 576, dtype=torch.bfloat16), randn(576, seed=1, dtype=torch.bfloat16)
    together = norm.rms_norm(x, weight, 1e-5)
    for row in range(len(x)):
        assert torch.equal(norm.rms_norm(x[row : row + 1], weight, 1e-5), together[row : row + 1])


def test_nothing_is_read_twice() -> None:
    x, weight = randn(8, 1024, dtype=torch.bfloat16), randn(1024, seed=1, dtype=torch.bfloat16)
    with count_bytes() as traffic:
        norm.rms_norm(x, weight, 1e-5)
    assert traffic.stored == x.nbytes
    assert traffic.loaded == x.nbytes + len(x) * weight.nbytes  # the weight stays in the L2 cache
