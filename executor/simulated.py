"""A device that is modelled instead of computed.

It lets the real scheduler, engine core, sockets and API process run at the pace of a large accelerator on any machine,
so that their own cost can be measured. Tokens are a function of the request's seed and the position, so restarts and
preemptions change nothing, as with a real device.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from zlib import crc32

import numpy as np
import numpy.typing as npt
from numpy.random import default_rng

from executor.config import ExecutorConfig, SimulatedDevice
from executor.liveness import ProcessSample
from executor.messages import (
    I32,
    AdapterLoaded,
    FreeKVCache,
    FromWorker,
    GrammarMask,
    InitKVCache,
    KVCacheFreed,
    KVCacheGroupSpec,
    KVCacheReady,
    LoadAdapter,
    ModelRunnerOutput,
    ResolvedPoolingParams,
    SchedulerOutput,
    Tensor,
    ToWorker,
    WorkerReady,
    i32,
    to_tensor,
    u8,
)
from executor.pooling import finish

FIRST_TOKEN_ID = 256
"""Lower ids are never sampled: in many vocabularies they are special."""


class DeviceModel:
    """Computes a step's duration and tokens. State is arrays by slot, as in a real worker."""

    def __init__(self, device: SimulatedDevice) -> None:
        self.device = device
        self._num_computed = np.zeros(64, np.int64)
        self._seeds = np.zeros(64, np.uint64)
        self._pooled: dict[int, tuple[ResolvedPoolingParams, bytes]] = {}
        """Pooling parameters and prompt, by slot."""

    def _make_room(self, slot: int) -> None:
        missing = max(slot + 1, 2 * len(self._seeds)) - len(self._seeds)
        self._num_computed = np.append(self._num_computed, np.zeros(missing, np.int64))
        self._seeds = np.append(self._seeds, np.zeros(missing, np.uint64))

    def execute(self, plan: SchedulerOutput) -> tuple[I32, float]:
        """Applies a plan.

        Returns:
            The sampled tokens, before any mask, and the seconds that its steps take.
        """
        for slot in i32(plan.finished_slots).tolist() if self._pooled else ():
            self._pooled.pop(slot, None)
        for request in plan.new_reqs:
            if request.pooling_params is not None:
                self._pooled[request.slot] = request.pooling_params, request.token_ids
            if request.slot >= len(self._num_computed):
                self._make_room(request.slot)
            self._num_computed[request.slot] = request.num_computed_tokens
            self._seeds[request.slot] = request.params.seed if request.params else 0
        slots = i32(plan.slots)
        counts = i32(plan.num_scheduled_tokens)
        if plan.num_draft_tokens:
            counts = counts - u8(plan.num_draft_tokens)  # this device has no drafts
        lengths = self._num_computed[slots][:, None] + counts[:, None] * np.arange(1, plan.num_steps + 1)
        self._num_computed[slots] = lengths[:, -1]
        sampled = u8(plan.num_sampled).astype(bool)
        tokens = self.tokens(slots[sampled].repeat(plan.num_steps), lengths[sampled].ravel())
        device = self.device
        micros = device.step_us + device.token_us * int(counts.sum())
        return tokens, (micros * plan.num_steps + device.context_us * int(lengths.sum())) * 1e-6

    def tokens(self, slots: I32, lengths: npt.NDArray[np.int64]) -> I32:
        """The tokens sampled, before any mask, when this many tokens of each slot are computed: int32 [slots]."""
        mixed = self._seeds[slots] * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= lengths.astype(np.uint64) * np.uint64(0xC2B2AE3D27D4EB4F)
        mixed ^= mixed >> np.uint64(29)
        span = np.uint64(max(1, self.device.vocab_size - FIRST_TOKEN_ID))
        tokens: I32 = (mixed % span).astype(np.int32) + np.int32(min(FIRST_TOKEN_ID, self.device.vocab_size - 1))
        if self.device.eos_token_id >= 0:
            tokens[tokens == self.device.eos_token_id] += 1
        return tokens

    def result(self, plan: SchedulerOutput, tokens: I32, mask: GrammarMask | None, seconds: float) -> ModelRunnerOutput:
        """The answer to an executed plan."""
        if mask is not None:
            tokens = self.constrain(plan, tokens, mask)
        return ModelRunnerOutput(
            step_id=plan.step_id,
            sampled_token_ids=tokens.tobytes(),
            pooler_output=tuple(self.pool(plan)),
            forward_ms=seconds * 1e3,
        )

    def constrain(self, plan: SchedulerOutput, tokens: I32, mask: GrammarMask) -> I32:
        """Sampled tokens of constrained rows: an allowed token, chosen by the token that it replaces."""
        constrained = i32(plan.grammar_slots).tolist()
        counts = u8(mask.num_positions) if mask.num_positions else np.ones(len(constrained), np.uint8)
        firsts = np.cumsum(counts, dtype=np.int64) - counts  # the others follow drafts, which this device has not
        rows = i32(mask.bitmask).reshape(int(counts.sum()), -1)[firsts]
        places = {slot: place for place, slot in enumerate(i32(plan.slots)[u8(plan.num_sampled) > 0].tolist())}
        tokens = tokens.copy()
        for slot, row in zip(constrained, rows, strict=True):
            tokens[places[slot]] = self.choose(int(tokens[places[slot]]), row)
        return tokens

    def choose(self, token: int, row: I32) -> int:
        """A token allowed by a row of a mask, chosen by the token that it replaces."""
        allowed = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little", count=self.device.vocab_size))
        return int(allowed[token * 2654435761 % (1 << 32) % len(allowed)]) if len(allowed) else token

    def pool(self, plan: SchedulerOutput) -> list[tuple[int, Tensor]]:
        """Rows and vectors of the prompts that end in an executed step: a function of their tokens."""
        vectors: list[tuple[int, Tensor]] = []
        for row, slot in enumerate(i32(plan.slots).tolist() if self._pooled else ()):
            params, token_ids = self._pooled.get(slot, (None, b""))
            if params is None or self._num_computed[slot] < len(i32(token_ids)):
                continue
            size = self.device.hidden_size
            shape = (len(i32(token_ids)), size) if params.pooling_type == "ALL" else (size,)
            states = default_rng(crc32(token_ids)).standard_normal(shape, np.float32)
            vectors.append((row, to_tensor(finish(states, params))))
        return vectors

    def ready(self) -> WorkerReady:
        """What a worker with this device would report at startup."""
        device = self.device
        group = KVCacheGroupSpec(kind="full", block_size=device.block_size, bytes_per_block=1, layers=(0,))
        return WorkerReady(
            rank=0,
            free_bytes=device.num_blocks,
            total_bytes=device.num_blocks,
            weight_bytes=0,
            default_kv_bytes=device.num_blocks,
            kv_cache_groups=(group,),
            max_model_len=device.max_model_len,
            vocab_size=device.vocab_size,
            device="simulated",
            hidden_size=device.hidden_size,
            has_late_results=True,
        )


