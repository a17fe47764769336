"""How long a step takes, by the number of its tokens: measured at startup, then learned from the steps that are
computed anyway.

The start has time for a few steps, fewer of a large model. They know nothing of long contexts or of other work on the
machine, and the loading of other processes may have disturbed them: what steps take later corrects them.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence

from executor.speculative.doubt import Doubt

KNOTS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)
"""Tokens of a step; times in between are interpolated."""
TIMED = (1, 8, 4, 2, 16)
"""Those timed at startup, in the order in which the curve needs them."""
RUNS = 2
"""Steps of each; the shortest counts."""
START_TIME = 0.15
"""Seconds that these may take together, but for the first one."""
MOST_AT_START = 0.25
"""Most that another token may cost by them, in steps of one token: drafts are tried however the start was disturbed."""
START_VISITS = 2.0
"""What they count for: if no step of such a size follows in a thousand, one is tried."""
DENSE = 8
"""Up to this number, each is a knot."""
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


def time_steps(run: Callable[[int], object], most: int, seconds: float = START_TIME) -> dict[int, float]:
    """Milliseconds of steps by the number of their tokens, as many as there is time for.

    Args:
        run: Computes a step of so many tokens.
        most: Most tokens of a step.
        seconds: All may take so long, but for the first one.
    """
    begin, took = time.perf_counter(), 0.0
    times: dict[int, float] = {}
    for size in (size for size in TIMED if size <= most):
        for _ in range(RUNS):
            start = time.perf_counter()
            if times and start - begin + took > seconds:
                return times
            run(size)
            took = time.perf_counter() - start
            times[size] = min(took * 1e3, times.get(size, math.inf))
    return times


class StepCosts:
    """Times of steps with one token per position that is sampled, such as those that decode.

    Numbers are Python's: there are few of them, so that arrays would take several times as long.
    """

    def __init__(self) -> None:
        self._guess = [math.log1p(FIRST_GUESS * (knot - 1)) for knot in KNOTS]
        self._shape = list(self._guess)
        """Logarithm of the time at each knot, relative to the scale."""
        self._scale: float | None = None
        """Logarithm of the milliseconds of all steps in common; None: nothing was measured."""
        self._num_added = 0
        self._visits = [0.0] * len(KNOTS)
        """Recent steps of about the size of each knot."""
        self._doubt = Doubt(len(KNOTS))

    def start(self, milliseconds: Mapping[int, float]) -> None:
        """Takes over how the times that ``time_steps`` has measured grow. Whole steps take longer, as they sample."""
        for size, took in milliseconds.items():
            knot, most = KNOTS.index(size), 1 + MOST_AT_START * (size - 1)
            self._shape[knot] = math.log(min(took / milliseconds[1], most))
            self._visits[knot] = START_VISITS
        self._guess_others()

    def add(self, num_tokens: int, milliseconds: float) -> None:
        """Learns from a step."""
        if num_tokens < 1 or milliseconds <= 0:
            return
        right = min(max(1, bisect_left(KNOTS, num_tokens)), len(KNOTS) - 1)
        left = right - 1
        weight = min(1.0, (num_tokens - KNOTS[left]) / (KNOTS[right] - KNOTS[left]))
        expected = (1 - weight) * self._shape[left] + weight * self._shape[right]
        measured = math.log(milliseconds)
        if self._scale is None:
            self._scale = measured - expected
        believed = self._doubt.believed(right if weight > 0.5 else left, measured - expected - self._scale)
        if believed is None:
            return
        surprise = min(MAX_SURPRISE, max(-MAX_SURPRISE, believed))
        self._scale += SCALE_RATE * surprise
        self._visits = [KEPT * visits for visits in self._visits]
        for knot, share in ((left, 1 - weight), (right, weight)):
            visits = self._visits[knot] = min(self._visits[knot] + share, MAX_VISITS)
            self._shape[knot] += share * max(SHAPE_RATE, 0.5 / (1 + visits)) * surprise
        self._num_added += 1
        if self._num_added < MANY or self._num_added % GUESS_PERIOD == 0:
            self._guess_others()

    def _guess_others(self) -> None:
        """Sizes that were not measured lie between those that were; the first guess says how it goes on behind."""
        known = [knot for knot, visits in enumerate(self._visits) if visits >= MIN_VISITS]
        if not known:
            return
        excess = [self._shape[knot] - self._guess[knot] for knot in known]
        sizes = [KNOTS[knot] for knot in known]
        for knot, size in enumerate(KNOTS):
            if self._visits[knot] < MIN_VISITS:
                self._shape[knot] = self._guess[knot] + _interpolated(size, sizes, excess)

    def relative(self, num_tokens: Sequence[int]) -> list[float]:
        """Times of steps with these numbers of tokens, at least 1, in a common unit. They never fall as the number
        grows."""
        most, times, highest = max(num_tokens, default=0), [], -math.inf
        for knot, shape in zip(KNOTS, self._shape, strict=True):
            highest = max(highest, shape)
            times.append(math.exp(highest))
            if knot >= most:
                break
        return [
            times[number - 1] if number <= DENSE else _interpolated(number, KNOTS[: len(times)], times)
            for number in num_tokens
        ]

    @property
    def is_known(self) -> bool:
        """Whether anything was measured."""
        return self._scale is not None

    def milliseconds(self, num_tokens: Sequence[int]) -> list[float]:
        """Times of steps with these numbers of tokens, at least 1; 0 before anything was measured."""
        scale = 0.0 if self._scale is None else math.exp(self._scale)
        return [scale * time for time in self.relative(num_tokens)]


def _interpolated(size: float, sizes: Sequence[float], values: Sequence[float]) -> float:
    """The value at a size, on the lines between those at ``sizes``, which ascend; level on both sides of these."""
    right = bisect_left(sizes, size)
    if right == 0 or right == len(sizes):
        return values[min(right, len(sizes) - 1)]
    begin, end = sizes[right - 1], sizes[right]
    return values[right - 1] + (values[right] - values[right - 1]) * (size - begin) / (end - begin)
