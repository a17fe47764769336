"""Attention over a paged KV cache (Kwon et al., PagedAttention, arXiv:2309.06180)."""

from __future__ import annotations

import torch
from torch import Tensor

from ops.dispatch import Spec, StepInput, op
from ops.metadata import INT4_CACHE, AttentionMetadata, AttentionShape, KVLayout
from ops.reference.kv_codes import decode_heads, encode_heads


@op(
    lambda q, k, v, kv_cache, meta, shape, layout="plain", sinks=None, biases=None: Spec(
        q.spec.rows, shape.out_width, q.spec.dtype
    )
)
def paged_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    kv_cache: tuple[Tensor, Tensor],
    meta: AttentionMetadata | StepInput,
    shape: AttentionShape,
    layout: KVLayout = "plain",
    sinks: Tensor | None = None,
    biases: Tensor | None = None,
) -> Tensor:
    """Writes this step's K and V into the cache, then attends to each request's whole context.

    All rows are written before any is read, so a request may read blocks that another request fills in the same step.

    Args:
        q: [num_tokens, num_heads * head_dim], after the rotary embedding.
        k: [num_tokens, num_kv_heads * head_dim], likewise. None: an earlier layer has written K and V of this step.
        v: [num_tokens, num_kv_heads * v_head_dim]; None: likewise.
        kv_cache: K and V, written in place: [num_blocks, block_size, num_kv_heads, head_dim] in the plain layout. The
            last dimension has ``stored_size(head_dim)`` elements if the dtype is ``INT4_CACHE`` or one of ``KV_CODES``.
        meta: The step's requests.
        shape: The layer's constants.
        layout: Layout of the cache. The reference reads only the plain one.
        sinks: [num_heads] if ``shape.has_sinks``: a score per head that takes part in the softmax without a value
            (Xiao et al., arXiv:2309.17453; as in gpt-oss).
        biases: float32 [num_heads, 2 * reach], contiguous: added to the scaled score of a key that is d tokens after
            the query, at ``reach + d`` (Raffel et al., arXiv:1910.10683). ``reach`` is a multiple of 32, and 32 or
            more above the longest distance.

    Returns:
        [num_tokens, num_heads * v_head_dim] in the type of ``q``; scores and softmax in float32.
    """
    assert isinstance(meta, AttentionMetadata)
    assert layout == "plain", "a tiled KV cache needs the kernels of its device"
    if k is not None and v is not None:
        write_kv(k, v, kv_cache, meta, shape)
    out = q.new_empty((q.shape[0], shape.num_heads, shape.v_dim))
    queries = q.view(q.shape[0], shape.num_heads, shape.head_dim)
    starts = meta.query_start_loc.tolist()
    for row, seq_len in enumerate(meta.seq_lens.tolist()):
        start, end = starts[row], starts[row + 1]
        num_blocks = -(-seq_len // meta.block_size)
        blocks = meta.block_table[row, :num_blocks].long()
        unseen = 0
        if shape.causal and shape.sliding_window is not None:
            first = seq_len - (end - start)
            whole = first // shape.sliding_window * shape.sliding_window
            unseen = whole if shape.is_chunked else max(0, first + 1 - shape.sliding_window)
        (keys, key_scales), (values, value_scales) = (
            decode_heads(tokens_of(cache, blocks, seq_len, unseen), dim)
            for cache, dim in zip(plain_caches(kv_cache), (shape.head_dim, shape.v_dim), strict=True)
        )
        out[start:end] = attend(queries[start:end], keys, values, shape, sinks, key_scales, value_scales, biases)
    return out.flatten(1)


def tokens_of(cache: Tensor, blocks: Tensor, seq_len: int, unseen: int) -> Tensor:
    """A request's tokens in a cache [seq_len, num_kv_heads, stored_size].

    The first ``unseen`` are zero: their blocks may belong to others by now, and NaN times a weight of zero is not zero.
    """
    stored = cache.view(torch.uint8)[blocks].flatten(0, 1)[:seq_len]  # torch selects no rows of fp8
    stored[:unseen] = 0
    return stored.view(cache.dtype)


def write_kv(
    k: Tensor, v: Tensor, kv_cache: tuple[Tensor, Tensor], meta: AttentionMetadata, shape: AttentionShape
) -> None:
    """Writes K and V of the step's tokens to the slots in ``slot_mapping``.

    The first token of a block zeroes the rest of it, so that nothing of an earlier owner remains.
    """
    for cache, x, scale in zip(plain_caches(kv_cache), (k, v), (shape.k_scale, shape.v_scale), strict=True):
        write_cache(x if scale == 1 else x.float() / scale, cache, meta, shape.num_kv_heads)


def plain_caches(kv_cache: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """K and V, each in the dtype of what it stores."""
    keys, values = kv_cache
    return (keys.view(torch.int8) if keys.dtype == INT4_CACHE else keys), values


def write_cache(x: Tensor, cache: Tensor, meta: AttentionMetadata, num_heads: int) -> None:
    """Writes the heads of the step's tokens, ``x`` [num_tokens, num_heads * head_dim], to their slots; see
    ``write_kv``."""
    stored = cache.view(torch.uint8)
    stored[meta.slot_mapping[meta.slot_mapping % meta.block_size == 0] // meta.block_size] = 0
    heads = encode_heads(x.unflatten(1, (num_heads, -1)), cache.dtype)
    stored.flatten(0, 1)[meta.slot_mapping] = heads.view(torch.uint8)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shape: AttentionShape,
    sinks: Tensor | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    biases: Tensor | None = None,
) -> Tensor:
    """Attention of one request's last tokens over its context.

    Args:
        q: [num_queries, num_heads, head_dim]: the last ``num_queries`` of ``seq_len`` tokens. If ``shape`` is not
            causal, there may be more: those beyond ``seq_len`` attend to others without being attended to. The result
            of one that sees nothing in its window is 0.
        k: [seq_len, num_kv_heads, head_dim].
        v: [seq_len, num_kv_heads, v_head_dim].
        sinks: [num_heads]; None: no sinks.
        key_scales: [seq_len, num_kv_heads]: factors of the heads of ``k``, applied to the scores. None: 1.
        value_scales: Likewise of ``v``, applied to the weights.
        biases: See ``paged_attention``.

    Returns:
        [num_queries, num_heads, v_head_dim] in the type of ``q``.
    """
    num_queries, seq_len = q.shape[0], k.shape[0]
    grouped = q.float().unflatten(1, (shape.num_kv_heads, -1)).permute(1, 2, 0, 3)  # [kv_heads, group, queries, dim]
    scores = grouped @ k.float().permute(1, 2, 0).unsqueeze(1)  # [kv_heads, group, queries, seq_len]
    if key_scales is not None:
        scores = scores * key_scales.T[:, None, None]
    scores = scores * (shape.scale * shape.k_scale)
    if shape.logit_softcap:
        scores = torch.tanh(scores / shape.logit_softcap) * shape.logit_softcap
    first = max(0, seq_len - num_queries)
    distance = torch.arange(first, first + num_queries).unsqueeze(1) - torch.arange(seq_len)
    if shape.alibi_slopes is not None:
        slopes = torch.tensor(shape.alibi_slopes, device=scores.device).view(shape.num_kv_heads, -1, 1, 1)
        scores = scores - slopes * distance.to(scores.device)
    if biases is not None:
        places = biases.shape[1] // 2 - distance.to(scores.device)
        scores = scores + biases[:, places].view(shape.num_kv_heads, -1, *distance.shape)
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if shape.causal:
        hidden |= distance < 0
    if shape.sliding_window is not None:
        whole = torch.full((num_queries, 1), shape.sliding_window)
        in_chunk = torch.arange(seq_len - num_queries, seq_len).unsqueeze(1) % shape.sliding_window + 1
        hidden |= distance.abs() >= (in_chunk if shape.is_chunked else whole)
    scores = scores.masked_fill(hidden.to(scores.device), float("-inf"))
    if sinks is not None:
        column = sinks.float().view(shape.num_kv_heads, -1, 1, 1).expand(-1, -1, num_queries, -1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :seq_len]
    weights = weights.masked_fill(hidden.all(1, keepdim=True).to(weights.device), 0.0)
    if value_scales is not None:
        weights = weights * value_scales.T[:, None, None]
    out = weights @ v.float().permute(1, 0, 2).unsqueeze(1) * shape.v_scale  # [kv_heads, group, queries, dim]
    return out.permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype)
