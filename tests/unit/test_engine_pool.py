"""Several engine clients as one, with engine cores that do as they are told, in the same event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from api.config import make_config
from api.engine import client as engine_client
from api.engine.client import EngineClient
from api.engine.metrics import EngineMetrics
from api.engine.place import INDEX_BITS
from api.engine.pool import EnginePool, create_engines
from api.engine.request_state import OutputOptions, RequestState
from api.engine.submission import Submission
from api.errors import EngineDeadError, RequestError
from engine_core.config import EngineConfig, SchedulerConfig
from engine_core.messages import (
    AbortRequests,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineDead,
    EngineReady,
    FinishReason,
    Ping,
    ResolvedParams,
    SiblingRequests,
    Suspicion,
    ToEngineCore,
    UtilityOutput,
    WorkersLost,
    WorkersRestarted,
    i32,
)
from engine_core.restart import ISOLATE_DEATHS, MAX_DEATHS, MAX_RESTARTS
from tests.unit.sockets import until
from tests.unit.test_engine_client import Core, FakeSupervisor

BLOCK = 16
"""Of ``Core.ready``."""


class Harness:
    """A pool that serves."""

    def __init__(self, num_replicas: int, config: EngineConfig) -> None:
        self.fatal: list[EngineDeadError] = []
        self.metrics = EngineMetrics("model")
        self.pool = EnginePool(config, num_replicas, None, self.metrics, on_fatal=self.fatal.append, bounds_queue=True)
        self.supervisors = [FakeSupervisor.replicas[rank] for rank in range(num_replicas)]
        self.channel = self.pool.open_channel()

    async def start(self) -> EngineReady:
        start = asyncio.create_task(self.pool.start())
        await until(lambda: all(supervisor.cores for supervisor in self.supervisors))
        for number, supervisor in enumerate(self.supervisors):
            core = supervisor.core
            core.send(EngineReady(core.epoch, 1, 64 - number, 50, 8, BLOCK, 4, weight_bytes=1000))
        return await start

    def core(self, rank: int) -> Core:
        return self.supervisors[rank].core

    def submit(self, first: int = 0, count: int = 40, **fields: Any) -> RequestState:
        return self.pool.submit(
            self.channel,
            0,
            Submission(params=ResolvedParams(), options=OutputOptions(), **fields),
            request_id="request",
            prompt_token_ids=range(first, first + count),
        )

    async def take(self, count: int) -> list[Any]:
        """The next deltas."""
        deltas: list[Any] = []
        while len(deltas) < count:
            deltas += await asyncio.wait_for(self.channel.take(), 60)
        return deltas

    async def hears(self, rank: int, count: int) -> list[ToEngineCore]:
        """The next messages to a core but for pings, as soon as there are so many."""
        told: list[ToEngineCore] = []

        def are_enough() -> bool:
            told.extend(each for each in self.core(rank).received() if not isinstance(each, Ping))
            return len(told) >= count

        await until(are_enough)
        return told

    async def returns(self, rank: int) -> None:
        """A restarted core is ready."""
        self.core(rank).ready()
        await until(lambda: self.pool.clients[rank].is_serving)

    def sample(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, {"model_name": "model", **labels}) or 0


@pytest.fixture
async def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Harness]:
    FakeSupervisor.folder = tmp_path
    monkeypatch.setattr(engine_client, "Supervisor", FakeSupervisor)
    monkeypatch.setattr(engine_client, "PING_INTERVAL", 1000)
    result = Harness(2, EngineConfig(scheduler=SchedulerConfig(max_num_queued_reqs=4, max_num_seqs=2)))
    await result.start()
    yield result
    await result.pool.close()


async def test_what_holds_for_all_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeSupervisor.folder = tmp_path
    monkeypatch.setattr(engine_client, "Supervisor", FakeSupervisor)
    harness = Harness(3, EngineConfig())
    assert not harness.pool.is_ready and not harness.pool.is_serving
    ready = await harness.start()
    try:
        assert (ready.max_model_len, ready.weight_bytes, ready.num_kv_blocks) == (62, 3000, 24)
        assert harness.pool.is_ready and harness.pool.is_serving
        configs = [supervisor.config for supervisor in harness.supervisors]
        assert [config.num_replicas for config in configs] == [3] * 3
        assert [config.executor.device.first_index for config in configs] == [0, 1, 2]
    finally:
        await harness.pool.close()


@pytest.mark.parametrize(("size", "local", "rank"), [(1, None, None), (4, None, 3), (4, 2, 3)])
async def test_a_server_of_one_engine_has_its_rank(
    size: int, local: int | None, rank: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeSupervisor.folder = tmp_path
    monkeypatch.setattr(engine_client, "Supervisor", FakeSupervisor)
    options = {"data_parallel_size": size, "data_parallel_size_local": local, "data_parallel_rank": rank}
    config, _ = make_config({name: value for name, value in options.items() if value is not None})
    client = create_engines(config, None, EngineMetrics("model", engine=rank or 0))
    assert isinstance(client, EngineClient) and client.rank == (rank or 0)
    started = FakeSupervisor.current
    assert (started.replica, started.config.num_replicas) == ((rank or 0) % (local or 1), local or 1)
    start = asyncio.create_task(client.start())
    await until(lambda: bool(started.cores))
    started.core.ready()
    await start
    fields: dict[str, Any] = {"request_id": "a", "prompt_token_ids": [1]}
    submission = Submission(params=ResolvedParams(), options=OutputOptions(), data_parallel_rank=rank)
    wrong = msgspec.structs.replace(submission, data_parallel_rank=1)
    with pytest.raises(RequestError, match=f"no data parallel rank 1; this server has rank {rank or 0}"):
        client.submit(client.open_channel(), 0, wrong, **fields)
    state = client.submit(client.open_channel(), 0, submission, **fields)
    assert state.index == ((rank or 0) << INDEX_BITS) + 1
    await client.close()


async def test_some_of_the_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server of its machine's engines alone, behind a balancer: their numbers are those among all."""
    FakeSupervisor.folder = tmp_path
    monkeypatch.setattr(engine_client, "Supervisor", FakeSupervisor)
    options = {"data_parallel_size": 6, "data_parallel_hybrid_lb": True, "data_parallel_start_rank": 3}
    config = make_config(options | {"data_parallel_size_local": 2})[0]
    metrics = EngineMetrics("model", engine=config.first_replica)
    pool = create_engines(config, None, metrics)
    assert isinstance(pool, EnginePool) and len(pool.clients) == 2
    assert [each.engine for each in metrics.engines] == [3, 4]
    assert [client.rank for client in pool.clients] == [0, 1]
    start = asyncio.create_task(pool.start())
    supervisors = [FakeSupervisor.replicas[rank] for rank in (0, 1)]
    await until(lambda: all(supervisor.cores for supervisor in supervisors))
    for supervisor in supervisors:
        assert (supervisor.config.num_replicas, supervisor.replica) == (2, supervisors.index(supervisor))
        supervisor.core.ready()
    await start
    submission = Submission(params=ResolvedParams(), options=OutputOptions(), data_parallel_rank=4)
    fields: dict[str, Any] = {"request_id": "a", "prompt_token_ids": [1]}
    assert pool.submit(pool.open_channel(), 0, submission, **fields).engine == 1
    wrong = msgspec.structs.replace(submission, data_parallel_rank=1)
    with pytest.raises(RequestError, match="no data parallel rank 1; this server has ranks 3 to 4"):
        pool.submit(pool.open_channel(), 0, wrong, **fields)
    await pool.close()
    alone = create_engines(make_config(options | {"data_parallel_size_local": 1})[0], None, metrics)
    assert isinstance(alone, EngineClient) and alone.rank == 3 and FakeSupervisor.current.replica == 0
    await alone.close()


