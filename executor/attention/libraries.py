"""Attention by libraries, as yardsticks for ours. They read the cache of the GPU kernels, which still write it.

A library chooses how it divides the work by what is computed together, so tokens may depend on a request's neighbours.
Its calls need numbers that the host knows, so steps are launched one by one, without graphs.
"""

from __future__ import annotations

import importlib
import importlib.util
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from executor.attention.base import AttentionStep, HostRows
from executor.attention.triton import TritonAttention
from executor.log import get_logger
from ops import AttentionMetadata, AttentionShape
from ops.triton.library import LibraryStep

logger = get_logger()
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""Takes q [tokens, heads * head_dim], K and V [blocks, kv_heads, block_size, dim], and the result to write, like q."""
WORKSPACE_BYTES = 128 << 20


class LibraryAttention(TritonAttention):
    """Base of backends that call a library."""

    needs_rows = True
    package: str
    """Its name for Python."""

    def __init__(self) -> None:
        super().__init__()
        logger.warning("--attention-backend %s: a request's tokens may depend on what runs beside it", self.name)

    def supports(self, shape: AttentionShape, dtype: torch.dtype) -> str | None:
        if importlib.util.find_spec(self.package) is None:
            return f"the package {self.package} is not installed"
        return super().supports(shape, dtype) or self.lacks(shape, dtype)

    @abstractmethod
    def lacks(self, shape: AttentionShape, dtype: torch.dtype) -> str | None:
        """The reason why the library cannot compute such a layer, or None."""

    def kv_shape(
        self, num_blocks: int, block_size: int, shape: AttentionShape, dtype: torch.dtype
    ) -> tuple[tuple[int, ...], ...]:
        if dtype != self._dtype:
            raise ValueError(f"--kv-cache-dtype: {self.name} reads K and V in the type of the activations; use auto")
        return super().kv_shape(num_blocks, block_size, shape, dtype)

    def plan(self, step: AttentionStep) -> AttentionMetadata:
        given = step.columns
        attend = None if step.rows is None else self.attend(step, step.rows)
        return LibraryStep(
            given.query_start_loc, given.seq_lens, given.block_table, given.slot_mapping, given.block_size, attend
        )

    @abstractmethod
    def attend(self, step: AttentionStep, rows: HostRows) -> Attend:
        """What computes the attention of the group's layers in this step."""


def _learned(shape: AttentionShape) -> str | None:
    return "sinks and learned biases are not supported" if shape.has_sinks or shape.has_biases else None


