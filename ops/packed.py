"""Weights in the layout of a device's kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight [out_features, in_features] that only the kernels of its device can read."""

    data: Tensor
    """One-dimensional, in the weight's dtype, padded."""
    shape: tuple[int, int]
    paired: bool
    """The two halves of the rows are interleaved, so that one product yields both the gate and up projections of an
    MLP."""

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        return self.data.device


Weight = Tensor | PackedWeight
