"""Kernels move little more than they must. What programs read again while it is in the L2 cache counts for each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.cpu import randn
from tests.triton_interpreter import count_bytes

pytest.importorskip("triton", reason="Triton is not installed")

from ops.metadata import AttentionMetadata
from ops.packed import ExpertWeights
from ops.triton import experts, gather, gemm, kv_cache, logprobs, norm, pointwise, rope, sample
from ops.triton.gemm import Epilogue

BFLOAT16 = torch.bfloat16


def numbers(*shape: int, dtype: torch.dtype = BFLOAT16) -> Tensor:
    return randn(*shape, dtype=dtype)


def _product(n: int, k: int, rows: int) -> tuple[Callable[[], object], float]:
    x, weight, residual = numbers(rows, k), numbers(n, k), numbers(rows, n)
    tiles = -(-n // 64)
    segments = gemm.num_segments(n, k)
    partials = 2 * 4 * 8 * n * segments if segments > 1 else 0
    moved = weight.nbytes + tiles * x.nbytes + 2 * residual.nbytes + partials
    return partial(gemm.matmul, x, weight, Epilogue(residual=residual)), moved


def _cache() -> tuple[Callable[[], object], float]:
    x, cache = numbers(4, 2 * 64), torch.zeros(2, 2, 32, 66, dtype=torch.int8)
    lengths = torch.zeros(2, dtype=torch.int32)
    step = AttentionMetadata(lengths, lengths[1:], lengths.view(1, 2), torch.arange(5, 9), 32)
    return partial(kv_cache.write_kv, x, x, (cache, cache.clone()), step), 2 * (x.nbytes + 4 * 2 * 66) + 3 * 8 * 4 * 2


def _rope() -> tuple[Callable[[], object], float]:
    x, positions, table = numbers(8, 256), torch.arange(8), numbers(16, 64, dtype=torch.float32)
    return partial(rope.rotary_embedding, x, positions, table, 64), 2 * x.nbytes + 8 * (64 * 4 + 8)


def _sampling(temperature: float, passes: int) -> tuple[Callable[[], object], float]:
    """Rows without top_p or top_k: the largest logit takes one pass, a random token two more."""
    rows = len(LOGITS)
    column = torch.full((rows,), temperature)
    filters = sample.Filters(column, torch.zeros(rows, dtype=torch.int32), torch.ones(rows), torch.zeros(rows))
    numbers = sample.Randomness(torch.arange(rows), torch.arange(rows))
    return partial(sample.sample_rows, LOGITS, filters, numbers), passes * LOGITS.nbytes


def _experts() -> tuple[Callable[[], object], float]:
    """Each weight is read once, as no expert has more than a tile of tokens; what is between products, twice."""
    tokens, hidden, inner, count, top_k = 6, 256, 128, 3, 2
    gate_up, down = ([numbers(*shape) for _ in range(count)] for shape in ((2 * inner, hidden), (hidden, inner)))
    weights = ExpertWeights(tuple(gate_up), tuple(down), None, None, "silu", top_k)
    x, routed = numbers(tokens, hidden), torch.full((tokens, count), 0.5)
    for token in range(tokens):
        routed[token, token % count] = 0
    rows = tokens * top_k
    moved = sum(each.nbytes for each in (*gate_up, *down))
    moved += rows * hidden * 2 * 2 + rows * inner * 2 * (1 + hidden // 64)  # by each tile of columns
    moved += 2 * rows * hidden * 4 + x.nbytes
    return partial(experts.experts, x, routed, weights), moved


def _simple(function: Callable[..., Any], *args: Any, moved: float) -> tuple[Callable[[], object], float]:
    return partial(function, *args), moved


X = numbers(8, 1024)
LOGITS = numbers(2, 4096, dtype=torch.float32)
KERNELS: dict[str, tuple[Callable[[], object], float]] = {
    "product": _product(64, 512, 8),
    "product of two segments": _product(128, 1024, 8),
    "embedding": _simple(gather.gather_rows, X, torch.tensor([3, 1, 3, 0]), moved=2 * 4 * 2048 + 4 * 8),
    "activation": _simple(pointwise.activation, X, "gelu", moved=2 * X.nbytes),
    "gated activation": _simple(pointwise.act_and_mul, X, "silu", moved=1.5 * X.nbytes),
    "sum": _simple(pointwise.add, X, X, moved=3 * X.nbytes),
    "layer norm": _simple(norm.layer_norm, X, X[0], X[1], 1e-5, moved=2 * X.nbytes + 2 * 8 * 2048),
    "rotation": _rope(),
    "cache in int8": _cache(),
    "largest logits": _sampling(0.0, 1),
    "random tokens": _sampling(1.0, 3),
    "experts": _experts(),
    "sums of weights": _simple(logprobs.weight_sum, LOGITS, moved=2 * LOGITS.nbytes),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_move_what_they_must(name: str) -> None:
    call, moved = KERNELS[name]
    with count_bytes() as traffic:
        call()
    assert traffic.loaded + traffic.stored <= 1.05 * moved + 64
