"""Normalisation over columns."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.dispatch import like_first, op


@op(like_first)
def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    size: int | None = None,
    offset: float = 0.0,
    round_first: bool = True,
) -> Tensor:
    """Root mean square (RMS) norm of each group of ``size`` columns, computed in float32.

    Usually one group is a whole row; with head size, each head is normalised separately.

    Args:
        x: [rows, groups * size].
        weight: [size]; [groups * size] if each group has its own; None: 1.
        eps: Added to the mean of squares.
        size: Columns of a group. Default: ``len(weight)``, or a whole row.
        offset: Added to the weight (1 in Gemma).
        round_first: Whether the normalised values are rounded to the dtype of ``x`` before the weight is applied, as in
            Llama. Otherwise only the result is (Gemma, OLMo 2). Without an offset only.
    """
    assert offset == 0.0 or not round_first
    size = size or (x.shape[-1] if weight is None else len(weight))
    groups = x.unflatten(-1, (-1, size)).float()
    if weight is not None:
        weight = weight.view(-1, size)
    normed: Tensor = groups * torch.rsqrt(groups.pow(2).mean(dim=-1, keepdim=True) + eps)
    if weight is None:
        out = normed.to(x.dtype)
    elif round_first:
        out = normed.to(x.dtype) * weight
    else:
        out = (normed * (offset + weight.float())).to(x.dtype)
    return out.flatten(-2)


@op(like_first)
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, size: int | None = None) -> Tensor:
    """Layer norm of each group of ``size`` columns, in float32 and rounded once.

    Args:
        x: [rows, groups * size].
        weight: [size]; [groups * size] if each group has its own; None: 1.
        bias: Likewise; None: 0.
        eps: Added to the variance.
        size: Columns of a group. Default: a whole row.
    """
    size = x.shape[-1] if size is None else size
    out = F.layer_norm(x.float().unflatten(-1, (-1, size)), (size,), None, None, eps)
    if weight is not None:
        out = out * weight.float().view(-1, size)
    if bias is not None:
        out = out + bias.float().view(-1, size)
    return out.flatten(-2).to(x.dtype)
