"""Normalisation over columns."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.dispatch import like_first, op


@op(like_first)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square (RMS) norm of each group of ``len(weight)`` columns.

    Usually one group is a whole row; with a weight of head size, each head is normalised separately. The norm is
    computed in float32 and rounded to the dtype of ``x`` before the weight is applied, as in Llama.

    Args:
        x: [rows, groups * size].
        weight: [size].
    """
    groups = x.unflatten(-1, (-1, weight.shape[0])).float()
    scale = torch.rsqrt(groups.pow(2).mean(dim=-1, keepdim=True) + eps)
    normed: Tensor = (groups * scale).to(x.dtype) * weight
    return normed.flatten(-2)


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