class SdpaAttention(LibraryAttention):
    """torch's ``scaled_dot_product_attention``, one call for all requests with as many queries."""

    name = "sdpa"
    package = "torch"

    def lacks(self, shape: AttentionShape, dtype: torch.dtype) -> str | None:
        if shape.logit_softcap or shape.alibi_slopes is not None:
            return "caps and slopes of scores are not supported"
        return _learned(shape)

    def attend(self, step: AttentionStep, rows: HostRows) -> Attend:
        device, shape = step.columns.seq_lens.device, step.group.shape
        starts = np.cumsum(rows.counts) - rows.counts
        parts = []
        for count in np.unique(rows.counts[rows.counts > 0]).tolist():
            own = np.flatnonzero(rows.counts == count)
            blocks, mask = _gathered(rows, own, count, shape, step.columns.block_size)
            tokens = starts[own][:, None] + np.arange(count)
            parts.append([torch.from_numpy(each).to(device) for each in (tokens, blocks, mask)])

        def attend(q: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> None:
            for tokens, blocks, mask in parts:
                queries = q[tokens].unflatten(2, (shape.num_heads, -1)).transpose(1, 2)
                k, v = (cache[blocks].transpose(1, 2).flatten(2, 3) for cache in (keys, values))
                result = F.scaled_dot_product_attention(
                    queries, k, v, attn_mask=mask, scale=shape.scale, enable_gqa=True
                )
                out[tokens] = result.transpose(1, 2).flatten(2)

        return attend


def _gathered(
    rows: HostRows, own: Any, count: int, shape: AttentionShape, block_size: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The blocks of requests with ``count`` queries each, and which of their tokens each query sees:
    int64 [requests, blocks], bool [requests, 1, count, blocks * block_size]."""
    lengths = rows.seq_lens[own][:, None]
    num_blocks = -(-int(lengths.max()) // block_size)
    table = rows.block_table[own, :num_blocks].astype(np.int64)
    blocks = np.where(np.arange(num_blocks) * block_size < lengths, table, table[:, :1])
    distance = (np.maximum(lengths - count, 0) + np.arange(count))[:, :, None] - np.arange(num_blocks * block_size)
    mask = distance >= 0 if shape.causal else np.arange(num_blocks * block_size) < lengths[:, None] + 0 * distance
    if shape.sliding_window is not None:
        mask &= np.abs(distance) < shape.sliding_window
    return blocks, mask[:, None]


class FlashAttention(LibraryAttention):
    """FlashAttention 2: Dao, arXiv:2307.08691."""

    name = "flash_attn"
    package = "flash_attn"
    block_size = 256
    block_size_multiple = 256

    def lacks(self, shape: AttentionShape, dtype: torch.dtype) -> str | None:
        if dtype == torch.float32:
            return "activations in float32 are not supported"
        if shape.v_dim != shape.head_dim:
            return "heads of V of another size are not supported"
        return _learned(shape)

    def attend(self, step: AttentionStep, rows: HostRows) -> Attend:
        function = importlib.import_module("flash_attn").flash_attn_varlen_func
        meta, shape = step.columns, step.group.shape
        window = (shape.sliding_window or 0) - 1
        slopes = shape.alibi_slopes
        given: dict[str, Any] = {
            "cu_seqlens_q": meta.query_start_loc,
            "cu_seqlens_k": F.pad(torch.cumsum(meta.seq_lens, 0, dtype=torch.int32), (1, 0)),
            "max_seqlen_q": int(rows.counts.max()),
            "max_seqlen_k": int(rows.seq_lens.max()),
            "softmax_scale": shape.scale,
            "causal": shape.causal,
            "window_size": (window, 0 if shape.causal and window >= 0 else window),
            "softcap": shape.logit_softcap or 0.0,
            "alibi_slopes": None if slopes is None else torch.tensor(slopes, device=meta.seq_lens.device),
            "block_table": meta.block_table,
        }

        def attend(q: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> None:
            queries = q.unflatten(1, (shape.num_heads, -1))
            # It reads [blocks, block_size, heads, dim] by strides.
            out.copy_(function(queries, keys.transpose(1, 2), values.transpose(1, 2), **given).flatten(1))

        return attend


class FlashInferAttention(LibraryAttention):
    """FlashInfer: Ye et al., arXiv:2501.01005."""

    name = "flashinfer"
    package = "flashinfer"

    def __init__(self) -> None:
        super().__init__()
        self._wrappers: dict[AttentionShape, Any] = {}
        """By the constants of a group's layers."""

    def lacks(self, shape: AttentionShape, dtype: torch.dtype) -> str | None:
        if dtype == torch.float32:
            return "activations in float32 are not supported"
        if shape.head_dim not in (64, 128, 256):
            return f"heads of {shape.head_dim} numbers are not supported"
        if shape.alibi_slopes is not None or (shape.sliding_window is not None and not shape.causal):
            return "slopes of scores, and windows in both directions, are not supported"
        return _learned(shape)

    def attend(self, step: AttentionStep, rows: HostRows) -> Attend:
        meta, shape = step.columns, step.group.shape
        wrapper = self._wrappers.get(shape)
        if wrapper is None:
            workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=meta.seq_lens.device)
            made_by = importlib.import_module("flashinfer").BatchPrefillWithPagedKVCacheWrapper
            wrapper = self._wrappers[shape] = made_by(workspace, "HND")
        size = meta.block_size
        num_blocks = -(-rows.seq_lens // size)
        used = np.arange(rows.block_table.shape[1]) < num_blocks[:, None]

        def column(numbers: Any) -> Tensor:
            return torch.from_numpy(numbers.astype(np.int32))

        wrapper.plan(
            qo_indptr=column(np.append(0, np.cumsum(rows.counts))),
            paged_kv_indptr=column(np.append(0, np.cumsum(num_blocks))),
            paged_kv_indices=column(rows.block_table[used]),
            paged_kv_last_page_len=column((rows.seq_lens - 1) % size + 1),
            num_qo_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim_qk=shape.head_dim,
            page_size=size,
            head_dim_vo=shape.v_dim,
            causal=shape.causal,
            sm_scale=shape.scale,
            window_left=(shape.sliding_window or 0) - 1,
            logits_soft_cap=shape.logit_softcap or 0.0,
            q_data_type=self._dtype,
            kv_data_type=self._dtype,
        )

        def attend(q: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> None:
            queries = q.unflatten(1, (shape.num_heads, -1))
            wrapper.run(queries, (keys, values), out=out.unflatten(1, (shape.num_heads, -1)))

        return attend
