"""What changes every step: arrays indexed by slot.

A step in which requests only get their next token costs a few numpy calls however many run. A request has a row from
when it is started until it ends or is preempted; ``Request`` keeps what survives that.
"""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt

from engine_core.in_flight import InFlight
from engine_core.messages import I32
from engine_core.request import MAX_STOP_IDS, Request

I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


class SlotTable:
    """Slots, who has them, and how far each of these requests is.

    Three counts of tokens that have a meaning each: those that are known (``num_tokens``, as in a worker), those that
    will be known once the plans in flight are done (``num_planned``), and those that will be computed then
    (``num_scheduled``). ``num_computed`` is what results have confirmed of the last one.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int) -> None:
        size = max_num_seqs
        self.owners: list[Request | None] = [None] * size
        self.free_slots = list(range(size - 1, -1, -1))
        self.finished_slots: list[int] = []
        """Slots that became free since the last plan."""
        self.running: I32 = np.empty(0, np.int32)
        """Slots in the order in which their requests started."""
        self.epochs = np.zeros(size, np.int64)
        """Counted up when a slot changes hands, so that results of its former owner are recognised."""
        self.indices = np.zeros(size, np.int64)
        """``Request.index``."""
        self.token_ids = np.zeros((size, max_model_len), np.int32)
        """int32 [slots, positions]: prompt and confirmed output."""
        self.num_prompt = np.zeros(size, np.int64)
        self.num_tokens = np.zeros(size, np.int64)
        """Prompt and confirmed output."""
        self.num_planned = np.zeros(size, np.int64)
        """``num_tokens`` once the plans in flight are done."""
        self.num_scheduled = np.zeros(size, np.int64)
        """Tokens whose K and V are in the cache once the plans in flight are done."""
        self.num_computed = np.zeros(size, np.int64)
        """Tokens whose K and V are in the cache: confirmed by results."""
        self.max_tokens = np.zeros(size, np.int64)
        """Prompt and output together may not become longer."""
        self.min_tokens = np.zeros(size, np.int64)
        """Stop tokens do not count before prompt and output together are this long."""
        self.num_charged = np.zeros(size, np.int64)
        """Tokens that the request's tenant was charged for: prompt, and output so far or as it is expected."""
        self.num_blocks = np.zeros(size, np.int64)
        self.num_published = np.zeros(size, np.int64)
        """Blocks that were made findable, from the first on."""
        self.stop_ids = np.full((size, MAX_STOP_IDS), -1, np.int32)
        self.has_stop_ids = np.zeros(size, np.bool_)
        self.is_special = np.zeros(size, np.bool_)
        """Rows that have more to say than their token: the first one, and those of special requests."""
        self.is_pooling = np.zeros(size, np.bool_)
        self.has_grammar = np.zeros(size, np.bool_)

    # -- slots change hands ----------------------------------------------------------------------------------

    def occupy(self, request: Request, num_computed: int, max_tokens: int, block_size: int) -> int:
        """Gives a request a slot and fills its row.

        Args:
            request: Has its blocks.
            num_computed: Tokens that came from the prefix cache.
            max_tokens: How long prompt and output together may become.
            block_size: Tokens of a block.
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
        self.running = np.append(self.running, np.int32(slot))
        self.indices[slot] = request.index
        self.token_ids[slot, :num_tokens] = request.token_ids
        self.num_prompt[slot] = request.num_prompt_tokens
        self.num_tokens[slot] = self.num_planned[slot] = num_tokens
        self.num_scheduled[slot] = self.num_computed[slot] = num_computed
        self.num_blocks[slot] = len(request.block_ids)
        self.num_published[slot] = num_computed // block_size
        self.is_pooling[slot] = request.is_pooling
        self.has_grammar[slot] = request.grammar is not None
        self.max_tokens[slot] = max_tokens
        self.min_tokens[slot] = request.num_prompt_tokens + params.min_tokens
        stop_ids = params.all_stop_token_ids
        self.stop_ids[slot] = -1
        self.stop_ids[slot, : min(len(stop_ids), MAX_STOP_IDS)] = stop_ids[:MAX_STOP_IDS]
        self.has_stop_ids[slot] = bool(stop_ids)
        self.is_special[slot] = is_first or request.is_special
        return slot

    def release(self, request: Request) -> None:
        """Takes the slot from a request."""
        slot = request.slot
        request.slot = -1
        self.owners[slot] = None
        self.epochs[slot] += 1
        self.running = self.running[self.running != slot]
        self.finished_slots.append(slot)
        self.free_slots.append(slot)

    def owner(self, step: InFlight, row: int) -> Request | None:
        """The request of a step's row, if it still has its slot."""
        slot = step.slots[row]
        return self.owners[slot] if self.epochs[slot] == step.epochs[row] else None

    def request(self, slot: int) -> Request:
        """The request of a slot that has one."""
        request = self.owners[slot]
        assert request is not None
        return request

    def running_requests(self) -> list[Request]:
        return [request for slot in self.running.tolist() if (request := self.owners[slot]) is not None]

    # -- steps -----------------------------------------------------------------------------------------------

    def note_samples(self, slots: I32) -> Bools:
        """Which rows of a plan sample; each of them will have one token more."""
        sampled: Bools = (self.num_scheduled[slots] == self.num_planned[slots]) & ~self.is_pooling[slots]
        self.num_planned[slots[sampled]] += 1
        return sampled

    def append(self, slots: I32, tokens: I32) -> I32:
        """Adds a token to each slot. Returns the tokens' indices in the outputs, int32 [slots]."""
        known = self.num_tokens[slots]
        self.token_ids[slots, known] = tokens
        self.num_tokens[slots] = known + 1
        return (known - self.num_prompt[slots]).astype(np.int32)

    def stops(self, slots: I32, tokens: I32) -> Bools:
        """Whether tokens that were appended end their requests, as far as the columns of stop ids tell."""
        stopped: Bools = self.has_stop_ids[slots]
        if stopped.any():
            stopped &= (tokens[:, None] == self.stop_ids[slots]).any(axis=1)
            stopped &= self.num_tokens[slots] >= self.min_tokens[slots]
        return stopped

    def check_integrity(self, block_size: int) -> None:
        """Asserts that slots and counts agree with each other and with the requests."""
        running = self.running.tolist()
        owners = {slot: request for slot, request in enumerate(self.owners) if request is not None}
        assert sorted(running) == sorted(owners), "running slots differ from the slots that have an owner"
        assert sorted(self.free_slots) == sorted(set(range(len(self.owners))) - set(running)), "free slots differ"
        for slot, request in owners.items():
            assert request.slot == slot
            assert self.num_tokens[slot] <= self.num_planned[slot] <= self.max_tokens[slot]
            assert self.num_computed[slot] <= self.num_scheduled[slot] <= len(request.block_ids) * block_size
            assert self.num_blocks[slot] == len(request.block_ids)
