"""Latent attention on every capability: against the definition, against its expanded form, and the same bits however
requests are divided into steps."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import ops
from ops import AttentionMetadata, AttentionShape
from ops.cpu.instructions import latent_shapes
from tests.ops.cpu import DTYPES, NAMES, randn, threads, use, using
from tests.ops.test_cpu_invariance import same_bits

EVERY = pytest.mark.parametrize("capability", NAMES)
SHAPES = {
    "heads of a tile": AttentionShape(5, 1, 56, scale=0.2, v_head_dim=40, kind="latent", rotates_pairs=True),
    "more heads": AttentionShape(50, 1, 96, scale=0.15, v_head_dim=64, kind="latent"),
}
NOPE = 24
"""Columns of a query before those that are rotated."""


class LatentRequests:
    """Requests with random queries and latents, whose attention is computed step by step."""

    def __init__(self, shape: AttentionShape, lengths: list[int], dtype: torch.dtype, *, plain: bool = False) -> None:
        self.shape, self.dtype, self.plain = shape, dtype, plain
        rotary = shape.head_dim - shape.v_dim
        widths = (shape.num_heads * shape.v_dim, shape.num_heads * (NOPE + rotary), shape.v_dim, rotary)
        self.data = [
            [randn(length, width, seed=10 * row + i, dtype=dtype) for i, width in enumerate(widths)]
            for row, length in enumerate(lengths)
        ]
        angles = torch.outer(torch.arange(max(lengths)).float(), 0.5 ** torch.arange(rotary // 2))
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), -1).contiguous()
        each = -(-max(lengths) // 32)
        count = len(lengths) * each
        self.table = torch.randperm(count, generator=torch.Generator().manual_seed(1)).int().view(len(lengths), each)
        (size,) = latent_shapes(count, 32, shape, dtype)
        # What an earlier owner left in a block must not matter.
        self.cache = torch.full((count, 32, 1, shape.head_dim) if plain else size, float("nan"), dtype=dtype)
        self.done = [0] * len(lengths)

    def step(self, counts: dict[int, int]) -> dict[int, Tensor]:
        """Attends with the next tokens of some requests, in this order; returns each one's result."""
        places = {row: torch.arange(self.done[row], self.done[row] + count) for row, count in counts.items()}
        for row, count in counts.items():
            self.done[row] += count
        sizes = list(counts.values())
        starts = torch.tensor([0, *sizes]).cumsum(0).int()
        slots = torch.cat([self.table[row][at // 32].long() * 32 + at % 32 for row, at in places.items()])
        ends = torch.tensor([self.done[row] for row in counts], dtype=torch.int32)
        meta = AttentionMetadata(starts, ends, self.table[list(counts)], slots, 32)
        q, q_rope, latents, k_rope = (
            torch.cat([self.data[row][i][at] for row, at in places.items()]) for i in range(4)
        )
        positions = torch.cat(list(places.values())).int()
        layout: ops.KVLayout = "plain" if self.plain else "tiled"
        cache = (self.cache,)
        out = self.attend(q, q_rope, latents, k_rope, positions, self.cos_sin, cache, meta, self.shape, layout)
        return dict(zip(counts, out.split(sizes), strict=True))

    def attend(self, *args: Any) -> Tensor:
        """The op."""
        return ops.latent_attention(*args)


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_latent_attention(capability: str, name: str, dtype: torch.dtype) -> None:
    lengths = [1, 33, 290]
    steps = [{0: 1, 2: 257}, {1: 20, 2: 3}, {2: 29, 1: 12}, {1: 1, 2: 1}]
    with use(capability), threads(2):
        ours, plain = (LatentRequests(SHAPES[name], lengths, dtype, plain=plain) for plain in (False, True))
        for counts in steps:
            results, expected = ours.step(counts), plain.step(counts)
            for row, result in results.items():
                tolerance = {torch.bfloat16: 0.03, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]
                torch.testing.assert_close(result, expected[row], rtol=tolerance / 4, atol=tolerance)


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_bits_of_latent_attention(capability: str, name: str, dtype: torch.dtype) -> None:
    """Random mixtures of decode and chunks of prompts, by one thread and two, against whole requests on their own."""
    lengths = [5, 290, 41]
    with use(capability):
        alone = LatentRequests(SHAPES[name], lengths, dtype)
        with threads(1):
            expected = [alone.step({row: length})[row] for row, length in enumerate(lengths)]
        for count in (1, 2):
            rng = random.Random(count)
            batched = LatentRequests(SHAPES[name], lengths, dtype)
            parts: list[list[Tensor]] = [[] for _ in lengths]
            with threads(count):
                while rows := [row for row, length in enumerate(lengths) if batched.done[row] < length]:
                    rows = rng.sample(rows, rng.randint(1, len(rows)))
                    counts = {
                        row: min(lengths[row] - batched.done[row], rng.choice([1, 2, 31, 64, 150])) for row in rows
                    }
                    for row, result in batched.step(counts).items():
                        parts[row].append(result)
            for part, whole in zip(parts, expected, strict=True):
                assert same_bits(torch.cat(part), whole)


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_of_heads(capability: str, dtype: torch.dtype) -> None:
    """More rows than are staged at once; the bits of separate products, for any rows."""
    heads, size, columns, rows = 3, 56, 40, 70
    x = randn(300, heads * size, dtype=dtype)
    numbers = [randn(rows, columns, seed=head + 1, dtype=dtype) for head in range(heads)]
    with use(capability), threads(2):
        weights = tuple(map(ops.pack_linear, numbers))
        out = ops.heads_linear(x, weights, size)
        own = [
            ops.linear(head[:, :columns].contiguous(), each)
            for head, each in zip(x.split(size, 1), weights, strict=True)
        ]
        assert same_bits(out, torch.cat(own, dim=1))
        assert same_bits(torch.cat([ops.heads_linear(part, weights, size) for part in x[:20].split(7)]), out[:20])
    expected = ops.heads_linear.reference(x, numbers, size)
    tolerance = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float32: 1e-4}[dtype]
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


def test_the_expanded_form_at_a_long_context() -> None:
    """Heads with keys and values of their own, as the model was trained: the same to 1e-4."""
    heads, rank, rotary, value, length = 4, 128, 32, 24, 5000
    shape = AttentionShape(heads, 1, rank + rotary, scale=0.15, v_head_dim=rank, kind="latent", rotates_pairs=True)
    requests = LatentRequests(shape, [length], torch.float32)
    _, q, latents, k_rope = requests.data[0]
    up_keys = [0.1 * randn(rank, NOPE, seed=20 + head) for head in range(heads)]
    up_values = [0.1 * randn(value, rank, seed=30 + head) for head in range(heads)]
    requests.data[0][0] = ops.heads_linear(q, tuple(map(ops.pack_linear, up_keys)), NOPE + rotary)
    parts = [requests.step({0: length - 3})[0], requests.step({0: 3})[0]]
    out = ops.heads_linear(torch.cat(parts), tuple(map(ops.pack_linear, up_values)), rank)

    positions = torch.arange(length)
    with using("reference"):
        turned = ops.rotary_embedding(k_rope, positions, requests.cos_sin, rotary, True)
        some = torch.tensor([0, 100, 2500, length - 3, length - 1])
        for head in range(heads):
            own = q.unflatten(1, (heads, -1))[some, head]
            query = torch.cat(
                (own[:, :NOPE], ops.rotary_embedding(own[:, NOPE:], some, requests.cos_sin, rotary, True)), 1
            )
            keys = torch.cat((latents @ up_keys[head], turned), 1)
            scores = (query.double() @ keys.double().T * shape.scale).masked_fill(positions > some[:, None], -torch.inf)
            expected = scores.softmax(-1) @ (latents.double() @ up_values[head].double().T)
            found = out.unflatten(1, (heads, -1))[some, head]
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)


def test_the_cache_has_a_number_for_each_column_of_a_latent() -> None:
    """DeepSeek's 512 and 64, once."""
    shape = replace(SHAPES["heads of a tile"], num_heads=128, head_dim=576, v_head_dim=512)
    (size,) = latent_shapes(10, 64, shape, torch.bfloat16)
    assert torch.Size(size).numel() == 10 * 64 * 576
