"""Attention with the GPU kernels."""

from __future__ import annotations

import torch

from executor.attention.base import AttentionStep, OpsAttention, unsupported_kind
from ops import KV_CODES, AttentionMetadata, AttentionShape
from ops.dispatch import is_used
from ops.triton.attention import planned, unsupported


class TritonAttention(OpsAttention):
    """Keeps a head's part of a block together; see ``ops/triton/attention.py``."""

    name = "triton"
    block_size = 32
    block_size_multiple = 1
    kv_layout = "heads"

    def supports(self, shape: AttentionShape, dtype: torch.dtype) -> str | None:
        if not is_used("triton"):
            return "this device does not run Triton's kernels"
        return unsupported_kind(shape) or unsupported(shape, dtype)

    def kv_shape(
        self, num_blocks: int, block_size: int, shape: AttentionShape, dtype: torch.dtype
    ) -> tuple[tuple[int, ...], ...]:
        """See ``AttentionBackend``.

        Raises:
            ValueError: The kernels do not read a cache of this dtype.
        """
        if dtype in KV_CODES:
            name = str(dtype).removeprefix("torch.")
            raise ValueError(f"--kv-cache-dtype: GPUs do not run a KV cache in {name} yet; use auto")
        return tuple((num_blocks, shape.num_kv_heads, block_size, dim) for dim in (shape.head_dim, shape.v_dim))

    def plan(self, step: AttentionStep) -> AttentionMetadata:
        """Makes the step's work list on the device."""
        return planned(step.columns, step.group.shape, step.group.kv_dtype)
