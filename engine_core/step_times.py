"""Predicts how long a step may take, from past steps."""

from __future__ import annotations

MIN_DEADLINE = 10.0
"""Seconds that every step may take."""
SLOWER = 10.0
"""A step may take this many times as long as predicted."""
NEW_WORKER_STEPS = 3
"""The first steps of a worker, which touch new memory and may compile."""
NEW_WORKER_DEADLINE = 30.0
UNKNOWN_DEADLINE = 600.0
"""Deadline in seconds when there are no past steps to learn from."""


class StepTimes:
    """Times of steps by their size.

    A step has a number of tokens and a number of (token, attended token) pairs. Its time has a fixed part and grows
    with both, at most proportionally. So a past step gives an upper bound: its time multiplied by how much more the new
    step has of either. The smallest of these bounds is the prediction.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[int, int], tuple[int, int, float]] = {}
        """By magnitude: size of the latest step and a running estimate of the seconds."""

    def add(self, num_tokens: int, num_attended: int, seconds: float) -> None:
        """Records a step. One that took much longer than others of its size gets little weight."""
        key = num_tokens.bit_length(), num_attended.bit_length()
        seen = self._seen.get(key)
        if seen is not None:
            before = seen[2]
            rate = 0.5 if seconds < before else 0.1
            seconds = before + rate * (min(seconds, SLOWER * before) - before)
        self._seen[key] = num_tokens, num_attended, seconds

    def predict(self, num_tokens: int, num_attended: int) -> float | None:
        """Upper bound in seconds for a step on an idle machine; None: unknown."""
        return min(
            (
                seconds * max(1.0, num_tokens / tokens, num_attended / attended)
                for tokens, attended, seconds in self._seen.values()
            ),
            default=None,
        )

    def deadline(self, num_tokens: int, num_attended: int, num_steps: int, num_in_a_row: int = 1) -> float:
        """Seconds after which a worker counts as hung.

        Args:
            num_tokens: Tokens of the step.
            num_attended: (token, attended token) pairs of the step.
            num_steps: Steps that the worker has computed since its start.
            num_in_a_row: Such steps that it answers together.
        """
        predicted = self.predict(num_tokens, num_attended)
        if predicted is None:
            return UNKNOWN_DEADLINE
        least = MIN_DEADLINE if num_steps >= NEW_WORKER_STEPS else NEW_WORKER_DEADLINE
        return max(least, SLOWER * predicted * num_in_a_row)
