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
        return tuple(
            (num_blocks, block_size, shape.num_kv_heads, ops.stored_size(dim, dtype))
            for dim in ((shape.head_dim,) if shape.kind == LATENT else (shape.head_dim, shape.v_dim))
        )
