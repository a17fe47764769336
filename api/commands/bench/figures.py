"""Distributions, comparisons of runs, and tables of both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The percentile of sorted values, interpolated between neighbours."""
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def describe(values: Sequence[float]) -> dict[str, float]:
    """Mean, percentiles and maximum; empty for no values."""
    if not values:
        return {}
    ordered = sorted(values)
    figures = {"mean": math.fsum(ordered) / len(ordered), "median": percentile(ordered, 50)}
    figures |= {f"p{percent}": percentile(ordered, percent) for percent in (90, 95, 99)}
    return figures | {"max": ordered[-1]}


def flatten(figures: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested figures as one table: ``{"ttft_ms": {"p99": 3}}`` becomes ``{"ttft_ms.p99": 3}``."""
    flat: dict[str, float] = {}
    for key, value in figures.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[prefix + key] = value
    return flat


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, float, float, float]]:
    """Figures that both runs have and that are not 0 in both: name, old, new, new divided by old (NaN if that is 0)."""
    before, after = flatten(old), flatten(new)
    return [
        (key, before[key], after[key], after[key] / before[key] if before[key] else math.nan)
        for key in after
        if key in before and (before[key] or after[key])
    ]


def format_comparison(rows: Sequence[tuple[str, float, float, float]], old_name: str, new_name: str) -> str:
    """The table from ``compare``, as text."""
    lines = [f"{'':28} {old_name[:14]:>14} {new_name[:14]:>14}    ratio"]
    lines += [f"{key:28} {before:14.6g} {after:14.6g} {ratio:8.3f}" for key, before, after, ratio in rows]
    return "\n".join(lines)


def format_distributions(named: dict[str, dict[str, float]]) -> str:
    """Distributions as a table, one per line."""
    columns = ("mean", "median", "p90", "p95", "p99", "max")
    lines = [f"{'':22}" + "".join(f"{column:>10}" for column in columns)]
    for name, figures in named.items():
        cells = "".join(f"{figures[column]:10.3f}" if figures else f"{'-':>10}" for column in columns)
        lines.append(f"{name:22}{cells}")
    return "\n".join(lines)
