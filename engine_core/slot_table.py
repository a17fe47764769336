"""State that changes every step: arrays indexed by slot.

A pure decode step costs a few numpy calls, however many requests run. A request has a row from its start until it ends
or is preempted; ``Request`` holds the state that survives preemption.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from engine_core.in_flight import I64, Bools, InFlight
from engine_core.messages import I32
from engine_core.request import MAX_STOP_IDS, Request
from engine_core.single_type_kv_cache_manager import NEVER
from executor.messages import row_offsets

CHARGED_TOKENS = 64
"""Tokens by which an output may exceed its expected length before its tenant is charged again."""


class SlotTable:
    """The slots, their requests and these requests' progress.

    ``num_known`` tokens are confirmed by results. Once the plans in flight are done, ``num_planned`` tokens will be
    known and ``num_scheduled`` computed, both assuming that all allowed drafts are accepted; results that bring fewer
    tokens lower them.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, max_draft_tokens: int = 0) -> None:
        size = max_num_seqs
        self.owners: list[Request | None] = [None] * size
        self.free_slots = list(range(size - 1, -1, -1))
        self.finished_slots: list[int] = []
        """Slots freed since the last plan."""
        self.running: I32 = np.empty(0, np.int32)
        """Slots in use, in the order in which their requests started."""
        self.epochs = np.zeros(size, np.int64)
        """Incremented when a slot changes hands, to recognise results of its former owner."""
        self.indices = np.zeros(size, np.int64)
        """``Request.index``."""
        self.token_ids = np.zeros((size, max_model_len), np.int32)
        """int32 [slots, positions]: prompt and confirmed output."""
        self.num_prompt = np.zeros(size, np.int64)
        self.num_known = np.zeros(size, np.int64)
        """Length of prompt and confirmed output."""
        self.num_planned = np.zeros(size, np.int64)
        """``num_known`` once the plans in flight are done, at most."""
        self.num_scheduled = np.zeros(size, np.int64)
        """Tokens whose K and V are in the cache once the plans in flight are done, at most."""
        self.num_open_drafts = np.zeros(size, np.int64)
        """Drafts allowed by plans in flight: the two counts above may be too high by this many."""
        self.allowances = np.zeros(size, np.int64)
        """Drafts allowed by the plan being made."""
        self.drafts = np.zeros((size, max_draft_tokens), np.int32)
        """int32 [slots, drafts]: the worker's drafts for the slot's next step."""
        self.num_drafts = np.zeros(size, np.int64)
        self.max_tokens = np.zeros(size, np.int64)
        """Maximum length of prompt and output together."""
        self.min_tokens = np.zeros(size, np.int64)
        """Length of prompt and output together before which stop tokens are ignored."""
        self.num_charged = np.zeros(size, np.int64)
        """Tokens charged to the request's tenant: prompt, and actual or expected output."""
        self.capacity = np.zeros(size, np.int64)
        """Tokens that fit into the allocated blocks."""
        self.publish_at = np.full(size, NEVER, np.int64)
        """Number of known and scheduled tokens at which the next block can be cached."""
        self.free_at = np.full(size, NEVER, np.int64)
        """Number of confirmed tokens at which the next block leaves a window."""
        self.stop_ids = np.full((MAX_STOP_IDS, size), -1, np.int32)
        """int32 [stop tokens, slots]; -1: none."""
        self.num_stop_ids = 0
        """Rows of ``stop_ids`` that have been in use."""
        self.is_special = np.zeros(size, np.bool_)
        """Rows that take the slow path: a request's first one, and those of special requests."""
        self.is_pooling = np.zeros(size, np.bool_)
        self.has_grammar = np.zeros(size, np.bool_)

    # -- slots change hands ----------------------------------------------------------------------------------

    def occupy(self, request: Request, num_computed: int, max_tokens: int) -> int:
        """Gives a request a slot and fills its row.

        Args:
            request: A request with its blocks allocated.
            num_computed: Tokens found in the prefix cache.
            max_tokens: Maximum length of prompt and output together.
        """
        slot = self.free_slots.pop()
        params = request.params
        num_tokens = len(request.token_ids)
        request.slot = slot
        if request.num_cached_tokens is None:
            request.num_cached_tokens = num_computed
        is_first = request.scheduled_time is None or num_tokens == request.num_prompt_tokens
        if request.scheduled_time is None:
            request.scheduled_time = time.monotonic()
        self.owners[slot] = request
        self.running = np.concatenate((self.running, np.array([slot], np.int32)))
        self.indices[slot] = request.index
        self.token_ids[slot, :num_tokens] = request.token_ids
        self.num_prompt[slot] = request.num_prompt_tokens
        self.num_known[slot] = self.num_planned[slot] = num_tokens
        self.num_scheduled[slot] = num_computed
        self.num_open_drafts[slot] = self.allowances[slot] = self.num_drafts[slot] = 0
        self.is_pooling[slot] = request.is_pooling
        self.has_grammar[slot] = request.grammar is not None
        self.max_tokens[slot] = max_tokens
        self.min_tokens[slot] = request.num_prompt_tokens + params.min_tokens
        stop_ids = params.all_stop_token_ids
        count = min(len(stop_ids), MAX_STOP_IDS)
        self.num_stop_ids = max(self.num_stop_ids, count)
        self.stop_ids[:count, slot] = stop_ids[:count]
        self.stop_ids[count : self.num_stop_ids, slot] = -1
        self.is_special[slot] = is_first or request.is_special
        return slot

    def release(self, request: Request) -> None:
        """Takes the slot from a request."""
        slot = request.slot
        request.slot = -1
        self.owners[slot] = None
        self.publish_at[slot] = self.free_at[slot] = NEVER
        self.epochs[slot] += 1
        self.running = self.running[self.running != slot]
        self.finished_slots.append(slot)
        self.free_slots.append(slot)

    def owner(self, step: InFlight, row: int) -> Request | None:
        """The request of a step's row, if it still has its slot."""
        slot = step.slots[row]
        return self.owners[slot] if self.epochs[slot] == step.epochs[row] else None

    def request(self, slot: int) -> Request:
        """The request of a slot in use."""
        request = self.owners[slot]
        assert request is not None
        return request

    def running_requests(self) -> list[Request]:
        return [request for slot in self.running.tolist() if (request := self.owners[slot]) is not None]

    # -- steps -----------------------------------------------------------------------------------------------

    def note_samples(self, slots: I32, *, has_drafts: bool, num_steps: int = 1) -> tuple[Bools, I64 | None]:
        """Determines which rows of a plan sample and how many drafts each may verify in each step; counts the resulting
        tokens as planned.

        Args:
            slots: int32 [rows].
            has_drafts: Whether any of them may verify drafts, or has plans in flight that may.
            num_steps: Steps of the plan; with more than one, all rows sample in each.
        """
        scheduled, planned = self.num_scheduled[slots] - (num_steps - 1), self.num_planned[slots]
        if not has_drafts:
            sampled: Bools = (scheduled == planned) & ~self.is_pooling[slots]
            self.num_planned[slots[sampled]] += num_steps
            return sampled, None
        allowances = self.allowances[slots]
        sampled = (scheduled - allowances * num_steps == planned) & ~self.is_pooling[slots]
        self.num_planned[slots[sampled]] += (1 + allowances[sampled]) * num_steps
        self.num_open_drafts[slots] += allowances * num_steps
        return sampled, allowances

    def confirm(self, step: InFlight, counts: I64, current: Bools) -> I64:
        """Records the accepted drafts of a step, before its tokens are appended.

        Args:
            step: The plan.
            counts: int64 [rows that sample]: tokens that the worker sampled for each.
            current: bool [rows]: the request still has its slot.

        Returns:
            int64 [rows]: tokens of each row's request computed so far.
        """
        if step.allowances is None:
            return step.ends
        ends: I64 = step.ends.copy()
        slots = step.slots[step.sampled]
        ends[step.sampled] = self.num_known[slots] + counts - 1
        self.num_open_drafts[step.slots[current]] -= step.allowances[current]
        is_current = current[step.sampled]
        missing = (step.allowances[step.sampled] + step.num_steps - counts)[is_current]
        self.num_planned[slots[is_current]] -= missing
        self.num_scheduled[slots[is_current]] -= missing
        return ends

    def note_drafts(self, slots: I32, counts: I64, token_ids: I32) -> None:
        """Records a worker's drafts for the next step.

        Args:
            slots: int32 [n].
            counts: int64 [n]: drafts per slot.
            token_ids: int32 [sum of counts], concatenated slot by slot.
        """
        rows, offsets = row_offsets(counts)
        self.drafts[slots[rows], offsets] = token_ids
        self.num_drafts[slots] = counts

    def append(self, slots: I32, offsets: I64 | None, tokens: I32) -> I64:
        """Appends tokens.

        Args:
            slots: int32 [tokens]: slot of each token; tokens of a slot are adjacent.
            offsets: int64 [tokens]: index of each token among its slot's tokens; None: one token per slot.
            tokens: int32 [tokens].

        Returns:
            int64 [tokens]: length of the request up to and including each token.
        """
        places: I64 = self.num_known[slots]
        if offsets is not None:
            places += offsets
        self.token_ids[slots, places] = tokens
        places += 1
        self.num_known[slots] = places  # the last one of a slot wins
        return places

    def ends_here(self, slots: I32, tokens: I32, lengths: I64) -> Bools:
        """Whether tokens end their requests, judging by the columns alone.

        Args:
            slots: int32 [tokens].
            tokens: int32 [tokens].
            lengths: int64 [tokens]: length of the request up to and including each token.
        """
        ends: Bools = lengths >= self.max_tokens[slots]
        for stop_ids in self.stop_ids[: self.num_stop_ids]:
            hits = (tokens == stop_ids[slots]).nonzero()[0]
            if len(hits):
                ends[hits] |= lengths[hits] >= self.min_tokens[slots[hits]]
        return ends

    def num_confirmed(self) -> I64:
        """Tokens of each slot that precede everything later plans compute, whatever the outcome of steps in flight.

        Computation continues at the last known token or later: rejected drafts are not known tokens.
        """
        return np.minimum(self.num_scheduled, self.num_known - 1)

    def num_computed_before(self, lost: Sequence[InFlight]) -> dict[int, int]:
        """By running slot: tokens that were computed before these steps began, at least, at most all but the last.

        Args:
            lost: Steps without the result of some rank, oldest first.
        """
        found = {
            slot: int(min(self.num_scheduled[slot] - self.num_open_drafts[slot], self.num_known[slot] - 1))
            for slot in self.running.tolist()
        }
        for step in lost:
            current = self.epochs[step.slots] == step.epochs
            for slot, begin in zip(step.slots[current].tolist(), step.begins[current].tolist(), strict=True):
                found[slot] = min(found[slot], begin)
        return found

    def charge_long_outputs(self) -> None:
        """Charges tenants for outputs that exceed their expected length."""
        excess = self.num_known[self.running] - self.num_charged[self.running]
        for row in np.flatnonzero(excess >= CHARGED_TOKENS).tolist():
            slot = self.running[row]
            self.request(slot).account.charge(int(excess[row]))
            self.num_charged[slot] += excess[row]

    def check_integrity(self) -> None:
        """Asserts that slots and counts agree with each other and with the requests."""
        running = self.running.tolist()
        owners = {slot: request for slot, request in enumerate(self.owners) if request is not None}
        assert sorted(running) == sorted(owners), "running slots differ from the slots that have an owner"
        assert sorted(self.free_slots) == sorted(set(range(len(self.owners))) - set(running)), "free slots differ"
        for slot, request in owners.items():
            assert request.slot == slot
            assert self.num_known[slot] <= self.num_planned[slot] <= self.max_tokens[slot]
            assert self.num_scheduled[slot] <= self.capacity[slot]
            assert 0 <= self.num_open_drafts[slot] <= self.num_planned[slot] - self.num_known[slot]
