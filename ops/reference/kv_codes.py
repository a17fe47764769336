"""Caches of K and V in codes: how the numbers of a token's head become bytes, and back.

``int8`` has a scale per token and head; vLLM's ``fp8`` formats have none. V in 4 bits has a scale and a minimum for
each 32 columns. What a head stores depends on its own numbers alone, so a cache has the same bits however prompts were
chunked and batched.

Kernels may multiply the codes of ``int8`` as integers: with queries, and softmax weights of a part of the context,
rounded to 16 bits with a scale for each row, which is closer than bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ops.metadata import INT4_CACHE, KV_CODES, SCALE_BYTES, V_GROUP


def encode_heads(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Heads as a cache of a dtype stores them.

    Args:
        x: [..., dim].
        dtype: Of the cache. int8: codes from -127 to 127, the nearest to ``x / scale`` (ties to even); the scale is
            ``max |x| / 127``, rounded to bfloat16. Numbers beyond the range of an fp8 type become its largest.
            ``INT4_CACHE``: V in 4 bits; see ``encode_groups``.

    Returns:
        [..., stored_size(dim)] in ``dtype``.
    """
    if dtype == INT4_CACHE:
        return encode_groups(x.float())
    if dtype not in KV_CODES:
        return x.to(dtype)
    x = x.float()
    if dtype != torch.int8:
        return x.clamp(-KV_CODES[dtype], KV_CODES[dtype]).to(dtype)
    scale = (x.abs().amax(dim=-1, keepdim=True) / 127).to(torch.bfloat16)
    codes = torch.where(scale == 0, 0.0, x / scale.float()).round().clamp(-127, 127)
    return torch.cat([codes.nan_to_num().to(torch.int8), scale.view(torch.int8)], dim=-1)


def encode_groups(x: Tensor) -> Tensor:
    """Heads in 4 bits, x float32 [..., dim] -> uint8 [..., stored_size(dim)].

    For each 32 columns, the codes from 0 to 15 that are nearest to ``(x - minimum) / scale`` (ties to even). The
    minimum is the least number, rounded to bfloat16, and the scale ``max x / 15 - minimum / 15``, rounded likewise:
    below 0 if the minimum was rounded up beyond all numbers. A head has the codes, two in a byte, the even column's
    lower, then the scales of all groups, then their minimums.
    """
    missing = -x.shape[-1] % V_GROUP
    groups = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], missing)], dim=-1).unflatten(-1, (-1, V_GROUP))
    invalid = (groups * 0).sum(-1)  # NaN for infinity, too
    minimums = (groups.amin(-1) + invalid).to(torch.bfloat16)
    scales = (groups.amax(-1) / 15 - minimums.float() / 15).to(torch.bfloat16)
    steps = scales.float().unsqueeze(-1)
    codes = torch.where(steps == 0, 0.0, (groups - minimums.float().unsqueeze(-1)) / steps).round().clamp(0, 15)
    codes = codes.nan_to_num().to(torch.uint8).flatten(-2)
    pairs = codes[..., ::2] | codes[..., 1::2] << 4
    return torch.cat([pairs, scales.view(torch.uint8), minimums.view(torch.uint8)], dim=-1)


def decode_groups(stored: Tensor, dim: int) -> Tensor:
    """Inverse of ``encode_groups``, uint8 [..., stored_size(dim)] -> float32 [..., dim]."""
    count = -(-dim // V_GROUP)
    pairs, scales, minimums = stored.split([count * V_GROUP // 2, count * SCALE_BYTES, count * SCALE_BYTES], dim=-1)
    codes = torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(-2).unflatten(-1, (count, V_GROUP))
    scale, minimum = (each.contiguous().view(torch.bfloat16).float().unsqueeze(-1) for each in (scales, minimums))
    numbers: Tensor = codes.float() * scale + minimum
    return numbers.flatten(-2)[..., :dim]


def decode_heads(stored: Tensor, dim: int) -> tuple[Tensor, Tensor | None]:
    """Inverse of ``encode_heads``: numbers [..., dim] in float32, and the scales [...] by which they are multiplied."""
    if stored.dtype == INT4_CACHE:
        return decode_groups(stored, dim), None
    if stored.dtype != torch.int8:
        return stored.float(), None
    scales = stored[..., -SCALE_BYTES:].contiguous().view(torch.bfloat16).squeeze(-1)
    return stored[..., :-SCALE_BYTES].float(), scales.float()
