"""A small product and a small attention, compared with torch: whether this machine's compiler can be trusted at all.

Compilers have been wrong about single GPUs (triton-lang/triton #10821); tokens would be noise, and nothing would say
so.
"""

from __future__ import annotations

import torch

from ops.metadata import AttentionMetadata, AttentionShape
from ops.triton.attention import paged_attention
from ops.triton.linear import linear

_TOLERANCE = 0.05
"""Far more than rounding to bfloat16 explains."""


def problem(device: torch.device) -> str | None:
    """What the kernels compute wrongly on a device, or None. Waits for the device."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 128, generator=generator).bfloat16()
    weight = torch.randn(64, 128, generator=generator).bfloat16()
    if _differs(linear(x.to(device), weight.to(device)), x.double() @ weight.double().T):
        return "products of matrices"
    shape, length = AttentionShape(2, 1, 64, 0.125), 40
    q, k, v = (torch.randn(length, width, generator=generator).bfloat16() for width in (128, 64, 64))
    cache = (torch.zeros(2, 1, 32, 64, dtype=torch.bfloat16, device=device) for _ in range(2))
    columns = (torch.tensor([0, length]), torch.tensor([length]), torch.tensor([[1, 0]]))
    starts, lengths, table = (column.to(device, torch.int32) for column in columns)
    slots = torch.tensor([*range(32, 64), *range(8)]).to(device)
    meta = AttentionMetadata(starts, lengths, table, slots, 32)
    found = paged_attention(q.to(device), k.to(device), v.to(device), (next(cache), next(cache)), meta, shape)
    heads = q.double().unflatten(1, (2, 64)).transpose(0, 1)
    scores = heads @ k.double().T * shape.scale
    is_later = torch.ones(length, length, dtype=torch.bool).triu(1)
    expected = scores.masked_fill(is_later, -torch.inf).softmax(-1) @ v.double()
    return "results of attention" if _differs(found, expected.transpose(0, 1).flatten(1)) else None


def _differs(found: torch.Tensor, expected: torch.Tensor) -> bool:
    error = (found.cpu().double() - expected).abs().max() / expected.abs().max()
    return not bool(error < _TOLERANCE)  # also if it is not a number
