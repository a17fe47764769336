"""The loop of the engine core with workers that do as they are told: it loses no request, whatever they do."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engine_core.__main__ import ZmqTransport
from engine_core.config import CacheConfig, EngineConfig, ExecutorConfig, ModelConfig, SchedulerConfig
from engine_core.core import MAX_CRASHES, EngineCore
from engine_core.messages import (
    POOLING_TYPES,
    AbortRequests,
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineDead,
    EngineReady,
    FinishReason,
    FromEngineCore,
    LoRARequest,
    MultiModalFeature,
    Ping,
    PoolingParams,
    ResetPrefixCache,
    ResolvedParams,
    SchedulerStats,
    Shutdown,
    StatusRequest,
    ToEngineCore,
    UtilityOutput,
    WorkersRestarted,
    i32,
    i64,
    to_array,
)
from executor.base import EXIT_MODEL, WorkerDiedError
from executor.messages import (
    FromWorker,
    InitKVCache,
    KVCacheGroupSpec,
    KVCacheReady,
    LoadProgress,
    ModelRunnerOutput,
    SchedulerOutput,
    ToWorker,
    WorkerFailed,
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

    num_ranks = 1

    def __init__(self) -> None:
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

    def start(self) -> None:
        assert not self.is_up
        self.lives += 1
        self.is_up = True
        self.hung_up = False
        self.device = FakeDevice(NUM_BLOCKS, BLOCK_SIZE, VOCAB, STOP)
        if self.loads_by_itself:
            self.inbox.append([LoadProgress(0, "weights", 1, 1), worker_ready()])

    def submit(self, message: ToWorker) -> None:
        assert self.is_up
        if self.hung_up:
            raise WorkerDiedError("worker 0 hung up")
        if isinstance(message, SchedulerOutput):
            self.plans.append(message)
        elif isinstance(message, InitKVCache) and self.loads_by_itself:
            self.inbox.append([KVCacheReady(0)])

    @property
    def has_news(self) -> bool:
        return bool(self.inbox) or bool(self.plans and self.computes)

    def receive(self) -> list[FromWorker]:
        assert self.is_up
        if self.inbox:
            news = self.inbox.popleft()
            if isinstance(news, WorkerDiedError):
                raise news
            return news
        if not self.plans or not self.computes:
            return []
        plan = self.plans.popleft()
        if self.dies_of(plan):
            raise WorkerDiedError("worker 0 ended with exit code -9")
        for request in plan.new_reqs:
            if request.params is not None:
                take_over(request.params)
            else:
                assert request.pooling_params is not None
                assert request.pooling_params.pooling_type in POOLING_TYPES
                assert 1 <= (request.pooling_params.dimensions or 1) <= HIDDEN_SIZE
        return [self.device.execute(plan)]

    def compute_one(self) -> ModelRunnerOutput:
        return self.device.execute(self.plans.popleft())

    def poll_fds(self) -> list[Any]:
        return []

    def worker_pids(self) -> tuple[int, ...]:
        return (self.lives,)

    def shutdown(self) -> None:
        self.is_up = False
        self.plans.clear()
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


def worker_ready(num_blocks: int = NUM_BLOCKS) -> WorkerReady:
    group = KVCacheGroupSpec(kind="full", block_size=BLOCK_SIZE, bytes_per_block=1, layers=(0,))
    return WorkerReady(
        rank=0,
        free_bytes=num_blocks,
        total_bytes=num_blocks,
        weight_bytes=0,
        default_kv_bytes=num_blocks,
        kv_cache_groups=(group,),
        max_model_len=MAX_LEN,
        vocab_size=VOCAB,
        hidden_size=HIDDEN_SIZE,
    )


class Harness:
    """An engine core, its workers and its api, in one thread."""

    def __init__(self, **options: Any) -> None:
        config = EngineConfig(
            scheduler=SchedulerConfig(
                max_num_seqs=options.pop("max_num_seqs", 4),
                max_num_batched_tokens=16,
                max_in_flight_steps=options.pop("depth", 2),
                scheduling_policy=options.pop("policy", "fcfs"),
            ),
            cache=CacheConfig(num_gpu_blocks_override=options.pop("num_blocks", None)),
            executor=ExecutorConfig(
                model=ModelConfig(max_model_len=options.pop("max_model_len", None)), check_every_step=True
            ),
            **options,
        )
        self.executor = FakeExecutor()
        self.inbox: list[ToEngineCore] = []
        self.sent: list[FromEngineCore] = []
        self.outputs: dict[int, list[int]] = {}
        self.reasons: dict[int, int] = {}
        self.errors: dict[int, str | None] = {}
        self.stats = SchedulerStats()
        self.api_is_gone = False
        self.core = EngineCore(config, self.executor, self, engine_epoch=1)
        self.executor.start()

    # -- the transport

    def send(self, message: FromEngineCore) -> None:
        self.sent.append(msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=FromEngineCore))
        if not isinstance(message, EngineCoreOutputs):
            return
        self.stats = message.scheduler_stats or self.stats
        columns = (i64(message.indices), i32(message.output_indices), i32(message.token_ids))
        for index, position, token in zip(*(column.tolist() for column in columns), strict=True):
            self._append(index, position, [token])
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
        if timeout is None and not self.inbox and not self.executor.has_news:
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
        assert scheduler.kv.pool.num_free == scheduler.kv.pool.num_blocks

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


# -- life -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_requests_are_served(depth: int) -> None:
    harness = Harness(depth=depth)
    for index, prompt in enumerate(prompts(9)):
        harness.add(index, prompt)
    harness.run_to_the_end()
    (ready,) = harness.messages(EngineReady)
    assert (ready.max_model_len, ready.vocab_size, ready.num_kv_blocks) == (MAX_LEN, VOCAB, NUM_BLOCKS)
    assert harness.outputs == {index: expected(prompt) for index, prompt in enumerate(prompts(9))}
    assert harness.stats.num_running_reqs == 0 and harness.stats.kv_cache_usage == 0


def test_pooling_requests_are_served_beside_others() -> None:
    harness = Harness()
    harness.inbox.append(make_request(1, params=None, pooling_params=PoolingParams(dimensions=3)))
    harness.add(2)
    harness.inbox.append(make_request(3, prompts(1)[0], params=None, pooling_params=PoolingParams()))
    harness.inbox.append(AbortRequests((3,)))
    harness.run_to_the_end()
    (output,) = (
        output
        for message in harness.messages(EngineCoreOutputs)
        for output in message.outputs
        if output.pooling_output is not None
    )
    assert output.index == 1 and output.finish_reason == FinishReason.STOP and output.num_cached_tokens == 0
    assert to_array(output.pooling_output).tolist() == [*PROMPT, len(PROMPT)]
    assert harness.outputs[2] == expected()
    (ready,) = harness.messages(EngineReady)
    assert ready.hidden_size == HIDDEN_SIZE


@pytest.mark.parametrize(
    ("problem", "fields"),
    [
        ("dimensions", {"pooling_params": PoolingParams(dimensions=HIDDEN_SIZE + 1)}),
        ("dimensions", {"pooling_params": PoolingParams(dimensions=0)}),
        ("pooling_type", {"pooling_params": PoolingParams(pooling_type="MAX")}),
        ("not both", {"pooling_params": PoolingParams(), "params": ResolvedParams()}),
        ("not both", {"pooling_params": PoolingParams(), "resumed_output_token_ids": b"\1\0\0\0"}),
        ("maximum context", {"pooling_params": PoolingParams(), "prompt": [9] * (MAX_LEN + 1)}),
    ],
)
def test_pooling_requests_that_make_no_sense(problem: str, fields: dict[str, Any]) -> None:
    harness = Harness()
    harness.inbox.append(make_request(1, **{"params": None, **fields}))
    harness.run_to_the_end()
    assert harness.reasons == {1: FinishReason.ERROR} and problem in (harness.errors[1] or "")


def test_it_ends_with_the_api() -> None:
    harness = Harness()
    harness.executor.shutdown()
    harness.api_is_gone = True
    assert harness.core.run() == 0
    assert not harness.executor.is_up


@pytest.mark.parametrize("drain", [False, True])
def test_shutdown(drain: bool) -> None:
    harness = Harness()
    harness.add(0)
    harness.turns(4)
    harness.inbox.append(Shutdown(drain=drain))
    harness.run()
    assert harness.core.exit_code == 0
    assert (harness.outputs.get(0) == expected()) == drain


def test_control_messages_are_answered_while_the_model_loads_and_while_a_step_takes_long() -> None:
    harness = Harness()
    harness.executor.loads_by_itself = False
    harness.executor.inbox.clear()
    harness.inbox += [Ping(1), StatusRequest(2), ResetPrefixCache(3)]
    harness.run()
    assert [answer.call_id for answer in harness.messages(UtilityOutput)] == [1, 2, 3]

    harness = Harness()
    harness.executor.computes = False
    harness.add(0, max_tokens=3)
    harness.run()
    assert len(harness.core.in_flight) == 2
    harness.inbox += [Ping(4), StatusRequest(5)]
    harness.run()
    ping, status = harness.messages(UtilityOutput)
    assert ping.call_id == 4 and status.result["steps_in_flight"] == 2 and status.result["integrity"] == ""
    harness.executor.computes = True
    harness.run_to_the_end()


def test_requests_that_come_early_wait_for_the_model() -> None:
    harness = Harness()
    harness.executor.loads_by_itself = False
    harness.executor.inbox.clear()
    harness.add(0, prompts(6)[0])
    harness.add(1, prompts(6)[1])
    harness.run()
    harness.executor.inbox.append([worker_ready()])
    harness.run()
    # The cache is planned, but the workers have not allocated it.
    harness.add(2, prompts(6)[2])
    harness.add(3, prompts(6)[3])
    harness.inbox.append(AbortRequests((1, 3)))
    harness.run()
    assert not harness.outputs
    harness.executor.inbox.append([KVCacheReady(0)])
    harness.run_to_the_end()
    assert harness.outputs == {index: expected(prompts(6)[index]) for index in (0, 2)}
    assert harness.errors == {0: None, 2: None}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_blocks": 3}, "does not fit the KV cache"),
        ({"max_model_len": MAX_LEN + 1}, "longer than"),
    ],
)
def test_a_cache_that_does_not_fit_is_fatal(options: dict[str, Any], message: str) -> None:
    harness = Harness(**options)
    harness.run()
    (dead,) = harness.messages(EngineDead)
    assert message in dead.message and dead.exit_code == harness.core.exit_code == EXIT_MODEL


def test_no_room_for_a_cache_is_fatal() -> None:
    harness = Harness()
    harness.executor.inbox[0] = [worker_ready(num_blocks=0)]
    harness.run()
    (dead,) = harness.messages(EngineDead)
    assert "no room for a KV cache" in dead.message and harness.core.exit_code == EXIT_MODEL


# -- faults ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exit_code", [1, EXIT_MODEL])
def test_a_worker_that_cannot_load_is_fatal(exit_code: int) -> None:
    harness = Harness()
    harness.executor.inbox.clear()
    harness.executor.inbox.append([WorkerFailed(0, "no such weights", exit_code)])
    harness.run()
    (dead,) = harness.messages(EngineDead)
    assert dead.message == "no such weights" and dead.exit_code == harness.core.exit_code == exit_code


def test_after_a_fatal_failure_nothing_is_submitted() -> None:
    harness = Harness()
    harness.add(0)
    harness.turns(5)
    harness.executor.inbox.append([WorkerFailed(0, "the model is gone", EXIT_MODEL)])
    harness.executor.hung_up = True
    harness.core.step()
    assert harness.core.exit_code == EXIT_MODEL


@pytest.mark.parametrize("moment", [0, 1])
@pytest.mark.parametrize("num_deaths", [1, 3])
def test_a_worker_that_dies_while_it_loads_is_started_again(moment: int, num_deaths: int) -> None:
    harness = Harness()
    harness.add(0)
    for _ in range(num_deaths):
        harness.turns(moment)
        harness.executor.inbox.clear()
        harness.executor.inbox.append(WorkerDiedError("worker 0 ended with exit code -9"))
        harness.core.step()
    harness.run_to_the_end()
    assert harness.executor.lives == 1 + num_deaths
    # To the api the model was loaded once, and took longer.
    assert len(harness.messages(EngineReady)) == 1 and not harness.messages(WorkersRestarted)
    assert harness.outputs[0] == expected()


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("moment", range(3, 16))
@pytest.mark.parametrize("way", ["died", "failed", "hung up"])
def test_requests_survive_their_workers(depth: int, moment: int, way: str) -> None:
    harness = Harness(depth=depth)
    for index, prompt in enumerate(prompts(7)):
        harness.add(index, prompt)
    harness.turns(moment)
    if way == "died":
        harness.executor.inbox.append(WorkerDiedError("worker 0 ended with exit code -9"))
    elif way == "failed":
        harness.executor.inbox.append([WorkerFailed(0, "out of memory")])
    else:
        harness.executor.hung_up = True
    harness.run_to_the_end()
    assert harness.executor.lives == 2
    (restarted,) = harness.messages(WorkersRestarted)
    assert restarted.worker_pids == (2,) and restarted.reason
    assert harness.outputs == {index: expected(prompt) for index, prompt in enumerate(prompts(7))}


def test_what_dead_workers_still_sent_is_not_taken_for_the_word_of_new_ones() -> None:
    harness = Harness()
    harness.add(0)
    harness.executor.computes = False
    harness.run()
    stale = [WorkerFailed(0, "out of memory"), harness.executor.compute_one(), worker_ready(), KVCacheReady(0)]
    harness.executor.inbox.append(stale)
    harness.executor.computes = True
    harness.run_to_the_end()
    assert harness.executor.lives == 2 and harness.outputs[0] == expected()


def test_workers_may_die_again_while_they_come_back() -> None:
    harness = Harness()
    harness.add(0)
    harness.turns(6)
    for _ in range(3):
        harness.executor.inbox.append(WorkerDiedError("worker 0 ended with exit code -9"))
        harness.core.step()
        harness.executor.inbox.clear()
        harness.executor.inbox.append([worker_ready()])
        harness.turns(1)
        harness.executor.inbox.clear()
    harness.executor.inbox.append([KVCacheReady(0)])
    harness.run_to_the_end()
    assert len(harness.messages(WorkersRestarted)) == 1 and harness.outputs[0] == expected()


def test_too_many_deaths_are_fatal() -> None:
    harness = Harness(max_worker_restarts=2)
    harness.add(0)
    harness.executor.dies_of = lambda plan: True
    harness.run()
    (dead,) = harness.messages(EngineDead)
    assert "gave up after 2 restarts" in dead.message and harness.core.exit_code == 1


def test_a_request_that_kills_workers_is_ended_and_others_are_not() -> None:
    harness = Harness(depth=1)
    victims = prompts(3)
    for index, prompt in enumerate(victims):
        harness.add(index, prompt, 8)
    harness.turns(6)
    poison = [VOCAB - 1] * 5
    harness.executor.dies_of = lambda plan: any(i32(new.token_ids).tolist()[:5] == poison for new in plan.new_reqs)
    harness.add(9, poison)
    harness.run_to_the_end()
    assert harness.executor.lives == 1 + MAX_CRASHES
    assert harness.reasons[9] == FinishReason.ERROR and "failed repeatedly" in str(harness.errors[9])


def test_aborts_while_workers_come_back() -> None:
    harness = Harness()
    for index, prompt in enumerate(prompts(7)):
        harness.add(index, prompt, 30)
    harness.turns(8)
    assert harness.stats.num_running_reqs and harness.stats.kv_cache_usage
    harness.executor.loads_by_itself = False
    harness.executor.inbox.append(WorkerDiedError("worker 0 ended with exit code -9"))
    harness.core.step()
    assert harness.stats.num_running_reqs == 0 and harness.stats.num_waiting_reqs == 7 - len(harness.reasons)
    harness.inbox.append(AbortRequests(tuple(range(7))))
    harness.run()
    # No step will tell: the gauges must not stay where they were.
    stats = harness.stats
    assert (stats.num_running_reqs, stats.num_waiting_reqs, stats.kv_cache_usage) == (0, 0, 0)
    harness.executor.inbox += [[worker_ready()], [KVCacheReady(0)]]
    harness.run_to_the_end()


def test_aborts_of_what_is_unknown_or_done() -> None:
    harness = Harness()
    harness.add(0, max_tokens=2)
    harness.inbox.append(AbortRequests((5, -1, 2**63)))
    harness.run_to_the_end()
    harness.inbox.append(AbortRequests((0, 0)))
    harness.run_to_the_end()
    assert harness.outputs == {0: expected(max_tokens=2)}


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_order_of_requests_aborts_and_deaths(data: st.DataObject) -> None:
    draw = data.draw
    harness = Harness(depth=draw(st.integers(1, 3)), max_num_seqs=draw(st.integers(1, 4)), max_worker_restarts=100)
    aborted: set[int] = set()
    inputs = prompts(8)
    crashes = 0
    for index, prompt in enumerate(inputs):
        harness.add(index, prompt)
        for _ in range(draw(st.integers(0, 6))):
            if not harness.inbox and not harness.executor.has_news:
                break
            harness.core.step()
        event = draw(st.sampled_from(["", "", "abort", "death", "stale death"]))
        if event == "abort":
            aborted.add(draw(st.integers(0, index)))
            harness.inbox.append(AbortRequests(tuple(aborted)))
        elif event and crashes < MAX_CRASHES - 1:
            crashes += 1
            failure: list[FromWorker] = [WorkerFailed(0, "out of memory")] if harness.core._announced else []
            if event == "stale death" and failure and harness.executor.plans:
                failure.append(harness.executor.compute_one())
            harness.executor.inbox.append(failure or WorkerDiedError("worker 0 ended with exit code -9"))
    harness.run_to_the_end()
    for index, prompt in enumerate(inputs):
        got = harness.outputs.get(index, [])
        assert got == expected(prompt)[: len(got) if index in aborted else None]


def test_looking_at_the_books_does_not_keep_requests_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness()
    harness.run()
    scheduler = harness.core._scheduler
    assert scheduler is not None
    harness.core.config = EngineConfig()  # not after every step
    monkeypatch.setattr(scheduler, "check_integrity", lambda: pytest.fail("it is not time yet"))
    for index in range(3):
        harness.add(index, max_tokens=3)
        harness.run()
    assert len(harness.outputs) == 3


# -- hostile requests -----------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.sampled_from(
        [-(2**63), -(2**31) - 1, -2, -1, 0, 1, VOCAB - 1, VOCAB, 2**31 - 1, 2**31, 2**32, 2**63, 2**64 - 1]
    ),
    st.integers(-(2**63), 2**64 - 1),
)
FLOATS = st.one_of(st.sampled_from([float("nan"), float("inf"), -1.0, 0.0, 1e-300, 1e39, 1e308]), st.floats())
TOKEN_LISTS = st.lists(NUMBERS, max_size=12).map(tuple)
COLUMNS = st.one_of(
    st.binary(max_size=40),
    st.lists(st.integers(-(2**31), 2**31 - 1), max_size=12).map(lambda ids: np.array(ids, np.int32).tobytes()),
    st.lists(st.integers(0, VOCAB - 1), max_size=80).map(lambda ids: np.array(ids, np.int32).tobytes()),
)
PARAMS: dict[str, st.SearchStrategy[Any]] = {
    "temperature": FLOATS,
    "top_k": NUMBERS,
    "top_p": FLOATS,
    "min_p": FLOATS,
    "seed": NUMBERS,
    "presence_penalty": FLOATS,
    "frequency_penalty": FLOATS,
    "repetition_penalty": FLOATS,
    "max_tokens": NUMBERS,
    "min_tokens": NUMBERS,
    "stop_token_ids": TOKEN_LISTS,
    "eos_token_ids": TOKEN_LISTS,
    "logit_bias": st.lists(st.tuples(NUMBERS, FLOATS), max_size=3).map(tuple),
    "allowed_token_ids": TOKEN_LISTS,
    "bad_words_token_ids": st.lists(TOKEN_LISTS, max_size=3).map(tuple),
    "logprobs": NUMBERS,
    "prompt_logprobs": NUMBERS,
    "logprob_token_ids": TOKEN_LISTS,
}
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "request_id": st.text(max_size=5),
    "index": NUMBERS,
    "prompt_token_ids": COLUMNS,
    "sampling_params": st.none(),
    "pooling_params": st.builds(
        PoolingParams,
        pooling_type=st.one_of(st.sampled_from(POOLING_TYPES), st.text(max_size=3)),
        dimensions=st.one_of(st.none(), NUMBERS),
    ),
    "arrival_time": FLOATS,
    "priority": NUMBERS,
    "lora_request": st.builds(LoRARequest, name=st.text(max_size=3), lora_id=NUMBERS, path=st.text(max_size=3)),
    "mm_features": st.lists(st.builds(MultiModalFeature, st.text(max_size=3), NUMBERS, NUMBERS), max_size=2).map(tuple),
    "cache_salt": st.text(max_size=5),
    "resumed_output_token_ids": COLUMNS,
}


@settings(max_examples=200, deadline=None)
@given(data=st.data(), policy=st.sampled_from(["fcfs", "priority"]))
def test_hostile_fields_fail_only_their_request(data: st.DataObject, policy: str) -> None:
    """One or two fields of a request have any value that a socket can bring; those beside it notice nothing."""
    harness = Harness(policy=policy)
    harness.run()
    canaries = {1_000_001: PROMPT, 1_000_002: [30, 31, 32]}
    harness.add(1_000_001)
    used = set(canaries)
    harness.turns(data.draw(st.integers(0, 4)))
    for index in (2_000_001, 2_000_002):
        bad_params = data.draw(st.sets(st.sampled_from(sorted(PARAMS)), max_size=2))
        bad_fields = data.draw(st.sets(st.sampled_from(sorted(FIELDS)), min_size=not bad_params, max_size=2))
        params = {"max_tokens": 6} | {name: data.draw(PARAMS[name], name) for name in sorted(bad_params)}
        request = make_request(index, params=ResolvedParams(**params))
        request = msgspec.structs.replace(
            request, **{name: data.draw(FIELDS[name], name) for name in sorted(bad_fields)}
        )
        try:
            received = msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=ToEngineCore)
        except (msgspec.MsgspecError, UnicodeEncodeError):
            assume(False)  # the socket does not let it through
        assume(received.index not in used)
        used.add(received.index)
        harness.inbox.append(received)
        harness.turns(1)
    harness.add(1_000_002, canaries[1_000_002])
    harness.run_to_the_end()
    assert harness.executor.lives == 1
    for index, prompt in canaries.items():
        assert harness.outputs[index] == expected(prompt) and harness.errors[index] is None


def test_an_index_that_is_taken_does_not_end_its_owner() -> None:
    harness = Harness()
    harness.add(1)
    harness.turns(4)
    harness.add(1, [20, 21])
    harness.run_to_the_end()
    assert harness.outputs == {1: expected()} and harness.errors == {1: None}


# -- the socket -----------------------------------------------------------------------------------------------


@pytest.fixture
def transport(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ZmqTransport, zmq.Socket[bytes], int]]:
    """A transport, the api's end of it, and the api's end of the start pipe."""
    reader, writer = os.pipe()
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.bind(f"ipc://{tmp_path}/api")
    with os.fdopen(reader) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        core_side = ZmqTransport(f"ipc://{tmp_path}/api", b"engine_core.1")
        core_side.send(EngineDead(1, "hello"))
        router.recv_multipart()
        yield core_side, router, writer
        core_side.close()
    router.close(linger=0)
    context.term()
    os.close(writer)


def test_frames_that_are_no_messages_are_dropped(transport: tuple[ZmqTransport, zmq.Socket[bytes], int]) -> None:
    core_side, router, _ = transport
    good = msgspec.msgpack.encode(make_request(1))
    for frame in (b"", b"\xc1", good[:-1], good.replace(b"request-1", b"\xff" * 9), msgspec.msgpack.encode([]), good):
        router.send_multipart((b"engine_core.1", frame))
    received: list[ToEngineCore] = []
    while not received:
        received += core_side.wait([], 1.0) or []
    assert received == [make_request(1)]


def test_the_end_of_the_api_is_noticed(transport: tuple[ZmqTransport, zmq.Socket[bytes], int]) -> None:
    core_side, _, writer = transport
    assert core_side.wait([], 0) == []
    os.close(os.dup(writer))
    assert core_side.wait([], 0) == []
    os.dup2(os.open(os.devnull, os.O_RDONLY), writer)
    assert core_side.wait([], 5.0) is None
