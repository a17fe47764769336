"""Rotation, gathers and the short convolution in Triton, interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ops import AttentionMetadata
from ops.reference import basic, norm, rotary
from ops.reference import short_conv as conv
from tests.ops.cpu import randn
from tests.triton_interpreter import ORDERS, Order, count_bytes, grid_order

rope: Any = pytest.importorskip("ops.triton.rope")
gather: Any = pytest.importorskip("ops.triton.gather")
linear: Any = pytest.importorskip("ops.triton.linear")
short_conv: Any = pytest.importorskip("ops.triton.short_conv")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BF16 = torch.bfloat16


def table(positions: int, rotary_dim: int) -> Tensor:
    angles = randn(positions, rotary_dim // 2, seed=5)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "dim", "rotary_dim"), [(3, 64, 64), (9, 80, 32), (2, 96, 96)])
def test_rotation_equals_the_reference(
    dtype: torch.dtype, interleaved: bool, heads: int, dim: int, rotary_dim: int
) -> None:
    x, positions = randn(5, heads * dim + 32, dtype=dtype)[:, 16:-16], torch.tensor([7, 0, 3, 3, 19], dtype=torch.int32)
    args = (x, positions, table(20, rotary_dim), dim, interleaved)
    assert torch.equal(rope.rotary_embedding(*args), rotary.rotary_embedding.reference(*args))


def written(step: AttentionMetadata, k: Tensor, v: Tensor, cache: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The cache [blocks, heads, block_size, dim] after K and V were written to it."""
    result = []
    for before, x in zip(cache, (k, v), strict=True):
        after = before.clone()
        slots = step.slot_mapping[step.slot_mapping >= 0]
        for slot in slots.tolist():
            if slot % step.block_size == 0:
                after[slot // step.block_size] = 0
        heads = x.unflatten(1, (before.shape[1], -1))
        for token, slot in enumerate(step.slot_mapping.tolist()):
            if slot >= 0:
                after[slot // step.block_size, :, slot % step.block_size] = heads[token]
        result.append(after)
    return result[0], result[1]


def a_step(block_size: int = 4) -> AttentionMetadata:
    """Three requests: one fills a block and begins another, one continues a block, one begins one; and padding."""
    slots = torch.tensor([*range(8, 14), 3, 20, -1, -1])
    zeros = torch.zeros(3, dtype=torch.int32)
    return AttentionMetadata(zeros, zeros, zeros.view(1, 3), slots, block_size)


@pytest.mark.parametrize(
    ("order", "dtype", "has_norm", "dim", "rotary_dim", "v_dim"),
    [
        ("forward", BF16, False, 64, 64, 64),
        ("reversed", torch.float32, True, 64, 64, 64),
        ("shuffled", BF16, True, 32, 16, 48),
    ],
)
def test_k_and_v_are_rotated_into_the_cache(
    order: Order, dtype: torch.dtype, has_norm: bool, dim: int, rotary_dim: int, v_dim: int
) -> None:
    step, heads, kv_heads = a_step(), 6, 3
    tokens = len(step.slot_mapping)
    qkv = randn(tokens, (heads + kv_heads) * dim + kv_heads * v_dim, dtype=dtype)
    q, k, v = qkv.split([heads * dim, kv_heads * dim, kv_heads * v_dim], dim=-1)
    positions, cos_sin, q_cos_sin = torch.arange(tokens), table(20, rotary_dim), table(20, rotary_dim) * 0.5
    caches = (randn(6, kv_heads, 4, dim, dtype=dtype), randn(6, kv_heads, 4, v_dim, dtype=dtype))
    weights = [randn(dim, seed=seed, dtype=dtype) for seed in (3, 4)] if has_norm else [None, None]
    norms = [None if weight is None else rope.HeadNorm(weight, 1e-6) for weight in weights]

    def turned(x: Tensor, weight: Tensor | None, angles: Tensor) -> Tensor:
        normed = x if weight is None else norm.rms_norm.reference(x, weight, 1e-6)
        return rotary.rotary_embedding.reference(normed, positions, angles, dim)

    expected = written(step, turned(k, weights[1], cos_sin), v, caches)
    with grid_order(order):
        out = rope.rope_kv(
            q, k, v, positions, q_cos_sin, cos_sin, step.slot_mapping, caches, q_norm=norms[0], k_norm=norms[1]
        )
    close = (
        {"rtol": 2 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps} if has_norm else {"rtol": 0, "atol": 0}
    )
    torch.testing.assert_close(out, turned(q, weights[0], q_cos_sin), **close)
    torch.testing.assert_close(caches[0], expected[0], **close)
    assert torch.equal(caches[1], expected[1])


def test_rotation_reads_and_writes_once() -> None:
    x, cos_sin = randn(16, 512, dtype=BF16), table(16, 64)
    with count_bytes() as traffic:
        rope.rotary_embedding(x, torch.arange(16), cos_sin, 64)
    assert traffic.stored == x.nbytes and traffic.loaded == x.nbytes + 16 * 8 + cos_sin.nbytes


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_and_columns(dtype: torch.dtype) -> None:
    x, rows, columns = randn(9, 1100, dtype=dtype), torch.tensor([8, 0, 8]), torch.tensor([1099, 0, 7])
    assert torch.equal(gather.gather_rows(x, rows), x[rows])
    assert torch.equal(linear.embedding(rows.int(), x), basic.embedding.reference(rows.int(), x))
    assert torch.equal(gather.select_columns(x, columns), x[:, columns])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("has_bias", [False, True])
def test_short_convolution(order: Order, dtype: torch.dtype, has_bias: bool) -> None:
    width, size = 96, 4
    starts, lengths = torch.tensor([0, 5, 6, 8], dtype=torch.int32), torch.tensor([5, 9, 6], dtype=torch.int32)
    blocks = torch.tensor([[3, 1, 9], [2, 7, 5], [4, 6, 9]], dtype=torch.int32)
    slots = []
    for row in range(3):
        count, length = int(starts[row + 1] - starts[row]), int(lengths[row])
        slots += [int(blocks[row, p // size]) * size + p % size for p in range(length - count, length)]
    real = AttentionMetadata(starts, lengths, blocks, torch.tensor(slots), size)
    padded = AttentionMetadata(
        torch.cat([starts, starts[-1:]]),
        torch.cat([lengths, torch.zeros(1, dtype=torch.int32)]),
        torch.cat([blocks, blocks[:1] + 100]),
        torch.tensor([*slots, -1, -1]),
        size,
    )
    gate_in, gate_out, x = (randn(10, width, seed=seed, dtype=dtype) for seed in range(3))
    weight, bias = randn(3, width, seed=7, dtype=dtype), randn(width, seed=8, dtype=dtype) if has_bias else None
    caches = [randn(10, size, width, seed=9, dtype=dtype) for _ in range(2)]
    expected = conv.short_conv.reference(gate_in[:8], gate_out[:8], x[:8], weight, bias, caches[0], real)
    with grid_order(order):
        result = short_conv.short_conv(gate_in, gate_out, x, weight, bias, caches[1], padded)
    assert torch.equal(caches[0], caches[1])
    torch.testing.assert_close(result[:8], expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
