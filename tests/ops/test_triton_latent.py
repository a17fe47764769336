"""Latent attention in Triton, interpreted: against the definition, and the same bits however requests are divided into
steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ops
from ops import AttentionShape
from ops.triton.configs import TARGETS
from ops.triton.launch import for_target
from tests.ops.cpu import randn
from tests.ops.test_cpu_latent import LatentRequests
from tests.triton_interpreter import grid_order

latent: Any = pytest.importorskip("ops.triton.latent")
attention_tiles: Any = pytest.importorskip("ops.triton.attention_tiles")

BFLOAT16 = torch.bfloat16
SHAPES = {
    "pairs": AttentionShape(5, 1, 56, scale=0.2, v_head_dim=40, kind="latent", rotates_pairs=True),
    "halves": AttentionShape(20, 1, 48, scale=0.15, v_head_dim=32, kind="latent"),
}


class TritonRequests(LatentRequests):
    """Requests whose steps the kernels compute."""

    def __init__(self, shape: AttentionShape, lengths: list[int], dtype: torch.dtype = BFLOAT16) -> None:
        super().__init__(shape, lengths, dtype, plain=True)
        self.cache = self.cache.transpose(1, 2).contiguous()

    def attend(self, *args: Any) -> Tensor:
        *inputs, meta, shape, _ = args
        result: Tensor = latent.latent_attention(*inputs, meta, shape)
        return result


@pytest.fixture
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a few tokens, so that contexts that span some are quick to compute."""
    monkeypatch.setattr(attention_tiles, "PART", 64)


@pytest.mark.usefixtures("short_parts")
@pytest.mark.parametrize(("name", "dtype"), [("pairs", BFLOAT16), ("halves", torch.float16)])
def test_what_the_reference_computes(name: str, dtype: torch.dtype) -> None:
    lengths = [3, 80]
    ours = TritonRequests(SHAPES[name], lengths, dtype)
    plain = LatentRequests(SHAPES[name], lengths, dtype, plain=True)
    for counts in ({1: 70, 0: 2}, {0: 1, 1: 1}, {1: 9}):
        results, expected = ours.step(counts), plain.step(counts)
        tolerance = {BFLOAT16: 0.03, torch.float16: 4e-3}[dtype]
        for row, result in results.items():
            torch.testing.assert_close(result, expected[row], rtol=tolerance / 4, atol=tolerance)


@pytest.mark.usefixtures("short_parts")
def test_the_same_bits_in_chunks_and_batches() -> None:
    """Parts of one program each and all parts in one; what an earlier owner left in a block does not matter."""
    lengths, shape = [100, 34], SHAPES["pairs"]
    alone = TritonRequests(shape, lengths)
    expected = [alone.step({row: length})[row] for row, length in enumerate(lengths)]
    batched = TritonRequests(shape, lengths)
    parts: list[list[Tensor]] = [[], []]
    with grid_order("shuffled", seed=3):
        for counts in ({0: 95}, {1: 31, 0: 1}, {0: 3, 1: 2}, {1: 1, 0: 1}):
            for row, result in batched.step(counts).items():
                parts[row].append(result)
    for whole, part in zip(expected, parts, strict=True):
        assert torch.equal(torch.cat(part), whole)


@pytest.mark.parametrize(("rows", "columns", "head_dim"), [(40, 56, 64), (64, 32, 32)])
def test_products_of_heads(rows: int, columns: int, head_dim: int) -> None:
    """The bits of a product per head, and of rows alone."""
    heads, tokens = 3, 20
    x = randn(tokens, heads * head_dim, dtype=BFLOAT16)
    weights = tuple(randn(rows, columns, seed=head + 1, dtype=BFLOAT16) for head in range(heads))
    found = latent.heads_linear(x, weights, head_dim)
    gemm = pytest.importorskip("ops.triton.gemm")
    each = [
        gemm.matmul(x[:, head * head_dim : head * head_dim + columns].contiguous(), weight)
        for head, weight in enumerate(weights)
    ]
    assert torch.equal(found, torch.cat(each, dim=1))
    assert torch.equal(latent.heads_linear(x[7:8], weights, head_dim), found[7:8])
    torch.testing.assert_close(found, ops.heads_linear.reference(x, weights, head_dim), rtol=2**-7, atol=2**-5)


def test_what_is_not_supported_is_named() -> None:
    shape = SHAPES["pairs"]
    assert latent.unsupported(shape, BFLOAT16) is None
    with for_target(TARGETS["sm_86"]):
        assert "bfloat16" in latent.unsupported(shape, torch.float32)
    wide = AttentionShape(5, 1, 1088, scale=0.2, v_head_dim=1024, kind="latent")
    assert "1024 numbers" in latent.unsupported(wide, BFLOAT16)
