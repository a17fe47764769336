"""How many decode steps in a row a plan asks for.

Core, api and sockets work once per plan, on the cores that compute the next step meanwhile. While steps are short, this
takes a good part of them; a plan of several steps takes it once. Its tokens reach clients together, and a request that
comes in the meantime waits for all of them, so a plan takes no longer than a screen shows a picture.
"""

from __future__ import annotations

import numpy as np

from engine_core.config import MAX_NUM_STEPS, MAX_STEPS_AHEAD, SchedulerConfig
from engine_core.in_flight import InFlight

FRAME_MS = 16.0
"""Milliseconds that a plan of several steps may take."""
NEWEST = 0.2
"""Weight of the newest measurement in the running mean."""
SLOWER = 2.0
"""A step that took more times as long as usual counts as one of this many: others may have had the cores."""


class StepsPerPlan:
    """Chooses numbers of steps, by the times of earlier ones. No token depends on them."""

    def __init__(self, config: SchedulerConfig, *, num_stages: int, has_late_results: bool) -> None:
        """
        Args:
            config: Limits.
            num_stages: Pipeline stages: with several, steps follow each other without gaps.
            has_late_results: Likewise, since the next step is launched before the last one is done.
        """
        depth, wanted = config.max_in_flight_steps, config.num_scheduler_steps
        room = min(config.step_tokens, MAX_STEPS_AHEAD) // depth  # see ``max_step_tokens``
        self._most = 1 if num_stages > 1 else max(1, min(wanted or MAX_NUM_STEPS, room))
        self._by_time = wanted is None
        if self._by_time and has_late_results:
            self._most = 1
        self._step_ms = np.zeros(config.max_num_seqs.bit_length() + 1)
        """By magnitude of the number of rows: running mean of the milliseconds of a decode step; 0: unknown."""

    def choose(self, num_rows: int) -> int:
        """Most steps of a plan of this many rows that decode."""
        if self._most == 1 or not self._by_time:
            return self._most
        step_ms = self._step_ms[num_rows.bit_length()]
        return 1 if step_ms == 0 else max(1, min(self._most, int(FRAME_MS / step_ms)))

    def note(self, step: InFlight, forward_ms: float) -> None:
        """Records how long a plan took."""
        num_rows = len(step.slots)
        if self._most == 1 or not forward_ms or step.num_tokens != num_rows * step.num_steps:
            return
        place, step_ms = num_rows.bit_length(), forward_ms / step.num_steps
        mean = self._step_ms[place]
        self._step_ms[place] = step_ms if mean == 0 else mean + NEWEST * (min(step_ms, SLOWER * mean) - mean)
