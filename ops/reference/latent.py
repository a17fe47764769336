"""Latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1) in the absorbed form: the matrices between latents and
heads are applied to the queries and to the results, so that what is cached is read as it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ops.dispatch import Spec, StepInput, Value, op
from ops.metadata import AttentionMetadata, AttentionShape, KVLayout
from ops.packed import Weight
from ops.reference.attention import attend, tokens_of, write_cache
from ops.reference.basic import linear
from ops.reference.kv_codes import decode_heads
from ops.reference.rotary import rotary_embedding


def _infer_heads(x: Value, weights: Sequence[Weight], head_dim: int) -> Spec:
    return Spec(x.spec.rows, len(weights) * weights[0].shape[0], x.spec.dtype)


@op(_infer_heads)
def heads_linear(x: Tensor, weights: Sequence[Weight], head_dim: int) -> Tensor:
    """Multiplies each head with a weight of its own.

    Args:
        x: [num_tokens, num_heads * head_dim].
        weights: [out_features, in_features] of each head, as ``linear`` takes them, all of one shape. ``in_features``
            may be less than ``head_dim``: then the rest of each head is ignored.
        head_dim: Columns of a head of ``x``.

    Returns:
        [num_tokens, num_heads * out_features] in the type of ``x``.
    """
    columns = weights[0].shape[1]
    heads = x.split(head_dim, dim=-1)
    return torch.cat(
        [linear.reference(head[:, :columns], weight) for head, weight in zip(heads, weights, strict=True)], dim=-1
    )


def _infer_attention(q: Value, *_: object, **__: object) -> Spec:
    return q.spec


@op(_infer_attention)
def latent_attention(
    q: Tensor,
    q_rope: Tensor,
    latents: Tensor,
    k_rope: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    kv_cache: tuple[Tensor],
    meta: AttentionMetadata | StepInput,
    shape: AttentionShape,
    layout: KVLayout = "plain",
) -> Tensor:
    """Writes this step's latents into the cache, then attends to each request's whole context.

    What a token caches is its latent and its rotated columns: together the key of all heads. The latent alone is their
    value. All rows are written before any is read, as in ``paged_attention``.

    Args:
        q: [num_tokens, num_heads * v_head_dim]: the queries of the latents.
        q_rope: [num_tokens, num_heads * size]: the last ``rotary_dim`` columns of each head are rotated, and are the
            queries of the rotated columns.
        latents: [num_tokens, v_head_dim].
        k_rope: [num_tokens, rotary_dim], to be rotated.
        positions: [num_tokens].
        cos_sin: float32 [max_positions, rotary_dim], as of ``rotary_embedding``.
        kv_cache: One tensor, written in place: [num_blocks, block_size, 1, stored_size(head_dim)] in the plain layout.
        meta: The step's requests.
        shape: The layer's constants: one KV head of ``v_head_dim + rotary_dim`` columns.
        layout: Layout of the cache. The reference reads only the plain one.

    Returns:
        [num_tokens, num_heads * v_head_dim] in the type of ``q``; scores and softmax in float32.
    """
    assert isinstance(meta, AttentionMetadata)
    assert layout == "plain", "a tiled KV cache needs the kernels of its device"
    (cache,) = kv_cache
    rank, rotary_dim, heads, interleaved = shape.v_dim, cos_sin.shape[1], shape.num_heads, shape.rotates_pairs
    k_rope = rotary_embedding.reference(k_rope, positions, cos_sin, rotary_dim, interleaved)
    write_cache(torch.cat([latents, k_rope], dim=-1), cache, meta, 1)
    turned = q_rope.unflatten(1, (heads, -1))[..., -rotary_dim:].flatten(1)
    turned = rotary_embedding.reference(turned, positions, cos_sin, rotary_dim, interleaved)
    queries = torch.cat([q.unflatten(1, (heads, -1)), turned.unflatten(1, (heads, -1))], dim=-1)
    out = q.new_empty((q.shape[0], heads, rank))
    starts = meta.query_start_loc.tolist()
    for row, seq_len in enumerate(meta.seq_lens.tolist()):
        start, end = starts[row], starts[row + 1]
        blocks = meta.block_table[row, : -(-seq_len // meta.block_size)].long()
        keys, scales = decode_heads(tokens_of(cache, blocks, seq_len, 0), shape.head_dim)
        values = keys[..., :rank]
        out[start:end] = attend(queries[start:end], keys, values, shape, None, scales, scales)
    return out.flatten(1)
