"""How long a step takes, by the number of its tokens: learned from the steps that are computed anyway.

Measuring at startup would cost as much as twenty steps of every size, and would know nothing of long contexts or of
other work on the machine.
"""

from __future__ import annotations

import math
from bisect import bisect_left

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]

KNOTS = np.array([1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024], np.float64)
"""Tokens of a step; times in between are interpolated."""
_KNOTS: list[float] = KNOTS.tolist()
FIRST_GUESS = 0.1
"""Cost of another token before anything was measured, in steps of one token. It is low, so that drafts are tried."""
SCALE_RATE = 0.3
"""How fast the times of all sizes together follow a measurement: the load of the machine and contexts change them."""
SHAPE_RATE = 0.05
"""How fast the time of one size relative to the others follows, after its first measurements."""
MAX_VISITS = 10.0
MIN_VISITS = 0.25
KEPT = 0.998
"""Part of the visits that is left after another step: a size that is not measured for thousands of steps is forgotten,
so that it is tried again."""
MANY = 100
"""Measurements after which others change little from step to step."""
GUESS_PERIOD = 8
"""Steps between guesses from then on."""
MAX_SURPRISE = 0.7
"""Bound of a measurement's logarithm relative to the expectation: something else may have taken the time."""


class StepCosts:
    """Times of steps with one token per position that is sampled, such as those that decode."""

    def __init__(self) -> None:
        self._guess: F64 = np.log1p(FIRST_GUESS * (KNOTS - 1))
        self._shape: F64 = self._guess.copy()
        """Logarithm of the time at each knot, relative to the scale."""
        self._scale: float | None = None
        """Logarithm of the milliseconds of all steps in common; None: nothing was measured."""
        self._num_added = 0
        self._visits = np.zeros(len(KNOTS))
        """Recent steps of about the size of each knot."""

    def add(self, num_tokens: int, milliseconds: float) -> None:
        """Learns from a step."""
        if num_tokens < 1 or milliseconds <= 0:
            return
        right = min(max(1, bisect_left(_KNOTS, num_tokens)), len(_KNOTS) - 1)
        left = right - 1
        weight = min(1.0, (num_tokens - _KNOTS[left]) / (_KNOTS[right] - _KNOTS[left]))
        expected = (1 - weight) * float(self._shape[left]) + weight * float(self._shape[right])
        measured = math.log(milliseconds)
        if self._scale is None:
            self._scale = measured - expected
        surprise = min(MAX_SURPRISE, max(-MAX_SURPRISE, measured - expected - self._scale))
        self._scale += SCALE_RATE * surprise
        self._visits *= KEPT
        for knot, share in ((left, 1 - weight), (right, weight)):
            visits = min(float(self._visits[knot]) + share, MAX_VISITS)
            self._visits[knot] = visits
            self._shape[knot] += share * max(SHAPE_RATE, 0.5 / (1 + visits)) * surprise
        self._num_added += 1
        if self._num_added < MANY or self._num_added % GUESS_PERIOD == 0:
            self._guess_others()

    def _guess_others(self) -> None:
        """Sizes that were not measured lie between those that were; the first guess says how it goes on behind."""
        is_known = self._visits >= MIN_VISITS
        known = np.flatnonzero(is_known)
        if len(known):
            excess = np.interp(KNOTS, KNOTS[known], (self._shape - self._guess)[known])
            self._shape = np.where(is_known, self._shape, self._guess + excess)

    def relative(self, num_tokens: F64) -> F64:
        """Times of steps with these numbers of tokens, in a common unit. They never fall as the number grows.

        Args:
            num_tokens: float64 [n], at least 1.
        """
        shape = np.exp(np.maximum.accumulate(self._shape))
        times: F64 = np.interp(num_tokens, KNOTS, shape)
        return times

    @property
    def is_known(self) -> bool:
        """Whether anything was measured."""
        return self._scale is not None

    def milliseconds(self, num_tokens: F64) -> F64:
        """Times of steps with these numbers of tokens; 0 before anything was measured.

        Args:
            num_tokens: float64 [n], at least 1.
        """
        if self._scale is None:
            return np.zeros(len(num_tokens))
        times: F64 = self.relative(num_tokens) * np.exp(self._scale)
        return times
