"""Times single kernels on a GPU, against what the card can do and against its vendor's libraries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from gpu_card import Card
from torch.nn.functional import scaled_dot_product_attention

from ops.metadata import AttentionMetadata, AttentionShape
from ops.triton import attention, sample
from ops.triton.gemm import PLAIN, Epilogue, matmul
from ops.triton.logprobs import most_likely

BFLOAT16 = torch.bfloat16
CACHE_BYTES = 128 << 20
"""More than the caches of a GPU hold."""
LARGE_MATRIX = 8192
LARGE_COPY = 8 << 30
BLOCK_SIZE = 32


@dataclass(frozen=True)
class Ceilings:
    """What the card can do, measured in the same run."""

    bytes_per_s: float
    """Of a large copy, read and written."""
    operations_per_s: float
    """Of a large product in bfloat16 by the vendor's library."""

    def floor(self, num_bytes: float, operations: float) -> float:
        """Least seconds for work that moves so many bytes."""
        return max(num_bytes / self.bytes_per_s, operations / self.operations_per_s)


@dataclass(frozen=True)
class Shape:
    """Of a model's layers."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @property
    def products(self) -> dict[str, tuple[int, int, Epilogue]]:
        """Rows and columns of the weights, and what follows the products."""
        gated = Epilogue(activation="silu", is_gated=True)
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "qkv": (q + 2 * kv, self.hidden, PLAIN),
            "o": (self.hidden, q, PLAIN),
            "gate_up": (2 * self.inner, self.hidden, gated),
            "down": (self.hidden, self.inner, PLAIN),
            "logits": (self.vocab, self.hidden, PLAIN),
        }

    @property
    def attention(self) -> AttentionShape:
        """Of a layer."""
        return AttentionShape(self.heads, self.kv_heads, self.head_dim, self.head_dim**-0.5)


def measure_ceilings(card: Card) -> Ceilings:
    """Measures both, with random numbers: zeros take less power."""
    size, copied = (LARGE_MATRIX, LARGE_COPY) if card.is_real else (64, 1 << 16)
    source = torch.empty(copied // 2, dtype=torch.uint8, device=card.device)
    target = torch.empty_like(source)
    rate = 2 * source.nbytes / card.seconds([partial(target.copy_, source)])
    del source, target
    a, b = (torch.randn(size, size, device=card.device).to(BFLOAT16) for _ in range(2))
    out = torch.empty_like(a)
    return Ceilings(rate, 2 * size**3 / card.seconds([partial(torch.mm, a, b, out=out)]))


def _rotated(num_bytes: int, most: int = 8) -> range:
    """For how much memory a call is repeated."""
    return range(max(1, min(most, -(-CACHE_BYTES // num_bytes))))


def products(card: Card, shape: Shape, ceilings: Ceilings, rows: Sequence[int]) -> list[dict[str, float | str]]:
    """Times each product of a layer, ours and the library's."""
    found: list[dict[str, float | str]] = []
    for name, (n, k, epilogue) in shape.products.items():
        weights = [torch.randn(n, k, device=card.device).to(BFLOAT16) for _ in _rotated(2 * n * k)]
        for m in rows:
            x = torch.randn(m, k, device=card.device).to(BFLOAT16)
            columns = n // 2 if epilogue.is_gated else n
            out, plain = (torch.empty(m, width, dtype=BFLOAT16, device=card.device) for width in (columns, n))
            ours = card.seconds([partial(matmul, x, weight, epilogue, out=out) for weight in weights])
            theirs = card.seconds([partial(torch.mm, x, weight.t(), out=plain) for weight in weights])
            floor = ceilings.floor(2 * (n * k + m * k + m * columns), 2.0 * m * n * k)
            print(
                f"{name:8} m={m:5}: {ours * 1e6:9.1f} us, {floor / ours:5.2f} of the ceiling; "
                f"library {theirs * 1e6:9.1f} us"
            )
            found.append({"kernel": name, "m": m, "us": ours * 1e6, "share": floor / ours, "library_us": theirs * 1e6})
        del weights
    return found


