"""Proposes what followed the last tokens where they occurred before: suffix decoding (arXiv 2411.04975), with n-grams
as its special case.

There is no tree: a text is an array, in which a token is found in microseconds. So a request costs nothing when it
starts or comes back, and memory for texts is only needed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from msgspec.structs import replace

from executor.config import MAX_DRAFT_TOKENS, SpeculativeConfig
from executor.messages import I32, I64, NewRequest
from executor.registry import resolve
from executor.request_states import RequestStates
from executor.speculative.base import ComputedRows, Drafts, ProposerContext
from executor.speculative.lookup import Found, continuation, find
from executor.speculative.pool import Pool, Pools

SURE_LENGTH = 8
"""From this length on, a match is followed as long as it goes on, without another search."""

SEARCHES = {"cpu": "executor.speculative.kernel:KernelSearch"}
"""Searches by op set: they take the configuration and the number of slots. Other op sets use ``Search``."""


class TextSearch(Protocol):
    """Searches the texts of requests for their last tokens."""

    def forget(self, slot: int) -> None:
        """Another request takes the slot."""

    def propose(self, slots: I32, limits: I64, states: RequestStates, pools: Sequence[Pool | None]) -> Drafts:
        """Proposes tokens to follow those in the table.

        Args:
            slots: int32 [n].
            limits: int64 [n]: maximum drafts per slot.
            states: Tokens by slot.
            pools: Earlier outputs that each slot may search, too.
        """


class SuffixProposer:
    """Searches a request's prompt and output, and earlier outputs of the same pool."""

    costs = None

    def __init__(self, config: SpeculativeConfig, max_num_seqs: int, context: ProposerContext) -> None:
        create = resolve(SEARCHES, context.op_set, "search") if context.op_set in SEARCHES else Search
        self._search: TextSearch = create(config, max_num_seqs)
        self._pools = Pools(config.max_cached_requests)
        self._numbers = [0] * max_num_seqs
        """``NewRequest.draft_pool`` by slot."""

    def add(self, request: NewRequest) -> None:
        self._numbers[request.slot] = request.draft_pool
        self._search.forget(request.slot)

    def remove(self, slot: int, output: I32) -> None:
        self._pools.add(self._numbers[slot], output)

    def follow(self, computed: ComputedRows, states: RequestStates) -> None:
        pass

    def propose(self, slots: I32, limits: I64, states: RequestStates) -> Drafts:
        pools: list[Pool | None] = [None] * len(slots)
        if len(self._pools):
            pools = [self._pools.get(self._numbers[slot]) for slot in slots.tolist()]
        return self._search.propose(slots, limits, states, pools)


class Search:
    """The definition, with array operations."""

    def __init__(self, config: SpeculativeConfig, max_num_seqs: int) -> None:
        self._least, self._most = config.prompt_lookup_min, config.prompt_lookup_max
        self._factor = config.max_spec_factor
        self._followed: list[tuple[int, int, int] | None] = [None] * max_num_seqs
        """By slot: length of the text at the last search, where what followed begins, and length of the match."""

    def forget(self, slot: int) -> None:
        self._followed[slot] = None

    def propose(self, slots: I32, limits: I64, states: RequestStates, pools: Sequence[Pool | None]) -> Drafts:
        counts = np.zeros(len(slots), np.int64)
        all_tokens: list[int] = []
        all_kinds: list[int] = []
        known = states.num_known[slots].tolist()
        for row, (slot, limit, length) in enumerate(zip(slots.tolist(), limits.tolist(), known, strict=True)):
            if limit <= 0:
                continue
            tokens, kinds = self._propose(slot, states.token_ids[slot, :length], limit, pools[row])
            counts[row] = len(tokens)
            all_tokens += tokens
            all_kinds += kinds
        return Drafts(counts, np.array(all_tokens, np.int32), np.array(all_kinds, np.int8))

    def _propose(self, slot: int, text: I32, limit: int, pool: Pool | None) -> tuple[list[int], list[int]]:
        source, found = text, self._follow(slot, text)
        if found is None:
            query = text[: -self._most - 1 : -1]
            found = find(text, query, self._least)
            if pool is not None and found.length < SURE_LENGTH:
                other = find(pool.text, query, max(self._least, found.length + 1))
                if other.length:
                    source, found = pool.text, other
        if not found.length:
            return [], []
        self._followed[slot] = (len(text), int(found.places[-1]), found.length) if source is text else None
        return continuation(source, found, min(limit, max(1, int(self._factor * found.length))))

    def _follow(self, slot: int, text: I32) -> Found | None:
        """The place of the last match, moved on by the new tokens, if they are those that followed there."""
        followed, self._followed[slot] = self._followed[slot], None
        if followed is None or followed[2] < SURE_LENGTH:
            return None
        before, place, length = followed
        new = len(text) - before
        if new and not np.array_equal(text[place : place + new], text[before:]):
            return None
        return Found(min(length + new, self._most), np.array([place + new]))


class NgramProposer(SuffixProposer):
    """Proposes as many tokens as allowed, from the request's own text alone."""

    def __init__(self, config: SpeculativeConfig, max_num_seqs: int, context: ProposerContext) -> None:
        config = replace(config, max_spec_factor=float(MAX_DRAFT_TOKENS), max_cached_requests=0)
        super().__init__(config, max_num_seqs, context)
