"""The cache of short convolutions: a layer that looks back a few tokens, as attention with a tiny window does.

So blocks, prefix hits, preemption and rejected drafts need nothing of their own.
"""

from __future__ import annotations

import torch

import ops
from executor.attention.base import SHORT_CONV, AttentionStep, KVCache
from ops import AttentionMetadata, AttentionShape


class ShortConvCache:
    """Caches the inputs of the convolution, ``num_heads`` columns per token."""

    name = "short_conv"
    block_size = 32
    block_size_multiple = 1
    kv_layout = "rows"
    needs_rows = False

    def supports(self, shape: AttentionShape, dtype: torch.dtype) -> str | None:
        return None if shape.kind == SHORT_CONV else f"layers of kind {shape.kind!r} are not supported"

    def kv_shape(
        self, num_blocks: int, block_size: int, shape: AttentionShape, dtype: torch.dtype
    ) -> tuple[tuple[int, ...], ...]:
        return ((num_blocks, block_size, shape.num_heads),)

    def plan(self, step: AttentionStep) -> AttentionMetadata:
        return step.columns

    def run(
        self, inputs: tuple[torch.Tensor, ...], kv_cache: KVCache, shape: AttentionShape, meta: AttentionMetadata
    ) -> torch.Tensor:
        """``inputs``: both gates, x, the weights, and the bias if there is one (``ops.short_conv``)."""
        gate_in, gate_out, x, weight, *bias = inputs
        (cache,) = kv_cache
        return ops.short_conv(gate_in, gate_out, x, weight, bias[0] if bias else None, cache, meta)
