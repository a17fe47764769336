"""Proposes what a small model says: its likeliest token, then the one after that, and so on.

The model runs in the worker of the large one, on the same rows of the same table of tokens. Its K and V lie in KV cache
groups of their own, whose blocks the scheduler gives and shares like those of the large model. So after each step it
computes what the step has added, prompts included, and a block that may be shared holds what it should.
"""

from __future__ import annotations

import copy
import time

import numpy as np
import numpy.typing as npt
import torch

from executor.config import SpeculativeConfig
from executor.messages import I32, I64, NewRequest
from executor.request_states import RequestStates
from executor.speculative.base import ComputedRows, Drafts, ProposerContext
from executor.speculative.forced_drafts import ForcedDrafts
from executor.speculative.step_costs import StepCosts

Bools = npt.NDArray[np.bool_]


class DraftModelProposer:
    """See ``executor/speculative/base.py``. State by slot: how much of a request the draft model has computed."""

    def __init__(self, config: SpeculativeConfig, max_num_seqs: int, context: ProposerContext) -> None:
        assert context.draft is not None and context.states is not None
        self._model = context.draft
        self._max_len = self._model.loaded.max_model_len
        self._computed = np.zeros(max_num_seqs, np.int64)
        self._next = np.zeros(max_num_seqs, np.int64)
        """The first draft of each slot."""
        self._next_at = np.full(max_num_seqs, -1, np.int64)
        """Position of that draft; -1: there is none."""
        states = copy.copy(context.states)  # the same arrays, but for what is computed, and where it is
        states.num_computed = self._computed
        states.block_tables = states.block_tables[-len(self._model.groups) :]
        states.adapters = np.zeros_like(states.adapters)
        self._forward = self._model.forward(states)
        self._forced = ForcedDrafts(config, max_num_seqs) if config.script else None
        self.costs = StepCosts()

    def add(self, request: NewRequest) -> None:
        self._computed[request.slot] = request.num_computed_tokens
        self._next_at[request.slot] = -1
        if self._forced is not None:
            self._forced.add(request)

    def remove(self, slot: int, output: I32) -> None:
        pass

    def follow(self, computed: ComputedRows, states: RequestStates) -> None:
        slots = computed.slots
        known, reached = states.num_known[slots], states.num_computed[slots]
        # Drafts that were rejected are computed once more, with the tokens in their places.
        self._computed[slots] = np.minimum(self._computed[slots], known - 1)
        ends = np.minimum(np.where(reached >= known - 1, known, reached), self._max_len)
        counts = ends - self._computed[slots]
        self._next_at[slots] = -1
        rows = np.flatnonzero(counts > 0)
        if not len(rows):
            return
        slots, counts, goes_on = slots[rows], counts[rows], (ends == known)[rows]
        tokens = self._run(slots, counts, goes_on)
        self._next[slots[goes_on]] = tokens
        self._next_at[slots[goes_on]] = known[rows][goes_on]

    def _run(self, slots: I32, counts: I64, goes_on: Bools) -> I64:
        """Computes the next tokens of slots; returns the likeliest token after those of the slots that go on."""
        batch = self._forward.prepare(slots, counts.astype(np.int32), goes_on.astype(np.uint8))
        _, logits = self._forward.run(batch)
        self._computed[slots] += counts
        tokens: I64 = torch.argmax(logits, 1).numpy() if len(logits) else np.empty(0, np.int64)
        return tokens

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
                found = self._run(own, np.ones(len(rows), np.int64), np.ones(len(rows), np.bool_))
                self.costs.add(len(rows), (time.perf_counter() - begin) * 1e3)
            else:
                found = self._next[own]
            if self._forced is not None:
                found = self._forced.replace(own, known[rows] + index, states.num_prompt[own], found)
            tokens[rows, index] = found
            states.token_ids[own, known[rows] + index] = found
        taken = np.arange(most) < limits[:, None]
        kinds = np.broadcast_to(np.arange(most, dtype=np.int8), taken.shape)
        return Drafts(limits, tokens[taken], kinds[taken])