class SimulatedExecutor:
    """A thread that sleeps for the time of each step. See ``executor/base.py``."""

    num_ranks = 1
    new_model: Callable[[SimulatedDevice], DeviceModel] = DeviceModel

    def __init__(self, config: ExecutorConfig, ipc_dir: str, log_level: str = "info") -> None:
        self._device = config.simulated_device
        self._plans: queue.SimpleQueue[SchedulerOutput | None] = queue.SimpleQueue()
        self._masks: queue.SimpleQueue[GrammarMask | None] = queue.SimpleQueue()
        self._results: deque[FromWorker] = deque()
        self._event = os.eventfd(0, os.EFD_NONBLOCK)
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        model = self.new_model(self._device)
        self._plans, self._masks = queue.SimpleQueue(), queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(model,), name="simulated device", daemon=True)
        self._thread.start()
        self._answer(model.ready())

    def submit(self, message: ToWorker) -> None:
        if isinstance(message, SchedulerOutput):
            self._plans.put(message)
        elif isinstance(message, GrammarMask):
            self._masks.put(message)
        elif isinstance(message, InitKVCache):
            self._answer(KVCacheReady(rank=0))
        elif isinstance(message, FreeKVCache):
            self._answer(KVCacheFreed(rank=0))
        elif isinstance(message, LoadAdapter):
            self._answer(AdapterLoaded(0, message.number, message.adapter.content_hash))

    def _run(self, model: DeviceModel) -> None:
        free_at = 0.0
        while (plan := self._plans.get()) is not None:
            tokens, seconds = model.execute(plan)
            free_at = max(free_at, time.monotonic()) + seconds
            delay = free_at - time.monotonic()
            if delay > 0:
                time.sleep(delay)
            mask = None
            if plan.grammar_slots:
                mask = self._masks.get()
                if mask is None:
                    return
            self._answer(model.result(plan, tokens, mask, seconds))

    def _answer(self, message: FromWorker) -> None:
        self._results.append(message)
        os.eventfd_write(self._event, 1)

    def receive(self) -> list[FromWorker]:
        try:
            os.eventfd_read(self._event)
        except BlockingIOError:
            return []
        messages = []
        while self._results:
            messages.append(self._results.popleft())
        return messages

    def poll_fds(self) -> list[int]:
        return [self._event]

    def worker_pids(self) -> tuple[int, ...]:
        return ()

    def remote_samplers(self) -> Mapping[int, Callable[[], ProcessSample | None]]:
        return {}

    def shutdown(self) -> None:
        if self._thread is not None:
            self._plans.put(None)
            self._masks.put(None)
            self._thread.join()
            self._thread = None

    def kill(self) -> None:
        self.shutdown()

    def forget_memory(self) -> None:
        pass
