"""Products by the GPU vendor's library, through torch: a yardstick for ours.

A library chooses its kernel by the number of rows, so a row's bits may depend on what is computed beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ops.packed import QuantizedWeight, Weight
from ops.triton import linear as own
from ops.triton.launch import call, result


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """The op ``linear``; of quantised weights by our kernels."""
    if not isinstance(weight, Tensor):
        assert isinstance(weight, QuantizedWeight)
        return own.linear(x, weight, bias, out=out)
    out = result(out, (x.shape[0], weight.shape[0]), x.dtype, x)
    call(_multiply, {"x": x, "weight": weight, "bias": bias, "out": out})
    return out


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)
