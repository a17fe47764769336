"""A step between its plan and its result."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from engine_core.messages import I32

I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass
class InFlight:
    """A plan that is being computed. Slots may change hands before its result is there: epochs tell.

    With drafts, counts of tokens are what is computed if all of them hold, here and in the steps before.
    """

    step_id: int
    slots: I32
    epochs: I64
    indices: I64
    """The requests of the rows."""
    counts: I64
    """Tokens that are computed of each row's request, ``allowances`` included."""
    begins: I64
    """How many of its tokens are computed before the step, at least."""
    ends: I64
    """How many of its tokens are computed once the step is done."""
    sampled: Bools
    """Rows that sample."""
    allowances: I64 | None
    """Drafts that the worker may verify in each row; None: none."""
    grammar_rows: I64
    """Rows whose sampling waits for the step's ``GrammarMask``, in its order."""
    num_tokens: int
    num_attended: int
    """Pairs of a token and one that it attends to, at most."""
    schedule_us: float
    num_masks: list[int] = field(default_factory=list)
    """Positions of each constrained row that had a mask."""
