"""The promise of the kernels: a row's bits do not depend on the batch, on chunks, or on the number of threads."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

import ops
from executor.graphs import Program
from ops import AttentionShape
from ops.cpu import build
from ops.dispatch import Spec
from tests.ops.cpu import DTYPES, NAMES, Requests, randn, threads, use

pytestmark = pytest.mark.parametrize("capability", NAMES)

SHAPES = {
    "groups of 3": AttentionShape(9, 3, 64, scale=0.125),
    "groups of 5": AttentionShape(5, 1, 40, scale=0.3, v_head_dim=24),
    "window": AttentionShape(4, 2, 32, scale=0.3, sliding_window=100),
    "alibi": AttentionShape(6, 2, 32, scale=0.3, alibi_slopes=(0.5, 0.25, 0.1, 0.05, 0.02, 0.01)),
    "softcap": AttentionShape(4, 4, 32, scale=1.0, logit_softcap=8.0),
    "chunks and sinks": AttentionShape(4, 2, 32, scale=0.3, sliding_window=100, is_chunked=True, has_sinks=True),
}


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    """Whether all bits are equal, those of zeros and NaNs too."""
    integer = torch.int32 if ours.dtype == torch.float32 else torch.int16
    return torch.equal(ours.contiguous().view(integer), theirs.contiguous().view(integer))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("out_features", "in_features"), [(96, 64), (61, 45), (700, 512), (64, 2048)])
def test_rows_of_a_product(capability: str, dtype: torch.dtype, out_features: int, in_features: int) -> None:
    """70 rows at once, in parts, from rows of another matrix, alone; by one thread and by two."""
    weight, bias = randn(out_features, in_features, dtype=dtype), randn(out_features, seed=1, dtype=dtype)
    x = randn(70, in_features, seed=2, dtype=dtype)
    emulated = capability == "amx_emulation" and out_features * in_features > 100_000
    parts = [70, 33] if emulated else [70, 1, 3, 5, 7, 12, 13, 34]
    with use(capability):
        layer = ops.pack_linear(weight, paired=out_features % 2 == 0)
        with threads(1):
            expected, logits = ops.linear(x, layer, bias), ops.logits(x, layer)
        for count in (1, 2):
            with threads(count):
                for part in parts:
                    chunks = x.split(part)
                    assert same_bits(torch.cat([ops.linear(chunk, layer, bias) for chunk in chunks]), expected)
                    assert same_bits(torch.cat([ops.logits(chunk, layer) for chunk in chunks]), logits)
                wide = torch.cat([x, x], dim=1)[:, in_features:]
                assert same_bits(ops.linear(wide, layer, bias), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fused", [False, True])
def test_many_rows_of_a_product(capability: str, dtype: torch.dtype, fused: bool) -> None:
    """So many rows that threads divide them, into groups; an odd number of blocks; alone and with what fuses."""
    rows, hidden, inner = 410, 1056, 96
    weight = randn(2 * inner if fused else inner, hidden, dtype=dtype)
    norm, x = randn(hidden, seed=1, dtype=dtype), randn(rows, hidden, seed=2, dtype=dtype)
    with use(capability):
        layer = ops.pack_linear(weight, paired=fused)
        program = Program("cpu", max_tokens=rows)
        recorded: Any = program.input("x", Spec("tokens", hidden, dtype))
        if fused:
            recorded = ops.rms_norm(recorded, norm, 1e-5)
        result = ops.linear(recorded, layer)
        program.finish(ops.act_and_mul(result, "silu") if fused else result)
        assert program.python_ops == 0
        with threads(1):
            expected = torch.cat([program.replay({"x": part})[0].clone() for part in x.split(5)])
        for count in (1, 2, 3):
            with threads(count):
                for part in (rows, 300):
                    parts = [program.replay({"x": chunk})[0].clone() for chunk in x.split(part)]
                    assert same_bits(torch.cat(parts), expected)


@pytest.mark.parametrize("in_features", [45, 320])
def test_products_are_added_in_order(capability: str, in_features: int) -> None:
    """Each element of a product of bfloat16 has one sum, over ascending k, unless the CPU adds pairs at once.

    Products of two such numbers are exact in float32, so that multiplying and adding in one step changes no bit.
    """
    if not {"avx512_bf16", "amx_bf16"}.isdisjoint(build.ALL[capability].needs):
        pytest.skip("this CPU's instruction adds pairs")
    weight, x = (randn(rows, in_features, seed=rows, dtype=torch.bfloat16) for rows in (96, 31))
    expected = torch.zeros(31, 96)
    for column, row in zip(x.float().T, weight.float().T, strict=True):
        expected += column[:, None] * row
    with use(capability):
        layer = ops.pack_linear(weight)
        for part in (*range(1, 9), 12, 31):
            assert same_bits(torch.cat([ops.logits(rows, layer) for rows in x.split(part)]), expected)


CACHES = [
    *((dtype, dtype) for dtype in DTYPES),
    (torch.bfloat16, torch.int8),
    (torch.float32, torch.float8_e4m3fn),
]
"""Types of activations and of caches."""


@pytest.mark.parametrize(("dtype", "cache_dtype"), CACHES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_attention_of_random_batches(capability: str, name: str, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    """Random mixtures of decode and chunks of prompts against each request alone, one token after another."""
    shape = SHAPES[name]
    lengths = [5, 300, 33, 290, 64, 41] if capability != "amx_emulation" else [5, 262, 33, 64]
    with use(capability):
        with threads(1):
            alone = Requests(shape, lengths, dtype, cache_dtype=cache_dtype, seed=3)
            expected = [
                torch.cat([alone.step({row: 1})[row] for _ in range(length)]) for row, length in enumerate(lengths)
            ]
        for seed, count in enumerate((1, 2, 3)):
            with threads(count):
                batched = Requests(shape, lengths, dtype, cache_dtype=cache_dtype, seed=3)
                results = run_randomly(batched, lengths, random.Random(seed))
            for result, alone_result in zip(results, expected, strict=True):
                assert same_bits(result, alone_result)


@pytest.mark.parametrize(("dtype", "cache_dtype"), CACHES, ids=str)
@pytest.mark.parametrize("block_size", [32, 96])
def test_a_few_tokens_of_each_request(
    capability: str, block_size: int, dtype: torch.dtype, cache_dtype: torch.dtype
) -> None:
    """As with drafts, within blocks, across their ends, and across parts of the context that threads may share."""
    starts, counts = [40, 29, 254, 33, 250, 0], [3, 4, 4, 2, 4, 1]
    lengths = [start + count for start, count in zip(starts, counts, strict=True)]
    for shape in (SHAPES["groups of 3"], AttentionShape(2, 2, 40, scale=0.2, sliding_window=70)):
        results: list[list[Tensor]] = []
        with use(capability):
            for num_threads, together in ((1, False), (1, True), (3, True)):
                with threads(num_threads):
                    requests = Requests(shape, lengths, dtype, block_size=block_size, cache_dtype=cache_dtype, seed=5)
                    requests.step({row: start for row, start in enumerate(starts) if start})
                    if together:
                        results.append([*requests.step(dict(enumerate(counts))).values()])
                    else:
                        one = [[requests.step({row: 1})[row] for _ in range(n)] for row, n in enumerate(counts)]
                        results.append([torch.cat(each) for each in one])
        for found in results[1:]:
            assert all(same_bits(mine, alone) for mine, alone in zip(found, results[0], strict=True))


def run_randomly(requests: Requests, lengths: list[int], rng: random.Random) -> list[Tensor]:
    """Steps with random requests and random numbers of tokens, until all are done."""
    parts: list[list[Tensor]] = [[] for _ in lengths]
    while open_rows := [row for row, length in enumerate(lengths) if requests.done[row] < length]:
        rows = rng.sample(open_rows, rng.randint(1, len(open_rows)))
        counts = {}
        for row in rows:
            left = lengths[row] - requests.done[row]
            counts[row] = min(left, rng.choice([1, 1, 2, 7, 31, 64, 150, left]))
        for row, result in requests.step(counts).items():
            parts[row].append(result)
    return [torch.cat(results) for results in parts]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shared_blocks(capability: str, dtype: torch.dtype) -> None:
    """A request may read blocks that another one fills in the same step."""
    shape = SHAPES["groups of 3"]
    with use(capability):
        expected = run([90, 90], shape, dtype, [{0: 90}, {1: 90}], share=0)
        for count in (1, 2):
            with threads(count):
                results = run([90, 90], shape, dtype, [{0: 50}, {0: 40, 1: 26}], share=64)
                assert same_bits(results[0], expected[0])
                assert same_bits(results[1], expected[1][64:])


def run(
    lengths: list[int], shape: AttentionShape, dtype: torch.dtype, steps: Iterable[dict[int, int]], share: int
) -> list[Tensor]:
    """Two requests with the same first ``share`` tokens, in the same blocks."""
    requests = Requests(shape, lengths, dtype, seed=4)
    for mine, theirs in zip(requests.data[1], requests.data[0], strict=True):
        mine[:64] = theirs[:64]
    requests.table[1, : share // requests.block_size] = requests.table[0, : share // requests.block_size]
    requests.done[1] = share
    parts: list[list[Tensor]] = [[] for _ in lengths]
    for counts in steps:
        for row, result in requests.step(counts).items():
            parts[row].append(result)
    return [torch.cat(results) for results in parts]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_ops_row_by_row(capability: str, dtype: torch.dtype) -> None:
    x, weight = randn(40, 8 * 96, dtype=dtype), randn(96, seed=1, dtype=dtype)
    whole = weight.repeat(8)
    with use(capability):
        functions: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
            lambda rows: ops.rms_norm(rows, weight, 1e-5),
            lambda rows: ops.rms_norm(rows, whole, 1e-5),
            lambda rows: ops.rms_norm(rows, weight, 1e-5, offset=1.0, round_first=False),
            lambda rows: ops.layer_norm(rows, whole, None, 1e-5),
            lambda rows: ops.act_and_mul(rows, "silu"),
            lambda rows: ops.activation(rows, "gelu"),
        )
        for function in functions:
            with threads(1):
                expected = torch.cat([function(row) for row in x.split(1)])
            with threads(2):
                assert same_bits(function(x), expected)
                assert same_bits(torch.cat([function(rows) for rows in x.split(7)]), expected)


def test_numbers_of_a_neighbour_do_not_leak(capability: str) -> None:
    """A request whose numbers are not finite leaves those of others alone."""
    shape = SHAPES["groups of 3"]
    for dtype, cache_dtype in CACHES:
        with use(capability):
            clean = Requests(shape, [40, 70], dtype, cache_dtype=cache_dtype)
            expected = clean.step({0: 40, 1: 70})[1]
            dirty = Requests(shape, [40, 70], dtype, cache_dtype=cache_dtype)
            for tensor in dirty.data[0]:
                tensor.fill_(float("nan"))
            assert same_bits(dirty.step({0: 40, 1: 70})[1], expected)
            weight = ops.pack_linear(randn(64, 50, dtype=dtype))
            x = randn(20, 50, seed=1, dtype=dtype)
            product = ops.linear(x, weight)
            x[3] = float("inf")
            with_neighbour = ops.linear(x, weight)
            others = [row for row in range(20) if row != 3]
            assert same_bits(with_neighbour[others], product[others])
