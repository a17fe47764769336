"""Paged attention in Triton, interpreted: against the reference, and bit by bit against itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ops.metadata import AttentionMetadata, AttentionShape
from ops.reference.attention import attend
from ops.reference.kv_codes import decode_heads, encode_heads
from tests.triton_interpreter import ORDERS, Order, count_bytes, grid_order

attention: Any = pytest.importorskip("ops.triton.attention")
attention_tiles: Any = pytest.importorskip("ops.triton.attention_tiles")
configs: Any = pytest.importorskip("ops.triton.configs")
launch: Any = pytest.importorskip("ops.triton.launch")

BFLOAT16 = torch.bfloat16
SMALL = AttentionShape(4, 2, 32, 32**-0.5)
TINY = AttentionShape(2, 1, 16, 0.25)


class Requests:
    """Requests with random q, k and v, whose attention is computed step by step."""

    def __init__(
        self,
        shape: AttentionShape,
        lengths: Sequence[int],
        dtype: torch.dtype = BFLOAT16,
        *,
        block_size: int = 32,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.shape, self.block_size, self.dtype = shape, block_size, dtype
        blocks = [-(-length // block_size) for length in lengths]
        order = torch.randperm(sum(blocks) + 2, generator=generator).int()
        self.table = torch.full((len(lengths), max(blocks) + 1), -1, dtype=torch.int32)
        for row, part in enumerate(order[: sum(blocks)].split(blocks)):
            self.table[row, : len(part)] = part
        widths = (shape.q_width, shape.num_kv_heads * shape.head_dim, shape.num_kv_heads * shape.v_dim)
        self.data = [
            [torch.randn(length, width, generator=generator).to(dtype) for width in widths] for length in lengths
        ]
        self.sinks = torch.randn(shape.num_heads, generator=generator).to(dtype) if shape.has_sinks else None
        # What an earlier owner left in a block must not matter.
        keys, values = (
            torch.full((len(order), shape.num_kv_heads, block_size, dim), torch.nan, dtype=dtype)
            for dim in (shape.head_dim, shape.v_dim)
        )
        self.cache = keys, values
        self.done = [0] * len(lengths)

    def meta(self, counts: dict[int, int]) -> AttentionMetadata:
        """A step with the next tokens of some requests, in this order."""
        starts, lengths, slots = [0], [], []
        for row, count in counts.items():
            position = torch.arange(self.done[row], self.done[row] + count)
            slots.append(self.table[row][position // self.block_size].long() * self.block_size + position % 32)
            starts.append(starts[-1] + count)
            lengths.append(self.done[row] + count)
        begins, ends = (torch.tensor(column, dtype=torch.int32) for column in (starts, lengths))
        return AttentionMetadata(begins, ends, self.table[list(counts)], torch.cat(slots), self.block_size)

    def step(self, counts: dict[int, int], meta: AttentionMetadata | None = None, **options: Any) -> dict[int, Tensor]:
        """Attends with the next tokens of some requests; returns each one's result."""
        meta = meta or self.meta(counts)
        q, k, v = (
            torch.cat([self.data[row][i][self.done[row] : self.done[row] + count] for row, count in counts.items()])
            for i in range(3)
        )
        for row, count in counts.items():
            self.done[row] += count
        out = attention.paged_attention(q, k, v, self.cache, meta, self.shape, "heads", self.sinks, **options)
        return dict(zip(counts, out.split(list(counts.values())), strict=True))

    def expected(self, row: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """The attention of all tokens of a request."""
        q, k, v = (x.to(dtype) for x in self.data[row])
        shape = self.shape
        return exact(q, k, v, shape, None if self.sinks is None else self.sinks.to(dtype))


def exact(q: Tensor, k: Tensor, v: Tensor, shape: AttentionShape, sinks: Tensor | None) -> Tensor:
    """The definition in float64, independent of the reference."""
    length = len(q)
    heads = q.view(length, shape.num_kv_heads, -1, shape.head_dim)
    scores = torch.einsum("qhgd,khd->hgqk", heads, k.view(length, shape.num_kv_heads, shape.head_dim)) * shape.scale
    if shape.logit_softcap:
        scores = torch.tanh(scores / shape.logit_softcap) * shape.logit_softcap
    distance = torch.arange(length).unsqueeze(1) - torch.arange(length)
    if shape.alibi_slopes is not None:
        scores = scores - torch.tensor(shape.alibi_slopes).view(shape.num_kv_heads, -1, 1, 1).double() * distance
    if shape.causal:
        hidden = (distance < 0) | (distance >= (shape.sliding_window or length))
        if shape.is_chunked:
            chunk = torch.arange(length) // (shape.sliding_window or length)
            hidden |= chunk.unsqueeze(1) != chunk
        scores = scores.masked_fill(hidden, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(*scores.shape[:2], 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    weights = scores.softmax(dim=-1)[..., :length]
    return torch.einsum("hgqk,khd->qhgd", weights, v.view(length, shape.num_kv_heads, shape.v_dim)).flatten(1)


def assert_close(result: Tensor, expected: Tensor, v: Tensor) -> None:
    """Within the rounding of weights and results to the type."""
    eps = torch.finfo(result.dtype).eps
    torch.testing.assert_close(result.double(), expected, rtol=eps, atol=float(2e-5 + eps / 2 * v.abs().max()))


SHAPES = {
    "plain": SMALL,
    "one head each": AttentionShape(2, 2, 16, 0.25),
    "many heads, one KV head": AttentionShape(20, 1, 16, 0.25),
    "odd group and head": AttentionShape(6, 2, 80, 80**-0.5),
    "different heads of V": AttentionShape(4, 2, 48, 0.14, v_head_dim=24),
    "window": replace(SMALL, sliding_window=70),
    "chunks": replace(SMALL, sliding_window=33, is_chunked=True),
    "wide heads": AttentionShape(2, 1, 512, 0.05),
    "cap": replace(SMALL, logit_softcap=3.0),
    "sinks": replace(SMALL, has_sinks=True, sliding_window=40),
    "alibi": replace(SMALL, alibi_slopes=(0.5, 0.25, 0.125, 0.0625)),
    "both ways": replace(SMALL, causal=False),
}


@pytest.mark.parametrize("name", SHAPES)
def test_prompts_and_decoding_together(name: str) -> None:
    shape = SHAPES[name]
    requests = Requests(shape, [100, 33, 3])
    results = [requests.step({0: 99, 1: 32}), requests.step({1: 1, 0: 1, 2: 2}), requests.step({2: 1})]
    for row, begins in {0: [0, 99], 1: [0, 32], 2: [0, 2]}.items():
        if not shape.causal:  # earlier steps did not see the whole context
            continue
        got = torch.cat([result[row] for result in results if row in result])
        assert begins[-1] < len(got)
        assert_close(got, requests.expected(row), requests.data[row][2])
    if not shape.causal:
        requests = Requests(shape, [100, 33])
        for row, result in requests.step({1: 33, 0: 100}).items():
            assert_close(result, requests.expected(row), requests.data[row][2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_types(dtype: torch.dtype) -> None:
    requests = Requests(SMALL, [75, 5], dtype)
    first, second = requests.step({0: 74, 1: 4}), requests.step({0: 1, 1: 1})
    for row in (0, 1):
        assert_close(torch.cat([first[row], second[row]]), requests.expected(row), requests.data[row][2])


def test_what_the_reference_computes() -> None:
    requests = Requests(SMALL, [50])
    result = requests.step({0: 50})[0]
    q, k, v = (x.unflatten(1, (-1, 32)) for x in requests.data[0])
    torch.testing.assert_close(result, attend(q, k, v, SMALL).flatten(1), rtol=0, atol=2**-7)


@pytest.fixture
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a few tokens, so that contexts that span some are quick to compute."""
    monkeypatch.setattr(attention_tiles, "PART", 128)


@pytest.mark.usefixtures("short_parts")
@pytest.mark.parametrize(
    "shape",
    [TINY, replace(TINY, sliding_window=150, has_sinks=True), replace(TINY, sliding_window=150, is_chunked=True)],
)
def test_the_same_bits_in_parts_chunks_and_batches(shape: AttentionShape) -> None:
    """A prompt that spans parts, at once and in chunks; its last token decoded alone and among others."""
    length, other = 280, 170
    whole = Requests(shape, [length])
    expected = whole.step({0: length})[0]

    chunked = Requests(shape, [length])
    for start, end in ((0, 129), (129, 250), (250, 257), (257, 258), (258, 279), (279, length)):
        result = chunked.step({0: end - start})[0]
        assert torch.equal(result, expected[start:end]), (start, end)

    for order in ORDERS:
        batch = Requests(shape, [length, other, 5])
        batch.done = [length - 1, other - 1, 0]
        batch.cache = tuple(torch.zeros_like(cache) for cache in batch.cache)  # type: ignore[assignment]
        batch.sinks = whole.sinks
        _copy(whole, batch)
        with grid_order(order):
            result = batch.step({2: 5, 0: 1, 1: 1})[0]
        assert torch.equal(result, expected[-1:])


def _copy(source: Requests, target: Requests) -> None:
    """Gives the first request what it has computed elsewhere."""
    target.data[0] = source.data[0]
    count = -(-len(source.data[0][0]) // source.block_size)
    for there, here in zip(source.cache, target.cache, strict=True):
        here[target.table[0, :count].long()] = there[source.table[0, :count].long()]


@pytest.mark.usefixtures("short_parts")
@pytest.mark.parametrize("order", ORDERS)
def test_programs_may_run_in_any_order(order: Order) -> None:
    shape = replace(SMALL, has_sinks=True)
    expected, requests = Requests(shape, [260, 130, 40]), Requests(shape, [260, 130, 40])
    for each in (expected, requests):
        each.done = [257, 127, 36]
        each.cache = tuple(torch.ones_like(cache) for cache in each.cache)  # type: ignore[assignment]
    first = expected.step({0: 2, 1: 2, 2: 3}), expected.step({0: 1, 2: 1, 1: 1})
    with grid_order(order, seed=5):
        second = requests.step({0: 2, 1: 2, 2: 3}), requests.step({0: 1, 2: 1, 1: 1})
    for step, other in zip(first, second, strict=True):
        assert all(torch.equal(step[row], other[row]) for row in step)


@pytest.mark.parametrize("length", [511, 512, 513, 8192])
def test_sums_of_equal_weights_do_not_overflow(length: int) -> None:
    """Identical keys: each weight is 1, and the result is the mean of V."""
    shape = AttentionShape(2, 1, 16, 0.25)
    requests = Requests(shape, [length])
    requests.data[0][0][:] = 0
    requests.data[0][1][:] = 1
    requests.data[0][2][:] = torch.arange(length).unsqueeze(1) % 2
    requests.done = [length - 1]
    for cache, x in zip(requests.cache, requests.data[0][1:], strict=True):
        padded = torch.zeros(-(-length // 32) * 32, 16, dtype=BFLOAT16)
        padded[:length] = x
        cache[requests.table[0, : len(padded) // 32].long()] = padded.view(-1, 1, 32, 16)
    result = requests.step({0: 1})[0]
    torch.testing.assert_close(result, torch.full((1, 32), length // 2 / length, dtype=BFLOAT16), rtol=2**-8, atol=0)


def test_rows_and_tokens_of_padding() -> None:
    """They have no tokens and no slots, and what is in their places is left alone."""
    requests = Requests(SMALL, [40, 1])
    expected = Requests(SMALL, [40, 1]).step({0: 40})[0]
    meta = requests.meta({0: 40})
    padded = AttentionMetadata(
        torch.tensor([0, 40, 40, 40], dtype=torch.int32),
        torch.tensor([40, 0, 0], dtype=torch.int32),
        torch.cat([meta.block_table, torch.full((2, meta.block_table.shape[1]), 1 << 30, dtype=torch.int32)]),
        torch.cat([meta.slot_mapping, torch.full((8,), -1)]),
        meta.block_size,
    )
    q, k, v = (torch.cat([x, torch.full((8, x.shape[1]), torch.nan, dtype=BFLOAT16)]) for x in requests.data[0])
    out = torch.full((48, SMALL.out_width), 7.0, dtype=BFLOAT16)
    before = [cache.clone() for cache in requests.cache]
    result = attention.paged_attention(q, k, v, requests.cache, padded, SMALL, out=out)
    assert result is out and torch.equal(out[:40], expected) and bool((out[40:] == 7).all())
    used = set(requests.table[0, :2].tolist())
    for cache, old in zip(requests.cache, before, strict=True):
        for block in set(range(len(cache))) - used:
            assert torch.equal(cache[block].view(torch.int16), old[block].view(torch.int16))


@pytest.mark.usefixtures("short_parts")
def test_lists_and_static_memory() -> None:
    """A work list in memory that is used again gives the same bits, also if it has room for more."""
    requests, again = Requests(TINY, [160, 50]), Requests(TINY, [160, 50])
    work = attention.new_work_list(TINY, BFLOAT16, 700, 4, 4096, torch.empty(0))
    for part in (work.split, work.whole, work.counts):
        part.fill_(0x5A5A5A5A)
    for counts in ({0: 159, 1: 20}, {0: 1, 1: 3}, {1: 27}):
        meta = again.meta(counts)
        listed = attention.PlannedAttention(
            *(getattr(meta, name) for name in ("query_start_loc", "seq_lens", "block_table", "slot_mapping")),
            meta.block_size,
            attention.plan_attention(meta, TINY, BFLOAT16, work),
        )
        first, second = requests.step(counts), again.step(counts, listed)
        assert all(torch.equal(first[row], second[row]) for row in counts)


@pytest.mark.usefixtures("short_parts")
def test_a_request_that_is_not_split_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = Requests(TINY, [280, 150])
    requests.done = [279, 149]
    keys, values = (torch.ones_like(cache) for cache in requests.cache)
    requests.cache = keys.clone(), values.clone()
    expected = requests.step({0: 1, 1: 1})
    monkeypatch.setattr(attention_tiles, "SPLIT_PARTS", 3)  # enough for the first request alone
    again = Requests(TINY, [280, 150])
    again.done, again.cache = [279, 149], (keys, values)
    result = again.step({0: 1, 1: 1})
    assert all(torch.equal(result[row], expected[row]) for row in expected)


def test_a_layer_that_reads_the_cache_of_an_earlier_one() -> None:
    requests = Requests(SMALL, [60])
    expected = requests.step({0: 60})[0]
    requests.done = [0]
    q = requests.data[0][0]
    result = attention.paged_attention(q, None, None, requests.cache, requests.meta({0: 60}), SMALL)
    assert torch.equal(result, expected)


def test_the_cache_is_read_once() -> None:
    """Decoding moves K, V and little else."""
    requests = Requests(AttentionShape(8, 2, 64, 0.125), [1024])
    requests.done = [1023]
    requests.cache = tuple(torch.zeros_like(cache) for cache in requests.cache)  # type: ignore[assignment]
    with count_bytes() as traffic:
        requests.step({0: 1})
    context = 1024 * 2 * 2 * 64 * 2
    assert context <= traffic.loaded <= 1.05 * context


def test_wide_heads_on_amd_are_not_cut_into_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One program goes through all parts of a token's context, with the same bits."""
    monkeypatch.setattr(attention_tiles, "PART", 64)
    results = []
    for name in ("sm_90", "gfx942"):
        requests = Requests(SHAPES["wide heads"], [70])
        with launch.for_target(configs.TARGETS[name]):
            with launch.recorded() as launches:
                attention.plan_attention(requests.meta({0: 1}), requests.shape, BFLOAT16)
            assert (launches[0].constants["SPLIT_QUERIES"] == 0) == (name == "gfx942")
            results.append([requests.step({0: 69})[0], requests.step({0: 1})[0]])
    assert all(map(torch.equal, *results))


def test_what_is_not_supported_is_named() -> None:
    assert attention_tiles.unsupported(SMALL, BFLOAT16) is None
    assert "float64" in attention_tiles.unsupported(SMALL, torch.float64)
    assert "1024 numbers" in attention_tiles.unsupported(AttentionShape(4, 2, 1024, 0.1), BFLOAT16)


@pytest.mark.parametrize(("kv_dtype", "scales"), [(torch.float8_e4m3fn, (0.5, 2.0)), (torch.float8_e5m2, (1.0, 1.0))])
def test_a_cache_in_fp8(kv_dtype: torch.dtype, scales: tuple[float, float]) -> None:
    shape = replace(SMALL, k_scale=scales[0], v_scale=scales[1])
    requests = Requests(shape, [37, 5])
    for _, k, v in requests.data:  # some beyond the range of e4m3
        k[::7] *= 200
        v[::5] *= 300
    caches = [torch.full(cache.shape, -1, dtype=torch.int8).view(kv_dtype) for cache in requests.cache]
    requests.cache = caches[0], caches[1]
    found = requests.step({0: 37, 1: 4})
    meta = requests.meta({1: 1})
    found |= {2: requests.step({1: 1}, meta)[1]}
    for row, result in ((0, found[0]), (1, torch.cat([found[1], found[2]]))):
        q, k, v = requests.data[row]
        heads = [x.unflatten(1, (2, -1)).float() / scale for x, scale in zip((k, v), scales, strict=True)]
        keys, values = (encode_heads(x, kv_dtype).float() for x in heads)
        expected = attend(q.unflatten(1, (4, -1)).float(), keys, values, shape).flatten(1)
        torch.testing.assert_close(result.float(), expected, rtol=2**-7, atol=float(2**-7 * v.abs().max()))
    # Nothing of an earlier owner is left in a block that was begun.
    last = caches[0].view(torch.uint8)[int(requests.table[1, 0]), :, 5:]
    assert not last.any()


def _stored(cache: Tensor, block: int, count: int) -> Tensor:
    """The first tokens of a block in int8, as the reference stores them: [tokens, heads, stored_size]."""
    heads, size, stored = cache.shape[1:]
    parts = cache[block].view(heads, -1)
    codes, scales = parts[:, : size * (stored - 2)].view(heads, size, -1), parts[:, size * (stored - 2) :]
    return torch.cat([codes, scales.view(heads, size, 2)], dim=-1)[:, :count].transpose(0, 1)


@pytest.mark.parametrize("dtype", [BFLOAT16, torch.float16])
def test_a_cache_in_int8(dtype: torch.dtype) -> None:
    requests, chunked = Requests(SMALL, [37, 5], dtype), Requests(SMALL, [37, 5], dtype)
    for each in (requests, chunked):
        for _, k, v in each.data:
            k[::3, :9] *= 40
            k[1, :32] = 0
            v[::5] *= 0.001
        old = [torch.full((*cache.shape[:3], 34), -1, dtype=torch.int8) for cache in each.cache]
        each.cache = old[0], old[1]
    found = requests.step({0: 37, 1: 5})
    chunked.step({1: 3, 0: 20})
    again = [chunked.step({0: 16, 1: 2}), chunked.step({0: 1})]
    assert torch.equal(torch.cat([again[0][0], again[1][0]]), found[0][20:]) and torch.equal(again[0][1], found[1][3:])
    for row, result in found.items():
        q, k, v = requests.data[row]
        stored = [encode_heads(x.unflatten(1, (2, -1)), torch.int8) for x in (k, v)]
        (keys, key_scales), (values, value_scales) = (decode_heads(each, 32) for each in stored)
        assert key_scales is not None and value_scales is not None
        expected = attend(q.unflatten(1, (4, -1)), keys, values, SMALL, None, key_scales, value_scales).flatten(1)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(result, expected, rtol=2 * eps, atol=float(eps * v.abs().max()))
        for cache, heads in zip(requests.cache, stored, strict=True):
            assert torch.equal(_stored(cache, int(requests.table[row, 0]), 32)[: len(q)], heads[:32])
    begun = _stored(requests.cache[0], int(requests.table[1, 0]), 32)
    assert begun[:5].any() and not begun[5:].any()


@pytest.mark.parametrize("name", ["window", "biases", "both"])
def test_encoders(name: str) -> None:
    """Tokens that attend in both directions; with queries beyond what is attended to, which may see nothing."""
    has_biases = name != "window"
    shape = replace(SMALL, causal=False, sliding_window=None if name == "biases" else 9, has_biases=has_biases)
    requests = Requests(shape, [75, 20])
    biases = torch.randn(4, 256) if has_biases else None
    meta = requests.meta({0: 75, 1: 20})
    meta.seq_lens[0] = 60
    found = requests.step({0: 75, 1: 20}, meta, biases=biases)
    for row, seen in ((0, 60), (1, 20)):
        q, k, v = (x.unflatten(1, (-1, 32)) for x in requests.data[row])
        expected = attend(q, k[:seen], v[:seen], shape, biases=biases).flatten(1)
        torch.testing.assert_close(found[row], expected, rtol=2**-7, atol=2**-7)
