"""The cache of recurrent layers: the state of a sequence, once per block.

A block holds the state after the last of its tokens that were computed and are no drafts; it keeps the inputs of drafts
(``ops/reference/recurrence.py``). As a group with a window of two tokens, a layer needs the block of the token before.
So prefix hits, preemption and freeing need nothing of their own: a full block is a snapshot. States are large, so the
engine core gives most blocks the memory of the one before them, whose state is overwritten then.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import ops
from executor.attention.base import MAMBA, RECURRENT_KINDS, AttentionStep, KVCache
from executor.messages import STATES_LAYOUT
from ops import AttentionMetadata, AttentionShape


class RecurrentStates:
    """Caches float32 states, one per block."""

    name = "recurrent"
    block_size = 32
    block_size_multiple = 1
    kv_layout = STATES_LAYOUT
    needs_rows = False

    def supports(self, shape: AttentionShape, dtype: torch.dtype) -> str | None:
        return None if shape.kind in RECURRENT_KINDS else f"layers of kind {shape.kind!r} are not supported"

    def kv_shape(
        self, num_blocks: int, block_size: int, shape: AttentionShape, dtype: torch.dtype
    ) -> tuple[tuple[int, ...], ...]:
        return ((num_blocks, ops.state_size(shape)),)

    def plan(self, step: AttentionStep) -> AttentionMetadata:
        return step.columns

    def run(
        self, inputs: tuple[torch.Tensor | None, ...], kv_cache: KVCache, shape: AttentionShape, meta: AttentionMetadata
    ) -> torch.Tensor:
        """``inputs``: those that ``ops.gated_delta`` or ``ops.mamba`` takes before the cache."""
        (cache,) = kv_cache
        recurrence: Callable[..., torch.Tensor] = ops.mamba if shape.kind == MAMBA else ops.gated_delta
        return recurrence(*inputs, cache, meta, shape)
