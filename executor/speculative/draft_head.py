"""Proposes what a head says that was trained for the model: EAGLE-3 and multi-token prediction.

After each step the head computes a row for each token that the model has computed, from the model's hidden states and
the token that follows (``executor/models/draft_head.py``). Its prediction after the last row is the first draft; for
those after that it goes on from its own hidden states.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import Tensor

from executor.config import SpeculativeConfig
from executor.messages import I32, I64, row_offsets
from executor.request_states import RequestStates
from executor.speculative.base import ComputedRows, ProposerContext
from executor.speculative.chain import Bools, ChainProposer


class DraftHeadProposer(ChainProposer):
    """See ``ChainProposer``. State by slot: also the hidden states of the head's last row."""

    def __init__(self, config: SpeculativeConfig, max_num_seqs: int, context: ProposerContext) -> None:
        assert context.draft is not None and context.states is not None
        self._head = context.draft.head
        self._hidden: Tensor | None = None
        """From where the head goes on, [max_num_seqs, num_features]; None: it has never run."""
        super().__init__(config, max_num_seqs, context, context.states.token_ids.shape[1] - 1, shift=1)

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
        places = self._on_device(firsts[rows][own] + offsets)
        slots, counts, known, begins = slots[rows], counts[rows], known[rows], begins[rows]
        goes_on = begins + counts == known - 1
        self._computed[slots] = begins
        self._run(slots, counts, goes_on, [hidden[places] for hidden in computed.hidden_states])
        self._next_at[slots[goes_on]] = known[goes_on]

    def _on_device(self, numbers: I64) -> Tensor:
        return self._model.channel.upload({"": numbers})[""]

    def _run(self, slots: I32, counts: I64, goes_on: Bools, states: list[Tensor] | None = None) -> None:
        batch = self._forward.prepare(slots, counts.astype(np.int32), goes_on.astype(np.uint8))
        if states is None:
            assert self._hidden is not None, "the model's hidden states come first"
            previous = self._hidden[self._on_device(slots.astype(np.int64))]
        else:
            previous = self._head.combine_hidden_states(states, batch)
        hidden, logits = self._forward.run(replace(batch, hidden=previous))
        self._computed[slots] += counts
        if len(logits):
            if self._hidden is None:
                self._hidden = hidden.new_zeros((len(self._next), self._head.num_features))
            last = self._on_device((np.cumsum(counts) - 1)[goes_on])
            own = slots[goes_on]
            self._hidden[self._on_device(own.astype(np.int64))] = hidden[last]
            self._next[own] = self._read(self._head.target_ids(self._draw(logits, own)))
