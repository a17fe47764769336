"""Ops with several results: eager, and in programs with and without kernels."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import ops
from executor.graphs import Program
from ops.dispatch import Spec, like_first, op
from tests.ops.cpu import NEEDS_KERNELS, using

WIDTH, EXPERTS, K = 40, 8, 2


@pytest.fixture(
    params=[
        "reference",
        pytest.param("kernels", marks=NEEDS_KERNELS),
    ]
)
def kernels(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Runs a test in plain torch and on the kernels."""
    if request.param == "kernels":
        yield True
        return
    with using("reference"):
        yield False


@op(lambda x, k: (Spec(x.spec.rows, k, torch.float32), Spec(x.spec.rows, k, torch.int64)))
def top_experts(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest columns of each row: weights that add up to 1, and where they are."""
    values, ids = x.float().topk(k, dim=-1)
    return values.softmax(dim=-1), ids


@op(like_first)
def mixed_experts(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """Each row times the weighted sum of the numbers of its experts."""
    return x * (weights * (1 + ids)).sum(dim=-1, keepdim=True)


@op(lambda x: (x.spec, x.spec))
def parted(x: Tensor) -> tuple[Tensor, Tensor]:
    """A quarter of x, and the rest."""
    return x / 4, x - x / 4


@op(lambda x: ())
def looked_at(x: Tensor) -> tuple[()]:
    """No result at all."""
    return ()


def rows(count: int) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(count))


def weight(out_features: int, seed: int) -> Any:
    return ops.pack_linear(torch.randn(out_features, WIDTH, generator=torch.Generator().manual_seed(seed)) / 6)


def captured(forward: Any) -> Program:
    program = Program("cpu")
    x: Any = program.input("x", Spec("tokens", WIDTH, torch.float32))
    program.finish(*forward(x))
    return program


def assert_same(program: Program, forward: Any) -> None:
    for count in (3, 70, 1, 5):
        x = rows(count)
        expected = forward(x)
        for ours, theirs in zip(program.replay({"x": x}), expected, strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)


def test_an_expert_layer(kernels: bool) -> None:
    router, up, down = weight(EXPERTS, 0), weight(WIDTH, 1), weight(WIDTH, 2)

    def forward(x: Any) -> tuple[Any, ...]:
        weights, ids = top_experts(ops.linear(x, router), K)
        inner = mixed_experts(ops.linear(x, up), weights, ids)
        return (ops.add(x, ops.linear(inner, down)),)

    program = captured(forward)
    assert (program.native_ops, program.python_ops) == ((4, 2) if kernels else (0, 6))
    assert_same(program, forward)


def test_results_that_kernels_read_and_results_that_nobody_reads(kernels: bool) -> None:
    first, second = weight(WIDTH, 3), weight(WIDTH, 4)

    def forward(x: Any) -> tuple[Any, ...]:
        small, large = parted(ops.linear(x, first))
        _, unused = parted(x)
        kept, _ = parted(unused)
        looked_at(kept)
        # Both results are copied to where the kernels look for them, in places of their own.
        summed = ops.add(ops.linear(small, second), ops.linear(large, first))
        return summed, kept, ops.add(small, large)

    program = captured(forward)
    assert program.python_ops == (4 if kernels else 9)
    assert_same(program, forward)


def test_columns_of_one_of_several_results(kernels: bool) -> None:
    matrix = ops.pack_linear(torch.randn(16, 30, generator=torch.Generator().manual_seed(5)))

    def forward(x: Any) -> tuple[Any, ...]:
        small, large = parted(x)
        left, right = large.split([30, 10], dim=-1)
        return ops.linear(left, matrix), parted(right)[1], small

    assert_same(captured(forward), forward)


def test_what_nobody_reads_any_more_is_dropped(kernels: bool) -> None:
    alive: list[weakref.ref[Tensor]] = []
    seen: list[list[bool]] = []

    @op(lambda x: (x.spec, x.spec))
    def made(x: Tensor) -> tuple[Tensor, Tensor]:
        results = x + 1, x + 2
        alive.extend(map(weakref.ref, results))
        return results

    @op(like_first)
    def watched(x: Tensor) -> Tensor:
        seen.append([reference() is not None for reference in alive])
        return x + 3

    def forward(x: Any) -> tuple[Any, ...]:
        first, _ = made(x)
        second, third = made(first)
        return watched(second), third

    program = captured(forward)
    (result, third) = program.replay({"x": rows(3)})
    assert seen == [[False, False, True, True]]
    assert torch.equal(result, rows(3) + 1 + 1 + 3)
    assert torch.equal(third, rows(3) + 1 + 2)
    del third
    assert [reference() is not None for reference in alive] == [False] * 4


def test_a_function_that_returns_too_few_is_noticed(kernels: bool) -> None:
    @op(lambda x: (x.spec, x.spec))
    def short(x: Tensor) -> tuple[Tensor, ...]:
        return (x + 1,)

    program = captured(lambda x: short(x))
    with pytest.raises(ValueError, match="shorter"):
        program.replay({"x": rows(3)})
