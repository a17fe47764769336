"""A plan in flight: a step, or several in a row, without a result."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from engine_core.messages import I32
from executor.messages import ForcedDrafts, ModelRunnerOutput, u8

I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass
class InFlight:
    """A plan being computed. Slots may change hands before its result arrives; epochs reveal that.

    With drafts, token counts assume that all drafts are accepted, here and in earlier steps.
    """

    step_id: int
    slots: I32
    epochs: I64
    indices: I64
    """The requests of the rows."""
    counts: I64
    """Tokens computed of each row's request, ``allowances`` included."""
    begins: I64
    """Tokens of the request computed before the step, at least."""
    ends: I64
    """Tokens of the request computed after the step."""
    sampled: Bools
    """Rows that sample."""
    allowances: I64 | None
    """Maximum drafts that the worker may verify in each row, in all steps together; None: none."""
    grammar_rows: I64
    """Rows whose sampling waits for the step's ``GrammarMask``, in the mask's order."""
    num_tokens: int
    num_attended: int
    """Upper bound on the number of (token, attended token) pairs, and what takes as long: images to encode."""
    schedule_us: float
    num_steps: int = 1
    """Steps in a row; with more than one, ``counts`` are those of all of them."""
    forced_drafts: tuple[ForcedDrafts, ...] = ()
    """Drafts of constrained rows that take the place of the worker's own."""
    num_masks: list[int] = field(default_factory=list)
    """Number of positions of each constrained row that had a mask."""

    def num_computed(self, result: ModelRunnerOutput) -> int:
        """Tokens of the step, without those that were allowed for drafts and not accepted."""
        if self.allowances is None:
            return self.num_tokens
        return self.num_tokens - int(self.allowances.sum()) + int(u8(result.num_accepted).sum(dtype=np.int64))