def _decode_step(batch: int, context: int, device: torch.device) -> AttentionMetadata:
    blocks = -(-context // BLOCK_SIZE)
    table = torch.randperm(batch * blocks, device=device).int().view(batch, blocks)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
    lengths = torch.full((batch,), context, dtype=torch.int32, device=device)
    slots = torch.full((batch,), -1, dtype=torch.int64, device=device)
    return AttentionMetadata(starts, lengths, table, slots, BLOCK_SIZE)


def decode_attention(
    card: Card, shape: Shape, ceilings: Ceilings, steps: Sequence[tuple[int, int]]
) -> list[dict[str, float | str]]:
    """Times the attention of a layer in decode steps of a batch and a context."""
    found: list[dict[str, float | str]] = []
    layer, device = shape.attention, card.device
    for batch, context in steps:
        num_bytes = 4 * batch * context * shape.kv_heads * shape.head_dim
        if 3 * num_bytes > card.free_bytes():
            print(f"attention {batch:4} x {context:6}: does not fit into memory")
            continue
        meta = attention.planned(_decode_step(batch, context, device), layer, BFLOAT16)
        blocks = meta.block_table.numel()
        size = (blocks, shape.kv_heads, BLOCK_SIZE, shape.head_dim)
        q = torch.randn(batch, layer.q_width, device=device).to(BFLOAT16)
        out = torch.empty_like(q)
        calls: list[Callable[[], object]] = []
        libraries: list[Callable[[], object]] = []
        for _ in _rotated(num_bytes, 4):
            keys, values = (torch.randn(size, dtype=BFLOAT16, device=device) for _ in range(2))
            calls.append(partial(attention.paged_attention, q, None, None, (keys, values), meta, layer, out=out))
            k, v = (each.view(batch, -1, *size[1:]).transpose(1, 2).flatten(2, 3) for each in (keys, values))
            queries = q.view(batch, shape.heads, 1, shape.head_dim)
            libraries.append(partial(scaled_dot_product_attention, queries, k, v, enable_gqa=True))
        ours, theirs = card.seconds(calls), card.seconds(libraries)
        floor = ceilings.floor(num_bytes, 0)
        print(
            f"attention {batch:4} x {context:6}: {ours * 1e6:9.1f} us, {floor / ours:5.2f} of the ceiling; "
            f"library {theirs * 1e6:9.1f} us"
        )
        row = {"us": ours * 1e6, "share": floor / ours, "library_us": theirs * 1e6}
        found.append({"kernel": "attention", "batch": batch, "context": context, **row})
    return found


def sampling(card: Card, vocab: int, rows: Sequence[int]) -> list[dict[str, float | str]]:
    """Times the sampler, by what all rows ask for."""
    found: list[dict[str, float | str]] = []
    device = card.device
    asked = {"greedy": (0.0, 0, 1.0), "random": (1.0, 0, 1.0), "top_k 50": (1.0, 50, 1.0), "top_p 0.9": (1.0, 0, 0.9)}
    for count in rows:
        logits = 4 * torch.randn(count, vocab, device=device)
        tokens = torch.arange(count, device=device)
        randomness = sample.Randomness(tokens, tokens)
        calls: dict[str, Callable[[], object]] = {"20 log probabilities": partial(most_likely, logits, tokens, 20)}
        for name, (temperature, top_k, top_p) in asked.items():
            filters = sample.Filters(
                torch.full((count,), temperature, device=device),
                torch.full((count,), top_k, dtype=torch.int32, device=device),
                torch.full((count,), top_p, device=device),
                torch.zeros(count, device=device),
            )
            calls[name] = partial(sample.sample_rows, logits, filters, randomness)
        for name, call in calls.items():
            seconds = card.seconds([call])
            print(f"sampling {count:4} rows, {name:20}: {seconds * 1e6:9.1f} us")
            found.append({"kernel": f"sampling, {name}", "rows": count, "us": seconds * 1e6})
    return found
