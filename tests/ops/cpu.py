"""What the tests of the CPU kernels share: the capabilities of this machine, and requests to attend to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import ops
from ops import AttentionMetadata, AttentionShape, OpSet
from ops.cpu import build, library
from ops.cpu.instructions import kv_shapes
from ops.cpu.op_set import CpuOps

DTYPES = [torch.bfloat16, torch.float16, torch.float32]

NEEDS_KERNELS = pytest.mark.skipif(not build.available(), reason="no kernels are available on this machine")

NAMES = [*build.CAPABILITIES, build.AMX_EMULATION.name]


@contextmanager
def using(op_set: OpSet | str) -> Iterator[OpSet]:
    """Lets CPU tensors use another op set. Weights and KV caches have the layout of the type alone."""
    before = ops.op_set("cpu")
    try:
        yield ops.use("cpu", op_set)
    finally:
        ops.use("cpu", before)


@contextmanager
def use(capability: str) -> Iterator[CpuOps]:
    """Uses the kernels of a capability, or skips the test where the machine lacks it."""
    missing = build.ALL[capability].needs - build.cpu_flags()
    if missing:
        pytest.skip(f"this CPU lacks {', '.join(sorted(missing))}")
    chosen = CpuOps(library.load(capability))
    with using(chosen):
        yield chosen


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


class Requests:
    """Requests with random q, k and v, whose attention is computed step by step."""

    def __init__(
        self,
        shape: AttentionShape,
        lengths: Sequence[int],
        dtype: torch.dtype,
        *,
        block_size: int = 32,
        plain: bool = False,
        cache_dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        """Makes requests of these lengths.

        Args:
            shape: Of the layer.
            lengths: Tokens of each request.
            dtype: Of the activations.
            block_size: Tokens in a block.
            plain: KV caches have the layout of the reference.
            cache_dtype: Of the KV cache; None: that of the activations.
            seed: Of all random numbers.
        """
        cache_dtype = cache_dtype or dtype
        self.shape = shape
        self.block_size = block_size
        generator = torch.Generator().manual_seed(seed)
        blocks = [-(-length // block_size) for length in lengths]
        order = torch.randperm(sum(blocks) + 2, generator=generator).int()
        self.table = torch.full((len(lengths), max(blocks) + 1), -1, dtype=torch.int32)
        used = 0
        for row, count in enumerate(blocks):
            self.table[row, :count] = order[used : used + count]
            used += count
        kv_widths = (shape.num_kv_heads * shape.head_dim, shape.num_kv_heads * shape.v_dim)
        widths = (shape.q_width, *kv_widths)
        self.data = [
            [torch.randn(length, width, generator=generator).to(dtype) for width in widths] for length in lengths
        ]
        heads = shape.num_kv_heads
        shapes: tuple[tuple[int, ...], ...] = (
            (len(order), block_size, heads, ops.stored_size(shape.head_dim, cache_dtype)),
            (len(order), block_size, heads, ops.stored_size(shape.v_dim, cache_dtype, is_value=True)),
        )
        self.layout: ops.KVLayout = "plain" if plain else "tiled"
        if not plain:
            shapes = kv_shapes(len(order), block_size, shape, cache_dtype)
        # What an earlier owner left in a block must not matter: all bits set are NaN in every type of floats.
        sizes = (torch.Size(size).numel() * cache_dtype.itemsize for size in shapes)
        keys, values = (
            torch.full((size,), 0xFF, dtype=torch.uint8).view(cache_dtype).view(shape)
            for size, shape in zip(sizes, shapes, strict=True)
        )
        self.cache = keys, values
        self.sinks = 2 * torch.randn(shape.num_heads, generator=generator).to(dtype) if shape.has_sinks else None
        self.done = [0] * len(lengths)

    def step(self, counts: dict[int, int], *, writes: bool = True, attended: int | None = None) -> dict[int, Tensor]:
        """Attends with the next tokens of some requests, in this order; returns each one's result.

        Args:
            counts: Tokens of each request.
            writes: Whether K and V are written; else the cache must hold them.
            attended: Most tokens of a request to which others attend.
        """
        rows = list(counts)
        begins = [self.done[row] for row in rows]
        for row, count in counts.items():
            self.done[row] += count
        ends = [self.done[row] for row in rows]
        positions = [torch.arange(begin, end) for begin, end in zip(begins, ends, strict=True)]
        slots = [
            self.table[row][position // self.block_size].long() * self.block_size + position % self.block_size
            for row, position in zip(rows, positions, strict=True)
        ]
        starts = torch.tensor([0, *torch.tensor(list(counts.values())).cumsum(0).tolist()], dtype=torch.int32)
        lengths = torch.tensor([end if attended is None else min(end, attended) for end in ends], dtype=torch.int32)
        meta = AttentionMetadata(starts, lengths, self.table[rows], torch.cat(slots), self.block_size)
        q, k, v = (
            torch.cat([self.data[row][i][begin:end] for row, begin, end in zip(rows, begins, ends, strict=True)])
            for i in range(3)
        )
        out = ops.paged_attention(
            q, k if writes else None, v if writes else None, self.cache, meta, self.shape, self.layout, self.sinks
        )
        return dict(zip(rows, out.split(list(counts.values())), strict=True))