async def test_requests_spread_and_prefixes_stay_together(harness: Harness) -> None:
    first, second = harness.submit(0), harness.submit(100)
    assert (first.engine, second.engine) == (0, 1)
    assert (first.index, second.index) == (1, (1 << INDEX_BITS) + 1)
    for state in (first, second):
        core = harness.core(state.engine)
        (message,) = await harness.hears(state.engine, 1)
        assert isinstance(message, EngineCoreRequest) and message.index == state.index
        core.finish(state, 0, 7)
    await harness.take(2)
    assert harness.submit(100).engine == 1 and harness.submit(100, cache_salt="other").engine == 0
    assert harness.sample("vllm:request_success_total", engine="1", finished_reason="length") == 1
    text = harness.metrics.render().decode()
    assert text.count("# TYPE vllm:num_requests_running gauge") == 1
    assert 'vllm:num_requests_running{engine="1",model_name="model"}' in text


async def test_completions_of_a_prompt_run_together(harness: Harness) -> None:
    states = harness.pool.submit_siblings(
        harness.channel,
        0,
        Submission(params=ResolvedParams(), options=OutputOptions(), data_parallel_rank=1),
        request_ids=["a", "b", "c"],
        prompt_token_ids=np.arange(40, dtype=np.int32).tobytes(),
        seeds=[1, 2, 3],
    )
    assert [state.engine for state in states] == [1, 1, 1]
    (message,) = await harness.hears(1, 1)
    assert isinstance(message, SiblingRequests)


