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
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm of each row, in float32.

    Args:
        x: [rows, width].
        weight: [width].
        bias: [width] or None.
    """
    bias_f32 = None if bias is None else bias.float()
    return F.layer_norm(x.float(), (x.shape[-1],), weight.float(), bias_f32, eps).to(x.dtype)
