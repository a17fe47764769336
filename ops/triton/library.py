"""Products and attention by libraries: yardsticks for ours.

A library chooses its kernel by the number of rows, so a row's bits may depend on what is computed beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ops.metadata import AttentionMetadata
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


@dataclass
class LibraryStep(AttentionMetadata):
    """Metadata of a step whose attention a library computes."""

    attend: Callable[[Tensor, Tensor, Tensor, Tensor], None] | None
    """Reads q, K and V and writes the result. None: nothing is computed, memory is planned."""


def attend(q: Tensor, kv_cache: tuple[Tensor, Tensor], step: LibraryStep, out: Tensor) -> None:
    """Launches the attention of a layer whose K and V are written."""
    assert step.attend is not None or q.is_meta
    if step.attend is not None:
        call(step.attend, {"q": q, "keys": kv_cache[0], "values": kv_cache[1], "out": out})
