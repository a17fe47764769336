"""Proposes what a small model says: a token, then the one after that, and so on.

The model runs in the worker of the large one, on the same rows of the same table of tokens. Its K and V lie in KV cache
groups of their own, whose blocks the scheduler gives and shares like those of the large model. So after each step it
computes what the step has added, prompts included, and a block that may be shared holds what it should.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from executor.config import SpeculativeConfig
from executor.messages import I32, I64
from executor.request_states import RequestStates
from executor.speculative.base import ComputedRows, ProposerContext
from executor.speculative.chain import Bools, ChainProposer


class DraftModelProposer(ChainProposer):
    """See ``ChainProposer``."""

    def __init__(self, config: SpeculativeConfig, max_num_seqs: int, context: ProposerContext) -> None:
        assert context.draft is not None
        super().__init__(config, max_num_seqs, context, context.draft.loaded.max_model_len)

    def follow(self, computed: ComputedRows, states: RequestStates) -> None:
        slots = computed.slots
        known, reached = states.num_known[slots], states.num_computed[slots]
        # Drafts that were rejected, or replaced, are computed once more, with the tokens in their places.
        right = np.minimum(self._num_right(slots, states), known - 1)
        self._computed[slots] = np.minimum(self._computed[slots], right)
        ends = np.minimum(np.where(reached >= known - 1, known, reached), self._max_len)
        counts = ends - self._computed[slots]
        self._next_at[slots] = -1
        rows = np.flatnonzero(counts > 0)
        if not len(rows):
            return
        slots, counts, goes_on = slots[rows], counts[rows], (ends == known)[rows]
        self._run(slots, counts, goes_on)
        self._next_at[slots[goes_on]] = known[rows][goes_on]

    def _run(self, slots: I32, counts: I64, goes_on: Bools, states: list[Tensor] | None = None) -> None:
        batch = self._forward.prepare(slots, counts.astype(np.int32), goes_on.astype(np.uint8))
        _, logits = self._forward.run(batch)
        self._computed[slots] += counts
        own = slots[goes_on]
        self._next[own] = self._read(self._draw(logits, own))
