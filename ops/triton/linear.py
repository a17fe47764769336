"""Products with weights of any kind."""

from __future__ import annotations

import torch
from torch import Tensor

from ops.packed import PackedWeight, QuantizedWeight, Weight
from ops.triton import gather, gemm, pointwise, quantized
from ops.triton.gemm import PLAIN, Epilogue


def matmul(
    x: Tensor,
    weight: Weight,
    epilogue: Epilogue = PLAIN,
    *,
    rows: Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See ``gemm.matmul``. A gated product with several segments of weights takes a launch more."""
    assert not isinstance(weight, PackedWeight), "a packed weight needs the kernels of its device"
    if isinstance(weight, Tensor):
        return gemm.matmul(x, weight, epilogue, rows=rows, dtype=dtype, out=out)
    if epilogue.is_gated and len(weight.segments) > 1:
        assert epilogue.residual is None
        both = quantized.matmul(x, weight, Epilogue(epilogue.bias), rows=rows)
        return pointwise.act_and_mul(both, epilogue.activation, out=out)
    return quantized.matmul(x, weight, epilogue, rows=rows, dtype=dtype, out=out)


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """The op ``linear``."""
    return matmul(x, weight, Epilogue(bias), out=out)


def logits(x: Tensor, weight: Weight, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """The op ``logits``: the sums themselves."""
    return matmul(x, weight, Epilogue(bias), dtype=torch.float32, out=out)


def embedding(ids: Tensor, weight: Weight, *, out: Tensor | None = None) -> Tensor:
    """The op ``embedding``."""
    assert not isinstance(weight, PackedWeight), "a packed weight needs the kernels of its device"
    if isinstance(weight, QuantizedWeight):
        return quantized.embedding(ids, weight, out=out)
    return gather.gather_rows(weight, ids, out=out)
