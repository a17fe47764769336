"""How many of the proposed drafts a step verifies: as many as make it produce the most tokens per second.

Two things are learned while requests run. The probability that a draft is accepted depends on its kind and on its
request, by online logistic regression. It needs no verification: proposals that were not verified are compared with the
tokens that came. The times of steps are those of ``StepCosts``. Both may depend on timing and on other requests, since
drafts never change tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import numpy as np

from executor.messages import I32, I64
from executor.request_states import RequestStates
from executor.speculative.base import Drafts
from executor.speculative.step_costs import StepCosts

MAX_KINDS = 32
FIRST_LOGITS = tuple(
    level + change for level in (-0.8, 0.0, 0.4, 0.8, 1.1, 1.5, 2.0, 2.5) for change in (0.0, 0.3, -0.6)
)
"""Logits of the probabilities by kind (see ``lookup.py``) before anything was learned."""
OTHER_LOGIT = -0.8
"""Logit of other kinds."""
KIND_RATE = 0.02
REQUEST_RATE = 0.3
MAX_BIAS = 3.0
PROBE = 32
"""While no drafts are worth their proposal, some are proposed each time that this many steps have passed."""
MIN_GAIN = 1.03
"""Drafts are verified if they promise this many times the tokens per second: costs are not known better than that."""

FIRST_GAIN = 0.2
"""Tokens that drafts save per step and request, before anything was learned."""
GAIN_RATE = 1 / 32
MAX_LEAST_GAIN = 0.12
"""Drafts that save as many pay in any case."""
AGAIN = 1.5
"""Once drafts do not pay, they must save this many times what proposing them takes before they are verified again."""

Proposal = tuple[int, list[int], list[int], int, float]
"""Position of the first proposed token, the tokens and their kinds; how many of them are worth verifying, and what each
of these takes, in tokens."""


class DraftCosts(Protocol):
    """What another draft of each of several slots takes; see ``StepCosts``."""

    def milliseconds(self, num_tokens: Sequence[int]) -> list[float]:
        """By number of slots."""


class DraftLengths:
    """Chooses the drafts to verify. State by slot is reset by ``add``.

    Slots are taken one by one: a step has drafts for few of them, for which array operations would take longer.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_drafts: int,
        min_probability: float,
        *,
        is_adaptive: bool,
        first_logits: Sequence[float] = FIRST_LOGITS,
    ) -> None:
        """
        Args:
            max_num_seqs: Number of slots.
            max_drafts: Maximum drafts of a slot.
            min_probability: Drafts end where the probability that all of them are accepted falls below this.
            is_adaptive: Whether anything is learned, and whether costs count.
            first_logits: Logits of the probabilities by kind before anything was learned.
        """
        self.costs = StepCosts()
        self._min_probability = min_probability
        self._is_adaptive = is_adaptive
        self._kinds = [*first_logits, *(OTHER_LOGIT,) * (MAX_KINDS - len(first_logits))]
        self._gain = FIRST_GAIN
        """Tokens that drafts save per step and request, verified or not, less those that their verification takes."""
        self._pays = True
        self._num_skipped = 0
        """Steps in a row for which ``affordable`` found no drafts worth their time."""
        self._requests = [0.0] * max_num_seqs
        """Logits by slot, to be added to those of kinds."""
        self._proposals: dict[int, Proposal] = {}
        """The last proposals by slot, verified or not, until they are compared with what came."""

    def add(self, slot: int) -> None:
        """Forgets what is known of a slot."""
        self._proposals.pop(slot, None)
        self._requests[slot] = 0.0

    def _chances(self, slot: int, kinds: Sequence[int]) -> list[float]:
        """Probability that each of a slot's drafts and those before it are accepted, up to the least that counts."""
        own, chance = self._requests[slot], 1.0
        chances: list[float] = []
        for kind in kinds:
            chance *= _probability(self._kinds[kind] + own)
            if chance < self._min_probability:
                break
            chances.append(chance)
        return chances

    def affordable(self, slots: I32, limits: I64, draft_costs: DraftCosts) -> I64:
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
        num_rows, gains, num_slots = [0] * most, [0.0] * most, len(slots)
        for slot, limit in zip(slots.tolist(), limits.tolist(), strict=True):
            own, chance = self._requests[slot], 1.0
            for place in range(limit):
                chance *= _probability(self._kinds[place] + own)
                gains[place] += chance
                num_rows[place] += 1
        proposing = accumulate((0.0, *draft_costs.milliseconds(num_rows[1:])), initial=0.0)
        times = self.costs.milliseconds(list(accumulate(num_rows, initial=num_slots)))
        tokens = accumulate(gains, initial=float(num_slots))
        rates = [gain / (time + own) for gain, time, own in zip(tokens, times, proposing, strict=True)]
        best = rates.index(max(rates))
        if rates[best] >= MIN_GAIN * rates[0]:
            self._num_skipped = 0
            return np.minimum(limits, best)
        self._num_skipped += 1  # now and then, drafts are compared with what comes
        return np.minimum(limits, 2 if self._num_skipped % PROBE == 0 else 0)

    def learn(self, slots: Sequence[int], states: RequestStates) -> None:
        """Compares the last proposals of slots with the tokens that have come since."""
        if not self._is_adaptive:
            return
        saved = 0.0
        for slot in slots if self._proposals else ():
            proposal = self._proposals.pop(slot, None)
            if proposal is None:
                continue
            begin, tokens, kinds, count, price = proposal
            came = states.token_ids[slot, begin : min(begin + len(tokens), int(states.num_known[slot]))].tolist()
            own, errors, held = self._requests[slot], 0.0, 0
            for token, kind, draft in zip(came, kinds, tokens, strict=False):
                error = (token == draft) - _probability(self._kinds[kind] + own)
                self._kinds[kind] += KIND_RATE * error
                errors += error
                if token != draft:
                    break
                held += 1
            count = min(count, len(came))
            saved += min(held, count) - count * price
            self._requests[slot] = min(max(own + REQUEST_RATE * errors, -MAX_BIAS), MAX_BIAS)
        self._gain += GAIN_RATE * (saved / max(1, len(slots)) - self._gain)

    def pays(self, num_slots: int, milliseconds: float) -> bool:
        """Whether drafts have saved more lately than proposing them takes.

        Args:
            num_slots: Slots of a step.
            milliseconds: What a step takes longer while drafts are expected, whether it has some or not.
        """
        if not self._is_adaptive or not self.costs.is_known:
            return True
        least = min(milliseconds / self.costs.milliseconds([num_slots])[0], MAX_LEAST_GAIN)
        self._pays = self._gain > (least if self._pays else AGAIN * least)
        return self._pays

    def choose(self, slots: Sequence[int], drafts: Drafts, states: RequestStates) -> list[int]:
        """How many drafts of each slot are worth verifying.

        Args:
            slots: All slots of the next step, as far as is known.
            drafts: The proposals of these slots.
            states: Tokens by slot.
        """
        counts: list[int] = drafts.counts.tolist()
        if drafts.kinds is None:
            return counts
        tokens, kinds = drafts.token_ids.tolist(), drafts.kinds.tolist()
        chances: list[list[float]] = []
        begin = 0
        for slot, count in zip(slots, counts, strict=True):
            chances.append(self._chances(slot, kinds[begin : begin + count]))
            begin += count
        if not self._is_adaptive:
            return list(map(len, chances))
        least, price = self._least(chances)
        chosen = [sum(chance >= least for chance in own) for own in chances]
        begin = 0
        for slot, count, number in zip(slots, counts, chosen, strict=True):
            if count:
                end = begin + count
                self._proposals[slot] = int(states.num_known[slot]), tokens[begin:end], kinds[begin:end], number, price
                begin = end
        return chosen

    def _least(self, chances: Sequence[Sequence[float]]) -> tuple[float, float]:
        """The smallest probability of a draft that is worth its cost, above 1 if none is; and that cost, in tokens.

        Args:
            chances: By slot: probability that each draft is reached and accepted, falling.
        """
        gains = sorted((chance for own in chances for chance in own), reverse=True)
        num_rows = len(chances)
        times = self.costs.relative(range(num_rows, num_rows + len(gains) + 1))
        tokens = accumulate(gains, initial=float(num_rows))
        rates = [gain / time for gain, time in zip(tokens, times, strict=True)]
        best = rates.index(max(rates))
        if not best or rates[best] < MIN_GAIN * rates[0]:
            return 2.0, 0.0
        return gains[best - 1], (times[best] / times[0] - 1) * num_rows / best


def _probability(logit: float) -> float:
    return 1.0 / (1.0 + math.exp(-logit))
