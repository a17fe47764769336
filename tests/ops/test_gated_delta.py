"""The gated delta rule: the definition against transformers, the kernels against the definition, and the same bits
however requests are divided into steps."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ops
from ops import AttentionMetadata, AttentionShape
from ops.reference.delta import conv_width
from tests.ops.cpu import DTYPES, NAMES, randn, threads, use, using
from tests.ops.test_cpu_invariance import same_bits

SHAPES = {
    "shared keys": AttentionShape(4, 2, 24, 1.0, v_head_dim=40, sliding_window=2, kind="gated_delta", conv_length=4),
    "tiled": AttentionShape(
        4, 2, 24, 1.0, v_head_dim=40, sliding_window=2, kind="gated_delta", conv_length=4, has_tiled_heads=True
    ),
    "own keys": AttentionShape(2, 2, 32, 1.0, v_head_dim=16, sliding_window=2, kind="gated_delta", conv_length=2),
}
BLOCK = 16


class DeltaRequests:
    """Requests with random inputs, computed step by step."""

    def __init__(self, shape: AttentionShape, lengths: list[int], dtype: torch.dtype) -> None:
        self.shape = shape
        widths = (conv_width(shape), shape.num_heads, shape.num_heads)
        self.data = [
            [randn(length, width, seed=10 * row + i, dtype=dtype) for i, width in enumerate(widths)]
            for row, length in enumerate(lengths)
        ]
        self.conv = 0.5 * randn(shape.conv_length, widths[0], seed=7).to(dtype)
        self.decay, self.bias = -randn(shape.num_heads, seed=8).exp(), randn(shape.num_heads, seed=9)
        each = -(-max(lengths) // BLOCK)
        count = len(lengths) * each
        self.table = torch.randperm(count, generator=torch.Generator().manual_seed(1)).int().view(len(lengths), each)
        # What an earlier owner left in a block must not matter.
        self.cache = torch.full((count, ops.state_size(shape)), float("nan"))
        self.done = [0] * len(lengths)

    def step(self, counts: dict[int, int]) -> dict[int, Tensor]:
        """Computes the next tokens of some requests, in this order; returns each one's result."""
        places = {row: torch.arange(self.done[row], self.done[row] + count) for row, count in counts.items()}
        for row, count in counts.items():
            self.done[row] += count
        sizes = list(counts.values())
        starts = torch.tensor([0, *sizes]).cumsum(0).int()
        slots = torch.cat([self.table[row][at // BLOCK].long() * BLOCK + at % BLOCK for row, at in places.items()])
        ends = torch.tensor([self.done[row] for row in counts], dtype=torch.int32)
        meta = AttentionMetadata(starts, ends, self.table[list(counts)], slots, BLOCK)
        qkv, beta, step = (torch.cat([self.data[row][i][at] for row, at in places.items()]) for i in range(3))
        out = ops.gated_delta(qkv, beta, step, self.conv, self.decay, self.bias, self.cache, meta, self.shape)
        return dict(zip(counts, out.split(sizes), strict=True))


@pytest.mark.parametrize("name", SHAPES)
def test_the_definition(name: str) -> None:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

    shape = SHAPES[name]
    requests = DeltaRequests(shape, [50], torch.float32)
    with using("reference"):
        found = torch.cat([requests.step({0: count})[0] for count in (1, 30, 2, 17)])
    qkv, beta, step = requests.data[0]
    padded = F.pad(qkv.T, (shape.conv_length - 1, 0))
    mixed = F.silu(F.conv1d(padded[None], requests.conv.T[:, None], groups=qkv.shape[1]))[0].T
    keys = shape.num_kv_heads * shape.head_dim
    q, k, v = mixed.split([keys, keys, shape.out_width], dim=1)
    if shape.has_tiled_heads:
        q, k = (each.view(50, shape.num_kv_heads, -1).repeat(1, 2, 1).flatten(1) for each in (q, k))
    expected, _ = torch_recurrent_gated_delta_rule(
        q.view(1, 50, -1, shape.head_dim),
        k.view(1, 50, -1, shape.head_dim),
        v.view(1, 50, shape.num_heads, -1),
        (requests.decay * F.softplus(step + requests.bias))[None],
        beta.sigmoid()[None],
        use_qk_l2norm_in_kernel=True,
    )
    torch.testing.assert_close(found, expected[0].flatten(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("capability", NAMES)
def test_kernels(capability: str, name: str, dtype: torch.dtype) -> None:
    """Random mixtures of requests and chunks, by one thread and two, against whole requests alone."""
    lengths = [5, 100, 33]
    with using("reference"):
        plain = DeltaRequests(SHAPES[name], lengths, dtype)
        definition = [plain.step({row: length})[row] for row, length in enumerate(lengths)]
    with use(capability):
        alone = DeltaRequests(SHAPES[name], lengths, dtype)
        with threads(1):
            expected = [alone.step({row: length})[row] for row, length in enumerate(lengths)]
        for count in (1, 2):
            rng = random.Random(count)
            batched = DeltaRequests(SHAPES[name], lengths, dtype)
            parts: list[list[Tensor]] = [[] for _ in lengths]
            with threads(count):
                while rows := [row for row, length in enumerate(lengths) if batched.done[row] < length]:
                    rows = rng.sample(rows, rng.randint(1, len(rows)))
                    counts = {row: min(lengths[row] - batched.done[row], rng.choice([1, 2, 16, 70])) for row in rows}
                    for row, result in batched.step(counts).items():
                        parts[row].append(result)
            for part, whole in zip(parts, expected, strict=True):
                assert same_bits(torch.cat(part), whole)
    tolerance = {torch.bfloat16: 0.02, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]
    for result, exact in zip(expected, definition, strict=True):
        torch.testing.assert_close(result, exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("op_set", ["reference", "cpu"])
def test_a_request_goes_on_from_a_block_that_another_fills_in_the_same_step(op_set: str) -> None:
    shape = SHAPES["shared keys"]
    with using(op_set):
        requests = DeltaRequests(shape, [40, 40], torch.float32)
        expected = requests.step({0: 40})[0]
        requests = DeltaRequests(shape, [40, 40], torch.float32)
        for mine, theirs in zip(requests.data[1], requests.data[0], strict=True):
            mine.copy_(theirs)
        requests.table[1, :2] = requests.table[0, :2]
        requests.done[1] = 2 * BLOCK
        results = requests.step({0: 36, 1: 8})
    assert torch.equal(results[0], expected[:36])
    assert torch.equal(results[1], expected[2 * BLOCK :])
