"""The seam of speculation: who proposes drafts of the next tokens.

Drafts never change tokens. Each is verified by the model, and holds if the token that is sampled in its place is the
same; so a proposer may depend on timing, load and other requests, and be wrong. Where several ranks compute a step,
each has a proposer, and these must propose the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from executor.messages import I32, I64, NewRequest
from executor.request_states import RequestStates


@dataclass(frozen=True)
class Drafts:
    """What may come next, for some slots."""

    counts: I64
    """int64 [slots]."""
    token_ids: I32
    """int32 [sum of counts]: one slot after another. Each is a token of the model."""

    @classmethod
    def none(cls, num_slots: int) -> Drafts:
        return cls(np.zeros(num_slots, np.int64), np.empty(0, np.int32))


class Proposer(Protocol):
    """State by slot, if there is any, begins anew with ``add``."""

    def add(self, request: NewRequest) -> None:
        """A request enters a slot: new, or back after a preemption."""

    def propose(self, slots: I32, limits: I64, states: RequestStates) -> Drafts:
        """Drafts of the tokens that follow those in the table.

        Args:
            slots: int32 [n]: requests that got tokens.
            limits: int64 [n]: drafts of each, at most.
            states: Tokens by slot; ``num_known`` of them are there.
        """
