"""All requests of an engine, and where each is.

A request waits for its grammar, its adapter or its stored prefix, each outside the queue; or in the queue; or it runs,
with a slot and blocks. The methods here move it from one place to another and keep what depends on that in step:
blocks, slots, images, adapters, suspects, and what tenants are charged. What runs when is the scheduler's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from engine_core.adapters import AdapterPool
from engine_core.config import SchedulerConfig
from engine_core.encoder_cache_manager import EncoderCacheManager
from engine_core.fair_shares import FairShares
from engine_core.in_flight import InFlight
from engine_core.kv_cache_manager import KVCacheManager
from engine_core.kv_transfer.transfers import KVTransfers
from engine_core.messages import EngineCoreOutput
from engine_core.request import Request
from engine_core.request_queue import create_request_queue
from engine_core.slot_table import SlotTable
from engine_core.step_outputs import error_output
from engine_core.suspects import Suspects


class RequestPool:
    """Owns the requests, the queue and the slots."""

    def __init__(
        self,
        config: SchedulerConfig,
        table: SlotTable,
        kv: KVCacheManager,
        images: EncoderCacheManager,
        adapters: AdapterPool,
        max_model_len: int,
    ) -> None:
        self.table = table
        self.kv = kv
        self.images = images
        self.adapters = adapters
        self.max_model_len = max_model_len
        self.requests: dict[int, Request] = {}
        """By index."""
        self.shares = FairShares()
        self.waiting = create_request_queue(config.scheduling_policy)
        self.compiling: dict[int, Request] = {}
        """Requests whose grammars are not compiled yet; they wait outside the queue."""
        self.transfers: KVTransfers | None = None
        """Moves blocks from and to a store; None: there is none."""
        self.suspects = Suspects()
        self.num_preemptions = 0

    @property
    def num_waiting(self) -> int:
        num_loading = 0 if self.transfers is None else self.transfers.num_waiting
        return len(self.waiting) + len(self.compiling) + self.adapters.num_parked + num_loading

    def max_output_tokens(self, request: Request) -> int:
        """Maximum tokens that a request may generate, including those of an earlier life."""
        return min(request.params.max_tokens, self.max_model_len - request.num_prompt_tokens)

    # -- requests come and wait ----------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queues a request, or holds it until its grammar is compiled. Its prompt must fit the model and the cache."""
        assert request.index not in self.requests
        assert 0 < len(request.token_ids) < self.max_model_len or request.is_pooling
        self.requests[request.index] = request
        request.account = self.shares.open(request.message.tenant)
        if request.message.grammar is not None and request.grammar is None:
            self.compiling[request.index] = request
        else:
            self.waiting.add(request)

    def grammar_is_there(self, request: Request) -> None:
        """Queues a request whose grammar was being compiled."""
        del self.compiling[request.index]
        self.waiting.add(request)

    def park(self, request: Request) -> None:
        """Takes a request whose adapter has no place yet out of the queue."""
        self.waiting.remove(request)
        self.adapters.park(request)

    def unpark(self) -> None:
        """Returns the requests to the queue whose adapters have a place now."""
        for request in reversed(self.adapters.take_ready()):
            self.waiting.put_back(request)

    def release_kept(self, chosen: Callable[[Request], bool] = lambda request: True) -> bool:
        """Releases the blocks that waiting requests keep, of those chosen. Returns False if there were none."""
        others = (request for request in self.requests.values() if request.slot < 0 and request.num_kept_tokens)
        keeping = [request for request in others if chosen(request)]
        for request in keeping:
            self.kv.release(request)
        return bool(keeping)

    def forget_cache(self) -> None:
        """Forgets all that the KV cache holds for requests to come and for waiting ones."""
        self.release_kept()
        self.kv.reset_prefix_cache()

    # -- they run ------------------------------------------------------------------------------------------

    def start(self, request: Request, num_computed: int, capacity: int) -> int:
        """Gives a request a slot and charges its tenant, but not for tokens that must be recomputed.

        Args:
            request: A request that has left the queue and has its blocks.
            num_computed: Tokens found in the prefix cache.
            capacity: Tokens for which it has blocks.

        Returns:
            The slot.
        """
        num_tokens = len(request.token_ids)
        num_new = 0 if request.scheduled_time else num_tokens - num_computed
        if request.is_pooling:
            max_tokens, num_left = num_tokens + 1, 0
        else:
            max_output = self.max_output_tokens(request)
            max_tokens = request.num_prompt_tokens + max_output
            num_expected = min(int(request.account.mean_output), max_output)
            num_left = max(0, num_expected - (num_tokens - request.num_prompt_tokens))
        table = self.table
        slot = table.occupy(request, num_computed, max_tokens)
        self.adapters.started(request)
        table.capacity[slot] = capacity
        if self.kv.enable_prefix_caching:
            table.publish_at[slot] = num_computed + 1
        table.free_at[slot] = self.kv.free_unseen(request, num_computed)
        request.account.charge(num_new + num_left)
        table.num_charged[slot] = num_tokens + num_left
        if request.suspicion is not None:
            self.suspects.started(request, num_computed)
        self.images.started(request)
        return slot

    def publish_ready(self) -> None:
        """Publishes the blocks that known tokens have filled since the last call, of all running requests."""
        table = self.table
        counts = np.minimum(table.num_scheduled, table.num_known)
        for slot in (counts >= table.publish_at).nonzero()[0].tolist():
            self.publish(slot)

    def publish(self, slot: int) -> None:
        """Adds a request's full blocks of known tokens to the prefix cache as soon as their computation is planned.

        Workers execute plans in order and write all K and V of a step before reading any, so any request that hits such
        a block reads it after it was written.
        """
        table = self.table
        count = min(int(table.num_scheduled[slot]), int(table.num_known[slot]))
        if count < table.publish_at[slot]:
            return
        step = self.kv.publish_step
        table.publish_at[slot] = (count // step + 1) * step
        self.kv.publish(table.request(slot), table.token_ids[slot], count)

    # -- they return to the queue --------------------------------------------------------------------------

    def preempt(self, request: Request) -> None:
        """Takes slot and blocks from a running request in favour of others."""
        self.requeue(request)
        self.num_preemptions += 1

    def requeue(self, request: Request, num_kept: int = 0, first_lost: int = 0) -> None:
        """Takes slot and blocks from a running request, which will start over with the tokens it has.

        It keeps the blocks of its first ``num_kept`` tokens as far as they hold; see ``KVCacheManager.keep``.
        """
        slot = request.slot
        request.token_ids = self.table.token_ids[slot, : self.table.num_known[slot]].copy()
        request.prompt_logprobs = []  # the prompt is computed again
        if not (num_kept and self.kv.keep(request, num_kept, first_lost)):
            self.kv.release(request)
        self._free_slot(request)
        self.waiting.put_back(request)

    def requeue_all(self, lost: Sequence[InFlight] | None, next_step: int) -> None:
        """Requeues all running requests.

        Args:
            lost: Steps that some rank did not finish, oldest first, if the KV cache survives the workers: what these
                steps were writing is forgotten. None: the prefix cache is emptied.
            next_step: Id of the next step.
        """
        first_lost = lost[0].step_id if lost else next_step
        self.release_kept(lambda request: self.kv.holds_lost(request, first_lost))
        kept = {} if lost is None or self.kv.shape.has_states else self.table.num_computed_before(lost)
        for slot in reversed(self.table.running.tolist()):
            request = self.table.request(slot)
            self.requeue(request, 0 if request.needs_all_positions else kept.get(slot, 0), first_lost)
        if self.transfers is not None:
            self.transfers.restart(self.waiting.put_back)
        if lost is None:
            self.forget_cache()
        else:
            self.kv.forget_since(first_lost)

    def restart(self, lost: Sequence[InFlight] | None, next_step: int) -> None:
        """Adapts to new workers: requeues all running requests, as ``requeue_all`` does."""
        for request in reversed(self.adapters.unpark_all()):
            self.waiting.put_back(request)
        self.requeue_all(lost, next_step)
        self.table.finished_slots.clear()
        self.images.restart()
        self.adapters.restart()
        self.suspects.restart()

    # -- they end ------------------------------------------------------------------------------------------

    def finish(self, request: Request) -> None:
        """Drops a request, wherever it is."""
        del self.requests[request.index]
        self.suspects.forget(request)
        if request.slot >= 0:
            num_output = int(self.table.num_known[request.slot]) - request.num_prompt_tokens
            if num_output:
                request.account.note_output(num_output)
            if self.transfers is not None:
                self.transfers.save(request)
            self.kv.release(request)
            self._free_slot(request)
        else:
            self._stop_waiting(request)
            self.kv.release(request)
            self.unpark()  # others may have waited for the adapter that was kept for it
        self.shares.close(request.account)

    def fail(self, request: Request, message: str) -> EngineCoreOutput:
        """Ends a request with an error, wherever it is. If it runs, its blocks cannot be trusted."""
        is_running = request.slot >= 0
        num_tokens = int(self.table.num_known[request.slot]) if is_running else len(request.token_ids)
        output = error_output(request, num_tokens, message)
        if is_running:
            self.kv.discard(request)
        self.finish(request)
        return output

    def _stop_waiting(self, request: Request) -> None:
        """Takes a request that does not run from where it waits."""
        if self.compiling.pop(request.index, None) is not None or self.adapters.forget_request(request):
            return
        if self.transfers is None or not self.transfers.forget(request):
            self.waiting.remove(request)

    def _free_slot(self, request: Request) -> None:
        table, slot = self.table, request.slot
        request.account.charge(int(table.num_known[slot] - table.num_charged[slot]))
        self.suspects.stopped(slot)
        self.images.stopped(request)
        table.release(request)
        if self.adapters.stopped(request):
            self.unpark()

    def check_integrity(self) -> None:
        """Asserts that slots, queues and blocks agree with each other."""
        self.table.check_integrity()
        running, waiting = self.table.running_requests(), list(self.waiting)
        assert all(self.requests[request.index] is request for request in running)
        assert all(request.slot < 0 for request in waiting)
        assert all(bool(request.block_tables) == bool(request.num_kept_tokens) for request in waiting)
        assert self.num_waiting + len(running) == len(self.requests)
        self.adapters.check_integrity(running)
        held = (lambda group: ()) if self.transfers is None else self.transfers.held
        self.kv.check_integrity(self.requests.values(), held)
        self.images.check_integrity(running)
