"""Histograms that cost a request little: it is counted in a dozen of them while its client waits.

Those of ``prometheus_client`` take a lock and compare with each bound, several microseconds for each number.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


def add_histogram(
    family: HistogramMetricFamily, values: Sequence[str], bounds: Iterable[float], counts: Iterable[int], total: float
) -> None:
    """Adds a series to a family.

    Args:
        family: The family.
        values: Of its labels.
        bounds: Upper bounds of the buckets, ascending.
        counts: Numbers in each bucket; one more for the rest.
        total: Sum of all numbers.
    """
    names = [*map(floatToGoString, bounds), "+Inf"]
    family.add_metric(values, list(zip(names, accumulate(counts), strict=True)), sum_value=total)


class Histogram:
    """A histogram of one series. Only one thread may change it."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        """``bounds``: upper bounds of the buckets, ascending; one more has the rest."""
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        """Numbers in each bucket."""
        self.total = 0.0
        """Sum of all numbers."""

    def observe(self, number: float) -> None:
        """Counts a number."""
        self.counts[bisect_left(self._bounds, number)] += 1
        self.total += number


class Histograms(Collector):
    """A family of histograms, by their labels."""

    def __init__(
        self, name: str, text: str, labels: Sequence[str], bounds: Sequence[float], registry: CollectorRegistry
    ) -> None:
        """
        Args:
            name: Of the family.
            text: What it says.
            labels: Names of the labels.
            bounds: Upper bounds of the buckets, ascending.
            registry: Collects the family.
        """
        self._name, self._text, self._labels = name, text, list(labels)
        self._bounds = tuple(bounds)
        self._series: dict[tuple[str, ...], Histogram] = {}
        registry.register(self)

    def labels(self, *values: str) -> Histogram:
        """The series with these values of the labels."""
        series = self._series.get(values)
        if series is None:
            series = self._series[values] = Histogram(self._bounds)
        return series

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        for values, series in list(self._series.items()):
            add_histogram(family, values, self._bounds, series.counts, series.total)
        yield family
