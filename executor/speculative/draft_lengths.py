"""How many of the proposed drafts a step verifies: as many as make it produce the most tokens per second.

Two things are learned while requests run. The probability that a draft is accepted depends on its kind and on its
request, by online logistic regression. It needs no verification: proposals that were not verified are compared with the
tokens that came. The times of steps are those of ``StepCosts``. Both may depend on timing and on other requests, since
drafts never change tokens.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from executor.messages import I32, I64, row_offsets
from executor.request_states import RequestStates
from executor.speculative.base import Drafts
from executor.speculative.step_costs import StepCosts

F64 = npt.NDArray[np.float64]

MAX_KINDS = 32
FIRST_LOGITS = np.repeat([-0.8, 0.0, 0.4, 0.8, 1.1, 1.5, 2.0, 2.5], 3) + np.tile([0.0, 0.3, -0.6], 8)
"""Logits of the probabilities by kind (see ``lookup.py``) before anything was learned."""
KIND_RATE = 0.02
REQUEST_RATE = 0.3
MAX_BIAS = 3.0
PROBE = 32
"""While no drafts are worth their proposal, some are proposed each time that this many steps have passed."""
MIN_GAIN = 1.03
"""Drafts are verified if they promise this many times the tokens per second: costs are not known better than that."""


class DraftLengths:
    """Chooses the drafts to verify. State by slot is reset by ``add``."""

    def __init__(
        self,
        max_num_seqs: int,
        max_drafts: int,
        min_probability: float,
        *,
        is_adaptive: bool,
        first_logits: F64 = FIRST_LOGITS,
    ) -> None:
        """
        Args:
            max_num_seqs: Number of slots.
            max_drafts: Maximum drafts of a slot.
            min_probability: Drafts end where the probability that all of them are accepted falls below this.
            is_adaptive: Whether anything is learned, and whether costs count.
            first_logits: float64 [kinds]: logits of the probabilities by kind before anything was learned.
        """
        self.costs = StepCosts()
        self._min_probability = min_probability
        self._is_adaptive = is_adaptive
        self._kinds: F64 = np.zeros(MAX_KINDS)
        self._kinds[: len(first_logits)] = first_logits
        self._num_skipped = 0
        """Steps in a row for which ``affordable`` found no drafts worth their time."""
        self._requests: F64 = np.zeros(max_num_seqs)
        """Logits by slot, to be added to those of kinds."""
        self._tokens = np.zeros((max_num_seqs, max_drafts), np.int32)
        """int32 [slots, drafts]: the last proposals, verified or not."""
        self._token_kinds = np.zeros((max_num_seqs, max_drafts), np.int8)
        self._counts = np.zeros(max_num_seqs, np.int64)
        self._begins = np.zeros(max_num_seqs, np.int64)
        """Position of the first proposed token."""

    def add(self, slot: int) -> None:
        """Forgets what is known of a slot."""
        self._counts[slot] = 0
        self._requests[slot] = 0.0

    def probabilities(self, slots: I32, kinds: npt.NDArray[np.int8] | I64) -> F64:
        """Probability of each draft, given that those before it are accepted: float64 [drafts].

        Args:
            slots: int32 [drafts].
            kinds: int8 [drafts].
        """
        chances: F64 = 1.0 / (1.0 + np.exp(-self._kinds[kinds] - self._requests[slots]))
        return chances

    def affordable(self, slots: I32, limits: I64, draft_costs: StepCosts) -> I64:
        """How many drafts of each slot are worth proposing, where a proposal takes time: int64 [slots].

        A draft's kind is its place among the slot's drafts.

        Args:
            slots: int32 [n]: all slots of the next step, as far as is known.
            limits: int64 [n]: maximum drafts per slot.
            draft_costs: What another draft of each of several slots takes, the first excepted.
        """
        most = int(limits.max(initial=0))
        if not self._is_adaptive or most <= 0 or not self.costs.is_known:
            return limits
        places = np.arange(most)
        is_allowed = places < limits[:, None]
        chances = np.cumprod(self.probabilities(slots[:, None], places[None, :]), axis=1) * is_allowed
        rows = is_allowed.sum(0)
        num_tokens = len(slots) + np.concatenate(([0.0], np.cumsum(rows)))
        proposing = np.concatenate(([0.0, 0.0], np.cumsum(draft_costs.milliseconds(rows[1:].astype(np.float64)))))
        gains = np.concatenate(([0.0], np.cumsum(chances.sum(0))))
        rates = (len(slots) + gains) / (self.costs.milliseconds(num_tokens) + proposing)
        best = int(rates.argmax())
        if rates[best] >= MIN_GAIN * rates[0]:
            self._num_skipped = 0
            return np.minimum(limits, best)
        self._num_skipped += 1  # now and then, drafts are compared with what comes
        return np.minimum(limits, 2 if self._num_skipped % PROBE == 0 else 0)

    def learn(self, slots: I32, states: RequestStates) -> None:
        """Compares the last proposals of slots with the tokens that have come since."""
        slots = slots[self._counts[slots] > 0]
        if not self._is_adaptive or not len(slots):
            return
        begins = self._begins[slots]
        counts = np.minimum(self._counts[slots], states.num_known[slots] - begins)
        self._counts[slots] = 0
        rows, offsets = row_offsets(counts)
        came = states.token_ids[slots[rows], begins[rows] + offsets]
        hits = came == self._tokens[slots[rows], offsets]
        first_miss = np.full(len(slots), len(hits) + 1)
        np.minimum.at(first_miss, rows[~hits], offsets[~hits])
        counted = offsets <= first_miss[rows]
        rows, offsets, hits = rows[counted], offsets[counted], hits[counted]
        kinds = self._token_kinds[slots[rows], offsets]
        errors = hits - self.probabilities(slots[rows], kinds)
        np.add.at(self._kinds, kinds, KIND_RATE * errors)
        np.add.at(self._requests, slots[rows], REQUEST_RATE * errors)
        self._requests[slots] = np.minimum(np.maximum(self._requests[slots], -MAX_BIAS), MAX_BIAS)

    def choose(self, slots: I32, drafts: Drafts, states: RequestStates) -> I64:
        """How many drafts of each slot are worth verifying, int64 [slots].

        Args:
            slots: int32 [n]: all slots of the next step, as far as is known.
            drafts: The proposals of these slots.
            states: Tokens by slot.
        """
        if drafts.kinds is None or not len(drafts.token_ids):
            return drafts.counts
        rows, offsets = row_offsets(drafts.counts)
        self._counts[slots] = drafts.counts
        self._begins[slots] = states.num_known[slots]
        self._tokens[slots[rows], offsets] = drafts.token_ids
        self._token_kinds[slots[rows], offsets] = drafts.kinds
        chances = np.zeros((len(slots), int(drafts.counts.max())))
        chances[rows, offsets] = self.probabilities(slots[rows], drafts.kinds)
        np.cumprod(chances, axis=1, out=chances)
        chances[chances < self._min_probability] = 0.0
        if self._is_adaptive:
            chances[chances < self._least(chances, len(slots))] = 0.0
        counts: I64 = np.count_nonzero(chances, axis=1)
        return counts

    def _least(self, chances: F64, num_rows: int) -> float:
        """The smallest probability of a draft that is worth its cost; above 1: none is.

        Args:
            chances: float64 [slots, drafts]: probability that a draft is reached and accepted, falling along a row.
            num_rows: Tokens of the step without drafts.
        """
        gains = np.sort(chances[chances > 0.0])[::-1]
        if not len(gains):
            return 2.0
        times = self.costs.relative(num_rows + np.arange(len(gains) + 1.0))
        rates = (num_rows + np.concatenate(([0.0], np.cumsum(gains)))) / times
        best = int(rates.argmax())
        return float(gains[best - 1]) if rates[best] >= MIN_GAIN * rates[0] else 2.0
