"""Runs one step of a model, for all models and devices.

Charter of this file: it stays small and stable. It knows slots, positions and blocks; it does not know model classes,
devices, quantisation or sampling methods, and gets no ``if`` for any of them. State lives by slot in ``RequestStates``,
the sampler and the pooler; nothing here survives a step. Nothing between receiving a plan and launching it waits for
the device: inputs go up through a ``StepChannel``, and ``PendingOutput.collect`` reads the results, possibly after
later steps have begun.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import ops
from executor.attention.base import RECURRENT_KINDS, AttentionGroup
from executor.config import SpeculativeConfig, StepSize
from executor.deferred import Deferred, Together
from executor.device.base import Device
from executor.device.steps import Pending
from executor.draft_runner import DraftModel
from executor.forward import Forward, ForwardSetup, LateSlots, ModelStep, forward_class, run_model
from executor.graphs import Program
from executor.image_inputs import ImageInputs
from executor.input_batch import InputBatch, adapter_columns, adapter_rows
from executor.kv_memory import KVMemory, allocate_group
from executor.loader import LoadedModel
from executor.messages import (
    I32,
    I64,
    GrammarMask,
    InitKVCache,
    ModelRunnerOutput,
    SchedulerOutput,
    TokenLogprobs,
    i32,
    u8,
)
from executor.parallel import ParallelState
from executor.peak_memory import PeakMemory
from executor.pooling import Pooler, PoolerOutput
from executor.request_states import RequestStates
from executor.sampling.forced import create_sampler
from executor.sampling.sampler import Sampler, SamplerOutput, SampleRows, TokenMask
from executor.speculative.base import ComputedRows, Drafts, ProposerContext
from executor.speculative.speculation import Speculation, drafts_of, num_verified, settle, settle_late
from executor.speculative.step_costs import TIMED, time_steps
from executor.stages import Stage
from executor.step_rows import RowsOfPlans
from ops.dispatch import Spec

if TYPE_CHECKING:
    from executor.late_drafts import LateOutput, LateSpeculation

PROMPT_LOGITS_CHUNK = 128
"""Rows per batch of logits for prompt log probabilities: logits are wide."""

TIMED_TOKENS = max(TIMED)

NO_LOGPROBS: Deferred[Sequence[TokenLogprobs]] = Deferred.known(())


@dataclass
class StartedStep:
    """A step before its tokens are sampled."""

    plan: SchedulerOutput
    rows: SampleRows
    """The rows of ``logits``."""
    epochs: I64
    """int64 [samples]: epochs of their slots."""
    batch: InputBatch
    computed: ComputedRows
    drafts: I64 | None
    """int64 [samples]: the draft at each sampled position, -1 if none; None: no drafts at all."""
    logits: torch.Tensor
    """float32 [samples, vocab_size]."""
    prompt_logprobs: Deferred[Sequence[TokenLogprobs]]
    pooled: Deferred[PoolerOutput]
    launch_ms: float
    num_tokens: int
    """Tokens that the step computes."""


class PendingOutput:
    """The output of a launched step. Outputs are collected in step order."""

    def __init__(
        self,
        step: StartedStep,
        states: RequestStates,
        speculation: Speculation,
        results: Together,
        pending: Pending,
        rank: int,
        late: LateSpeculation | None = None,
    ) -> None:
        self._step = step
        self._states = states
        self._speculation = speculation
        self._late = late
        self._results = results
        self._pending = pending
        self._rank = rank

    def is_ready(self) -> bool:
        """Whether ``collect`` returns at once."""
        return self._pending.is_ready()

    @property
    def num_left(self) -> int:
        """Steps of the plan that are left, this one included; see ``steps_of``."""
        return self._step.plan.num_steps

    def collect(self) -> ModelRunnerOutput:
        """Waits for the results and fills in the tokens."""
        begin = time.perf_counter()
        sampled: SamplerOutput
        pooled: PoolerOutput
        drafts: Drafts | None
        sampled, prompt_logprobs, pooled, *found = self._results.make(self._pending.collect())
        step, states = self._step, self._states
        if self._late is not None:
            sampled, num_accepted, drafts = self._settle_late(self._late, sampled, *found)
        else:
            sampled, num_accepted = settle(states, step.rows, step.epochs, step.drafts, sampled)
            milliseconds = step.launch_ms + self._pending.device_ms + (time.perf_counter() - begin) * 1e3
            if step.num_tokens == len(step.rows):
                self._speculation.note_step(step.num_tokens, milliseconds)
            self._speculation.follow(step.computed, states)
            drafts = self._speculation.propose(step.rows, step.epochs, states)
        return ModelRunnerOutput(
            step_id=step.plan.step_id,
            rank=self._rank,
            sampled_token_ids=sampled.token_ids.astype(np.int32).tobytes(),
            num_accepted=num_accepted,
            num_verified=b"" if step.drafts is None else num_verified(step.rows),
            num_draft_tokens=b"" if drafts is None else drafts.counts.astype(np.uint8).tobytes(),
            draft_token_ids=b"" if drafts is None else drafts.token_ids.tobytes(),
            row_errors=(*sampled.row_errors, *pooled.row_errors),
            logprobs=tuple(sampled.logprobs),
            prompt_logprobs=tuple(prompt_logprobs),
            pooler_output=tuple(pooled.vectors),
            forward_ms=step.launch_ms + self._pending.device_ms + (time.perf_counter() - begin) * 1e3,
        )

    def _settle_late(
        self, late: LateSpeculation, sampled: SamplerOutput, output: LateOutput
    ) -> tuple[SamplerOutput, bytes, Drafts]:
        """Fills in the tokens where the device has settled the step, and made the next drafts."""
        step = self._step
        sampled, num_accepted = settle_late(self._states, step.rows, step.epochs, output.accepted, sampled)
        if step.num_tokens == len(step.rows):
            late.note_step(step.num_tokens, output, self._pending.device_ms)
        return sampled, num_accepted, late.note(step.rows, step.epochs, output)


class ModelRunner:
    """Executes plans with a loaded model."""

    forward: Forward
    """Exists once ``initialize`` was called."""

    def __init__(
        self,
        loaded: LoadedModel,
        device: Device,
        groups: tuple[AttentionGroup, ...],
        *,
        step_size: StepSize,
        enforce_eager: bool,
        speculative: SpeculativeConfig | None = None,
        draft: DraftModel | None = None,
        forced_outputs: str = "",
        rank: int = 0,
        communicator: ops.Communicator | None = None,
        kv_memory: KVMemory | None = None,
        stage: Stage | None = None,
    ) -> None:
        self.rank = rank
        self.stage = stage or Stage(ParallelState(), Spec("tokens", 0, loaded.dtype))
        self.communicator = communicator
        self.kv_memory = kv_memory
        self.model = loaded.model
        self.vocab_size = loaded.hf_config.vocab_size
        self.weight_bytes = loaded.weight_bytes
        self.max_model_len = loaded.max_model_len
        self.pooling_head = loaded.pooling_head
        self.dense, self.token_dense = loaded.dense, loaded.token_dense
        self.device = device
        self.groups = groups
        self.step_size = step_size
        self.max_tokens = step_size.max_num_batched_tokens or device.max_num_batched_tokens
        """The most tokens of a step."""
        self.block_sizes = [group.block_size for group in groups if group.is_cached]
        self.needs_whole_prompts = any(not group.is_cached for group in groups)
        """Whether a step computes whole prompts, as there is no cache of earlier tokens."""
        if self.needs_whole_prompts:
            self.max_tokens = max(self.max_tokens, self.max_model_len)
        self.enforce_eager = enforce_eager
        self.program: Program | None = None
        self.channel = self.stage.channel(device.steps())
        self.states = RequestStates(0, 0, [])
        self._rows = RowsOfPlans(computes_whole=bool(groups) and not self.block_sizes)
        self.sampler = Sampler(0)
        self.pooler = Pooler(0)
        self.speculative = speculative
        self.draft = draft
        self.forced_outputs = forced_outputs
        self.speculation = Speculation(None, 0)
        self._step_times: dict[int, float] = {}
        """What steps take, in milliseconds by number of tokens."""
        self.late: LateSpeculation | None = None
        """In its place, where the device makes drafts by itself."""
        self.images: ImageInputs | None = None
        """Images of requests, of a model that takes them."""

    def initialize(self, init: InitKVCache) -> None:
        """Allocates the KV cache, tables and slot arrays, then captures the program of a step."""
        max_num_seqs = self.step_size.max_num_seqs
        num_groups = len(self.block_sizes)
        self._allocate_kv(init.num_blocks[:num_groups], self.kv_memory)
        self.model.reserve_positions(init.max_model_len)
        block_sizes = self.block_sizes
        if self.draft is not None:
            block_sizes = [*block_sizes, *(group.block_size for group in self.draft.groups)]
            self.draft.allocate(init.num_blocks[num_groups:], init.max_model_len, self.kv_memory)
        has_states = any(group.shape.kind in RECURRENT_KINDS for group in self.groups)
        self.states = RequestStates(max_num_seqs, init.max_model_len, block_sizes, has_states=has_states)
        sampler = create_sampler(
            max_num_seqs,
            self.device.torch_device.type,
            self.channel,
            forced_outputs=self.forced_outputs,
            communicator=self.communicator,
        )
        self.sampler = self.stage.sampler(sampler)
        self.pooler = Pooler(max_num_seqs, self.pooling_head, self.dense, self.token_dense)
        if self.late_slots is None:
            context = ProposerContext(ops.op_set("cpu").name, self.states, self.draft)
            self.speculation = Speculation(self.speculative, max_num_seqs, context, self._step_times)
        else:
            self.late = self._late_speculation(self.late_slots)
        if not self.enforce_eager:
            self.program = self.capture()
        self.forward = self._new_forward()
        self.forward.attach(self.sampler)

    @cached_property
    def late_slots(self) -> LateSlots | None:
        """What the device keeps of slots, if it makes drafts by itself: with a second model or a head, and graphs, but
        not where the host replaces tokens or drafts."""
        config, draft, graphs = self.speculative, self.draft, self.channel.graphs
        if config is None or draft is None or graphs is None or self.enforce_eager or self.images is not None:
            return None
        if config.script or self.forced_outputs or not draft.runs_late:
            return None
        if any(group.backend.needs_rows or not group.is_cached for group in self.groups):
            return None
        max_num_seqs, new = self.step_size.max_num_seqs, graphs.block(64).device.new_zeros
        shape = (max_num_seqs, 2 + config.num_speculative_tokens)
        return LateSlots(new(max_num_seqs, dtype=torch.int32), new(shape, dtype=torch.int32))

    def _late_speculation(self, slots: LateSlots) -> LateSpeculation:
        from executor.late_drafts import LateDrafter, LateSpeculation  # and with it triton

        assert self.draft is not None and self.speculative is not None
        drafter = LateDrafter(self.speculative, slots, self.draft, self.draft.setup(self.channel), self.states)
        share = self.draft.loaded.weight_bytes / max(1, self.weight_bytes)
        return LateSpeculation(self.speculative, drafter, self.states, share)

    def step_memory(self) -> tuple[int, int]:
        """Memory needed in addition to weights and KV cache. Called before the KV cache exists.

        Returns:
            Bytes of the largest step, and bytes per token of the longest sequence.
        """
        self._allocate_kv([1] * len(self.block_sizes))  # a step needs its address; the real cache is captured later
        max_num_seqs = self.step_size.max_num_seqs
        if self.enforce_eager:
            values = self._dry_run()
        else:
            if self._steps_are_timed:
                self.model.reserve_positions(TIMED_TOKENS)  # the program knows where their tables are, too
            self.program = self.capture()
            values = self.program.num_bytes
        sampling = Sampler(max_num_seqs, self.device.torch_device.type, channel=self.channel)
        setup = self._setup()
        fixed, per_position = forward_class(setup).memory(setup)
        if self.images is not None:  # a step with images is computed outside of the program's memory
            values = 2 * values + self.images.num_bytes()
        step_bytes = values + fixed
        if self.stage.is_last:
            step_bytes += sampling.step_bytes(self.max_samples, self.vocab_size)
        per_position += self.model.position_bytes()
        if self.draft is not None:
            of_draft = self.draft.memory()
            step_bytes, per_position = step_bytes + of_draft[0], per_position + of_draft[1]
        return step_bytes, per_position

    @property
    def _steps_are_timed(self) -> bool:
        """Whether ``time_steps`` does anything."""
        if self.speculative is None or not self.speculative.is_adaptive or self.channel.fileno() is not None:
            return False
        return not self.enforce_eager and not any(group.shape.kind in RECURRENT_KINDS for group in self.groups)

    def time_steps(self) -> None:
        """Times some steps that verify drafts of a request, where such times matter. Called after ``step_memory``."""
        if not self._steps_are_timed:
            return
        self.states = RequestStates(1, TIMED_TOKENS, self.block_sizes)
        self.states.num_known[:] = self.states.num_attended[:] = TIMED_TOKENS
        self.states.token_ids[0, :TIMED_TOKENS] = np.linspace(0, self.vocab_size - 1, TIMED_TOKENS)
        forward, slot = self._new_forward(), np.zeros(1, np.int32)

        def run(count: int) -> None:
            forward.run(forward.prepare(slot, np.full(1, count, np.int32), np.full(1, count, np.uint8)))

        self._step_times = time_steps(run, min(self.max_samples, TIMED_TOKENS))

    def _dry_run(self) -> int:
        """Runs the model eagerly on the largest step: prompts as long as possible, all in the same block.

        Nothing is downloaded, so the channel keeps the inputs until the results of the first real step are collected.

        Returns:
            The most bytes that the step's tensors took at the same time.
        """
        longest = min(self.max_tokens, self.max_model_len)
        num_rows = min(self.step_size.max_num_seqs, -(-self.max_tokens // longest))
        slots, counts = np.arange(num_rows, dtype=np.int32), np.full(num_rows, longest, np.int32)
        counts[-1] = min(longest, self.max_tokens - longest * (num_rows - 1))
        self.model.reserve_positions(longest)
        self.states = RequestStates(num_rows, longest, self.block_sizes)
        self.states.num_known[:] = self.states.num_attended[:] = counts
        forward = self._new_forward()
        memory = PeakMemory()
        with memory:
            batch = forward.prepare(slots, counts, np.ones(num_rows, np.uint8))
            batch.hidden = self.stage.zeros(int(counts.sum()))
            rows = np.arange(min(self.max_samples, int(counts.sum())))
            forward.run(replace(batch, logits_rows=self.channel.upload({"logits_rows": rows})["logits_rows"]))
        return memory.peak_bytes

    @property
    def max_samples(self) -> int:
        """Most tokens that a step samples."""
        most = self.step_size.max_num_seqs
        return min(self.max_tokens, most if self.speculative is None else self.speculative.max_samples(most))

    def _setup(self) -> ForwardSetup:
        return ForwardSetup(
            self.model,
            self.program,
            self.channel,
            self.groups,
            max_num_seqs=self.step_size.max_num_seqs,
            max_tokens=self.max_tokens,
            max_samples=self.max_samples,
            hidden=self.stage.memory,
            samples=self.stage.is_last,
            late=self.late_slots,
        )

    def _new_forward(self) -> Forward:
        setup = self._setup()
        return forward_class(setup)(setup, self.states)

    def _allocate_kv(self, num_blocks: Sequence[int], memory: KVMemory | None = None) -> None:
        layers = self.model.attention_layers()
        cached = [group for group in self.groups if group.is_cached]
        for group, count in zip(cached, num_blocks, strict=True):
            allocate_group(group, count, layers, self.device, memory)
        for group in self.groups[len(cached) :]:  # layers compute one after the other, so they share the memory
            count = -(-self.max_tokens // group.block_size) + min(self.step_size.max_num_seqs, self.max_tokens)
            shapes = group.backend.kv_shape(count, group.block_size, group.shape, group.kv_dtype)
            shared = tuple(self.device.allocate_kv(shape, group.kv_dtype) for shape in shapes)
            for index in group.layers:
                layers[index].kv_cache = shared

    def cached_tensors(self) -> list[list[torch.Tensor]]:
        """The tensors of each KV cache group, those of a draft model last; the first dimension is the block."""
        models = [(self.model, self.groups)]
        if self.draft is not None:
            models.append((self.draft.loaded.model, self.draft.groups))
        return [
            [cache for index in group.layers for cache in model.attention_layers()[index].kv_cache]
            for model, groups in models
            for group in groups
            if group.is_cached
        ]

    def capture(self) -> Program:
        """Runs the model once with symbolic values; see ``executor/graphs.py``."""
        device_type = self.device.torch_device.type
        program = Program(device_type, max_tokens=self.max_tokens, max_samples=self.max_samples)
        has_types = self.model.num_token_types > 0
        batch = InputBatch.symbolic(program, len(self.groups), has_token_types=has_types, hidden=self.stage.hidden)
        program.finish(*run_model(self.model, batch))
        if self.communicator is not None:
            self.communicator.agree(program.meetings(), "what they exchange in a step")
        return program

    def execute(self, plan: SchedulerOutput, mask: GrammarMask | None = None) -> ModelRunnerOutput:
        """Computes a step: applies the plan, runs the model, samples or pools."""
        return self.finish(self.begin(plan), mask).collect()

    def begin(self, plan: SchedulerOutput) -> StartedStep:
        """Applies a plan and launches the model. Call ``finish`` before the next plan."""
        begin = time.perf_counter()
        states = self.states
        if plan.finished_slots:
            self.speculation.remove(i32(plan.finished_slots), states)
            self.pooler.remove(i32(plan.finished_slots))
        states.apply(plan)
        if self.kv_memory is not None:
            self.kv_memory.follow(plan)
        self.forward.apply(plan)
        if self.images is not None:
            self.images.apply(plan, states)
        for request in plan.new_reqs:
            if request.params is not None:
                self.sampler.add(request.slot, request.params)
            self.pooler.add(request.slot, request.pooling_params if self.stage.is_last else None)
            self.speculation.add(request)
            if self.late is not None:
                self.late.add(request)
        rows = self._rows.of(plan, states)
        slots, counts = rows.slots, rows.counts
        sampled = rows.samples()
        drafts = drafts_of(sampled, states) if rows.has_drafts else None
        batch = self.forward.prepare(slots, counts, rows.num_sampled, follows=rows.follows)
        batch.hidden = self.stage.begin(plan.step_id, rows.num_tokens)
        hidden, logits, *aux = self._run(batch, slots, counts)
        self.stage.pass_on(hidden)
        if logits.dtype != torch.float32 and self.stage.is_last:
            logits = logits.float()  # of models that do not generate, they are no logits, and none
        prompt_logprobs = self.prompt_logprobs(hidden, batch, slots, counts)
        pooled = self.pooler.pool(hidden, slots, counts, states)
        computed = ComputedRows(slots, counts, rows.computed, self._kept(hidden, *aux))
        rows.advance(states)
        if self.late is not None and len(sampled):
            sampled.device_positions = batch.positions[batch.logits_rows[: len(sampled)]] + 1
        return StartedStep(
            plan=plan,
            rows=sampled,
            epochs=rows.epochs,
            batch=batch,
            computed=computed,
            drafts=drafts,
            logits=logits,
            prompt_logprobs=prompt_logprobs,
            pooled=pooled,
            launch_ms=(time.perf_counter() - begin) * 1e3,
            num_tokens=rows.num_tokens,
        )

    def _run(self, batch: InputBatch, slots: I32, counts: I32) -> Sequence[torch.Tensor]:
        """See ``Forward.run``. A step with tokens of images goes on from embeddings, so it calls ops one by one: the
        bits are the same."""
        if self.images is None:
            return self.forward.run(batch)
        return self.images.run(self.forward, self.model.embed, batch, slots, counts)

    def _kept(self, *hidden: torch.Tensor) -> Sequence[torch.Tensor]:
        """Hidden states as a draft head needs them, once a step's tokens are known: where these are, the next step may
        be under way by then."""
        is_read = self.draft is not None and self.draft.has_head
        if not is_read or self.late is not None or self.channel.fileno() is None:
            return hidden
        return [each.clone() for each in hidden]

    def must_wait_for_drafts(self, plan: SchedulerOutput) -> bool:
        """Whether ``begin`` must wait until earlier outputs are collected, since it may verify drafts, or an earlier
        step does for its rows. Of a pipeline stage, those of the same rows: others are on their way between stages. A
        stage waits for them even if the plan allows none: it would drop the drafts that follow them, and other stages
        would not."""
        if self.late is not None:
            return self._depends_on_host(plan)
        if not plan.num_draft_tokens:
            return self.speculation.max_drafts > 0 and self.stage.lacks_tokens(plan, self.states)
        slots = i32(plan.slots)
        if not (plan.forced_drafts or self.speculation.is_expected(slots) or self.states.num_verifying[slots].any()):
            return False
        return self.stage.is_last or self.stage.lacks_tokens(plan, self.states)

    def _depends_on_host(self, plan: SchedulerOutput) -> bool:
        """Whether the host must know the tokens of rows with drafts, or with such rows in flight, to sample them."""
        slots = i32(plan.slots)
        if not (plan.num_draft_tokens or self.states.num_verifying[slots].any()):
            return False
        return bool(plan.forced_drafts or plan.grammar_slots) or self.sampler.depends_on_tokens(slots)

    def lacks_input(self, plan: SchedulerOutput) -> bool:
        """Whether ``begin`` must wait for another pipeline stage."""
        return self.stage.lacks_input(plan, self.states)

    def lacks_tokens(self, step: StartedStep) -> bool:
        """Whether ``finish`` must wait until earlier outputs are collected, because sampling reads their tokens."""
        return self.sampler.lacks_tokens(step.rows, self.states)

    def finish(self, step: StartedStep, mask: GrammarMask | None = None) -> PendingOutput:
        """Launches sampling. Not allowed while the step ``lacks_tokens``.

        Args:
            step: The result of ``begin``.
            mask: The step's grammar mask, if it has constrained rows.
        """
        begin = time.perf_counter()
        token_mask = None if mask is None else _token_mask(step, mask)
        sampled = self.sampler.sample(step.logits, step.rows, self.states, token_mask)
        sampled = self.stage.announce(sampled, step.rows)
        if self.stage.is_last:
            self.forward.store(step.rows, sampled.token_ids)
        parts: list[Deferred[Any]] = [sampled.output, step.prompt_logprobs, step.pooled]
        if self.late is not None:
            parts.append(self.late.launch(self._model_step(step), sampled))
        results = Together(parts)
        pending = self.channel.download(results.tensors)
        step.launch_ms += (time.perf_counter() - begin) * 1e3
        return PendingOutput(step, self.states, self.speculation, results, pending, self.rank, self.late)

    def _model_step(self, step: StartedStep) -> ModelStep:
        computed = step.computed
        ends = computed.begins + computed.counts
        return ModelStep(step.batch, computed.slots, computed.counts, ends, step.rows, computed.hidden_states)

    def prompt_logprobs(
        self, hidden: torch.Tensor, batch: InputBatch, slots: I32, counts: I32
    ) -> Deferred[Sequence[TokenLogprobs]]:
        """Log probabilities of the prompt tokens that follow this step's positions, for requests that report them."""
        states = self.states
        if not states.num_reporting or not self.stage.is_last:
            return NO_LOGPROBS
        wanted = np.flatnonzero(states.reports_prompt[slots]).tolist()
        starts = np.cumsum(counts) - counts
        parts: list[Deferred[list[TokenLogprobs]]] = []
        for row in wanted:
            slot, start = int(slots[row]), int(starts[row])
            params = states.params[slot]
            assert params is not None and params.prompt_logprobs is not None
            first = int(states.num_computed[slot])
            last = min(first + int(counts[row]), int(states.num_prompt[slot]) - 1)
            for begin in range(first, last, PROMPT_LOGITS_CHUNK):
                end = min(begin + PROMPT_LOGITS_CHUNK, last)
                rows = np.arange(start + begin - first, start + end - first)
                adapters = np.full(len(rows), states.adapters[slot], np.int32)
                views = self.channel.upload({"logits_rows": rows, **adapter_columns("sample_adapters", adapters)})
                chunk = replace(
                    batch,
                    logits_rows=views["logits_rows"],
                    sample_adapters=adapter_rows("sample_adapters", views),
                )
                logits = self.model.compute_logits(ops.gather_rows(hidden, chunk.logits_rows), chunk)
                tokens = states.token_ids[slot, begin + 1 : end + 1]
                parts.append(self.sampler.prompt_logprobs(logits, tokens, params.prompt_logprobs, row, begin + 1))
        together = Together(parts)
        return Deferred(together.tensors, lambda arrays: [entry for part in together.make(arrays) for entry in part])


def _token_mask(step: StartedStep, mask: GrammarMask) -> TokenMask:
    """A step's grammar mask, mapped to the rows of its logits."""
    constrained, rows = i32(step.plan.grammar_slots), step.rows
    counts = u8(mask.num_positions) if mask.num_positions else np.ones(len(constrained), np.uint8)
    size = int(max(rows.slots.max(), constrained.max())) + 1
    firsts, num_masks = np.zeros(size, np.int32), np.zeros(size, np.int32)
    num_masks[constrained] = counts
    firsts[constrained] = np.cumsum(counts, dtype=np.int32) - counts
    offsets: I32 | int = 0 if rows.offsets is None else rows.offsets.astype(np.int32)
    places = np.where(offsets < num_masks[rows.slots], firsts[rows.slots] + offsets, np.int32(-1))
    return TokenMask(bitmask=i32(mask.bitmask).reshape(int(counts.sum()), -1), rows=places.astype(np.int32))
