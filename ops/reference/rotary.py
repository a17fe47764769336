"""Rotary position embedding (Su et al., RoFormer, arXiv:2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor

from ops.dispatch import like_first, op


@op(like_first)
def rotary_embedding(x: Tensor, positions: Tensor, cos_sin: Tensor, head_dim: int, interleaved: bool = False) -> Tensor:
    """Rotates each head's first ``rotary_dim`` columns by the angles of the token's position.

    Args:
        x: [num_tokens, num_heads * head_dim].
        positions: int32 or int64 [num_tokens].
        cos_sin: float32 [max_positions, rotary_dim]: cosines, then sines, of the ``rotary_dim / 2`` angles.
        interleaved: Pairs are neighbouring columns (GPT-J) instead of the two halves (NeoX, Llama).

    Returns:
        Like ``x``. Computed in the dtype of ``x``, as the models were trained: cos and sin are rounded to it first.
    """
    rotary_dim = cos_sin.shape[1]
    heads = x.unflatten(-1, (-1, head_dim))  # [num_tokens, num_heads, head_dim]
    cos, sin = cos_sin[positions].to(x.dtype).unsqueeze(1).chunk(2, dim=-1)  # [num_tokens, 1, rotary_dim / 2]
    turned, rest = heads[..., :rotary_dim], heads[..., rotary_dim:]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        result = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        result = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((result, rest), dim=-1).flatten(-2)
