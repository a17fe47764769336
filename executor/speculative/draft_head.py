"""Proposes what a head says that was trained for the model: EAGLE-3 and multi-token prediction.

After each step the head computes a row for each token that the model has computed, from the model's hidden states and
the token that follows (``executor/models/draft_head.py``). Its prediction after the last row is the first draft; for
those after that it goes on from its own hidden states.
"""

from __future__ import annotations

import copy
import time
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from executor.config import SpeculativeConfig
from executor.messages import I32, I64, NewRequest, row_offsets
from executor.request_states import RequestStates
from executor.speculative.base import ComputedRows, Drafts, ProposerContext
from executor.speculative.forced_drafts import ForcedDrafts
from executor.speculative.step_costs import StepCosts

Bools = npt.NDArray[np.bool_]


class DraftHeadProposer:
    """See ``executor/speculative/base.py``. State by slot: the head's last row."""

    def __init__(self, config: SpeculativeConfig, max_num_seqs: int, context: ProposerContext) -> None:
        assert context.draft is not None and context.states is not None
        self._model = context.draft
        self._head = context.draft.head
        self._max_len = context.states.token_ids.shape[1] - 1
        self._computed = np.zeros(max_num_seqs, np.int64)
        self._next = np.zeros(max_num_seqs, np.int64)
        """The first draft of each slot."""
        self._next_at = np.full(max_num_seqs, -1, np.int64)
        """Position of that draft; -1: there is none."""
        self._hidden = torch.zeros(max_num_seqs, self._head.num_features, dtype=self._model.loaded.dtype)
        """From where the head goes on."""
        states = copy.copy(context.states)  # the same arrays, but for what is computed, where it is, and the tokens
        states.num_computed = self._computed
        states.token_ids = context.states.token_ids[:, 1:]
        states.block_tables = states.block_tables[-len(self._model.groups) :]
        states.adapters = np.zeros_like(states.adapters)
        self._forward = self._model.forward(states)
        self._forced = ForcedDrafts(config, max_num_seqs) if config.script else None
        self.costs = StepCosts()

    def add(self, request: NewRequest) -> None:
        self._next_at[request.slot] = -1
        if self._forced is not None:
            self._forced.add(request)

    def remove(self, slot: int, output: I32) -> None:
        pass

    def follow(self, computed: ComputedRows, states: RequestStates) -> None:
        slots, begins = computed.slots, computed.begins
        known = states.num_known[slots]
        # A row needs the token after its own, and rejected drafts have none.
        counts = np.minimum(states.num_computed[slots], known - 1) - begins
        self._next_at[slots] = -1
        rows = np.flatnonzero(counts > 0)
        if not len(rows):
            return
        firsts = np.cumsum(computed.counts, dtype=np.int64) - computed.counts
        own, offsets = row_offsets(counts[rows])
        places = torch.from_numpy(firsts[rows][own] + offsets)
        slots, counts, known, begins = slots[rows], counts[rows], known[rows], begins[rows]
        goes_on = begins + counts == known - 1
        self._computed[slots] = begins
        self._run(slots, counts, goes_on, [hidden[places] for hidden in computed.hidden_states])
        self._next_at[slots[goes_on]] = known[goes_on]

    def _run(self, slots: I32, counts: I64, goes_on: Bools, states: list[Tensor] | None = None) -> None:
        """Computes the next rows of slots, and predicts a token for those that go on.

        Args:
            slots: int32 [n].
            counts: int64 [n]: rows of each.
            goes_on: bool [n].
            states: The model's hidden states in these rows; None: the head goes on from its own.
        """
        batch = self._forward.prepare(slots, counts.astype(np.int32), goes_on.astype(np.uint8))
        with_states = self._hidden[torch.from_numpy(slots)] if states is None else None
        if states is not None:
            with_states = self._head.combine_hidden_states(states, batch)
        hidden, logits = self._forward.run(replace(batch, hidden=with_states))
        self._computed[slots] += counts
        if len(logits):
            last = torch.from_numpy((np.cumsum(counts) - 1)[goes_on])
            self._hidden[torch.from_numpy(slots[goes_on])] = hidden[last]
            self._next[slots[goes_on]] = self._head.target_ids(torch.argmax(logits, 1)).numpy()

    def propose(self, slots: I32, limits: I64, states: RequestStates) -> Drafts:
        known = states.num_known[slots]
        limits = np.where(self._next_at[slots] == known, np.minimum(limits, self._max_len - known), 0)
        limits = np.maximum(limits, 0)
        most = int(limits.max(initial=0))
        tokens = np.zeros((len(slots), most), np.int32)
        for index in range(most):
            rows = np.flatnonzero(limits > index)
            own = slots[rows]
            if index:
                begin = time.perf_counter()
                self._run(own, np.ones(len(rows), np.int64), np.ones(len(rows), np.bool_))
                self.costs.add(len(rows), (time.perf_counter() - begin) * 1e3)
            found = self._next[own]
            if self._forced is not None:
                found = self._forced.replace(own, known[rows] + index, states.num_prompt[own], found)
            tokens[rows, index] = states.token_ids[own, known[rows] + index] = found
        taken = np.arange(most) < limits[:, None]
        kinds = np.broadcast_to(np.arange(most, dtype=np.int8), taken.shape)
        return Drafts(limits, tokens[taken], kinds[taken])
