"""Attention with the CPU kernels."""

from __future__ import annotations

import torch

import ops
from executor.attention.base import KVCache
from ops import AttentionMetadata, AttentionShape
from ops.cpu import library
from ops.cpu.instructions import kv_shapes, unsupported_attention


class CpuAttention:
    """K and V in the layout that the kernels multiply with; see ``ops/cpu/csrc/kv_cache.h``."""

    name = "cpu"
    block_size = 32
    block_size_multiple = library.TOKENS_MULTIPLE

    def supports(self, shape: AttentionShape, dtype: torch.dtype) -> str | None:
        if library.current() is None:
            return "there are no kernels for this machine"
        return unsupported_attention(shape, dtype)

    def kv_shape(self, num_blocks: int, block_size: int, shape: AttentionShape) -> tuple[tuple[int, ...], ...]:
        return kv_shapes(num_blocks, block_size, shape)

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
