"""How many decode steps in a row a plan asks for.

Core, api and sockets work once per plan, on the cores that compute the next step meanwhile. While steps are short, this
takes a good part of them; a plan of several steps takes it once. Its tokens reach clients together, and a request that
comes in the meantime waits for all of them, so that a plan is short enough for text to appear thirty times a second.
"""

from __future__ import annotations

import numpy as np

from engine_core.config import MAX_NUM_STEPS, MAX_STEPS_AHEAD, SchedulerConfig
from engine_core.in_flight import InFlight

MAX_ROW_TOKENS = 255
"""Most tokens of a row that a result can tell."""
PLAN_MS = 33.0
"""Milliseconds that a plan of several steps may take."""
FASTER_WEIGHT, SLOWER_WEIGHT = 0.5, 0.05
"""Weight of a new measurement that is shorter or longer than usual: steps take longer while core and api disturb them,
which they do the less the more steps a plan has."""
SLOWER = 2.0
"""A step that took more times as long as usual counts as one of this many: others may have had the cores."""


class StepsPerPlan:
    """Chooses numbers of steps, by the times of earlier ones. No token depends on them."""

    def __init__(
        self, config: SchedulerConfig, max_draft_tokens: int = 0, *, num_stages: int, has_late_results: bool
    ) -> None:
        """
        Args:
            config: Limits.
            max_draft_tokens: Most drafts of a row in a step.
            num_stages: Pipeline stages: with several, steps follow each other without gaps.
            has_late_results: Likewise, since the next step is launched before the last one is done.
        """
        depth, wanted = config.max_in_flight_steps, config.num_scheduler_steps
        room = min(MAX_STEPS_AHEAD // depth, MAX_ROW_TOKENS // (1 + max_draft_tokens))
        room = min(room, config.step_tokens // depth // (1 + max_draft_tokens))  # see ``max_step_tokens``
        self._most = 1 if num_stages > 1 else max(1, min(wanted or MAX_NUM_STEPS, room))
        self._by_time = wanted is None
        if self._by_time and has_late_results:
            self._most = 1
        self._step_ms = np.zeros(config.max_num_seqs.bit_length() + 1)
        """By magnitude of the number of rows: the usual milliseconds of a decode step; 0: unknown."""

    def choose(self, num_rows: int) -> int:
        """Most steps of a plan of this many rows that decode."""
        if self._most == 1 or not self._by_time:
            return self._most
        step_ms = self._step_ms[num_rows.bit_length()]
        return 1 if step_ms == 0 else max(1, min(self._most, int(PLAN_MS / step_ms)))

    def note(self, step: InFlight, forward_ms: float) -> None:
        """Records how long a plan took."""
        num_rows, num_tokens = len(step.slots), step.num_tokens
        if step.allowances is not None:
            num_tokens -= int(step.allowances.sum())
        if self._most == 1 or not forward_ms or num_tokens != num_rows * step.num_steps:
            return
        place, step_ms = num_rows.bit_length(), forward_ms / step.num_steps
        usual = self._step_ms[place]
        weight = FASTER_WEIGHT if step_ms < usual else SLOWER_WEIGHT
        self._step_ms[place] = step_ms if usual == 0 else usual + weight * (min(step_ms, SLOWER * usual) - usual)
