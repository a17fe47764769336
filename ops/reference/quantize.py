"""Quantisation of rows in groups of 32 columns, as weights are loaded.

Sums have a fixed order (``tree_sum``), so all devices find the same codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ops.dispatch import Spec, op
from ops.packed import GROUP, shares_in_groups, tree_sum

NUMBERS = 1 << 17
"""Numbers quantised at a time: few enough for a core's cache."""
SHRINKS = (1.0, 0.9, 0.8)
"""Shares of a group's range that 4 bits may cover."""
FLAT = 1e-6
"""Variance of codes that are all the same, but for rounding."""


@op(lambda source, bits, importance=None: Spec("", 0, torch.uint8))
def quantize_groups(source: Tensor, bits: int, importance: Tensor | None = None) -> Tensor:
    """Rows in codes of 4 or 8 bits, as ``pack_segment`` takes them.

    8 bits count from 128, with a scale in float16, and are rounded to the nearest. 4 bits have a scale and a minimum,
    and are the best of several ranges for each group: scale and minimum are fitted to the codes of each by least
    squares.

    Args:
        source: [rows, columns] of any floating-point type; whole groups.
        bits: 4 or 8.
        importance: float32 [columns], positive: what the squared error of a column counts, for 4 bits. None: all alike.

    Returns:
        uint8 [rows, bytes]: a byte for each code, then the scales of the groups, then their minimums.
    """
    columns = source.shape[1]
    weights = torch.full((1, GROUP), 1 / GROUP) if importance is None else shares_in_groups(importance)
    result = []
    step = max(1, NUMBERS // columns)
    for first in range(0, len(source), step):
        groups = source[first : first + step].float().unflatten(1, (-1, GROUP))
        codes, *fields = nearest_int8(groups) if bits == 8 else best_int4(groups, weights)
        result.append(torch.cat([codes.flatten(1), *(field.contiguous().view(torch.uint8) for field in fields)], dim=1))
    return torch.cat(result)


def nearest_int8(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, and scales, of float32 [..., 32]."""
    scales = (groups.abs().amax(-1) / 127).half()
    divisors = torch.where(scales > 0, scales.float(), 1)[..., None]
    return (groups / divisors).round_().clamp_(-127, 127).add_(128).to(torch.uint8), scales


def best_int4(groups: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and minimums of float32 [..., 32]; ``weights`` of errors, [..., 32] with a sum of 1."""

    def mean_of(numbers: Tensor) -> Tensor:
        return tree_sum(numbers * weights)

    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    mean = mean_of(groups)
    centred = groups - mean
    scales, minimums = torch.zeros_like(low), mean.clone()
    starts, factors, most = low.clone(), torch.zeros_like(low), torch.full_like(low, -torch.inf)
    for share in SHRINKS:
        covered = share * (high - low)
        start, width = (low + high - covered) / 2, covered / 15
        factor = torch.where(width > 0, 1 / width, 0)
        codes = ((groups - start) * factor).round_().clamp_(0, 15)
        code_mean = mean_of(codes)
        covariance = mean_of(codes * centred)
        variance = mean_of(codes * codes) - code_mean * code_mean
        scale = covariance / torch.where(variance > FLAT, variance, 1)
        explained = scale * covariance  # the least squared error is the variance of the numbers without it
        is_better = explained > most
        most = torch.where(is_better, explained, most)
        scales = torch.where(is_better, scale, scales)
        minimums = torch.where(is_better, mean - scale * code_mean, minimums)
        starts, factors = torch.where(is_better, start, starts), torch.where(is_better, factor, factors)
    codes = ((groups - starts) * factors).round_().clamp_(0, 15)
    return codes.to(torch.uint8), scales.squeeze(-1).half(), minimums.squeeze(-1).half()
