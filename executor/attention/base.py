"""The attention backend seam.

Each attention layer has its own backend, since a model may mix kinds of layers. Layers of the same kind form a group,
which shares block tables and is planned once per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

import ops
from executor.messages import I32, KVCacheGroupSpec
from executor.registry import resolve
from ops import AttentionMetadata, AttentionShape, KVLayout

KVCache = tuple[torch.Tensor, ...]
"""The cache of one layer, in the shapes its backend requested: K and V, or one tensor of latents."""


class AttentionBackend(Protocol):
    """Reads and writes a paged KV cache. ``plan`` runs once per KV cache group and step, ``run`` once per layer."""

    name: str
    block_size: int
    """Preferred block size in tokens; any multiple of ``block_size_multiple`` works."""
    block_size_multiple: int
    kv_layout: str
    """Layout of a block. Caches of different layouts are incompatible."""
    needs_rows: bool
    """Whether ``plan`` reads ``AttentionStep.rows``: steps cannot be graphs."""

    def supports(self, shape: AttentionShape, dtype: torch.dtype) -> str | None:
        """The reason why this backend cannot run such a layer, or None if it can."""

    def kv_shape(
        self, num_blocks: int, block_size: int, shape: AttentionShape, dtype: torch.dtype
    ) -> tuple[tuple[int, ...], ...]:
        """Shapes of the tensors of a layer's cache in a dtype. The first dimension of each is the block.

        Raises:
            ValueError: The backend has no cache of this dtype.
        """

    def plan(self, step: AttentionStep) -> AttentionMetadata:
        """Prepares the step's metadata for ``run``."""

    def run(
        self, inputs: tuple[torch.Tensor | None, ...], kv_cache: KVCache, shape: AttentionShape, meta: AttentionMetadata
    ) -> torch.Tensor:
        """Writes this step's entries to the cache, then computes attention.

        Args:
            inputs: The inputs of this kind of layer: q, k and v, with heads side by side in the columns, then the sinks
                if ``shape.has_sinks``, then the biases if ``shape.has_biases``. Without k and v, the cache is that of
                an earlier layer, which has written them.
                Of latents: those that ``ops.latent_attention`` takes before the cache.
            kv_cache: The layer's cache.
            shape: The layer's constants.
            meta: The result of ``plan``.

        Returns:
            [num_tokens, num_heads * v_head_dim].
        """


@dataclass(frozen=True)
class AttentionGroup:
    """Layers of the same kind, which share block tables, and what they cache."""

    backend: AttentionBackend
    shape: AttentionShape
    kv_dtype: torch.dtype
    block_size: int
    layers: tuple[int, ...]
    """Their indices among the model's attention layers."""

    @property
    def is_cached(self) -> bool:
        """Whether K and V are kept from step to step. If not, the worker has room for those of one step and layer."""
        return self.shape.is_cached

    @property
    def spec(self) -> KVCacheGroupSpec:
        """Description of a cached group for the engine core."""
        window = self.shape.sliding_window
        sizes = self.backend.kv_shape(1, self.block_size, self.shape, self.kv_dtype)
        elements = sum(torch.Size(size).numel() for size in sizes)
        return KVCacheGroupSpec(
            kind="full" if window is None else "sliding_window",
            block_size=self.block_size,
            bytes_per_block=len(self.layers) * elements * self.kv_dtype.itemsize,
            layers=self.layers,
            sliding_window=window,
            dtype=ops.cache_name(self.kv_dtype),
            layout=self.backend.kv_layout,
        )

    def plan(self, columns: AttentionMetadata, rows: HostRows | None = None) -> AttentionMetadata:
        """A step's metadata for the group's layers."""
        return self.backend.plan(AttentionStep(self, columns, rows))


def cached_specs(groups: Sequence[AttentionGroup]) -> tuple[KVCacheGroupSpec, ...]:
    """Descriptions of the groups that have a KV cache, for the engine core."""
    return tuple(group.spec for group in groups if group.is_cached)


@dataclass(frozen=True)
class HostRows:
    """What the host knows of a step's requests."""

    counts: I32
    """int32 [requests]: tokens to compute."""
    seq_lens: I32
    """int32 [requests]: length of the context, this step's tokens included."""
    block_table: I32
    """int32 [requests, max_blocks]."""


@dataclass(frozen=True)
class AttentionStep:
    """A step as one group sees it."""

    group: AttentionGroup
    columns: AttentionMetadata
    """The requests of the step, and their blocks in this group."""
    rows: HostRows | None = None
    """The same on the host. None: it does not say; memory is planned, or a graph is recorded."""


