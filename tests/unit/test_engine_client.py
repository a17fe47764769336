"""The api's engine client with an engine core that does as it is told, in the same event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np
import pytest
import zmq

from api.engine import client as engine_client
from api.engine.blame import REFUSAL_TIME, Culprits
from api.engine.channel import Delta
from api.engine.client import EngineClient
from api.engine.core_socket import ROWS_PER_TURN
from api.engine.metrics import EngineMetrics
from api.engine.outbox import REQUESTS_PER_TURN
from api.engine.queue_bound import NOBODY
from api.engine.request_state import OutputOptions, RequestState
from api.engine.submission import Submission
from api.errors import EngineDeadError, ModelFileError, RequestError
from api.model.tokenizer import Tokenizer
from engine_core.config import EngineConfig
from engine_core.launch import LastWork, engine_identity
from engine_core.messages import (
    AbortRequests,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineDead,
    EngineReady,
    FinishReason,
    FromEngineCore,
    GrammarSpec,
    LoadProgress,
    Ping,
    ResolvedParams,
    SchedulerStats,
    SetVocabulary,
    SiblingRequests,
    Suspicion,
    ToEngineCore,
    WorkersLost,
    WorkersRestarted,
    i32,
)
from engine_core.restart import MAX_DEATHS, MAX_RESTARTS
from executor.liveness import ProcessSample, ProcessWatch
from tests.fakes import tiny_tokenizer
from tests.unit.sockets import until


class Core:
    """One life of an engine core: its socket."""

    def __init__(self, context: zmq.Context[Any], address: str, epoch: int) -> None:
        self.epoch = epoch
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, engine_identity(epoch))
        self._socket.connect(address)

    def send(self, message: FromEngineCore) -> None:
        self.send_frame(msgspec.msgpack.encode(message))

    def send_frame(self, frame: bytes) -> None:
        self._socket.send(frame)

    def ready(self) -> None:
        self.send(EngineReady(self.epoch, 1, 64, 50, 16, 4, 8))

    def tokens(self, state: RequestState, first: int, *tokens: int) -> None:
        """What a step says of a request that only got its next token, step by step."""
        for number, token in enumerate(tokens):
            self.send(
                EngineCoreOutputs(
                    self.epoch,
                    indices=np.array([state.index], np.int64).tobytes(),
                    output_indices=np.array([first + number], np.int32).tobytes(),
                    token_ids=np.array([token], np.int32).tobytes(),
                    scheduler_stats=SchedulerStats(num_scheduled_tokens=1),
                )
            )

    def finish(self, state: RequestState, first: int, token: int) -> None:
        output = EngineCoreOutput(state.index, first, (token,), FinishReason.LENGTH)
        self.send(EngineCoreOutputs(self.epoch, outputs=(output,)))

    def has_news(self) -> bool:
        """Whether the client sent something."""
        return bool(self._socket.poll(0))

    def received(self) -> list[ToEngineCore]:
        """What the client sent until now."""
        messages: list[ToEngineCore] = []
        while self._socket.poll(50):
            messages.append(msgspec.msgpack.decode(self._socket.recv(), type=ToEngineCore))
        return messages

    def close(self) -> None:
        self._socket.close(linger=2000)


class FakeSupervisor:
    """Starts sockets instead of processes."""

    current: FakeSupervisor
    replicas: ClassVar[dict[int, FakeSupervisor]] = {}
    """The last one of each replica."""
    folder: Path
    pid = 1
    error: OSError | None = None

    def __init__(self, config: EngineConfig, on_exit: Callable[[int], None], log_level: str, replica: int = 0) -> None:
        self.config = config
        self.replica = replica
        self.address = f"ipc://{FakeSupervisor.folder}/api{replica}"
        self.on_exit = on_exit
        self.context = zmq.Context()
        self.cores: list[Core] = []
        self.work = LastWork()
        self.num_kills = 0
        FakeSupervisor.current = self
        FakeSupervisor.replicas[replica] = self

    @property
    def core(self) -> Core:
        return self.cores[-1]

    def start(self, epoch: int) -> None:
        if self.error is not None:
            raise self.error
        self.cores.append(Core(self.context, self.address, epoch))

    def watch(self) -> ProcessWatch:
        return ProcessWatch(self.pid)

    def last_work(self) -> LastWork:
        return self.work

    def kill(self) -> None:
        self.num_kills += 1
        self.die()

    def die(self, code: int = -9, **work: Any) -> None:
        """The core ends; ``work`` is what it leaves word of."""
        self.work = LastWork(**work)
        self.core.close()
        self.on_exit(code)

    async def stop(self) -> None:
        self.context.destroy(linger=0)


class Harness:
    """A client that serves."""

    def __init__(self, tokenizer: Tokenizer | None = None) -> None:
        self.is_closed = False
        self.fatal: list[EngineDeadError] = []
        self.progress: list[LoadProgress] = []
        self.metrics = EngineMetrics("model")
        self.client = EngineClient(
            EngineConfig(),
            None if tokenizer is None else lambda: tokenizer,
            self.metrics,
            on_fatal=self.fatal.append,
            on_progress=self.progress.append,
            prepares_grammars=tokenizer is not None,
        )
        self.supervisor = FakeSupervisor.current
        self.channel = self.client.open_channel()

    async def start(self) -> None:
        start = asyncio.create_task(self.client.start())
        await asyncio.sleep(0)
        self.supervisor.core.send(LoadProgress(0, "weights", 1, 2))
        self.supervisor.core.ready()
        await start

    async def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            await self.client.close()

    def submit(self, *prompt: int, **fields: Any) -> RequestState:
        return self.client.submit(
            self.channel,
            0,
            Submission(params=ResolvedParams(), options=OutputOptions(), **fields),
            request_id="request",
            prompt_token_ids=prompt or (1, 2, 3),
        )

    async def take(self, count: int) -> list[Delta]:
        """The next deltas."""
        deltas: list[Delta] = []
        while len(deltas) < count:
            deltas += await asyncio.wait_for(self.channel.take(), 60)
        return deltas

    async def serving(self, interval: float = 0.01) -> None:
        """Waits until a restarted core is heard of; an interval of 0 waits no turn of the loop longer."""
        await until(lambda: self.client.is_serving, interval)

    async def hears(self, count: int) -> list[EngineCoreRequest]:
        """The next requests that the core is told, as soon as there are so many."""
        told: list[EngineCoreRequest] = []

        def are_enough() -> bool:
            told.extend(
                message for message in self.supervisor.core.received() if isinstance(message, EngineCoreRequest)
            )
            return len(told) >= count

        await until(are_enough)
        return told

    def sample(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, {"model_name": "model", "engine": "0", **labels}) or 0


@pytest.fixture
async def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Harness]:
    FakeSupervisor.folder = tmp_path
    monkeypatch.setattr(engine_client, "Supervisor", FakeSupervisor)
    monkeypatch.setattr(engine_client, "PING_INTERVAL", 1000)
    result = Harness()
    await result.start()
    yield result
    await result.close()


async def test_streams_go_on_where_they_were_when_the_core_dies(harness: Harness) -> None:
    state = harness.submit()
    harness.supervisor.core.tokens(state, 0, 5, 6)
    await harness.take(2)
    harness.supervisor.die()
    assert not harness.client.is_serving
    harness.supervisor.core.ready()
    await harness.serving()
    (again,) = harness.supervisor.core.received()
    assert isinstance(again, EngineCoreRequest) and again.index == state.index
    assert i32(again.resumed_output_token_ids).tolist() == [5, 6]
    harness.supervisor.core.tokens(state, 2, 7)
    harness.supervisor.core.finish(state, 3, 8)
    deltas = await harness.take(2)
    assert [delta.token_ids for delta in deltas] == [(7,), (8,)] and deltas[-1].finish_reason == "length"
    assert harness.client.num_unfinished == 0


async def test_tokens_that_come_twice_are_dropped_and_a_gap_is_an_error(harness: Harness) -> None:
    state = harness.submit()
    harness.supervisor.core.tokens(state, 0, 5)
    harness.supervisor.core.tokens(state, 0, 5)
    harness.supervisor.core.tokens(state, 1, 6)
    harness.supervisor.core.tokens(state, 3, 8)
    deltas = await harness.take(3)
    assert [delta.token_ids for delta in deltas] == [(5,), (6,), ()]
    assert "tokens 2 to 2 of the output were lost" in str(deltas[-1].error)
    assert harness.supervisor.core.received()[-1] == AbortRequests((state.index,))


async def test_siblings_are_one_message_and_share_their_prompt(harness: Harness) -> None:
    states = harness.client.submit_siblings(
        harness.channel,
        3,
        Submission(params=ResolvedParams(logit_bias=((1, 0.5),) * 1000), options=OutputOptions()),
        request_ids=[f"r-{number}" for number in range(600)],
        prompt_token_ids=np.arange(1, 1000, dtype=np.int32).tobytes(),
        seeds=range(600),
    )
    assert [state.choice for state in states] == list(range(3, 603))
    assert len({id(state.message.prompt_token_ids) for state in states}) == 1
    (message,) = harness.supervisor.core.received()
    assert isinstance(message, SiblingRequests)
    assert [state.message for state in states] == list(message.requests())
    assert len({id(request.prompt_token_ids) for request in message.requests()}) == 1
    assert len(msgspec.msgpack.encode(message)) < 60_000
    harness.client.abort(states)
    while harness.client.num_unfinished:  # noqa: ASYNC110
        await asyncio.sleep(0)
    aborted = [m.indices for m in harness.supervisor.core.received() if isinstance(m, AbortRequests)]
    assert [index for indices in aborted for index in indices] == [state.index for state in states]
    assert len(aborted) > 1


async def test_siblings_are_resumed_one_by_one(harness: Harness) -> None:
    states = harness.client.submit_siblings(
        harness.channel,
        0,
        Submission(params=ResolvedParams(), options=OutputOptions()),
        request_ids=["a", "b"],
        prompt_token_ids=np.array([1, 2], np.int32).tobytes(),
        seeds=[11, 12],
    )
    harness.supervisor.die()
    again = await back(harness)
    assert [request.index for request in again] == [state.index for state in states]
    assert [request.sampling_params.seed for request in again if request.sampling_params] == [11, 12]


async def test_an_idle_core_hears_the_vocabulary_before_it_is_needed(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    await harness.close()
    prepared = Harness(tiny_tokenizer())
    told: list[type] = []

    def hears(*kinds: type) -> Callable[[], bool]:
        def is_told() -> bool:
            messages = prepared.supervisor.core.received()
            told.extend(type(message) for message in messages if not isinstance(message, Ping))
            return told == list(kinds)

        return is_told

    try:
        await prepared.start()
        state = prepared.submit()
        await until(hears(EngineCoreRequest))
        for _ in range(3):
            prepared.client._offer_vocabulary()  # once in PING_INTERVAL
        assert prepared.client._vocabulary.frame is None  # making it would delay the request
        prepared.supervisor.core.finish(state, 0, 5)
        await prepared.take(1)
        for _ in range(2):
            prepared.client._offer_vocabulary()
        await until(hears(EngineCoreRequest, SetVocabulary))
        prepared.submit(grammar=GrammarSpec("choice", "[]"))
        await until(hears(EngineCoreRequest, SetVocabulary, EngineCoreRequest))
        prepared.supervisor.die()
        told.clear()
        prepared.supervisor.core.ready()
        await prepared.serving()
        await until(hears(SetVocabulary, EngineCoreRequest))
    finally:
        await prepared.close()


async def test_a_tokenizer_that_cannot_be_read_ends_the_start(harness: Harness) -> None:
    await harness.close()

    def fail() -> Tokenizer:
        raise ModelFileError("tokenizer.json", "is damaged")

    others = asyncio.all_tasks()
    client = EngineClient(EngineConfig(), fail, EngineMetrics("model"))
    with pytest.raises(ModelFileError, match="is damaged"):  # although the engine is never ready
        await client.start()
    await client.close()
    assert asyncio.all_tasks() == others  # the loop may end at once


async def test_messages_are_taken_once_in_a_turn_however_many_are_sent(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = harness.submit()
    harness.supervisor.core.received()
    num_taken = 0
    take = harness.client._socket.take

    def counted() -> bool:
        nonlocal num_taken
        num_taken += 1
        return take()

    monkeypatch.setattr(harness.client._socket, "take", counted)
    harness.supervisor.core.tokens(state, 0, *range(40))
    deadline = time.monotonic() + 60
    while len(state.output_token_ids) < 40 and time.monotonic() < deadline:
        before = num_taken
        for _ in range(10):
            harness.submit()  # sees that there is something to take
        await asyncio.sleep(0)
        assert num_taken <= before + 2  # that, and the loop's own notice
    assert len(state.output_token_ids) == 40


async def test_what_a_dead_core_left_is_taken_in_turns(harness: Harness) -> None:
    state = harness.submit()
    harness.supervisor.core.tokens(state, 0, *range(ROWS_PER_TURN))
    assert harness.client._socket.wait(60_000)
    harness.supervisor.die()
    assert len(state.output_token_ids) < ROWS_PER_TURN
    await until(lambda: len(harness.supervisor.cores) > 1)
    # As far as it had arrived: what had not is computed again.
    assert state.output_token_ids.tolist() == list(range(len(state.output_token_ids)))


async def test_a_new_core_hears_of_many_requests_in_turns(harness: Harness) -> None:
    states = [harness.submit() for _ in range(3 * REQUESTS_PER_TURN)]
    harness.supervisor.die()
    harness.supervisor.core.ready()
    await harness.serving(interval=0)
    told = [request for request in harness.supervisor.core.received() if isinstance(request, EngineCoreRequest)]
    assert len(told) <= REQUESTS_PER_TURN
    states.append(harness.submit())  # it comes after all those that were there before
    harness.client.abort(states[-3:-1])
    told += await harness.hears(len(states) - 2 - len(told))
    assert [request.index for request in told] == [state.index for state in (*states[:-3], states[-1])]


async def test_what_was_left_to_say_to_a_core_dies_with_it(harness: Harness) -> None:
    states = [harness.submit() for _ in range(3 * REQUESTS_PER_TURN)]
    harness.supervisor.die()
    harness.supervisor.core.ready()
    await harness.serving(interval=0)
    harness.supervisor.die()
    again = await back(harness)
    again += await harness.hears(len(states) - len(again))
    assert [request.index for request in again] == [state.index for state in states]


async def test_what_an_earlier_life_still_sends_is_dropped(harness: Harness) -> None:
    state = harness.submit()
    old = harness.supervisor.core
    harness.supervisor.on_exit(-9)
    harness.supervisor.core.ready()
    await harness.serving()
    old.tokens(state, 0, 9)
    old.send(EngineDead(1, "late"))
    old.close()
    harness.supervisor.core.tokens(state, 0, 5)
    assert [delta.token_ids for delta in await harness.take(1)] == [(5,)]


async def test_an_abort_during_a_restart_holds(harness: Harness) -> None:
    gone, stays = harness.submit(), harness.submit()
    harness.supervisor.die()
    harness.client.abort([gone])
    new = harness.submit()
    harness.supervisor.core.ready()
    await harness.serving()
    indices = [message.index for message in harness.supervisor.core.received()]  # type: ignore[union-attr]
    assert indices == [stays.index, new.index]


async def back(harness: Harness) -> list[EngineCoreRequest]:
    """A new core is there; gives the requests that it is told."""
    harness.supervisor.core.ready()
    await harness.serving()
    return [message for message in harness.supervisor.core.received() if isinstance(message, EngineCoreRequest)]


async def test_a_core_that_dies_while_it_loads_is_not_the_fault_of_requests(harness: Harness) -> None:
    state = harness.submit()
    harness.supervisor.die(computing={state.index: (0, 3)})
    for _ in range(MAX_DEATHS + 1):
        harness.supervisor.die()
    (again,) = await back(harness)
    assert again.suspicion is not None and again.suspicion.num_deaths == 1 and not state.finished


async def test_unrelated_deaths_never_add_up(harness: Harness) -> None:
    state = harness.submit()
    for number in range(20):
        harness.supervisor.core.tokens(state, number, 5)
        await harness.take(1)
        harness.supervisor.die(computing={state.index: (number + 3, number + 5)})
        (again,) = await back(harness)
        assert again.suspicion is not None and again.suspicion.num_deaths < MAX_DEATHS
    assert not state.finished and harness.client.dead is None and not harness.fatal


async def test_whoever_got_past_the_place_is_cleared_even_if_it_is_computed_again(harness: Harness) -> None:
    state = harness.submit()
    harness.supervisor.die(computing={state.index: (0, 3)})
    await back(harness)
    harness.supervisor.core.tokens(state, 0, 5, 6)
    await harness.take(2)
    harness.supervisor.die(computing={state.index: (0, 5)})  # it had been preempted
    (again,) = await back(harness)
    assert again.suspicion == Suspicion(1, 0, 5)


async def test_the_request_that_ends_cores_is_found_and_refused(harness: Harness) -> None:
    innocent, waiting = harness.submit(1, 2), harness.submit(1, 2, 3, 4)
    poison, twin = harness.submit(9, 9), harness.submit(9, 9)
    harness.supervisor.core.tokens(innocent, 0, 5)
    await harness.take(1)
    both = {innocent.index: (2, 4), poison.index: (0, 2)}
    harness.supervisor.die(computing=both)
    assert [again.suspicion is not None for again in await back(harness)] == [True, False, True, False]
    harness.supervisor.die(computing={innocent.index: (0, 3), poison.index: (0, 2)})
    # The suspects come first, to run alone.
    assert {again.index for again in (await back(harness))[:2]} == {innocent.index, poison.index}
    harness.supervisor.core.tokens(innocent, 1, 6, 7, 8)
    await harness.take(3)
    for _ in range(MAX_DEATHS - 3):
        harness.supervisor.die(computing={poison.index: (0, 2)})
        assert (await back(harness))[0].index == poison.index and not poison.finished
    harness.supervisor.die(computing={poison.index: (0, 2)})
    failed = await harness.take(2)
    assert {delta.finish_reason for delta in failed} == {"error"} and "10 minutes" in str(failed[0].error)
    assert poison.finished and twin.finished
    again = await back(harness)
    assert [(request.index, request.suspicion) for request in again] == [(innocent.index, None), (waiting.index, None)]
    with pytest.raises(RequestError, match="rejected for another 600 s") as refusal:
        harness.submit(9, 9)
    assert refusal.value.status == 422 and refusal.value.headers["Retry-After"] == "600"
    harness.submit(9, 9, 9)


async def test_a_request_that_ends_cores_when_it_is_taken_in_is_found(harness: Harness) -> None:
    innocent, poison = harness.submit(), harness.submit(9)
    harness.supervisor.core.tokens(innocent, 0, 5)
    await harness.take(1)
    for _ in range(MAX_DEATHS):
        harness.supervisor.die(adding=poison.index, computing={innocent.index: (3, 4)})
        assert innocent.index in [again.index for again in await back(harness)]
    assert poison.finished and not innocent.finished and innocent.suspicion is None


async def test_a_core_that_dies_again_and_again_for_no_reason_is_given_up(harness: Harness) -> None:
    for _ in range(MAX_RESTARTS):
        harness.supervisor.die()
        await back(harness)
    assert harness.client.dead is None
    harness.supervisor.die()
    assert harness.client.dead is not None and "without any progress" in str(harness.client.dead)
    assert harness.fatal == [harness.client.dead]
    assert harness.client._life.watch is None, "nobody is watched any more"


async def test_requests_that_wait_for_their_grammar_saturate_nothing(harness: Harness) -> None:
    for num_deferred, is_saturated in ((2, False), (1, True)):
        stats = SchedulerStats(num_waiting_reqs=2, num_deferred_reqs=num_deferred)
        harness.metrics.on_step(stats, 0, [])
        harness.client.check_queue(NOBODY)
        assert harness.client._queue.is_saturated == is_saturated


async def test_requests_that_kill_workers_are_refused_too(harness: Harness) -> None:
    state, twin = harness.submit(9), harness.submit(9)
    output = EngineCoreOutput(state.index, 0, (), FinishReason.ERROR, error="no", is_culprit=True)
    harness.supervisor.core.send(EngineCoreOutputs(1, outputs=(output,)))
    assert all(delta.finish_reason == "error" for delta in await harness.take(2))
    assert AbortRequests((state.index, twin.index)) in harness.supervisor.core.received()
    with pytest.raises(RequestError, match="rejected"):
        harness.submit(9)


def test_culprits_are_forgiven() -> None:
    now = 0.0
    culprits = Culprits(lambda: now)
    request = EngineCoreRequest("a", 1, b"12345678", ResolvedParams(seed=1))
    culprits.add(request)
    for same in (request, EngineCoreRequest("b", 2, b"12345678", ResolvedParams(seed=2), arrival_time=3.0)):
        with pytest.raises(RequestError):
            culprits.check(same)
    for other in (
        EngineCoreRequest("a", 1, b"12345679", ResolvedParams(seed=1)),
        EngineCoreRequest("a", 1, b"12345678", ResolvedParams(seed=1, temperature=0.5)),
    ):
        culprits.check(other)
    now = REFUSAL_TIME
    culprits.check(request)


async def test_readiness_is_the_truth(harness: Harness) -> None:
    core = harness.supervisor.core
    assert harness.client.is_ready
    core.send(WorkersLost(1, "worker 0 is gone"))
    await until(lambda: not harness.client.is_ready)
    core.send(WorkersRestarted(1, (2,), "worker 0 is gone"))
    await until(lambda: harness.client.is_ready)
    harness.supervisor.die()
    assert not harness.client.is_ready
    await back(harness)
    assert harness.client.is_ready


@pytest.mark.parametrize("is_serving", [True, False])
async def test_a_core_that_does_not_answer_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_serving: bool
) -> None:
    now, num_looks = 0.0, 0

    def look(pid: int) -> ProcessSample:
        nonlocal num_looks
        num_looks += 1
        return ProcessSample("S", 1.0)

    FakeSupervisor.folder = tmp_path
    monkeypatch.setattr(engine_client, "Supervisor", FakeSupervisor)
    monkeypatch.setattr(engine_client, "PING_INTERVAL", 0.001)
    monkeypatch.setattr(FakeSupervisor, "watch", lambda self: ProcessWatch(self.pid, lambda: now, look))
    harness = Harness()

    async def looks(count: int) -> None:
        wanted = num_looks + count
        await until(lambda: num_looks >= wanted or harness.supervisor.num_kills)

    start = asyncio.create_task(harness.client.start())
    await asyncio.sleep(0)
    if is_serving:
        harness.supervisor.core.ready()
        await start
        state = harness.submit()
    limit = engine_client.PING_TIMEOUT if is_serving else engine_client.LOAD_PING_TIMEOUT
    now = 60.0  # the watcher stood still; that does not count
    await looks(10)
    assert harness.supervisor.num_kills == 0
    while harness.supervisor.num_kills == 0:
        now += 1.0
        await looks(1)
    assert limit - 3 < now - 60 < limit + 10
    now = 0.0
    harness.supervisor.core.ready()
    await (start if not is_serving else harness.serving())
    if is_serving:
        assert any(
            isinstance(message, EngineCoreRequest) and message.index == state.index
            for message in harness.supervisor.core.received()
        )
    await harness.close()


async def test_a_core_that_is_killed_while_the_model_loads_first_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeSupervisor.folder = tmp_path
    monkeypatch.setattr(engine_client, "Supervisor", FakeSupervisor)
    harness = Harness()
    start = asyncio.create_task(harness.client.start())
    await asyncio.sleep(0)
    for _ in range(MAX_RESTARTS):
        harness.supervisor.die(-9)
    harness.supervisor.core.ready()
    assert (await start).pid == 1 and harness.client.is_ready
    await harness.close()


@pytest.mark.parametrize(("code", "num_deaths"), [(1, 1), (-9, MAX_RESTARTS + 1)])
async def test_a_core_that_never_loads_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, num_deaths: int
) -> None:
    FakeSupervisor.folder = tmp_path
    monkeypatch.setattr(engine_client, "Supervisor", FakeSupervisor)
    harness = Harness()
    start = asyncio.create_task(harness.client.start())
    await asyncio.sleep(0)
    for _ in range(num_deaths):
        assert harness.client.dead is None
        harness.supervisor.die(code)
    with pytest.raises(EngineDeadError, match="exited"):
        await start
    await harness.close()


async def test_a_core_that_cannot_be_started_again_is_given_up(harness: Harness) -> None:
    harness.submit()
    harness.supervisor.error = OSError(24, "Too many open files")
    harness.supervisor.die()
    (delta,) = await harness.take(1)
    assert "Too many open files" in str(delta.error)
    assert harness.fatal == [harness.client.dead] and harness.client.dead is not None
    with pytest.raises(EngineDeadError):
        harness.submit()


async def test_last_words_may_come_after_the_end(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.engine.client.LAST_WORDS_TIMEOUT", 60_000)
    core = harness.supervisor.core
    timer = threading.Timer(0.05, core.send, (EngineDead(1, "the weights are gone", 78),))
    timer.start()
    harness.supervisor.on_exit(78)
    timer.join()
    assert str(harness.client.dead) == "the weights are gone"
    assert harness.client.dead is not None and harness.client.dead.exit_code == 78


async def test_what_cannot_be_sent_leaves_nothing_behind(harness: Harness) -> None:
    with pytest.raises(OverflowError):
        harness.submit(priority=1 << 70)
    assert harness.client.num_unfinished == 0


async def test_a_message_that_cannot_be_handled_does_not_stop_the_others(harness: Harness) -> None:
    state = harness.submit()
    for number in range(5):
        harness.supervisor.core.send_frame(b"\xc1")
        harness.supervisor.core.tokens(state, number, 5 + number)
    assert [delta.token_ids for delta in await harness.take(5)] == [(5 + number,) for number in range(5)]


async def test_a_token_that_cannot_be_handled_ends_only_its_request(harness: Harness) -> None:
    class Broken:
        def append(self, token_id: int) -> str:
            raise KeyError(token_id)

    bad, good = harness.submit(), harness.submit()
    bad.detokenizer = Broken()  # type: ignore[assignment]
    harness.supervisor.core.send(
        EngineCoreOutputs(
            1,
            indices=np.array([bad.index, good.index], np.int64).tobytes(),
            output_indices=np.zeros(2, np.int32).tobytes(),
            token_ids=np.array([5, 6], np.int32).tobytes(),
        )
    )
    failed, delta = await harness.take(2)
    assert failed.finish_reason == "error" and delta.token_ids == (6,)
    assert harness.supervisor.core.received()[-1] == AbortRequests((bad.index,))


async def test_calls_end_with_the_client_and_with_the_core(harness: Harness) -> None:
    call = asyncio.create_task(harness.client.call(Ping))
    await asyncio.sleep(0)
    harness.supervisor.die()
    with pytest.raises(EngineDeadError):
        await call
    harness.supervisor.core.ready()
    await harness.serving()
    call = asyncio.create_task(harness.client.call(Ping))
    await asyncio.sleep(0)
    await harness.close()
    with pytest.raises(EngineDeadError):
        await asyncio.wait_for(call, 60)
    with pytest.raises(EngineDeadError):
        harness.submit()


async def test_aborted_requests_are_counted_and_progress_is_shown_once(harness: Harness) -> None:
    states = [harness.submit(), harness.submit()]
    harness.supervisor.core.finish(states[0], 0, 5)
    await harness.take(1)
    harness.client.abort(states)
    assert harness.sample("vllm:request_success_total", finished_reason="abort") == 1
    assert harness.sample("vllm:request_success_total", finished_reason="length") == 1
    assert harness.progress == [LoadProgress(0, "weights", 1, 2)]
    harness.supervisor.die()
    harness.supervisor.core.send(LoadProgress(0, "weights", 2, 2))
    harness.supervisor.core.ready()
    await harness.serving()
    assert len(harness.progress) == 1
