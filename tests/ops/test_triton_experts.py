"""Mixtures of experts in Triton, interpreted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import ops
from ops import ExpertWeights, QuantizedWeight, Routing, SwiGLUOAI
from tests.ops.cpu import randn, using
from tests.ops.test_experts import ROUTINGS
from tests.triton_interpreter import ORDERS, Order, grid_order

triton_experts: Any = pytest.importorskip("ops.triton.experts")
route: Any = pytest.importorskip("ops.triton.route").route


@pytest.mark.parametrize(("routing", "is_corrected"), ROUTINGS)
def test_routing_is_that_of_the_reference(routing: Routing, is_corrected: bool) -> None:
    logits, bias = 2 * randn(6, 8), randn(8, seed=1) if is_corrected else None
    expected = ops.route.reference(logits, routing, bias)
    found = route(logits, routing, bias)
    assert torch.equal(found != 0, expected != 0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_sparsemixer_and_equal_experts() -> None:
    logits = torch.tensor([[0.5] * 6, [0.0, 1, 1, 0, 1, 0], [2.0, 2, 3, 2, 2, -2]])
    factors = randn(6, seed=1)
    for scores in ("softmax", "sigmoid", "sparsemixer"):
        routing = Routing(2, scores, factor=1.5, jitter=0.1)
        expected = ops.route.reference(logits, routing, None, factors)
        torch.testing.assert_close(route(logits, routing, None, factors), expected, rtol=1e-6, atol=1e-7)


HIDDEN, INNER, EXPERTS = 48, 32, 5


def several(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    return tuple(0.3 * randn(*shape, seed=seed + index, dtype=dtype) for index in range(EXPERTS))


def a_layer(dtype: torch.dtype, *, has_bias: bool) -> ExpertWeights:
    first_bias = several(2 * INNER, seed=70, dtype=dtype) if has_bias else None
    second_bias = several(HIDDEN, seed=80, dtype=dtype) if has_bias else None
    first, second = several(2 * INNER, HIDDEN, seed=10, dtype=dtype), several(HIDDEN, INNER, seed=40, dtype=dtype)
    return ExpertWeights(first, second, first_bias, second_bias, "silu", 2)


def routed_tokens(tokens: int) -> Tensor:
    """One expert has no token, another one more than half of all, and the last token is not a number."""
    routed = torch.zeros(tokens, EXPERTS)
    for token in range(tokens):
        routed[token, 1 if token % 3 else 4] = 0.25 + token / 16
        routed[token, (0, 2)[token % 2]] = -0.5
    routed[-1] = torch.nan
    return routed


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("dtype", "shared"), [(torch.bfloat16, "gated"), (torch.float32, "none")])
def test_experts(order: Order, dtype: torch.dtype, shared: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, weights = 11, a_layer(dtype, has_bias=shared == "gated")
    x, routed = randn(tokens, HIDDEN, dtype=dtype), routed_tokens(tokens)
    both: list[Any] = [randn(tokens, HIDDEN, seed=5, dtype=dtype), randn(tokens, 1, seed=6)]
    both = both if shared == "gated" else [None, None]

    def share(part: slice) -> list[Any]:
        return [None if each is None else each[part] for each in both]

    real, one = slice(0, -1), slice(3, 4)
    expected = ops.experts.reference(x[real], routed[real], weights, *share(real))
    with grid_order(order):
        found = triton_experts.experts(x, routed, weights, *both)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found[:-1], expected, rtol=4 * eps, atol=32 * eps if dtype == torch.float32 else 4 * eps)
    # Whatever is computed beside a token, its bits are the same.
    monkeypatch.setattr(triton_experts, "MOST_TOKENS", 4)
    assert torch.equal(triton_experts.experts(x, routed, weights, *both)[:-1], found[:-1])
    assert torch.equal(triton_experts.experts(x[one], routed[one], weights, *share(one)), found[one])


def test_an_expert_multiplies_as_a_layer_does() -> None:
    linear: Any = pytest.importorskip("ops.triton.linear")
    weights, x = a_layer(torch.bfloat16, has_bias=False), randn(3, HIDDEN, dtype=torch.bfloat16)
    routed = torch.zeros(3, EXPERTS)
    routed[:, 2] = 1
    inner = ops.act_and_mul.reference(linear.linear(x, weights.gate_up[2]), "silu")
    expected = linear.logits(inner, weights.down[2]).to(torch.bfloat16)
    assert torch.equal(triton_experts.experts(x, routed, weights), expected)


@pytest.mark.parametrize(("bits", "size"), [(4, 32), (8, 0)])
def test_quantised_experts_multiply_as_layers_do(bits: int, size: int) -> None:
    linear: Any = pytest.importorskip("ops.triton.linear")

    def packed(rows: int, columns: int, seed: int) -> QuantizedWeight:
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, generator=generator)
        scales = 0.02 * randn(rows, columns // (size or columns), seed=seed, dtype=torch.float16)
        with using("triton"):
            return ops.pack_groups(codes, scales, bits=bits, dtype=torch.bfloat16, activations="float")

    gate_up, down = ([packed(*shape, seed) for seed in range(3)] for shape in ((2 * INNER, 64), (64, INNER)))
    weights = ExpertWeights(tuple(gate_up), tuple(down), None, None, "silu", 1)
    x, routed = randn(4, 64, dtype=torch.bfloat16), torch.zeros(4, 3)
    routed[[0, 3], 2] = routed[1, 0] = 1
    found = triton_experts.experts(x, routed, weights)
    for tokens, expert in (([0, 3], 2), ([1], 0)):
        inner = ops.act_and_mul.reference(linear.linear(x[tokens], gate_up[expert]), "silu")
        assert torch.equal(linear.logits(inner, down[expert]).to(torch.bfloat16), found[tokens])
    assert not found[2].any()


@pytest.mark.parametrize("kind", ["int8 rows", "fp8 rows", "fp8 blocks"])
def test_activations_of_experts_are_rounded_as_those_of_layers(kind: str) -> None:
    """A token's once for all its experts; whatever is computed beside it, its bits are the same."""
    hidden, inner, count = 256, 128, 3

    def packed(rows: int, columns: int, seed: int) -> QuantizedWeight:
        generator = torch.Generator().manual_seed(seed)
        scales = 0.02 + 0.01 * torch.rand(rows, 1, generator=generator)
        with using("triton"):
            if kind == "int8 rows":
                codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=generator)
                return ops.pack_groups(codes, scales, bits=8, dtype=torch.bfloat16, activations="int8_per_token")
            values = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn).view(torch.uint8)
            size = 128 if kind == "fp8 blocks" else columns
            options: Any = {"dtype": torch.bfloat16, "activations": "fp8_per_token"}
            return ops.pack_floats(
                values, scales.repeat(1, columns // size), format="fp8_e4m3", group_size=size, **options
            )

    def layer() -> ExpertWeights:
        gate_up, down = (
            tuple(packed(*shape, seed) for seed in range(count)) for shape in ((2 * inner, hidden), (hidden, inner))
        )
        return ExpertWeights(gate_up, down, None, None, "silu", 2)

    x, routed = randn(5, hidden, dtype=torch.bfloat16), torch.zeros(5, count)
    for token in range(4):
        routed[token, token % count] = 0.5
        routed[token, (token + 1) % count] = 0.25
    found = triton_experts.experts(x, routed, weights := layer())
    linear: Any = pytest.importorskip("ops.triton.linear")
    for token in range(4):
        total = torch.zeros(hidden)
        for expert in range(count):
            if routed[token, expert]:
                gate_up = linear.linear(x[token : token + 1], weights.gate_up[expert])
                out = linear.logits(ops.act_and_mul.reference(gate_up, "silu"), weights.down[expert])[0]
                total = torch.addcmul(total.double(), out.double(), routed[token, expert].double()).float()
        assert torch.equal(found[token], total.to(torch.bfloat16))
    assert not found[4].any()
    assert torch.equal(triton_experts.experts(x[1:2], routed[1:2], weights), found[1:2])


@pytest.mark.parametrize("kind", ["gpt-oss", "llama 4", "without gates"])
def test_experts_of_other_families(kind: str) -> None:
    plain = a_layer(torch.bfloat16, has_bias=kind == "gpt-oss")
    if kind == "gpt-oss":
        weights = replace(plain, activation=SwiGLUOAI(limit=0.5))
    elif kind == "llama 4":
        weights = replace(plain, scales_input=True)
    else:
        weights = replace(plain, gate_up=several(INNER, HIDDEN, seed=10), activation="relu2")
    x, routed = randn(7, HIDDEN, dtype=torch.bfloat16), routed_tokens(7)
    expected = ops.experts.reference(x[:-1], routed[:-1], weights)
    found = triton_experts.experts(x, routed, weights)
    torch.testing.assert_close(found[:-1], expected, rtol=2**-6, atol=2**-6)
    assert torch.equal(triton_experts.experts(x[2:3], routed[2:3], weights), found[2:3])


def test_what_has_no_kernels_is_refused() -> None:
    dense = a_layer(torch.float32, has_bias=False)
    mixed = replace(dense, down=(*several(HIDDEN, INNER, seed=40, dtype=torch.bfloat16)[:1], *dense.down[1:]))
    with pytest.raises(NotImplementedError, match="several formats"):
        triton_experts.experts(randn(2, HIDDEN), routed_tokens(2), mixed)
    ordered = replace(dense, down_orders=(torch.arange(INNER),) * EXPERTS)
    with pytest.raises(NotImplementedError, match="desc_act"):
        triton_experts.experts(randn(2, HIDDEN), routed_tokens(2), ordered)