class OpsAttention:
    """Base of backends that run ``ops.paged_attention`` and ``ops.latent_attention`` on a cache in their own layout."""

    kv_layout: KVLayout
    needs_rows = False

    def plan(self, step: AttentionStep) -> AttentionMetadata:
        return step.columns

    def run(
        self, inputs: tuple[torch.Tensor | None, ...], kv_cache: KVCache, shape: AttentionShape, meta: AttentionMetadata
    ) -> torch.Tensor:
        if shape.kind == LATENT:
            return self._run_latents(inputs, kv_cache, shape, meta)
        q, k, v, *more = inputs
        assert q is not None
        keys, values = kv_cache
        sinks = more.pop(0) if shape.has_sinks else None
        options = {"biases": more[0]} if shape.has_biases else {}
        return ops.paged_attention(q, k, v, (keys, values), meta, shape, self.kv_layout, sinks, **options)

    def _run_latents(
        self, inputs: tuple[torch.Tensor | None, ...], kv_cache: KVCache, shape: AttentionShape, meta: AttentionMetadata
    ) -> torch.Tensor:
        q, q_rope, latents, k_rope, positions, cos_sin = inputs
        assert q is not None and q_rope is not None and latents is not None and k_rope is not None
        assert positions is not None and cos_sin is not None
        (cache,) = kv_cache
        return ops.latent_attention(
            q, q_rope, latents, k_rope, positions, cos_sin, (cache,), meta, shape, self.kv_layout
        )


SHORT_CONV = "short_conv"
"""``AttentionShape.kind`` of short convolutions, which cache their inputs: ``num_heads`` columns per token."""
GATED_DELTA = "gated_delta"
"""``AttentionShape.kind`` of the gated delta rule, which caches states in float32."""
MAMBA = "mamba"
"""``AttentionShape.kind`` of the recurrence of Mamba-2, which caches states in float32."""
RECURRENT_KINDS = (GATED_DELTA, MAMBA)
"""Kinds of layers that cache a state per block, not per token."""
LATENT = "latent"
"""``AttentionShape.kind`` of latent attention, whose heads share one row per token."""


def unsupported_kind(shape: AttentionShape) -> str | None:
    """The reason why ``OpsAttention`` cannot compute such a layer, or None if it can."""
    return None if shape.kind in ("kv", LATENT) else f"layers of kind {shape.kind!r} are not supported"


REGISTRY = {
    "cpu": "executor.attention.cpu:CpuAttention",
    "flash_attn": "executor.attention.libraries:FlashAttention",
    "flashinfer": "executor.attention.libraries:FlashInferAttention",
    "recurrent": "executor.attention.recurrent:RecurrentStates",
    "reference": "executor.attention.reference:ReferenceAttention",
    "sdpa": "executor.attention.libraries:SdpaAttention",
    "short_conv": "executor.attention.short_conv:ShortConvCache",
    "triton": "executor.attention.triton:TritonAttention",
}
REFUSED = {"aiter": "aiter is not supported; on AMD GPUs use triton or sdpa"}
"""Backends that users of other servers know."""
PREFERENCE = {"cpu": ["cpu", "reference"], "triton": ["triton"]}
"""Backends of each op set, best first. Other op sets use the reference."""
OTHER_KINDS = ["recurrent", "short_conv"]
"""Backends of layers that are not attention, whatever ``--attention-backend`` says."""


def choose_backends(
    device_type: str, shapes: Sequence[AttentionShape], dtype: torch.dtype, name: str | None
) -> list[AttentionBackend]:
    """The backend of each layer: the named one, or the first of the device that supports the layer.

    Raises:
        ValueError: No backend supports a layer; the message says why each was rejected.
    """
    if name in REFUSED:
        raise ValueError(f"--attention-backend {name}: {REFUSED[name]}")

    def resolved(names: Sequence[str]) -> list[AttentionBackend]:
        return [resolve(REGISTRY, each, "attention backend")() for each in names]

    usual = resolved([name] if name else PREFERENCE.get(ops.op_set(device_type).name, ["reference"]))
    others = resolved(OTHER_KINDS) if any(shape.kind not in ("kv", LATENT) for shape in shapes) else []

    def choose(shape: AttentionShape) -> AttentionBackend:
        refused = []
        for backend in usual if shape.kind in ("kv", LATENT) else [*usual, *others]:
            reason = backend.supports(shape, dtype)
            if reason is None:
                return backend
            refused.append(f"{backend.name}: {reason}")
        raise ValueError("no attention backend supports this model: " + "; ".join(refused))

    chosen = {shape: choose(shape) for shape in dict.fromkeys(shapes)}
    return [chosen[shape] for shape in shapes]
