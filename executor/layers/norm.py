"""Normalisation layers."""

from __future__ import annotations

from torch import Tensor, nn

import ops
from executor.layers.context import ModelContext
from executor.layers.parameter import Part, WeightParameter, single


class RMSNorm(nn.Module):
    """Root mean square norm of each group of ``size`` columns (Zhang and Sennrich, arXiv:1910.07467)."""

    def __init__(self, context: ModelContext, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = WeightParameter.empty(single(Part.whole(size)), dtype=context.dtype, device=context.device)

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """Layer norm of each group of ``size`` columns (Ba et al., arXiv:1607.06450)."""

    def __init__(self, context: ModelContext, size: int, eps: float, *, weight: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.size, self.eps = size, eps
        parts = single(Part.whole(size))
        self.weight = WeightParameter.empty(parts, dtype=context.dtype, device=context.device) if weight else None
        self.bias = WeightParameter.empty(parts, dtype=context.dtype, device=context.device) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps, self.size)
