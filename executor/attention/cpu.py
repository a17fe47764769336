"""Attention with the CPU kernels."""

from __future__ import annotations

import torch

import ops
from executor.attention.base import LATENT, OpsAttention, unsupported_kind
from ops import AttentionShape
from ops.cpu import library
from ops.cpu.instructions import kv_shapes, latent_shapes, unsupported_attention, unsupported_latents


class CpuAttention(OpsAttention):
    """Keeps K and V in the layout of the kernels; see ``ops/cpu/csrc/kv_cache.h`` and ``latent_cache.h``."""

    name = "cpu"
    block_size = 32
    block_size_multiple = library.TOKENS_MULTIPLE
    kv_layout = "tiled"

    def supports(self, shape: AttentionShape, dtype: torch.dtype) -> str | None:
        if ops.op_set("cpu").name != self.name:
            return "no kernels are available on this machine"
        if shape.kind == LATENT:
            return unsupported_latents(shape, dtype)
        return unsupported_kind(shape) or unsupported_attention(shape, dtype)

    def kv_shape(
        self, num_blocks: int, block_size: int, shape: AttentionShape, dtype: torch.dtype
    ) -> tuple[tuple[int, ...], ...]:
        shapes = latent_shapes if shape.kind == LATENT else kv_shapes
        return shapes(num_blocks, block_size, shape, dtype)
