"""The rows of plans, and what the parts of a worker need to know about them.

Decode steps of the same requests have the same rows: what is made of them is kept until other rows come.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from executor.messages import I32, I64, SchedulerOutput
from executor.request_states import RequestStates
from executor.sampling.base import SampleRows
from executor.speculative.speculation import own_tokens, step_rows

U8 = npt.NDArray[np.uint8]
NO_NUMBERS: I64 = np.empty(0, np.int64)


@dataclass(eq=False)
class StepRows:
    """The rows of a step. Two steps that share the object have the same, and follow each other."""

    slots: I32
    """int32 [rows]."""
    counts: I32
    """int32 [rows]: tokens to compute."""
    num_sampled: U8
    """uint8 [rows]: tokens to sample."""
    has_drafts: bool
    places: npt.NDArray[np.intp]
    """[rows]: ``slots`` as numpy's own indices, which it need not convert."""
    num_tokens: int
    sampled_rows: I32
    """int32 [samples]: the row of each."""
    sampled_slots: I32
    """int32 [samples]: the slot of each."""
    samples_once: bool
    """Whether each row samples one token."""
    computed: I64
    """int64 [rows]: tokens that were computed before the step."""
    num_tokens_before: I64
    """int64 [rows]: tokens that the requests had before the step."""
    epochs: I64
    """int64 [samples]: of their slots."""
    follows: bool = False
    """Whether the step before had the same rows."""
    _after: tuple[I64, I64] = field(init=False)
    """``computed`` and ``num_tokens_before`` of the next step."""

    def samples(self) -> SampleRows:
        """The rows of the step's logits."""
        if not len(self.sampled_slots):
            return SampleRows(self.sampled_slots, NO_NUMBERS, self.sampled_rows)
        first = self.num_tokens_before if self.samples_once else _ranges(self.num_tokens_before, self.num_sampled)
        return SampleRows(self.sampled_slots, first, self.sampled_rows)

    def follow(self) -> None:
        """Becomes those of the next step, once this one has begun."""
        self.follows = True
        self.computed, self.num_tokens_before = self._after

    def advance(self, states: RequestStates) -> None:
        """Advances the counts of the requests, once the step has begun."""
        # New arrays: results of earlier steps are still on their way.
        self._after = self.computed + self.counts, self.num_tokens_before + self.num_sampled
        states.set_counts(self.places, *self._after)


def _ranges(firsts: I64, counts: U8) -> I64:
    ends = counts.cumsum(dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    numbers: I64 = np.arange(total) + (firsts - ends + counts).repeat(counts)
    return numbers


def _is_same(plan: SchedulerOutput, other: SchedulerOutput) -> bool:
    """Whether two plans have the same slots, with as many tokens."""
    same = plan.slots == other.slots and plan.num_scheduled_tokens == other.num_scheduled_tokens
    return same and plan.num_sampled == other.num_sampled


class RowsOfPlans:
    """Makes the rows of a plan, or finds those of the last one."""

    def __init__(self, *, computes_whole: bool = False) -> None:
        """``computes_whole``: Whether each row is a whole prompt, and so begins at its first token."""
        self._computes_whole = computes_whole
        self._plan: SchedulerOutput | None = None
        self._rows: StepRows | None = None

    def _goes_on(self, rows: StepRows, last: SchedulerOutput, plan: SchedulerOutput, states: RequestStates) -> bool:
        """Whether a plan has the same rows as the last one, both without drafts, whether they are allowed or not."""
        if plan.new_reqs or plan.slots != last.slots or plan.num_sampled != last.num_sampled or plan.forced_drafts:
            return False
        if plan.num_draft_tokens and states.num_drafts[rows.places].any():
            return False
        if plan.num_draft_tokens == last.num_draft_tokens:
            return plan.num_scheduled_tokens == last.num_scheduled_tokens
        return bool((own_tokens(plan) == rows.counts).all())

    def of(self, plan: SchedulerOutput, states: RequestStates) -> StepRows:
        """The rows of a plan, each with as many of its drafts as the plan allows."""
        last, rows = self._plan, self._rows
        if last is not None and rows is not None and self._computes_whole and _is_same(plan, last):
            return rows
        if last is not None and rows is not None and self._goes_on(rows, last, plan, states):
            rows.follow()
            self._plan = plan
            return rows
        slots, counts, num_sampled, has_drafts = step_rows(plan, states)
        places = slots.astype(np.intp)
        samples_once = len(slots) > 0 and int(num_sampled.min()) == int(num_sampled.max()) == 1
        numbers = np.arange(len(slots), dtype=np.int32)
        numbers, sampled = (
            (numbers, slots) if samples_once else (numbers.repeat(num_sampled), slots.repeat(num_sampled))
        )
        rows = StepRows(
            slots=slots,
            counts=counts,
            num_sampled=num_sampled,
            has_drafts=has_drafts,
            places=places,
            num_tokens=int(counts.sum()),
            sampled_rows=numbers,
            sampled_slots=sampled,
            samples_once=samples_once,
            computed=states.num_computed[places],
            num_tokens_before=states.num_tokens[places],
            epochs=states.epochs[sampled],
        )
        # Drafts are accepted or not, so counts do not go on from those of the step before.
        is_open = has_drafts or bool(states.num_verifying[places].any())
        self._plan, self._rows = (None, None) if is_open else (plan, rows)
        return rows
