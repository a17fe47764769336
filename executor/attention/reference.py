"""Attention in plain torch, on any device."""

from __future__ import annotations

import torch

import ops
from executor.attention.base import LATENT, OpsAttention, unsupported_kind
from ops import AttentionShape


class ReferenceAttention(OpsAttention):
    name = "reference"
    block_size = 32
    block_size_multiple = 1
    kv_layout = "plain"

    def supports(self, shape: AttentionShape, dtype: torch.dtype) -> str | None:
        return unsupported_kind(shape)

    def kv_shape(
        self, num_blocks: int, block_size: int, shape: AttentionShape, dtype: torch.dtype
    ) -> tuple[tuple[int, ...], ...]:
        refused = ops.unsupported_cache(shape, dtype)
        if refused:
            raise ValueError(refused)
        sizes = [ops.stored_size(shape.head_dim, dtype)]
        if shape.kind != LATENT:
            sizes.append(ops.stored_size(shape.v_dim, dtype, is_value=True))
        return tuple((num_blocks, block_size, shape.num_kv_heads, size) for size in sizes)
