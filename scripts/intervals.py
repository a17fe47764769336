"""How far a mean or a median of measurements may be from the true one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean."""
    if len(values) < 2:
        return -math.inf, math.inf
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    freedom = len(values) - 1
    t = 1.96 + 2.4 / freedom + 3.2 / freedom**2 if freedom > 2 else 4.303 if freedom == 2 else 12.71
    return mean - t * error, mean + t * error


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the median, by ranks."""
    ordered = sorted(values)
    first = max(0, math.floor(len(values) / 2 - 0.98 * math.sqrt(len(values))))
    return ordered[first], ordered[-1 - first]