async def test_a_request_may_name_its_engine(harness: Harness) -> None:
    assert [harness.submit(data_parallel_rank=1).engine for _ in range(3)] == [1, 1, 1]
    with pytest.raises(RequestError, match="no data parallel rank 2; this server has ranks 0 to 1") as error:
        harness.submit(data_parallel_rank=2)
    assert error.value.param == "X-data-parallel-rank"


async def test_streams_go_on_in_another_engine_when_a_core_dies(harness: Harness) -> None:
    state, other = harness.submit(0), harness.submit(100)
    harness.core(0).tokens(state, 0, 5, 6)
    await harness.take(2)
    await harness.hears(1, 1)
    harness.supervisors[0].die(computing={state.index: (0, 40)})
    assert harness.pool.is_ready and state.engine == 1
    (again,) = await harness.hears(1, 1)
    assert isinstance(again, EngineCoreRequest) and again.index == state.index
    assert i32(again.resumed_output_token_ids).tolist() == [5, 6]
    assert again.suspicion == Suspicion(1, 0, 40)  # so that it is not forgotten if this one dies of it, too
    harness.core(1).tokens(state, 2, 7)
    harness.core(1).finish(state, 3, 8)
    deltas = await harness.take(2)
    assert [delta.token_ids for delta in deltas] == [(7,), (8,)]
    assert harness.pool.num_unfinished == 1
    await harness.returns(0)
    assert not await_nothing(harness.core(0))
    assert harness.submit(200).engine == 0  # it has nothing to do
    assert other.engine == 1
    assert harness.sample("octavo:streams_moved_total", engine="0") == 1
    assert harness.metrics.registry.get_sample_value(
        "octavo:engine_restarts_total", {"engine": "0", "cause": "engine_core"}
    )


def await_nothing(core: Core) -> list[ToEngineCore]:
    """What a core is told that should be told nothing."""
    return [message for message in core.received() if not isinstance(message, Ping)]


@pytest.mark.parametrize("keeps_cache", [True, False])
async def test_streams_go_on_in_another_engine_when_workers_die(harness: Harness, keeps_cache: bool) -> None:
    state = harness.submit(0)
    harness.core(0).tokens(state, 0, 5)
    await harness.take(1)
    await harness.hears(0, 1)
    harness.core(0).send(WorkersLost(1, "worker 0 is gone", {state.index: Suspicion(1, 3, 4)}))
    (again,) = await harness.hears(1, 1)
    assert isinstance(again, EngineCoreRequest) and again.suspicion == Suspicion(1, 3, 4)
    assert await harness.hears(0, 1) == [AbortRequests((state.index,))]
    harness.core(0).tokens(state, 1, 6)  # too late
    harness.core(1).tokens(state, 1, 6, 7)
    deltas = await harness.take(2)
    assert [delta.token_ids for delta in deltas] == [(6,), (7,)]
    assert harness.submit(100).engine == 1  # the other one is not ready
    harness.core(0).send(WorkersRestarted(1, (2,), "worker 0 is gone", keeps_cache=keeps_cache))
    await until(lambda: harness.pool.clients[0].is_ready)
    prefix = harness.pool._router.prefix(np.arange(40, dtype=np.int32))
    assert harness.pool._router.cost(0, prefix) == (40 - 2 * BLOCK if keeps_cache else 40)
    assert harness.submit(200).engine == 0


