"""Kernels move little more than they must. What programs read again while it is in the L2 cache counts for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import ops
from ops import Adapter, AdapterTable, AttentionMetadata, AttentionShape, ExpertWeights, Routing
from tests.ops import test_gated_delta, test_mamba
from tests.ops.cpu import randn, using
from tests.ops.recurrent import BLOCK, Requests
from tests.ops.test_adapters import some_rows
from tests.ops.test_gated_delta import DeltaRequests
from tests.ops.test_mamba import MambaRequests
from tests.triton_interpreter import count_bytes

pytest.importorskip("triton", reason="Triton is not installed")

from ops.triton import (
    adapters,
    experts,
    gather,
    gemm,
    kv_cache,
    latent,
    linear,
    logprobs,
    norm,
    op_set,
    pointwise,
    prepare,
    rope,
    route,
    sample,
    short_conv,
)
from ops.triton.gemm import Epilogue
from tests.ops.test_triton_latent import TritonRequests

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


def _rounded(format: str) -> tuple[Callable[[], object], float]:
    """Rows are read twice, for their largest number and to be rounded."""
    rows, n, k = 8, 64, 512
    codes, scales = torch.ones(n, k, dtype=torch.uint8), torch.ones(n, 1)
    with using("triton"):
        if format == "int8":
            weight = ops.pack_groups(codes, scales, bits=8, dtype=BFLOAT16, activations="int8_per_token")
        else:
            weight = ops.pack_floats(codes, scales, format=format, dtype=BFLOAT16, activations="fp8_per_token")
    x = numbers(rows, k)
    moved = 2 * x.nbytes + 2 * rows * (k + 4) + n * (k + 4) + 2 * rows * n
    return partial(linear.linear, x, weight), moved


def _heads() -> tuple[Callable[[], object], float]:
    x, weights = numbers(8, 2 * 128), tuple(numbers(64, 128) for _ in range(2))
    moved = x.nbytes + sum(each.nbytes for each in weights) + 8 * 2 * 64 * 2
    return partial(latent.heads_linear, x, weights, 128), moved + 2 * 8


def _latents() -> tuple[Callable[[], object], float]:
    """A row of the cache is key and value of all heads; the parts of a context leave their sums."""
    shape = AttentionShape(16, 1, 288, scale=0.1, v_head_dim=256, kind="latent")
    requests = TritonRequests(shape, [1024])
    requests.done, requests.cache = [1023], torch.zeros_like(requests.cache)
    sums = 2 * 2 * 16 * 4 * (256 + 2)
    return partial(requests.step, {0: 1}), requests.cache[: 1024 // 32].nbytes + sums + 16 * (288 + 256) * 2 * 2


def _rotated_cache() -> tuple[Callable[[], object], float]:
    """Tokens within blocks: nothing has to be zeroed."""
    q, k, positions, table = numbers(4, 4 * 64), numbers(4, 2 * 64), torch.arange(5, 9), randn(16, 64)
    caches = torch.zeros(2, 2, 32, 64, dtype=BFLOAT16), torch.zeros(2, 2, 32, 64, dtype=BFLOAT16)
    moved = 2 * (q.nbytes + 2 * k.nbytes) + 4 * (2 * 64 * 4 + 2 * 8) + 4 * 4 * 8
    return partial(rope.rope_kv, q, k, k, positions, table, table, torch.arange(5, 9), caches), moved


def _convolution() -> tuple[Callable[[], object], float]:
    """A token reads the inputs of the convolution's length, and its weights."""
    tokens, width, length = 4, 1024, 3
    x, weight, cache = numbers(tokens, width), numbers(length, width), torch.zeros(1, 16, width, dtype=BFLOAT16)
    starts, lengths = torch.tensor([0, tokens], dtype=torch.int32), torch.tensor([9], dtype=torch.int32)
    meta = AttentionMetadata(starts, lengths, torch.zeros(1, 1, dtype=torch.int32), torch.arange(5, 9), 16)
    moved = 5 * x.nbytes + tokens * length * width * 4
    return partial(short_conv.short_conv, x, x, x, weight, None, cache, meta), moved


def _states(make: Callable[[list[int]], Requests]) -> tuple[Callable[[], object], float]:
    """A state is read and written once. The rest of a token is small beside it, and is read by each tile of columns."""
    with using(op_set.create()):
        requests = make([2 * BLOCK])
        requests.step({0: 5})

    def step() -> None:
        with using(op_set.create()):
            requests.step({0: 1})

    shape = requests.shape
    tiles = shape.num_heads * -(-shape.v_dim // 16)
    return step, 2 * 4 * requests.cache.shape[1] + tiles * 2 * 2 * shape.head_dim + 12 * sum(
        each[0].nbytes for each in requests.data[0]
    )


def _adapter() -> tuple[Callable[[], object], float]:
    """Sums of the layer and of the adapter's rows are written and read."""
    n, k, rank = 256, 512, 16
    x, weight = numbers(1, k), numbers(n, k)
    table = AdapterTable(2)
    adapter = Adapter(numbers(rank, k), numbers(n, rank), torch.ones(rank))
    table.put(1, adapters.pack_adapter(adapter, weight))
    moved = weight.nbytes + 4 * x.nbytes + adapter.a.nbytes + adapter.b.nbytes + 2 * 4 * n + 2 * n + 64 * 3 * rank
    return partial(adapters.adapted_linear, x, weight, None, table, some_rows([1])), moved


def _inputs() -> tuple[Callable[[], object], float]:
    """What a step's inputs are completed with, and its rows of block tables."""
    tables, slots = torch.arange(4 * 256, dtype=torch.int32).view(4, 256), torch.arange(4, dtype=torch.int32)
    lengths, out = torch.full((4,), 32 * 256, dtype=torch.int32), torch.zeros(4, 256, dtype=torch.int32)
    return partial(prepare.block_rows, tables, slots, lengths, 32, out), 2 * tables.nbytes + 8 * 4


def _most_likely() -> tuple[Callable[[], object], float]:
    """One pass for the largest, one for sums and ranks, two that search, and what is kept of the last one."""
    return partial(logprobs.most_likely, LOGITS, torch.tensor([5, 7]), 5), 4.1 * LOGITS.nbytes


def _simple(function: Callable[..., Any], *args: Any, moved: float) -> tuple[Callable[[], object], float]:
    return partial(function, *args), moved


DELTA, MAMBA = test_gated_delta.SHAPES, test_mamba.SHAPES
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
    "product in int8": _rounded("int8"),
    "product in FP8": _rounded("fp8_e4m3"),
    "products of heads": _heads(),
    "latent attention": _latents(),
    "rotation into the cache": _rotated_cache(),
    "short convolution": _convolution(),
    "delta rule": _states(
        partial(DeltaRequests, replace(DELTA["own keys"], head_dim=64, v_head_dim=64), dtype=BFLOAT16)
    ),
    "mamba": _states(partial(MambaRequests, replace(MAMBA["one group"], head_dim=64, v_head_dim=64), dtype=BFLOAT16)),
    "adapter": _adapter(),
    "block tables": _inputs(),
    "router": _simple(route.route, LOGITS[:, :128], Routing(8), moved=2 * 2 * 128 * 4),
    "side by side": _simple(gather.concat, X, X, moved=4 * X.nbytes),
    "most likely tokens": _most_likely(),
    "sums of weights": _simple(logprobs.weight_sum, LOGITS, moved=2 * LOGITS.nbytes),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_move_what_they_must(name: str) -> None:
    call, moved = KERNELS[name]
    with count_bytes() as traffic:
        call()
    assert traffic.loaded + traffic.stored <= 1.05 * moved + 64
