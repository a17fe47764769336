"""The speculation seam: proposers of draft tokens.

Drafts never change outputs. The model verifies each draft and accepts it if the token sampled at its position is the
same; so a proposer may depend on timing, load and other requests, and may be wrong. If several ranks compute a step,
each has a proposer, and all must propose the same drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from executor.messages import I32, I64, NewRequest
from executor.request_states import RequestStates

if TYPE_CHECKING:
    from executor.draft_runner import DraftModel
    from executor.speculative.step_costs import StepCosts


@dataclass(frozen=True)
class Drafts:
    """Proposed next tokens of some slots."""

    counts: I64
    """int64 [slots]: number of drafts per slot."""
    token_ids: I32
    """int32 [sum of counts], concatenated slot by slot. Each is a valid token id."""
    kinds: npt.NDArray[np.int8] | None = None
    """int8 [sum of counts]: small numbers; drafts of one kind are about equally likely to be accepted. None: all drafts
    are worth their verification."""


@dataclass(frozen=True)
class ComputedRows:
    """What a step has computed."""

    slots: I32
    """int32 [rows]."""
    counts: I32
    """int32 [rows]: tokens of each row, drafts included."""
    begins: I64
    """int64 [rows]: positions of their first tokens."""
    hidden_states: Sequence[Tensor]
    """Those of all tokens, [tokens, hidden_size], then the auxiliary ones. They hold while the proposer follows."""


@dataclass(frozen=True)
class ProposerContext:
    """What a worker has for its proposer."""

    op_set: str = ""
    """Name of the op set whose kernels may be used; empty: none."""
    states: RequestStates | None = None
    """Tokens by slot."""
    draft: DraftModel | None = None
    """The second model, of methods that have one."""


class Proposer(Protocol):
    """Proposes drafts. State by slot, if any, is reset by ``add``."""

    @property
    def costs(self) -> StepCosts | None:
        """What another draft of each of several slots takes, by number of slots. None: next to nothing."""

    def add(self, request: NewRequest) -> None:
        """Registers a request that enters a slot: new, or back after a preemption."""

    def remove(self, slot: int, output: I32) -> None:
        """Registers that a request leaves its slot: done, or preempted.

        Args:
            slot: The slot.
            output: int32 [tokens]: its output so far.
        """

    def follow(self, computed: ComputedRows, states: RequestStates) -> None:
        """Registers that a step is done, before ``propose`` is called for its rows that sample.

        Args:
            computed: The rows of the step.
            states: What is known and computed of each: rejected drafts are not.
        """

    def propose(self, slots: I32, limits: I64, states: RequestStates) -> Drafts:
        """Proposes tokens to follow those in the table.

        Args:
            slots: int32 [n]: slots that got tokens.
            limits: int64 [n]: maximum drafts per slot.
            states: Tokens by slot, ``num_known`` of each.
        """
