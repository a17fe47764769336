"""Decides what each step computes.

There are no separate prefill and decode phases. A request has known tokens (its prompt, its output, and placeholders
for what planned steps will sample) and computed tokens; a step lets the second number catch up with the first, within a
budget. Chunked prefill, prefix cache hits, decode and resumption after a preemption are all this one subtraction. While
drafts are being verified, both numbers are upper bounds: results say how many drafts are accepted.

Where each request is, and its way from place to place, is the ``RequestPool``'s. State that changes every step lives in
the ``SlotTable``. Plans are made before the results of earlier ones are known; see ``InFlight`` for how results are
matched to requests, and ``step_outputs.py`` for what is reported to the api.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import msgspec
import numpy as np

from engine_core.adapters import AdapterPool
from engine_core.cache_shape import CacheShape, max_step_tokens
from engine_core.config import CacheConfig, LoRAConfig, SchedulerConfig
from engine_core.draft_allowance import DraftAllowance
from engine_core.draft_counts import DraftCounts
from engine_core.encoder_cache_manager import EncoderCacheManager
from engine_core.grammar_rows import forced_drafts, judge_rows, keep_drafts
from engine_core.hashing import draft_pool
from engine_core.in_flight import I64, Bools, InFlight
from engine_core.kv_cache_manager import KVCacheManager, PrefixHit
from engine_core.lanes import Lanes
from engine_core.messages import (
    I32,
    EngineCoreOutput,
    EngineCoreOutputs,
    FinishReason,
    MultiModalSupport,
    SchedulerStats,
    TokenLogprobs,
)
from engine_core.request import Request
from engine_core.request_pool import RequestPool
from engine_core.slot_table import SlotTable
from engine_core.step_outputs import (
    end_output,
    keep_prompt_logprobs,
    pooling_output,
    token_columns,
    token_output,
)
from engine_core.step_tokens import StepTokens
from engine_core.steps_per_plan import StepsPerPlan
from engine_core.structured.request_grammar import Verdict
from engine_core.suspects import allowed
from executor.messages import ModelRunnerOutput, NewRequest, SchedulerOutput

MAX_DESCRIBED_TOKENS = 1 << 16
"""Tokens, cached ones included, of prompts and accompanying lists of the requests started in one step; once exceeded,
no more start, so that running requests wait for about 10 ms at most."""
REQUEST_COST = 512
"""What starting a request costs besides its tokens, in tokens."""
NO_SLOTS: I32 = np.empty(0, np.int32)
NO_COUNTS: I64 = np.empty(0, np.int64)


class Scheduler:
    """Plans steps, applies their results, and is the engine core's interface to its requests."""

    def __init__(
        self,
        config: SchedulerConfig,
        cache: CacheConfig,
        shape: CacheShape,
        max_model_len: int,
        *,
        engine_epoch: int = 0,
        max_draft_tokens: int = 0,
        max_samples: int | None = None,
        num_lookahead_tokens: int = 0,
        multimodal: MultiModalSupport | None = None,
        adapters: AdapterPool | None = None,
        num_stages: int = 1,
        has_late_results: bool = True,
    ) -> None:
        self.config = config
        self.num_lookahead_tokens = num_lookahead_tokens
        self.max_draft_tokens = max_draft_tokens
        self.max_samples = max_samples or config.max_num_seqs * (1 + max_draft_tokens)
        self.max_model_len = max_model_len
        self.shape = shape
        self.engine_epoch = engine_epoch
        self.kv = KVCacheManager(
            shape,
            max_step_tokens(config, max_draft_tokens, num_lookahead_tokens),
            enable_prefix_caching=cache.enable_prefix_caching,
        )
        self.table = SlotTable(config.max_num_seqs, max_model_len, max_draft_tokens)
        self.images = EncoderCacheManager(multimodal, config.step_tokens)
        self.pool = RequestPool(
            config, self.table, self.kv, self.images, adapters or AdapterPool(LoRAConfig()), max_model_len
        )
        self.requests, self.waiting, self.suspects = self.pool.requests, self.pool.waiting, self.pool.suspects
        self.admits = True
        """Whether waiting requests may start."""
        self.on_admit: Callable[[int], None] | None = None
        """Called with the index of each request about to get a slot."""
        self.drafts = DraftCounts()
        self._allowance = DraftAllowance(max_draft_tokens, retries=has_late_results and num_stages == 1)
        self.lanes = Lanes(num_stages, config.max_num_seqs)
        self.steps_per_plan = StepsPerPlan(
            config, max_draft_tokens, num_stages=num_stages, has_late_results=has_late_results
        )
        self._step_id = 0

    # -- requests come and go ------------------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        return len(self.table.running)

    @property
    def has_unfinished(self) -> bool:
        return bool(self.requests)

    @property
    def num_waiting(self) -> int:
        return self.pool.num_waiting

    @property
    def num_preemptions(self) -> int:
        return self.pool.num_preemptions

    def running_requests(self) -> list[Request]:
        return self.table.running_requests()

    def add_request(self, request: Request) -> None:
        """Queues a request, or holds it until its grammar is compiled. Its prompt must fit the model and the cache."""
        self.pool.add(request)

    def abort_request(self, index: int) -> bool:
        """Drops a request, whatever its state. Returns False if it does not exist (any more)."""
        request = self.requests.get(index)
        if request is None:
            return False
        self.pool.finish(request)
        return True

    def pause(self, lost: Sequence[InFlight] | None = None) -> None:
        """Requeues all running requests. For ``lost`` see ``RequestPool.requeue_all``."""
        self.pool.requeue_all(lost, self._step_id + 1)

    def restart(self, lost: Sequence[InFlight] | None = None) -> None:
        """Adapts to new workers: requeues all running requests. For ``lost`` see ``RequestPool.requeue_all``."""
        self.pool.restart(lost, self._step_id + 1)

    # -- planning ------------------------------------------------------------------------------------------

    def schedule(self) -> tuple[SchedulerOutput, InFlight] | None:
        """Plans a step, or several in a row; None if no request can make progress."""
        begin = time.perf_counter()
        table = self.table
        if not self.waiting and not len(table.running):
            return None
        self.images.begin(self.num_running)
        slots, counts, num_steps, updates, preempted = self._plan_running()
        num_running = len(slots)
        new_reqs: list[NewRequest] = []
        if self.waiting and self.admits and not preempted:
            new_slots, new_counts = self._admit(self.config.step_tokens - int(counts.sum()), new_reqs)
            slots, counts = (
                (np.concatenate((slots, new_slots)), np.concatenate((counts, new_counts)))
                if num_running
                else (new_slots, new_counts)
            )
        if not len(slots):
            return None
        if new_reqs:
            self._allowance.restart()
        has_drafts = self._plan_drafts(slots, counts, 0 if preempted else num_running, updates, num_steps)
        ends, open_drafts = table.num_scheduled[slots], table.num_open_drafts[slots]
        sampled, allowances = table.note_samples(slots, has_drafts=has_drafts, num_steps=num_steps)
        grammar_rows = (sampled & table.has_grammar[slots]).nonzero()[0]
        self._step_id += 1
        self.lanes.note(slots, sampled, self._step_id)
        plan = SchedulerOutput(
            step_id=self._step_id,
            slots=slots.tobytes(),
            num_scheduled_tokens=(counts // num_steps).astype(np.int32).tobytes(),
            num_sampled=sampled.tobytes(),
            num_draft_tokens=b"" if allowances is None else allowances.astype(np.uint8).tobytes(),
            finished_slots=np.array(table.finished_slots, np.int32).tobytes() if table.finished_slots else b"",
            new_reqs=tuple(new_reqs),
            block_updates=tuple(np.array(column, np.int32).tobytes() for column in updates) if any(updates) else (),
            grammar_slots=slots[grammar_rows].tobytes(),
            forced_drafts=forced_drafts(table, slots[grammar_rows]),
            num_steps=num_steps,
            **self.images.take(slots, ends),
        )
        table.finished_slots.clear()
        step = InFlight(
            step_id=self._step_id,
            slots=slots,
            epochs=table.epochs[slots],
            indices=table.indices[slots],
            counts=counts,
            begins=ends - counts - open_drafts,
            ends=ends,
            sampled=sampled,
            allowances=None if allowances is None else allowances * num_steps,
            grammar_rows=grammar_rows,
            forced_drafts=plan.forced_drafts,
            num_tokens=int(counts.sum()),
            num_attended=int(counts @ ends) + self.images.num_pairs,
            schedule_us=(time.perf_counter() - begin) * 1e6,
            num_steps=num_steps,
        )
        return plan, step

    def _plan_running(self) -> tuple[I32, I64, int, list[list[int]], bool]:
        """Plans what running requests compute.

        Returns:
            Their slots; how many tokens each; in how many steps; block updates; whether a request was preempted.
        """
        step_id = self._step_id
        self.kv.begin_step(step_id + 1, step_id - self.config.max_in_flight_steps)
        if not len(self.table.running) and self.lanes.num_stages == 1:  # a request that is alone starts at once
            return NO_SLOTS, NO_COUNTS, 1, [], False
        self._free_unseen()
        slots, counts = self._wanted_by_running()
        num_steps = self._choose_num_steps(slots)
        slots, counts, updates, preempted = self._give_blocks(slots, counts * num_steps)
        self.table.num_scheduled[slots] += counts
        self.pool.publish_ready()  # the blocks that these tokens fill
        return slots, counts, num_steps, updates, preempted

    def leaves_nothing(self, step: InFlight) -> bool:
        """Whether there is nothing to plan after the last plan until there are results: it has the last tokens of
        prompts that are pooled, and no others wait."""
        if self.waiting or len(step.slots) < len(self.table.running) or step.sampled.any():
            return False
        return bool((step.ends >= self.table.num_planned[step.slots]).all())

    def _choose_num_steps(self, slots: I32) -> int:
        """Steps in a row of a plan with these running rows: more than one if all decode and nothing else is to be done.

        No row reaches its limit before the last step, and there are blocks for all tokens. Masks of grammars depend on
        the step before, and a suspect is watched step by step.
        """
        table = self.table
        most = self.steps_per_plan.choose(len(slots)) if len(slots) else 1
        if most == 1 or self.waiting or self.suspects or not self.images.is_idle:
            return 1
        planned, scheduled = table.num_planned[slots], table.num_scheduled[slots]
        decodes = (planned - scheduled == 1) & (planned > table.num_prompt[slots]) & ~table.has_grammar[slots]
        if not decodes.all():
            return 1
        room = int((table.max_tokens[slots] - planned).min())
        if self._expects_drafts(slots):
            room = max(1, room // (1 + self._allowance.usual))
        num_steps = min(most, room)
        ends = self._with_lookahead(slots, scheduled + num_steps)
        rows = (ends > table.capacity[slots]).nonzero()[0]
        growing = zip(slots[rows].tolist(), ends[rows].tolist(), strict=True)
        if len(rows) and not self.kv.can_grow([(table.request(slot), end) for slot, end in growing]):
            return 1
        return num_steps

    def _wanted_by_running(self) -> tuple[I32, I64]:
        """Running slots with tokens to compute, and how many each, within the budget.

        The last token of a request at its limit is never computed, since nothing follows it.
        """
        table = self.table
        slots = table.running
        if self.suspects.is_isolating:
            request = self.suspects.current
            slots = slots[:0] if request is None or request.slot < 0 else np.array([request.slot], np.int32)
        scheduled = table.num_scheduled[slots]
        counts = np.minimum(table.num_planned[slots], table.max_tokens[slots] - 1) - scheduled
        if self.config.long_prefill_token_threshold:
            counts = np.minimum(counts, self.config.long_prefill_token_threshold)
        if self.suspects:
            counts = self.suspects.limit(slots, counts, scheduled)
        active = (counts > 0).nonzero()[0]
        if len(active) < len(slots):
            slots, counts = slots[active], counts[active]
        if self.lanes.num_stages > 1:
            has_others = bool(self.waiting) and self.admits
            chosen = self.lanes.choose(table, slots, self._step_id + 1, has_others=has_others)
            slots, counts = slots[chosen], counts[chosen]
        budget = self.config.step_tokens
        if not self.images.is_idle:
            counts = self.images.limit(slots, counts, self.table.num_scheduled[slots], budget)
            slots, counts = slots[counts > 0], counts[counts > 0]
        if int(counts.sum()) > budget:
            if self.config.enable_chunked_prefill:
                before = np.cumsum(counts) - counts
                counts = np.clip(budget - before, 0, counts)
                slots, counts = slots[counts > 0], counts[counts > 0]
            else:
                fits = np.cumsum(counts) <= budget
                slots, counts = slots[fits], counts[fits]
        return slots, counts

    def _plan_drafts(self, slots: I32, counts: I64, num_running: int, updates: list[list[int]], num_steps: int) -> bool:
        """Lets rows of a plan verify drafts.

        Args:
            slots: int32 [rows].
            counts: int64 [rows]: their tokens, to which those of drafts are added.
            num_running: Rows that may verify drafts, the first ones.
            updates: As for ``_allow_drafts``.
            num_steps: Likewise.

        Returns:
            Whether some rows may, or have plans in flight that may.
        """
        table = self.table
        if not self.max_draft_tokens:
            return False
        is_expected = self._expects_drafts(slots)
        if not is_expected and not table.num_open_drafts[slots].any():
            return False
        table.allowances[table.running] = 0
        if is_expected and num_running and not self.suspects:  # they would blur the position at which a suspect kills
            budget = min(self.config.step_tokens - int(counts.sum()) // num_steps, self.max_samples - len(slots))
            counts[:num_running] += self._allow_drafts(slots[:num_running], budget, updates, num_steps) * num_steps
        return True

    def _expects_drafts(self, slots: I32) -> bool:
        """Whether workers may have drafts for rows of a plan, or grammars may."""
        if not self.max_draft_tokens:
            return False
        return self._allowance.is_expected or bool(self.table.has_grammar[slots].any())

    def _allow_drafts(self, slots: I32, budget: int, updates: list[list[int]], num_steps: int) -> I64:
        """Lets decoding rows verify drafts, with the tokens and blocks that all others leave.

        Args:
            slots: Running rows of the plan. Those that start with it have no drafts yet.
            budget: Tokens that are left in each step.
            updates: Extended by the blocks that drafts need.
            num_steps: Steps of the plan.

        Returns:
            Number of drafts that each row may verify in each step.
        """
        table = self.table
        planned, scheduled, max_tokens = table.num_planned[slots], table.num_scheduled[slots], table.max_tokens[slots]
        goes_on = (planned > table.num_prompt[slots]) & (scheduled - planned == num_steps - 1)
        share = max(1, budget // max(1, int(np.count_nonzero(goes_on))))
        room = (max_tokens - planned) // num_steps - 1
        most = np.minimum(self._allowance.in_rows(num_steps, room), share)
        allowances = np.maximum(np.minimum(most, room), 0) * goes_on
        left = budget - (allowances.cumsum() - allowances)
        drafts: I64 = np.maximum(np.minimum(left, allowances), 0)
        ends = self._with_lookahead(slots, scheduled + drafts * num_steps)
        rows = (ends > table.capacity[slots]).nonzero()[0]
        if len(rows):
            growing = [
                (table.request(slot), end) for slot, end in zip(slots[rows].tolist(), ends[rows].tolist(), strict=True)
            ]
            if not self.kv.can_grow(growing):
                return np.zeros_like(drafts)
            for request, end in growing:
                capacity = self.kv.grow(request, end, updates)
                assert capacity is not None, "there are blocks for all"
                table.capacity[request.slot] = capacity
        table.allowances[slots] = drafts
        table.num_scheduled[slots] += drafts * num_steps
        return drafts

    def _with_lookahead(self, slots: I32, ends: I64) -> I64:
        """Tokens that need blocks if a step computes those up to ``ends``."""
        if not self.num_lookahead_tokens:
            return ends
        most = np.maximum(self.table.max_tokens[slots], ends)
        wanted: I64 = np.minimum(ends + self.num_lookahead_tokens, most)
        return wanted

    def _free_unseen(self) -> None:
        """Frees the blocks that have left their windows."""
        if not self.kv.has_windows:
            return
        table = self.table
        confirmed = table.num_confirmed()
        for slot in np.flatnonzero(confirmed >= table.free_at).tolist():
            table.free_at[slot] = self.kv.free_unseen(table.request(slot), int(confirmed[slot]))

    def _give_blocks(self, slots: I32, counts: I64) -> tuple[I32, I64, list[list[int]], bool]:
        """Allocates the blocks that running rows need, preempting others if there are too few.

        Returns:
            The remaining rows, the plan's block updates, and whether a request was preempted.
        """
        table, kv = self.table, self.kv
        ends = self._with_lookahead(slots, table.num_scheduled[slots] + counts)
        updates: list[list[int]] = [[] for _ in kv.managers]
        dropped: set[int] = set()
        rows = (ends > table.capacity[slots]).nonzero()[0]
        for slot, end in zip(slots[rows].tolist(), ends[rows].tolist(), strict=True):
            request = table.owners[slot]
            if request is None:
                continue  # preempted in favour of an earlier row
            capacity = kv.grow(request, end, updates)
            while capacity is None:
                victim = self._choose_victim()
                dropped.add(victim.slot)
                self.pool.preempt(victim)
                if victim is request:
                    break
                capacity = kv.grow(request, end, updates)
            if capacity is not None:
                table.capacity[slot] = capacity
        if dropped:
            gone = list(dropped)
            kept = ~np.isin(slots, gone)
            slots, counts = slots[kept], counts[kept]
            columns = [np.array(column, np.int32).reshape(-1, 3) for column in updates]
            updates = [column[~np.isin(column[:, 0], gone)].ravel().tolist() for column in columns]
        return slots, counts, updates, bool(dropped)

    def _choose_victim(self) -> Request:
        running = self.running_requests()
        if self.suspects.is_isolating:
            return next((other for other in reversed(running) if other is not self.suspects.current), running[-1])
        if self.config.scheduling_policy == "priority":
            return max(running, key=lambda request: request.priority)
        return running[-1]

    def _admit(self, budget: int, new_reqs: list[NewRequest]) -> tuple[I32, I64]:
        """Starts waiting requests as long as token budget, slots and blocks allow: their slots and counts of tokens."""
        table, transfers = self.table, self.pool.transfers
        slots: list[int] = []
        counts: list[int] = []
        if table.free_slots and len(table.running):
            table.charge_long_outputs()
        num_described = 0
        while budget > 0 and self.waiting and (table.free_slots or self.suspects.is_isolating):
            if num_described >= MAX_DESCRIBED_TOKENS:
                break  # the rest in the next step: do not hold up running requests
            request = self._next_waiting()
            if request is None:
                break
            if not self._has_adapter(request):
                if self.suspects.is_isolating:
                    break
                self.pool.park(request)
                continue
            num_tokens = len(request.token_ids)
            hit = self.kv.find_cached_prefix(request)
            num_computed = hit.num_tokens
            count = num_tokens - num_computed
            whole = not self.config.enable_chunked_prefill
            if whole and count > budget:
                break
            ahead = self._lookahead_of(request)
            if self.suspects.is_isolating:
                self._make_room(hit, num_tokens + ahead)
            if not self._fits(request, hit, num_tokens + ahead):
                break
            if transfers is not None and not self.suspects.is_isolating and transfers.load(request, hit):
                self.waiting.pop()
                continue
            if self.config.long_prefill_token_threshold and not whole:
                count = min(count, self.config.long_prefill_token_threshold)
            count = min(count, budget)
            if request.suspicion is not None:
                count = allowed(request, count, num_computed, num_computed)
            count = self.images.admit(request, num_computed, count, whole=whole)
            if not count:
                break  # the encoder has no room in this step
            if self.suspects.is_isolating:
                self.waiting.remove(request)
            else:
                self.waiting.pop()
            if self.on_admit is not None:
                self.on_admit(request.index)
            capacity = self.kv.start(request, hit, num_computed + count + ahead)
            slot = self.pool.start(request, num_computed, capacity)
            new_reqs.append(self._describe(request, slot, num_computed))
            num_described += REQUEST_COST + num_tokens + len(request.params.logit_bias)
            table.num_scheduled[slot] += count
            self.pool.publish(slot)
            slots.append(slot)
            counts.append(count)
            budget -= count
        return np.array(slots, np.int32), np.array(counts, np.int64)

    def _fits(self, request: Request, hit: PrefixHit, num_tokens: int) -> bool:
        """Whether there is room for a waiting request. If nothing runs, others that wait give up what they keep."""
        if self.kv.can_fit(hit, num_tokens):
            return True
        if len(self.table.running) and not self.suspects.is_isolating:
            return False
        return self.pool.release_kept(lambda other: other is not request) and self.kv.can_fit(hit, num_tokens)

    def _has_adapter(self, request: Request) -> bool:
        """Whether a request's adapter has a place; asks for it to be loaded. Before a trial, others give up theirs."""
        is_trial = self.suspects.is_isolating
        if is_trial and request.message.lora_request is not None and self.pool.adapters.is_full:
            for running in reversed(self.running_requests()):
                self.pool.preempt(running)
        return self.pool.adapters.may_start(request, is_alone=is_trial)

    def _lookahead_of(self, request: Request) -> int:
        """Tokens behind those known that need blocks when a request starts."""
        if not self.num_lookahead_tokens or request.is_pooling:
            return 0
        most = request.num_prompt_tokens + self.pool.max_output_tokens(request)
        return max(0, min(self.num_lookahead_tokens, most - len(request.token_ids)))

    def _next_waiting(self) -> Request | None:
        """The next request that may start now; None: none may."""
        if not self.suspects.is_isolating:
            return self.waiting.peek()
        request = self.suspects.current
        if request is None or request.slot >= 0 or request.index in self.pool.compiling:
            return None
        if self.pool.adapters.forget_request(request):
            self.waiting.put_back(request)
        return request

    def _make_room(self, hit: PrefixHit, num_tokens: int) -> None:
        """Preempts requests that wait for another's trial, as far as the trial needs their blocks."""
        while len(self.table.running) and not (self.table.free_slots and self.kv.can_fit(hit, num_tokens)):
            self.pool.preempt(self.running_requests()[-1])

    def _describe(self, request: Request, slot: int, num_computed: int) -> NewRequest:
        return NewRequest(
            slot=slot,
            token_ids=request.token_ids.tobytes(),
            num_prompt_tokens=request.num_prompt_tokens,
            num_computed_tokens=num_computed,
            block_ids=tuple(np.array(blocks.block_ids, np.int32).tobytes() for blocks in request.block_tables),
            block_offsets=tuple(blocks.first for blocks in request.block_tables) if self.kv.has_windows else (),
            params=None if request.is_pooling else request.params,
            pooling_params=request.message.pooling_params,
            lora_id=self.pool.adapters.number(request),
            mm_features=self.images.features_for(request, num_computed),
            draft_pool=draft_pool(request.message.tenant, request.message.cache_salt) if self.max_draft_tokens else 0,
        )

    # -- results -------------------------------------------------------------------------------------------

    def update_from_output(self, step: InFlight, result: ModelRunnerOutput) -> EngineCoreOutputs:
        """Appends the tokens of a step, ends finished requests and returns the outputs.

        Rows of requests that have left their slots since the plan was made are dropped.
        """
        table = self.table
        current = table.epochs[step.slots] == step.epochs
        self.steps_per_plan.note(step, result.forward_ms)
        if not result.sampled_token_ids and not result.row_errors and not step.sampled.any():
            return self._only_prompts(step, result, current)
        new = StepTokens(step, result, current)
        ends = table.confirm(step, new.counts, current)
        if self.suspects:
            self.suspects.computed(step.slots, ends, current)
        outputs = self._take_prompts(step, result, current)
        if result.num_verified:
            self.drafts.add(result.num_verified, result.num_accepted)
        self._allowance.note(step, result)
        if result.num_draft_tokens:
            keep_drafts(table, step, new, result, current)
        verdicts = judge_rows(table, step, new) if len(step.grammar_rows) else {}

        tokens, rows, offsets = new.columns()
        slots = step.slots[rows]
        lengths = table.append(slots, offsets, tokens)
        special = (table.ends_here(slots, tokens, lengths) | table.is_special[slots]).nonzero()[0]
        if len(special) or verdicts or result.row_errors:
            described = np.zeros(len(step.slots), np.bool_)
            described[rows[special]] = True
            described[[*verdicts, *(error.row for error in result.row_errors)]] = True
            outputs += self._describe_rows(step, result, new, described, verdicts)
            plain = ~described[rows]
            tokens, slots, lengths, rows = tokens[plain], slots[plain], lengths[plain], rows[plain]
            offsets = None if offsets is None else offsets[plain]
        self.pool.publish_ready()
        indices, output_indices, num_tokens, num_drafts, num_accepted = token_columns(
            table.indices[slots], lengths - 1 - table.num_prompt[slots], offsets, new.drafts_of(rows)
        )
        return EngineCoreOutputs(
            engine_epoch=self.engine_epoch,
            indices=indices,
            output_indices=output_indices,
            token_ids=tokens.tobytes(),
            num_tokens=num_tokens,
            num_draft_tokens=num_drafts,
            num_accepted_tokens=num_accepted,
            outputs=tuple(outputs),
            scheduler_stats=self.stats(step, result),
            timestamp=time.monotonic(),
        )

    def _only_prompts(self, step: InFlight, result: ModelRunnerOutput, current: Bools) -> EngineCoreOutputs:
        """The outputs of a step that computed parts of prompts, and prompts that are pooled."""
        ends = step.ends if step.allowances is None else self.table.confirm(step, NO_COUNTS, current)
        if self.suspects:
            self.suspects.computed(step.slots, ends, current)
        outputs = self._take_prompts(step, result, current)
        if len(self.table.running):
            self.pool.publish_ready()
        return EngineCoreOutputs(
            engine_epoch=self.engine_epoch,
            outputs=tuple(outputs),
            scheduler_stats=self.stats(step, result),
            timestamp=time.monotonic(),
        )

    def _take_prompts(self, step: InFlight, result: ModelRunnerOutput, current: Bools) -> list[EngineCoreOutput]:
        """Ends pooling requests whose prompts are complete, and keeps other requests' prompt log probabilities."""
        outputs: list[EngineCoreOutput] = []
        for row, value in result.pooler_output:
            if current[row]:
                request = self.table.request(int(step.slots[row]))
                outputs.append(pooling_output(request, value))
                self.pool.finish(request)
        if result.prompt_logprobs:
            keep_prompt_logprobs(self.table, step, result.prompt_logprobs)
        return outputs

    def _describe_rows(
        self,
        step: InFlight,
        result: ModelRunnerOutput,
        new: StepTokens,
        described: Bools,
        verdicts: dict[int, Verdict],
    ) -> list[EngineCoreOutput]:
        """The outputs of rows that take the slow path; ends finished requests.

        Args:
            step: The plan.
            result: Its result.
            new: The step's tokens, already in the table.
            described: bool [rows].
            verdicts: Verdicts of the grammars by row.
        """
        logprobs: dict[int, list[TokenLogprobs]] = {}
        for entry in result.logprobs:
            logprobs.setdefault(entry.row, []).append(entry)
        outputs: list[EngineCoreOutput] = []
        samples = described[new.rows].nonzero()[0]
        rows = new.rows[samples]
        for sample, row, slot in zip(samples.tolist(), rows.tolist(), step.slots[rows].tolist(), strict=True):
            tokens = new.of(sample)
            if not tokens:
                continue
            request, reason = self.table.request(slot), None
            if verdicts.get(row) is Verdict.ENDED:
                assert request.grammar is not None
                reason = FinishReason.LENGTH if request.grammar.was_cut else FinishReason.STOP
            drafts = partial(new.drafts_within, sample)
            output = token_output(self.table, slot, tokens, reason, logprobs.get(row, []), drafts)
            outputs.append(output)
            self.pool.publish(slot)
            if output.finish_reason is not None:
                self.pool.finish(request)
            else:
                self.table.is_special[slot] = request.is_special
        for row, verdict in verdicts.items():
            if verdict is not Verdict.ENDED and (ending := self.table.owner(step, row)) is not None:
                outputs += self._execute(step, row, ending, verdict)
        for error in result.row_errors:
            if self.table.owner(step, error.row) is not None:
                output = self.pool.fail(self.table.request(int(step.slots[error.row])), error.message)
                outputs.append(msgspec.structs.replace(output, error_param="") if error.is_request_fault else output)
        return outputs

    def _execute(self, step: InFlight, row: int, request: Request, verdict: Verdict) -> list[EngineCoreOutput]:
        """Acts on a token that its grammar did not accept."""
        if verdict is Verdict.REJECTED:
            self.pool.requeue(request)
            return []
        if verdict is Verdict.COMPLETE:
            return [self.end_row(step, row, FinishReason.LENGTH)]
        assert request.grammar is not None
        return [self.end_row(step, row, FinishReason.ERROR, request.grammar.error)]

    def end_row(self, step: InFlight, row: int, reason: FinishReason, error: str = "") -> EngineCoreOutput:
        """Ends the request of a row between two tokens.

        Args:
            step: The step with the row.
            row: A row whose request still has its slot.
            reason: Why it ends.
            error: For ``ERROR``, the problem with the client's grammar.
        """
        request = self.table.request(int(step.slots[row]))
        if reason is FinishReason.ERROR:
            return msgspec.structs.replace(self.pool.fail(request, error), error_param=request.grammar_param)
        output = end_output(self.table, request, reason)
        self.pool.finish(request)
        return output

    # -- facts ---------------------------------------------------------------------------------------------

    def stats(self, step: InFlight | None = None, result: ModelRunnerOutput | None = None) -> SchedulerStats:
        drafts = self.drafts
        stats = SchedulerStats(
            num_running_reqs=len(self.table.running),
            num_waiting_reqs=self.num_waiting,
            num_deferred_reqs=len(self.pool.compiling),
            kv_cache_usage=self.kv.usage,
            prefix_cache_queries=self.kv.num_queried_tokens,
            prefix_cache_hits=self.kv.num_hit_tokens,
            external_prefix_cache_queries=self.kv.num_queried_externally,
            external_prefix_cache_hits=self.kv.num_hit_externally,
            num_preemptions=self.num_preemptions,
            num_scheduled_tokens=step.num_computed(result) if step and result else 0,
            schedule_us=step.schedule_us if step else 0.0,
            forward_ms=result.forward_ms if result else 0.0,
            num_steps=step.num_steps if step else 1,
            num_drafts=drafts.num_drafts,
            num_draft_tokens=drafts.num_draft_tokens,
            num_accepted_tokens=drafts.num_accepted_tokens,
            num_accepted_tokens_per_pos=drafts.accepted_per_position(),
        )
        return self.pool.adapters.noted(stats)

    def check_integrity(self) -> None:
        """Asserts that slots, queues and blocks agree with each other."""
        self.pool.check_integrity()