async def test_requests_wait_if_no_engine_is_left_and_the_first_to_return_takes_them(harness: Harness) -> None:
    states = [harness.submit(0), harness.submit(100)]
    harness.supervisors[0].die()
    harness.supervisors[1].die()
    assert not harness.pool.is_ready and harness.pool.dead is None
    states.append(harness.submit(300))
    await harness.returns(1)
    told = await harness.hears(1, 3)
    assert {message.index for message in told if isinstance(message, EngineCoreRequest)} == {
        state.index for state in states
    }
    assert {state.engine for state in states} == {1}


async def test_a_fatal_request_reaches_two_engines_and_then_runs_alone(harness: Harness) -> None:
    fatal, innocent = harness.submit(0), harness.submit(100)
    engines = [fatal.engine]
    for _ in range(MAX_DEATHS):
        harness.supervisors[fatal.engine].die(computing={fatal.index: (39, 40)})
        if fatal.finished:
            break
        engines.append(fatal.engine)
        if fatal.suspicion is not None and fatal.suspicion.num_deaths >= ISOLATE_DEATHS:
            await harness.returns(fatal.engine)
        other = 1 - fatal.engine
        if not harness.pool.clients[other].is_serving:
            await harness.returns(other)
    assert engines == [0, 1, 1, 1]
    (delta,) = await harness.take(1)
    assert delta.error is not None and "repeatedly crashed the engine" in delta.error
    assert not innocent.finished
    with pytest.raises(RequestError, match="repeatedly crashed"):
        harness.submit(0, data_parallel_rank=0)  # no engine accepts it


async def test_aborts_reach_the_engine_that_has_the_request(harness: Harness) -> None:
    states = [harness.submit(0), harness.submit(100)]
    harness.pool.abort(states)
    assert harness.pool.num_unfinished == 0
    for rank, state in enumerate(states):
        assert (await harness.hears(rank, 2))[-1] == AbortRequests((state.index,))
    assert harness.submit(500).engine == 0  # nothing is left of their work


async def test_an_engine_that_is_dead_for_good_leaves_the_others(harness: Harness) -> None:
    state = harness.submit(0)
    for _ in range(MAX_RESTARTS + 2):  # once while it served, then while it loaded
        harness.supervisors[0].die()
    assert harness.pool.clients[0].dead is not None and harness.pool.dead is None and not harness.fatal
    assert state.engine == 1 and not state.finished
    harness.core(1).send(EngineDead(1, "out of memory"))
    await until(lambda: harness.core(1).has_news())
    await asyncio.sleep(0)
    harness.supervisors[1].die(1)
    await until(lambda: bool(harness.fatal))
    assert str(harness.pool.dead) == "out of memory" and state.finished
    with pytest.raises(EngineDeadError):
        harness.submit()


async def test_the_queue_is_that_of_all_engines(harness: Harness) -> None:
    for number in range(8):  # two of each engine run, four wait
        assert not harness.pool.check_queue(("key", ""))
        harness.submit(100 * number, tenant=("key", ""))
    with pytest.raises(RequestError) as error:
        harness.pool.check_queue(("key", ""))
    assert error.value.status == 429
    harness.pool.fail_all("the server is shutting down")
    assert harness.pool.num_unfinished == 0
    with pytest.raises(EngineDeadError, match="shutting down"):
        harness.pool.check_key("key")


async def test_control_messages_go_to_all_engines(harness: Harness) -> None:
    call = asyncio.create_task(harness.pool.call(Ping))
    await asyncio.sleep(0)
    for rank in range(2):
        harness.core(rank).send(UtilityOutput(1, {"num_free": 3 + rank, "is_idle": rank == 0, "device": "cpu"}))
    assert await call == {"num_free": 7, "is_idle": False, "device": "cpu"}


async def test_a_finished_request_leaves_its_output_in_the_cache(harness: Harness) -> None:
    state = harness.submit(0, 16)
    output = EngineCoreOutput(state.index, 0, tuple(range(16, 48)), FinishReason.LENGTH)
    harness.core(0).send(EngineCoreOutputs(1, outputs=(output,)))
    await harness.take(1)
    harness.submit(1000, 100)
    assert harness.submit(0, 47).engine == 0  # 15 tokens to compute, though the other engine is idle
