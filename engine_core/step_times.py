"""How long a step may take, from those that were seen."""

from __future__ import annotations

MIN_DEADLINE = 10.0
"""Seconds that every step has."""
SLOWER = 10.0
"""A step may take this many times as long as predicted."""
NEW_WORKER_STEPS = 3
"""The first steps of a worker touch memory for the first time, and may compile."""
NEW_WORKER_DEADLINE = 30.0
UNKNOWN_DEADLINE = 600.0
"""Seconds of a step when there was none to learn from."""


class StepTimes:
    """Times of steps by their size.

    A step has a number of tokens, and a number of (token, token it attends to) pairs. The time grows with both, never
    faster than in proportion, and has a part that is fixed. So a step takes at most as long as one that was seen, times
    how much more it has of either. The least of these bounds is the prediction.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[int, int], tuple[int, int, float]] = {}
        """By magnitude: the size of the last step that was seen, and a running estimate of the seconds."""

    def add(self, num_tokens: int, num_attended: int, seconds: float) -> None:
        """A step was computed. One that took much longer than others of its size counts little."""
        key = num_tokens.bit_length(), num_attended.bit_length()
        seen = self._seen.get(key)
        if seen is not None:
            before = seen[2]
            rate = 0.5 if seconds < before else 0.1
            seconds = before + rate * (min(seconds, SLOWER * before) - before)
        self._seen[key] = num_tokens, num_attended, seconds

    def predict(self, num_tokens: int, num_attended: int) -> float | None:
        """Seconds that a step takes at most on a quiet machine; None: nothing is known."""
        return min(
            (
                seconds * max(1.0, num_tokens / tokens, num_attended / attended)
                for tokens, attended, seconds in self._seen.values()
            ),
            default=None,
        )

    def deadline(self, num_tokens: int, num_attended: int, num_steps: int) -> float:
        """Seconds after which a worker counts as hung.

        Args:
            num_tokens: Of the step.
            num_attended: Pairs of the step.
            num_steps: Steps that the worker has computed since it was started.
        """
        predicted = self.predict(num_tokens, num_attended)
        if predicted is None:
            return UNKNOWN_DEADLINE
        least = MIN_DEADLINE if num_steps >= NEW_WORKER_STEPS else NEW_WORKER_DEADLINE
        return max(least, SLOWER * predicted)
