"""The attention backend seam."""

from __future__ import annotations

from typing import Protocol

import torch

import ops
from executor.registry import resolve
from ops import AttentionMetadata, AttentionShape

KVCache = tuple[torch.Tensor, torch.Tensor]
"""K and V of one layer, in the shapes that the backend asked for."""


class AttentionBackend(Protocol):
    """Reads and writes a paged KV cache. ``plan`` runs once per KV cache group and step, ``run`` once per layer."""

    name: str
    block_size: int
    """What it likes best; any multiple of ``block_size_multiple`` works."""
    block_size_multiple: int

    def supports(self, shape: AttentionShape, dtype: torch.dtype) -> str | None:
        """None, or the reason why this backend cannot run such a layer."""

    def kv_shape(self, num_blocks: int, block_size: int, shape: AttentionShape) -> tuple[tuple[int, ...], ...]:
        """Shapes of K and V. The first dimension of both is the block."""

    def plan(
        self,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        slot_mapping: torch.Tensor,
        block_size: int,
    ) -> AttentionMetadata:
        """What ``run`` needs to know of a step; arguments as in ``AttentionMetadata``."""

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        kv_cache: KVCache,
        shape: AttentionShape,
        meta: AttentionMetadata,
    ) -> torch.Tensor:
        """Writes this step's K and V, then attends; see ``ops.paged_attention``."""


class OpsAttention:
    """What backends share that are ``ops.paged_attention`` on a KV cache of their own layout."""

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


REGISTRY = {
    "cpu": "executor.attention.cpu:CpuAttention",
    "reference": "executor.attention.reference:ReferenceAttention",
}
PREFERENCE = {"cpu": ["cpu", "reference"]}
"""Backends for each op set, the best first; for others the reference."""


def choose_backend(
    device_type: str, shapes: list[AttentionShape], dtype: torch.dtype, name: str | None
) -> AttentionBackend:
    """The backend of that name, or the device's first one that supports every layer.

    Raises:
        ValueError: There is none; the message says why each was refused.
    """
    refused = []
    for candidate in [name] if name else PREFERENCE.get(ops.op_set(device_type).name, ["reference"]):
        backend: AttentionBackend = resolve(REGISTRY, candidate, "attention backend")()
        reason = next((why for shape in shapes if (why := backend.supports(shape, dtype))), None)
        if reason is None:
            return backend
        refused.append(f"{candidate}: {reason}")
    raise ValueError("no attention backend supports this model: " + "; ".join(refused))
