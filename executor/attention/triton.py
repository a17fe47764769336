"""Attention with the GPU kernels."""

from __future__ import annotations

import torch

from executor.attention.base import LATENT, AttentionStep, OpsAttention, unsupported_kind
from ops import AttentionMetadata, AttentionShape, stored_size
from ops.dispatch import is_used
from ops.triton import latent
from ops.triton.attention import planned
from ops.triton.attention_tiles import unsupported, unsupported_cache


class TritonAttention(OpsAttention):
    """Keeps a head's part of a block together; see ``ops/triton/attention.py``."""

    name = "triton"
    block_size = 32
    block_size_multiple = 1
    kv_layout = "heads"

    def __init__(self) -> None:
        self._dtype = torch.bfloat16
        """Of the activations."""

    def supports(self, shape: AttentionShape, dtype: torch.dtype) -> str | None:
        self._dtype = dtype
        if not is_used("triton"):
            return "this device does not run Triton's kernels"
        if shape.kind == LATENT:
            return latent.unsupported(shape, dtype)
        return unsupported_kind(shape) or unsupported(shape, dtype)

    def kv_shape(
        self, num_blocks: int, block_size: int, shape: AttentionShape, dtype: torch.dtype
    ) -> tuple[tuple[int, ...], ...]:
        """See ``AttentionBackend``.

        Raises:
            ValueError: The kernels do not read a cache of this dtype.
        """
        reason = unsupported_cache(dtype, self._dtype, shape)
        if reason is not None:
            raise ValueError(f"--kv-cache-dtype: {reason}")
        if shape.kind == LATENT:
            if dtype != self._dtype:
                raise ValueError("--kv-cache-dtype: GPUs keep latents in the type of the activations; use auto")
            return ((num_blocks, 1, block_size, shape.head_dim),)
        sizes = (stored_size(dim, dtype) for dim in (shape.head_dim, shape.v_dim))
        return tuple((num_blocks, shape.num_kv_heads, block_size, size) for size in sizes)

    def plan(self, step: AttentionStep) -> AttentionMetadata:
        """Makes the step's work list on the device."""
        return planned(step.columns, step.group.shape, step.group.kv_dtype)
