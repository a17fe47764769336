"""Which rows decode in which plans, if a step goes through several pipeline stages.

A request's next token can be computed once the last one has come back from the last stage. Plans in a row should have
different requests, so that all stages have work: as many groups of them as there are stages, which take turns (lanes).
Here no request belongs to a lane. A plan takes the rows that have waited longest, no more than their share, and leaves
those whose tokens are still under way to later ones. So lanes form by themselves, and stay equal as requests come and
go.
"""

from __future__ import annotations

import numpy as np

from engine_core.in_flight import I64, Bools
from engine_core.messages import I32
from engine_core.slot_table import SlotTable


class Lanes:
    """Chooses the rows of each plan that decode."""

    def __init__(self, num_stages: int, max_num_seqs: int) -> None:
        """
        Args:
            num_stages: Pipeline stages; 1: every plan takes all rows.
            max_num_seqs: Number of slots.
        """
        self.num_stages = num_stages
        self._sampled_in = np.zeros(max_num_seqs, np.int64)
        """By slot: the last plan in which it got a token."""

    def choose(self, table: SlotTable, slots: I32, step_id: int, *, has_others: bool) -> Bools:
        """Which running rows a plan takes.

        Args:
            table: The slots.
            slots: int32 [rows]: those with tokens to compute, in the order in which they started.
            step_id: The plan's.
            has_others: Requests wait that may start with it. If nothing else is to be done, it takes rows whose tokens
                are under way: so they reach the first stage no later than these tokens do.

        Returns:
            bool [rows].
        """
        planned = table.num_planned[slots]
        decodes: Bools = (planned > table.num_prompt[slots]) & (planned - table.num_scheduled[slots] == 1)
        places = decodes.nonzero()[0]
        own = slots[places]
        is_back = (table.num_known[own] == planned[places]) | (self._sampled_in[own] <= step_id - self.num_stages)
        if is_back.any() or len(places) < len(slots) or has_others:
            candidates: I64 = places[is_back]
        else:
            candidates = places
        share = -(-len(places) // self.num_stages)
        order = np.argsort(self._sampled_in[slots[candidates]], kind="stable")
        chosen: Bools = ~decodes
        chosen[candidates[order[:share]]] = True
        return chosen

    def note(self, slots: I32, sampled: Bools, step_id: int) -> None:
        """Records which rows of a plan get a token."""
        if self.num_stages > 1:
            self._sampled_in[slots[sampled]] = step_id
