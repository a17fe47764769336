"""Whether plans allow drafts, and how many in each row and step of a plan of several."""

from __future__ import annotations

import numpy as np

from engine_core.in_flight import InFlight
from executor.messages import I64, ModelRunnerOutput

PATIENCE = 8
"""Results without drafts after which plans allow none until the workers have some again. A request that starts adds as
many, but half of it for each time that as many in a row came without drafts before: texts that never repeat themselves
rarely come alone, and drafts that a worker finds all the same are verified a plan or two later."""
RETRY_PERIOD = 32
"""Of as many results without drafts, the first ``PATIENCE`` let plans allow some: a worker whose results come late has
launched the next step before it finds drafts, and can keep them only if that step waits for them. Not where results are
there at once, and not with pipeline stages, which always wait for the tokens of their rows: plans that begin to allow
drafts would disturb their turns."""
LEAST = 3
"""Drafts that plans of several steps allow in any case."""
KEPT = 0.75
"""Part of what plans of several steps allow that is left after one whose rows needed less."""
MEAN_RATE = 0.25
"""How fast the mean of what rows verify follows."""


class DraftAllowance:
    """Follows what workers verify. No token depends on it.

    A plan counts on all drafts that it allows until its result comes. So a request seems to be close to its limit while
    plans in flight allow many, and gets shorter plans, or waits. Texts of which few drafts hold need no such room.
    """

    def __init__(self, max_draft_tokens: int, *, retries: bool) -> None:
        """
        Args:
            max_draft_tokens: Most drafts of a row in a step.
            retries: Whether ``RETRY_PERIOD`` applies.
        """
        self._most = self._current = float(max_draft_tokens)
        self._mean = 0.0
        """Drafts that a row verifies in a step, on average of the latest plans."""
        self._retries = retries
        self._num_barren = 0
        """Results in a row that came without drafts."""
        self._num_left = PATIENCE
        """Results that may come without drafts before plans allow none."""

    @property
    def is_expected(self) -> bool:
        """Whether workers may have drafts for the next plan."""
        return self._num_left > 0 or (self._retries and self._num_barren % RETRY_PERIOD < PATIENCE)

    @property
    def usual(self) -> int:
        """Drafts that suffice in most steps: rows near their limits get steps for so many, rather than fewer steps."""
        return min(int(self._current), max(LEAST, round(2 * self._mean)))

    def of(self, num_steps: int) -> int:
        """The most drafts in a row and step of a plan of this many steps, if the row is close to its limit."""
        return int(self._most if num_steps == 1 else self._current)

    def in_rows(self, num_steps: int, room: I64) -> I64:
        """The most drafts in each row and step of a plan.

        Args:
            num_steps: Steps of the plan.
            room: int64 [rows]: tokens before each row's limit, by step. Where the next plan has room for as many
                drafts again, nothing is gained by allowing few.

        Returns:
            int64 [rows].
        """
        return np.maximum(self.of(num_steps), np.minimum(int(self._most), room // 2))

    def restart(self) -> None:
        """Registers that a request starts, of which nothing is known."""
        self._current = self._most
        patience = PATIENCE if self._retries else PATIENCE >> self._num_barren // PATIENCE
        self._num_left = max(self._num_left, patience)

    def note(self, step: InFlight, result: ModelRunnerOutput) -> None:
        """Records the result of a plan in which rows have sampled."""
        found = result.num_draft_tokens if step.num_steps == 1 else result.num_draft_tokens + result.num_verified
        if found.strip(b"\0"):
            self._num_barren, self._num_left = 0, PATIENCE
        else:
            self._num_barren += 1
            self._num_left -= 1
        allowed = 0 if step.allowances is None else int(step.allowances.max()) // step.num_steps
        if allowed:
            used = max(result.num_verified, default=0)
            kept = self._current if used >= allowed else KEPT * self._current
            wanted = max(result.num_draft_tokens, default=0)
            self._current = min(self._most, max(LEAST, 2 * used, wanted, kept))
            mean = sum(result.num_verified) / max(1, len(step.slots) * step.num_steps)
            self._mean += MEAN_RATE * (mean - self._mean)
