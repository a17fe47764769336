"""Times of steps that are too long to be believed at once."""

from __future__ import annotations

DOUBTFUL = 0.4
"""Logarithm of a time relative to the expectation above which it needs another that confirms it."""


class Doubt:
    """Holds back long times of single steps.

    Another program may have had the cores, or a step may follow a long prompt that has emptied the caches. A size of
    steps that seems to take long is avoided, so that nothing would soon correct the mistake. If steps do take longer,
    the next one of that size shows it.
    """

    def __init__(self, num_sizes: int) -> None:
        self._held: list[float | None] = [None] * num_sizes
        """By size: the last measurement, if it was long."""

    def believed(self, size: int, surprise: float) -> float | None:
        """What a measurement counts for.

        Args:
            size: Which of the sizes.
            surprise: Logarithm of the time relative to the expectation.

        Returns:
            The surprise, if it is no long time; the smaller of this and the last one, if both are; otherwise None.
        """
        if surprise <= DOUBTFUL:
            self._held[size] = None
            return surprise
        held, self._held[size] = self._held[size], surprise
        return None if held is None else min(held, surprise)
