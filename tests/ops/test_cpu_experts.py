"""Experts on every capability: the bits of separate products, for any neighbours, in any format."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ops
from ops import ExpertWeights, Routing, SwiGLUOAI, Weight
from tests.ops.cpu import DTYPES, NAMES, randn, threads, use
from tests.ops.quantized import blocks, float_arguments
from tests.ops.test_cpu_invariance import same_bits

pytestmark = pytest.mark.parametrize("capability", NAMES)

TOKENS, HIDDEN, INNER, EXPERTS, TOP_K = 33, 96, 64, 5, 2


def plain(rows: int, columns: int, seed: int, dtype: torch.dtype, paired: bool) -> Weight:
    return ops.pack_linear(randn(rows, columns, seed=seed, dtype=dtype), paired)


def groups(activations: Any, bits: int, group: int = 32) -> Any:
    def pack(rows: int, columns: int, seed: int, dtype: torch.dtype, paired: bool) -> Weight:
        codes = torch.randint(0, 1 << bits, (rows, columns), generator=torch.Generator().manual_seed(seed))
        scales = randn(rows, columns // (group or columns), seed=seed).half() / 16
        return ops.pack_groups(
            codes.to(torch.uint8), scales, bits=bits, dtype=dtype, activations=activations, paired=paired
        )

    return pack


def floats(name: str, activations: Any) -> Any:
    def pack(rows: int, columns: int, seed: int, dtype: torch.dtype, paired: bool) -> Weight:
        given = float_arguments(name, rows, columns, seed)
        return ops.pack_floats(**given, format=name, dtype=dtype, activations=activations, paired=paired)

    return pack


def mixed(rows: int, columns: int, seed: int, dtype: torch.dtype, paired: bool) -> Weight:
    """Gate and up in different types, as mixes of llama.cpp have them, and those of experts as well."""
    kinds = ("Q8_0", "Q4_0") if seed % 2 else ("Q5_1", "Q4_1")
    segments = [(blocks(kind, rows // 2, columns, seed), kind) for kind in kinds]
    return ops.pack_blocks(segments, dtype=dtype, activations="int8")


FORMATS: dict[str, Any] = {
    "int8": groups("int8", 8),
    "int8 with floats": groups("float", 8),
    "int8 per token": groups("int8_per_token", 8, 0),
    "int4": groups("int8", 4),
    "fp8": floats("fp8_e4m3", "float"),
    "mxfp4": floats("mxfp4", "int8"),
    "mixed blocks": mixed,
}


def experts_of(
    pack: Any,
    dtype: torch.dtype,
    has_bias: bool = False,
    scales_input: bool = False,
    activation: Any = "silu",
    hidden: int = HIDDEN,
    inner: int = INNER,
) -> ExpertWeights:
    def biases(size: int, seed: int) -> tuple[Tensor, ...] | None:
        return tuple(randn(size, seed=seed + i, dtype=dtype) for i in range(EXPERTS)) if has_bias else None

    is_gated = activation != "relu2"
    rows = 2 * inner if is_gated else inner
    return ExpertWeights(
        tuple(pack(rows, hidden, 10 + index, dtype, is_gated) for index in range(EXPERTS)),
        tuple(pack(hidden, inner, 30 + index, dtype, False) for index in range(EXPERTS)),
        biases(rows, 50),
        biases(hidden, 60),
        activation,
        TOP_K,
        scales_input,
    )


def check(weights: ExpertWeights, dtype: torch.dtype) -> None:
    """All tokens by two threads, against the definition, and against the tokens one by one and in parts."""
    hidden = weights.down[0].shape[0]
    x, shared = randn(TOKENS, hidden, dtype=dtype), randn(TOKENS, hidden, seed=1, dtype=dtype)
    routed = ops.route(randn(TOKENS, EXPERTS, seed=2), Routing(TOP_K, normalize=True))
    routed[5:18] = routed[5]  # more rows of an expert than a tile has
    routed[20] = 0
    with threads(2):
        found = ops.experts(x, routed, weights, shared)
    assert same_bits(found, ops.experts.reference(x, routed, weights, shared))
    for size in (1, 14):
        parts = zip(x.split(size), routed.split(size), shared.split(size), strict=True)
        assert same_bits(torch.cat([ops.experts(*part[:2], weights, part[2]) for part in parts]), found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scales_input", [False, True])
def test_plain(capability: str, dtype: torch.dtype, scales_input: bool) -> None:
    with use(capability):
        check(experts_of(plain, dtype, has_bias=not scales_input, scales_input=scales_input), dtype)


@pytest.mark.parametrize("pack", [plain, floats("mxfp4", "int8"), mixed], ids=["plain", "mxfp4", "mixed blocks"])
def test_experts_of_gpt_oss(capability: str, pack: Any) -> None:
    with use(capability):
        check(experts_of(pack, torch.bfloat16, has_bias=True, activation=SwiGLUOAI(1.5, 1.0)), torch.bfloat16)


@pytest.mark.parametrize("pack", [plain, FORMATS["int4"]], ids=["plain", "int4"])
def test_experts_without_gates(capability: str, pack: Any) -> None:
    with use(capability):
        check(experts_of(pack, torch.bfloat16, has_bias=True, activation="relu2"), torch.bfloat16)


@pytest.mark.parametrize("name", FORMATS)
def test_quantized(capability: str, name: str) -> None:
    with use(capability):
        check(experts_of(FORMATS[name], torch.bfloat16), torch.bfloat16)


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_k_quants(capability: str, kind: str) -> None:
    """Weights of so many blocks of rows that threads take several at a time."""

    def pack(rows: int, columns: int, seed: int, dtype: torch.dtype, paired: bool) -> Weight:
        segments = [(blocks(kind, rows, columns, seed), kind)]
        return ops.pack_blocks(segments, dtype=dtype, activations="int8", paired=paired)

    with use(capability):
        check(experts_of(pack, torch.bfloat16, hidden=512, inner=256), torch.bfloat16)


def test_routing_does_not_depend_on_the_batch(capability: str) -> None:
    logits = randn(50, 37)
    with use(capability), threads(2):
        for routing in (Routing(5), Routing(4, "sigmoid", normalize=True), Routing(2, "sparsemixer", jitter=0.1)):
            alone = torch.cat([ops.route(row, routing) for row in logits.split(1)])
            assert same_bits(ops.route(logits, routing), alone)
