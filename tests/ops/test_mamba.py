"""The recurrence of Mamba-2: the definition against transformers, the kernels against the definition, and the same bits
however requests are divided into steps."""

from __future__ import annotations

import random
from dataclasses import replace

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
    "groups": AttentionShape(4, 2, 24, 1.0, v_head_dim=40, sliding_window=2, kind="mamba", conv_length=4),
    "one group": AttentionShape(3, 1, 32, 1.0, v_head_dim=16, sliding_window=2, kind="mamba", conv_length=2),
}
BLOCK = 16


class MambaRequests:
    """Requests with random inputs, computed step by step."""

    def __init__(
        self, shape: AttentionShape, lengths: list[int], dtype: torch.dtype, *, gate: bool = True, bias: bool = True
    ) -> None:
        self.shape, self.gate = shape, gate
        width, heads = conv_width(shape), shape.num_heads
        self.data = [
            [randn(length, columns, seed=10 * row + i, dtype=dtype) for i, columns in enumerate(self.widths)]
            for row, length in enumerate(lengths)
        ]
        self.conv, self.conv_bias = (
            0.5 * randn(shape.conv_length, width, seed=7),
            randn(width, seed=6) if bias else None,
        )
        self.decay = -randn(heads, seed=8).exp()
        self.skip, self.bias = randn(heads, seed=5), randn(heads, seed=9)
        each = -(-max(lengths) // BLOCK)
        count = len(lengths) * each
        self.table = torch.randperm(count, generator=torch.Generator().manual_seed(1)).int().view(len(lengths), each)
        # What an earlier owner left in a block must not matter.
        self.cache = torch.full((count, ops.state_size(shape)), float("nan"))
        self.done = [0] * len(lengths)

    @property
    def widths(self) -> tuple[int, int, int]:
        """Columns of x with B and C, of the steps, and of the gate."""
        return conv_width(self.shape), self.shape.num_heads, self.shape.out_width

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
        x, step, gate = (torch.cat([self.data[row][i][at] for row, at in places.items()]) for i in range(3))
        weights = (self.conv, self.conv_bias, self.decay, self.skip, self.bias)
        out = ops.mamba(x, step, gate if self.gate else None, *weights, self.cache, meta, self.shape)
        return dict(zip(counts, out.split(sizes), strict=True))


@pytest.mark.parametrize("name", SHAPES)
def test_the_definition(name: str) -> None:
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    shape = replace(SHAPES[name], step_limits=(0.3, 1.5))
    requests = MambaRequests(shape, [50], torch.float32)
    with using("reference"):
        found = torch.cat([requests.step({0: count})[0] for count in (1, 30, 2, 17)])
    x, step, gate = requests.data[0]
    padded = F.pad(x.T, (shape.conv_length - 1, 0))
    mixed = F.silu(F.conv1d(padded[None], requests.conv.T[:, None], requests.conv_bias, groups=x.shape[1]))[0].T
    groups = shape.num_kv_heads * shape.head_dim
    own, b, c = mixed.split([shape.out_width, groups, groups], dim=1)
    expected = mamba2_chunk_scan(
        own.view(1, 50, shape.num_heads, -1),
        step[None],
        requests.decay,
        b.view(1, 50, shape.num_kv_heads, -1),
        c.view(1, 50, shape.num_kv_heads, -1),
        chunk_size=16,
        D=requests.skip,
        dt_bias=requests.bias,
        dt_softplus=True,
        dt_limit=shape.step_limits,
    )
    torch.testing.assert_close(found, expected[0].flatten(1) * F.silu(gate), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("capability", NAMES)
def test_kernels(capability: str, name: str, dtype: torch.dtype) -> None:
    """Random mixtures of requests and chunks, by one thread and two, against whole requests alone."""
    lengths, options = [5, 100, 33], {"gate": name == "groups", "bias": name == "groups"}
    with using("reference"):
        plain = MambaRequests(SHAPES[name], lengths, dtype, **options)
        definition = [plain.step({row: length})[row] for row, length in enumerate(lengths)]
    with use(capability):
        alone = MambaRequests(SHAPES[name], lengths, dtype, **options)
        with threads(1):
            expected = [alone.step({row: length})[row] for row, length in enumerate(lengths)]
        for count in (1, 2):
            rng = random.Random(count)
            batched = MambaRequests(SHAPES[name], lengths, dtype, **options)
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
    shape = SHAPES["groups"]
    with using(op_set):
        requests = MambaRequests(shape, [40, 40], torch.float32)
        expected = requests.step({0: 40})[0]
        requests = MambaRequests(shape, [40, 40], torch.float32)
        for mine, theirs in zip(requests.data[1], requests.data[0], strict=True):
            mine.copy_(theirs)
        requests.table[1, :2] = requests.table[0, :2]
        requests.done[1] = 2 * BLOCK
        results = requests.step({0: 36, 1: 8})
    assert torch.equal(results[0], expected[:36])
    assert torch.equal(results[1], expected[2 * BLOCK :])
