"""Attention in plain torch, on any device."""

from __future__ import annotations

import torch

import ops
from executor.attention.base import KVCache
from ops import AttentionMetadata, AttentionShape


class ReferenceAttention:
    name = "reference"
    block_size = 32
    block_size_multiple = 1

    def supports(self, shape: AttentionShape, dtype: torch.dtype) -> str | None:
        return None

    def kv_shape(self, num_blocks: int, block_size: int, shape: AttentionShape) -> tuple[tuple[int, ...], ...]:
        return (
            (num_blocks, block_size, shape.num_kv_heads, shape.head_dim),
            (num_blocks, block_size, shape.num_kv_heads, shape.v_dim),
        )

    def plan(
        self,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        slot_mapping: torch.Tensor,
        block_size: int,
    ) -> AttentionMetadata:
        return AttentionMetadata(query_start_loc, seq_lens, block_table, slot_mapping, block_size)

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        kv_cache: KVCache,
        shape: AttentionShape,
        meta: AttentionMetadata,
    ) -> torch.Tensor:
        return ops.paged_attention(q, k, v, kv_cache, meta, shape)
