"""An engine core with workers that do as they are told."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import msgspec
import numpy as np

from engine_core.cache_shape import GroupShape
from engine_core.config import (
    CacheConfig,
    EngineConfig,
    ExecutorConfig,
    LoRAConfig,
    ModelConfig,
    SchedulerConfig,
    SpeculativeConfig,
)
from engine_core.core import EngineCore
from engine_core.messages import (
    POOLING_TYPES,
    EngineCoreOutputs,
    EngineCoreRequest,
    FromEngineCore,
    ResolvedParams,
    SchedulerStats,
    ToEngineCore,
    i32,
    i64,
    u8,
)
from executor.base import WorkerDiedError
from executor.liveness import ProcessSample
from executor.messages import (
    AdapterLoaded,
    FreeKVCache,
    FromWorker,
    Heartbeat,
    InitKVCache,
    KVCacheFreed,
    KVCacheGroupSpec,
    KVCacheReady,
    KVTransfer,
    LoadAdapter,
    LoadProgress,
    ModelRunnerOutput,
    SchedulerOutput,
    ToWorker,
    UnloadAdapter,
    WorkerReady,
)
from tests.fake_device import FakeDevice, next_token

VOCAB = 50
STOP = 7
MAX_LEN = 64
NUM_BLOCKS = 64
BLOCK_SIZE = 4
HIDDEN_SIZE = 16

PROMPT = [8, 9, 10, 11, 12]
"""Its output does not end by itself."""


class NothingComesError(Exception):
    """The core waits, and nothing will ever come."""


class FakeExecutor:
    """Workers with a script: what ``inbox`` holds is received first, one entry at a time; plans are then computed."""

    def __init__(self, num_ranks: int = 1) -> None:
        """Starts nothing. The last rank is the output rank; the others answer when nothing else is to be done."""
        self.num_ranks = num_ranks
        self.others_answer = True
        self.beats: deque[Heartbeat | WorkerDiedError] = deque()
        """Answers of the other ranks that did not come yet."""
        self.others_die_of: Callable[[SchedulerOutput], bool] = lambda plan: False
        self.inbox: deque[list[FromWorker] | WorkerDiedError] = deque()
        self.plans: deque[SchedulerOutput] = deque()
        self.lives = 0
        self.is_up = False
        self.loads_by_itself = True
        """Answer the messages of a start; else a test does."""
        self.computes = True
        self.hung_up = False
        """``submit`` finds nobody."""
        self.dies_of: Callable[[SchedulerOutput], bool] = lambda plan: False
        self.kept_bytes = 0
        """Size of a KV cache that outlives the workers; 0: it does not."""
        self.kept_groups: Any = None
        self.fingerprint = ""
        self.transfers: deque[KVTransfer] = deque()
        """Transfers that a test must answer."""
        self.groups = GROUPS
        """What the model needs of the KV cache."""
        self.propose: Callable[[list[int]], list[int]] = lambda tokens: []
        """Drafts of the tokens that follow others."""
        self.adapters: dict[int, str] = {}
        """Hashes of the adapters in memory, by number."""
        self.loads: list[str] = []
        """Names of the adapters that were loaded or tried."""
        self.told: list[list[int]] = []
        """Tokens of the requests that came into slots."""

    def start(self) -> None:
        assert not self.is_up
        self.lives += 1
        self.is_up = True
        self.hung_up = False
        self.adapters = {}
        if self.loads_by_itself:
            for rank in range(self.num_ranks):
                ready = worker_ready(rank=rank, groups=self.groups, fingerprint=self.fingerprint)
                self.inbox.append([LoadProgress(rank, "weights", 1, 1), ready])

    def submit(self, message: ToWorker) -> None:
        assert self.is_up
        if self.hung_up:
            raise WorkerDiedError("worker 0 closed its connection")
        if isinstance(message, SchedulerOutput):
            assert all(not new.lora_id or new.lora_id in self.adapters for new in message.new_reqs)
            self.plans.append(message)
        elif isinstance(message, LoadAdapter):
            self._load(message)
        elif isinstance(message, UnloadAdapter):
            del self.adapters[message.number]
        elif isinstance(message, InitKVCache):
            shapes = zip(message.num_blocks, self.groups, strict=True)
            groups = [GroupShape(count, group.block_size, group.sliding_window) for count, group in shapes]
            self.device = FakeDevice(groups, VOCAB, STOP, self.propose)
            if self.kept_bytes and self.kept_groups is not None:
                self.device.groups = self.kept_groups
            self.kept_groups = self.device.groups
            if self.loads_by_itself:
                self.inbox += [[KVCacheReady(rank, self.kept_bytes)] for rank in range(self.num_ranks)]
        elif isinstance(message, FreeKVCache):
            for group in self.device.groups:
                group.blocks[:] = 0
            self.inbox += [[KVCacheFreed(rank)] for rank in range(self.num_ranks)]
        elif isinstance(message, KVTransfer):
            self.transfers.append(message)

    def _load(self, message: LoadAdapter) -> None:
        """An adapter whose path says so cannot be loaded."""
        adapter = message.adapter
        self.loads.append(adapter.name)
        error = adapter.path if adapter.path.startswith("error") else ""
        self.adapters.pop(message.number, None)
        if message.number and not error:
            self.adapters[message.number] = adapter.content_hash
        for rank in range(self.num_ranks):
            self.inbox.append([AdapterLoaded(rank, message.number, adapter.content_hash, error)])

    @property
    def has_news(self) -> bool:
        return bool(self.inbox) or bool(self.plans and self.computes) or bool(self.beats and self.others_answer)

    def receive(self) -> list[FromWorker]:
        if not self.is_up:
            return []
        if self.inbox:
            news = self.inbox.popleft()
            if isinstance(news, WorkerDiedError):
                raise news
            return news
        if not self.plans or not self.computes:
            return self._others() if self.beats and self.others_answer else []
        plan = self.plans.popleft()
        self.told += [i32(new.token_ids).tolist() for new in plan.new_reqs]
        if self.dies_of(plan):
            raise WorkerDiedError("worker 0 ended with exit code -9")
        for request in plan.new_reqs:
            if request.params is not None:
                take_over(request.params)
            else:
                assert request.pooling_params is not None
                assert request.pooling_params.pooling_type in POOLING_TYPES
                assert 1 <= (request.pooling_params.dimensions or 1) <= HIDDEN_SIZE
        output_rank = self.num_ranks - 1
        if self.others_die_of(plan):
            self.beats.append(WorkerDiedError("worker 0 ended with exit code -11"))
        else:
            self.beats += [Heartbeat(rank, plan.step_id) for rank in range(output_rank)]
        return [msgspec.structs.replace(self.device.execute(plan), rank=output_rank)]

    def _others(self) -> list[FromWorker]:
        beat = self.beats.popleft()
        if isinstance(beat, WorkerDiedError):
            raise beat
        return [beat]

    def compute_one(self) -> ModelRunnerOutput:
        return self.device.execute(self.plans.popleft())

    def poll_fds(self) -> list[Any]:
        return []

    def worker_pids(self) -> tuple[int, ...]:
        return (self.lives,) * self.num_ranks

    def remote_samplers(self) -> Mapping[int, Callable[[], ProcessSample | None]]:
        return {}

    def kill(self) -> None:
        self.shutdown()

    def forget_memory(self) -> None:
        self.kept_groups = None

    def shutdown(self) -> None:
        self.is_up = False
        self.transfers.clear()
        self.plans.clear()
        self.beats.clear()
        self.inbox.clear()


def take_over(params: ResolvedParams) -> None:
    """What every worker does with parameters: numbers must fit its tables, and lists must be what they say."""
    np.array([params.top_k, params.min_tokens, params.logprobs or 0, params.prompt_logprobs or 0], np.int32)
    np.array([params.seed], np.uint64)
    floats = [params.temperature, params.top_p, params.min_p, params.repetition_penalty]
    floats += [params.presence_penalty, params.frequency_penalty, *(bias for _, bias in params.logit_bias)]
    assert np.isfinite(np.array(floats, np.float64).astype(np.float32)).all()
    logits = np.zeros(VOCAB)
    for ids in (
        params.all_stop_token_ids,
        params.allowed_token_ids or (),
        params.logprob_token_ids,
        [token for token, _ in params.logit_bias],
        [word[-1] for word in params.bad_words_token_ids],
    ):
        logits[list(ids)] = 1
        assert all(token >= 0 for token in ids)


GROUPS = (KVCacheGroupSpec(kind="full", block_size=BLOCK_SIZE, bytes_per_block=1, layers=(0,)),)


def worker_ready(
    num_blocks: int = NUM_BLOCKS,
    rank: int = 0,
    groups: tuple[KVCacheGroupSpec, ...] = GROUPS,
    fingerprint: str = "",
) -> WorkerReady:
    return WorkerReady(
        rank=rank,
        free_bytes=num_blocks,
        total_bytes=num_blocks,
        weight_bytes=1000,
        default_kv_bytes=num_blocks,
        kv_cache_groups=groups,
        max_model_len=MAX_LEN,
        vocab_size=VOCAB,
        hidden_size=HIDDEN_SIZE,
        fingerprint=fingerprint,
    )


class Harness:
    """An engine core, its workers and its api, in one thread."""

    def __init__(self, **options: Any) -> None:
        executor = FakeExecutor(options.pop("num_ranks", 1))
        executor.groups = options.pop("groups", GROUPS)
        executor.propose = options.pop("propose", executor.propose)
        max_draft_tokens = options.pop("max_draft_tokens", 0)
        config = EngineConfig(
            scheduler=SchedulerConfig(
                max_num_seqs=options.pop("max_num_seqs", 4),
                max_num_batched_tokens=16,
                max_in_flight_steps=options.pop("depth", 2),
                num_scheduler_steps=options.pop("num_scheduler_steps", 1),
                scheduling_policy=options.pop("policy", "fcfs"),
            ),
            cache=CacheConfig(num_gpu_blocks_override=options.pop("num_blocks", None)),
            executor=ExecutorConfig(
                model=ModelConfig(max_model_len=options.pop("max_model_len", None)),
                speculative=SpeculativeConfig(method="scripted", num_speculative_tokens=max_draft_tokens)
                if max_draft_tokens
                else None,
                lora=options.pop("lora", LoRAConfig()),
                check_every_step=True,
            ),
            **options,
        )
        self.executor = executor
        self.inbox: list[ToEngineCore] = []
        self.sent: list[FromEngineCore] = []
        self.outputs: dict[int, list[int]] = {}
        self.reasons: dict[int, int] = {}
        self.errors: dict[int, str | None] = {}
        self.stats = SchedulerStats()
        self.api_is_gone = False
        self.core = EngineCore(config, self.executor, self, engine_epoch=1)
        self.core.probation = 0.0
        self.core._start_workers()

    # -- the transport

    def send(self, message: FromEngineCore) -> None:
        self.sent.append(msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=FromEngineCore))
        if not isinstance(message, EngineCoreOutputs):
            return
        self.stats = message.scheduler_stats or self.stats
        tokens = iter(i32(message.token_ids).tolist())
        indices, positions = i64(message.indices).tolist(), i32(message.output_indices).tolist()
        counts = u8(message.num_tokens).tolist() or [1] * len(indices)
        for index, position, count in zip(indices, positions, counts, strict=True):
            self._append(index, position, list(islice(tokens, count)))
        for output in message.outputs:
            self._append(output.index, output.first_output_index, list(output.new_token_ids))
            if output.finish_reason is not None:
                self.reasons[output.index] = output.finish_reason
                self.errors[output.index] = output.error

    def _append(self, index: int, position: int, tokens: list[int]) -> None:
        assert index not in self.reasons, "nothing comes after the end"
        known = self.outputs.setdefault(index, [-1] * position)  # what an earlier life gave
        assert position == len(known), "no gap and no overlap"
        known += tokens

    def wait(self, fds: Sequence[Any], timeout: float | None) -> list[ToEngineCore] | None:
        if self.api_is_gone:
            return None
        if timeout != 0 and not self.inbox and not self.executor.has_news:
            raise NothingComesError
        messages, self.inbox = self.inbox, []
        return messages

    # -- what tests do

    def add(self, index: int, prompt: list[int] = PROMPT, max_tokens: int = 12, **fields: Any) -> None:
        self.inbox.append(make_request(index, prompt, max_tokens, **fields))

    def turns(self, count: int) -> None:
        for _ in range(count):
            self.core.step()

    def run(self) -> None:
        """Until nothing more will happen."""
        try:
            for _ in range(10_000):
                if self.core.exit_code is not None:
                    return
                self.core.step()
        except NothingComesError:
            return
        raise AssertionError("the core is busy with nothing")

    def run_to_the_end(self) -> None:
        """Until everything is done, and nothing is left."""
        self.run()
        scheduler = self.core._scheduler
        assert self.core.exit_code is None and scheduler is not None
        assert not scheduler.has_unfinished and not self.core.in_flight, "requests were forgotten"
        scheduler.check_integrity()
        assert scheduler.kv.num_free == scheduler.kv.num_blocks

    def messages(self, kind: type) -> list[Any]:
        return [message for message in self.sent if isinstance(message, kind)]


def make_request(index: int, prompt: list[int] = PROMPT, max_tokens: int = 12, **fields: Any) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id=f"request-{index}",
        index=index,
        prompt_token_ids=np.array(prompt, np.int32).tobytes(),
        sampling_params=fields.pop("params", ResolvedParams(max_tokens=max_tokens, eos_token_ids=(STOP,))),
        **fields,
    )


def expected(prompt: list[int] = PROMPT, max_tokens: int = 12) -> list[int]:
    """What a request gives when nothing happens."""
    tokens = list(prompt)
    while len(tokens) < min(len(prompt) + max_tokens, MAX_LEN) and (len(tokens) == len(prompt) or tokens[-1] != STOP):
        tokens.append(next_token(tokens, VOCAB, STOP))
    return tokens[len(prompt) :]


def prompts(count: int) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(8, VOCAB, 5 + index % 9).tolist() for index in range(count)]
