"""Caches of K and V in 8 bits: how the numbers of a token's head become bytes, and back.

``int8`` has a scale per token and head; vLLM's ``fp8`` formats have none. What a head stores depends on its own numbers
alone, so a cache has the same bits however prompts were chunked and batched.

Kernels may multiply the codes of ``int8`` as integers: with queries, and softmax weights of a part of the context,
rounded to 16 bits with a scale for each row, which is closer than bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ops.metadata import KV_CODES, SCALE_BYTES


def encode_heads(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Heads as a cache of a dtype stores them.

    Args:
        x: [..., dim].
        dtype: Of the cache. int8: codes from -127 to 127, the nearest to ``x / scale`` (ties to even); the scale is
            ``max |x| / 127``, rounded to bfloat16. Numbers beyond the range of an fp8 type become its largest.

    Returns:
        [..., stored_size(dim)] in ``dtype``.
    """
    if dtype not in KV_CODES:
        return x.to(dtype)
    x = x.float()
    if dtype != torch.int8:
        return x.clamp(-KV_CODES[dtype], KV_CODES[dtype]).to(dtype)
    scale = (x.abs().amax(dim=-1, keepdim=True) / 127).to(torch.bfloat16)
    codes = torch.where(scale == 0, 0.0, x / scale.float()).round().clamp(-127, 127)
    return torch.cat([codes.nan_to_num().to(torch.int8), scale.view(torch.int8)], dim=-1)


def decode_heads(stored: Tensor) -> tuple[Tensor, Tensor | None]:
    """Inverse of ``encode_heads``: numbers [..., dim] in float32, and the scales [...] by which they are multiplied."""
    if stored.dtype != torch.int8:
        return stored.float(), None
    scales = stored[..., -SCALE_BYTES:].contiguous().view(torch.bfloat16).squeeze(-1)
    return stored[..., :-SCALE_BYTES].float(), scales.float()
