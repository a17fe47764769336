"""One step of a model, common to all models and devices.

Constitution of this file: it stays small and stable. It knows slots, positions and blocks; it does not know model
classes, devices, quantisation or sampling methods, and grows no ``if`` for one of them. State lives in
``RequestStates``, in the sampler and in the pooler, by slot; nothing here survives a step. Nothing between receiving a
plan and launching the forward pass waits for the device.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

import ops
from executor.attention.base import AttentionBackend
from executor.device.base import Device
from executor.graphs import Program
from executor.input_batch import InputBatch
from executor.loader import LoadedModel
from executor.messages import (
    I32,
    GrammarMask,
    InitKVCache,
    KVCacheGroupSpec,
    ModelRunnerOutput,
    SchedulerOutput,
    TokenLogprobs,
    i32,
    u8,
)
from executor.pooling import Pooler, PoolerOutput
from executor.request_states import RequestStates
from executor.sampling.sampler import Sampler, TokenMask

PROMPT_LOGITS_CHUNK = 128
"""Rows whose logits are computed at a time for prompt log probabilities: logits are wide."""


@dataclass
class StartedStep:
    """A step before its tokens are sampled."""

    plan: SchedulerOutput
    slots: I32
    """int32 [samples]: slots that sample."""
    rows: I32
    """int32 [samples]: their rows in the plan."""
    logits: torch.Tensor
    """float32 [samples, vocab_size]."""
    prompt_logprobs: list[TokenLogprobs]
    pooled: PoolerOutput
    forward_ms: float


class ModelRunner:
    """Executes plans with a loaded model."""

    def __init__(
        self,
        loaded: LoadedModel,
        device: Device,
        backend: AttentionBackend,
        groups: tuple[KVCacheGroupSpec, ...],
        *,
        enforce_eager: bool,
        rank: int = 0,
    ) -> None:
        self.rank = rank
        self.model = loaded.model
        self.dtype = loaded.dtype
        self.device = device
        self.backend = backend
        self.groups = groups
        self.enforce_eager = enforce_eager
        self.program: Program | None = None
        self.states = RequestStates(0, 0, [])
        self.sampler = Sampler(0)
        self.pooler = Pooler(0)

    def initialize(self, init: InitKVCache) -> None:
        """Allocates the KV cache, tables and slot arrays, then captures the program of a step."""
        layers = self.model.attention_layers()
        for group, num_blocks in zip(self.groups, init.num_blocks, strict=True):
            for index in group.layers:
                shapes = self.backend.kv_shape(num_blocks, group.block_size, layers[index].shape)
                keys, values = (self.device.allocate_kv(shape, self.dtype) for shape in shapes)
                layers[index].kv_cache = (keys, values)
        self.model.reserve_positions(init.max_model_len)
        self.states = RequestStates(init.max_num_seqs, init.max_model_len, [group.block_size for group in self.groups])
        self.sampler = Sampler(init.max_num_seqs)
        self.pooler = Pooler(init.max_num_seqs)
        if not self.enforce_eager:
            self.program = self.capture(init)

    def capture(self, init: InitKVCache) -> Program:
        """Runs the model once with symbolic values; see ``executor/graphs.py``."""
        program = Program(
            self.device.torch_device.type, max_tokens=init.max_num_batched_tokens, max_samples=init.max_num_seqs
        )
        batch = InputBatch.symbolic(program, len(self.groups))
        hidden, logits = self._forward(batch)
        program.finish(hidden, logits)
        return program

    def _forward(self, batch: InputBatch) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.model.forward(batch).hidden
        return hidden, self.model.compute_logits(ops.gather_rows(hidden, batch.logits_rows))

    def execute(self, plan: SchedulerOutput, mask: GrammarMask | None = None) -> ModelRunnerOutput:
        """Computes a step: applies the plan, runs the model, samples or pools."""
        return self.finish(self.begin(plan), mask)

    def begin(self, plan: SchedulerOutput) -> StartedStep:
        """Applies a plan and runs the model. ``finish`` comes before the next plan."""
        begin = time.perf_counter()
        states = self.states
        states.apply(plan)
        self.pooler.remove(i32(plan.finished_slots))
        for request in plan.new_reqs:
            if request.params is not None:
                self.sampler.add(request.slot, request.params)
            self.pooler.add(request.slot, request.pooling_params)
        slots, counts = i32(plan.slots), i32(plan.num_scheduled_tokens)
        sampled = u8(plan.num_sampled).astype(np.bool_)
        batch = self.prepare(slots, counts, sampled)
        hidden, logits = self.program.replay(batch.step_inputs()) if self.program else self._forward(batch)
        prompt_logprobs = self.prompt_logprobs(hidden, slots, counts)
        pooled = self.pooler.pool(hidden, slots, counts, states)
        states.num_computed[slots] += counts
        return StartedStep(
            plan=plan,
            slots=slots[sampled],
            rows=np.flatnonzero(sampled).astype(np.int32),
            logits=logits,
            prompt_logprobs=prompt_logprobs,
            pooled=pooled,
            forward_ms=(time.perf_counter() - begin) * 1e3,
        )

    def finish(self, step: StartedStep, mask: GrammarMask | None = None) -> ModelRunnerOutput:
        """Samples.

        Args:
            step: What ``begin`` returned.
            mask: The step's, if it has constrained rows.
        """
        begin = time.perf_counter()
        token_mask = None if mask is None else _token_mask(step, mask)
        output = self.sampler.sample(step.logits, step.slots, step.rows, self.states, token_mask)
        self.states.append(step.slots, output.token_ids)
        return ModelRunnerOutput(
            step_id=step.plan.step_id,
            rank=self.rank,
            sampled_token_ids=output.token_ids.astype(np.int32).tobytes(),
            row_errors=(*output.row_errors, *step.pooled.row_errors),
            logprobs=tuple(output.logprobs),
            prompt_logprobs=tuple(step.prompt_logprobs),
            pooler_output=tuple(step.pooled.vectors),
            forward_ms=step.forward_ms + (time.perf_counter() - begin) * 1e3,
        )

    def prepare(self, slots: I32, counts: I32, sampled: npt.NDArray[np.bool_]) -> InputBatch:
        """The inputs of the forward pass for a plan's rows."""
        states = self.states
        ends = np.cumsum(counts)
        starts = ends - counts
        computed = states.num_computed[slots]
        num_tokens = int(ends[-1])
        token_rows = np.repeat(np.arange(len(slots)), counts)
        positions = np.arange(num_tokens) - np.repeat(starts - computed, counts)
        query_start_loc = torch.from_numpy(np.concatenate(([0], ends)).astype(np.int32))
        seq_lens = torch.from_numpy((computed + counts).astype(np.int32))
        attention = []
        for table, group in zip(states.block_tables, self.groups, strict=True):
            block_table = table[slots]  # [num_rows, max_blocks]
            blocks = block_table[token_rows, positions // group.block_size].astype(np.int64)
            slot_mapping = blocks * group.block_size + positions % group.block_size
            attention.append(
                self.backend.plan(
                    query_start_loc,
                    seq_lens,
                    torch.from_numpy(block_table),
                    torch.from_numpy(slot_mapping),
                    group.block_size,
                )
            )
        return InputBatch(
            input_ids=torch.from_numpy(states.token_ids[slots[token_rows], positions]),
            positions=torch.from_numpy(positions.astype(np.int32)),
            attention=attention,
            logits_rows=torch.from_numpy((ends - 1)[sampled].astype(np.int64)),
        )

    def prompt_logprobs(self, hidden: torch.Tensor, slots: I32, counts: I32) -> list[TokenLogprobs]:
        """Log probabilities of the prompt tokens that follow the positions of this step, where they are wanted."""
        states = self.states
        results: list[TokenLogprobs] = []
        start = 0
        for row, (slot, count) in enumerate(zip(slots.tolist(), counts.tolist(), strict=True)):
            params = states.params[slot]
            if params is not None and params.prompt_logprobs is not None:
                first = int(states.num_computed[slot])
                last = min(first + count, int(states.num_prompt[slot]) - 1)
                for begin in range(first, last, PROMPT_LOGITS_CHUNK):
                    end = min(begin + PROMPT_LOGITS_CHUNK, last)
                    rows = torch.arange(start + begin - first, start + end - first)
                    logits = self.model.compute_logits(ops.gather_rows(hidden, rows))
                    tokens = states.token_ids[slot, begin + 1 : end + 1]
                    results += self.sampler.prompt_logprobs(logits, tokens, params.prompt_logprobs, row, begin + 1)
            start += count
        return results


def _token_mask(step: StartedStep, mask: GrammarMask) -> TokenMask:
    """A step's mask by rows of its logits."""
    constrained = i32(step.plan.grammar_slots)
    places = np.full(int(max(step.slots.max(), constrained.max())) + 1, -1, np.int32)
    places[constrained] = np.arange(len(constrained), dtype=np.int32)
    return TokenMask(bitmask=i32(mask.bitmask).reshape(len(constrained), -1), rows=places[step.slots])
