"""Engines on other machines: who may join, what passes, and what happens when one is lost. No model, no process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq

from api.config import make_config
from api.flags import ConfigError
from engine_core import replica_duties
from engine_core.config import EngineConfig
from engine_core.last_work import SIZE
from engine_core.launch import EngineCoreLaunch, engine_identity
from engine_core.replica_duties import ReplicaDuties
from engine_core.replicas import WAITS, Engines, Replicas
from executor import identity
from executor.base import ModelError
from executor.config import ExecutorConfig, ModelConfig, SpeculativeConfig
from executor.identity import code_digest, model_digest, program_digest
from executor.nodes import agent as agents
from executor.nodes import members
from executor.nodes.agent import NodeAgent
from executor.nodes.frames import FRAME_BYTES
from executor.nodes.key_files import read_key_file
from executor.nodes.messages import NodeHello
from executor.nodes.worker_duties import with_files_of
from tests.null.test_machines import DEADLINE, cluster, key

__all__ = ["key"]

HEAD = {
    "data_parallel_size": 4,
    "data_parallel_size_local": 1,
    "data_parallel_address": "10.0.0.1",
    "cluster_key": "key",
}
HYBRID = {
    "data_parallel_size": 4,
    "data_parallel_size_local": 2,
    "data_parallel_start_rank": 2,
    "data_parallel_hybrid_lb": True,
}
OTHER = HEAD | {"headless": True, "data_parallel_size_local": 2, "data_parallel_start_rank": 1}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (HEAD | {"data_parallel_address": ""}, "engines on other machines need --data-parallel-address"),
        (HEAD | {"data_parallel_address": "0.0.0.0"}, "engines on other machines need --data-parallel-address"),
        (HEAD | {"cluster_key": ""}, "engines on other machines need --cluster-key FILE"),
        (HEAD | {"distributed_executor_backend": "inline"}, "engines on other machines have workers in processes"),
        (HEAD | {"enable_expert_parallel": True}, "the engines of --data-parallel-size 4 do not share experts"),
        (HEAD | {"enable_lora": True}, "--enable-lora: adapters are files of one machine"),
        (HEAD | {"data_parallel_size_local": 0, "data_parallel_rank": 1}, "--data-parallel-size-local 0: needs"),
        (HEAD | {"data_parallel_size_local": 0, "data_parallel_size": 1}, "--data-parallel-size-local 0: needs"),
        (HEAD | {"data_parallel_start_rank": 1}, "--data-parallel-start-rank 1: needs --headless"),
        (OTHER | {"data_parallel_start_rank": None}, "--headless needs --data-parallel-start-rank"),
        (OTHER | {"data_parallel_start_rank": 3}, "engines are numbered from 0 to 3"),
        (OTHER | {"data_parallel_size_local": 0}, "engines are numbered from 0 to 3"),
        (OTHER | {"data_parallel_address": ""}, "engines on other machines need --data-parallel-address"),
        (HYBRID | {"data_parallel_start_rank": 3}, "engines are numbered from 0 to 3"),
        (HYBRID | {"data_parallel_size_local": None}, "--data-parallel-hybrid-lb needs --data-parallel-size-local"),
        (HYBRID | {"data_parallel_size_local": 0}, "--data-parallel-hybrid-lb needs --data-parallel-size-local"),
        (HYBRID | {"headless": True}, "--data-parallel-hybrid-lb: each machine serves its own engines; omit --headles"),
        (HYBRID | {"data_parallel_rank": 1}, "each machine serves its own engines; omit --data-parallel-rank 1"),
        ({"headless": True}, "--headless needs --data-parallel-size, of which this machine runs some, or --nnodes"),
        (
            {
                "headless": True,
                "nnodes": 2,
                "pipeline_parallel_size": 2,
                "master_addr": "10.0.0.1",
                "cluster_key": "key",
            },
            "--headless: machine 0 serves the API",
        ),
    ],
)
def test_what_is_missing_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(fields)


def test_how_many_engines_are_here() -> None:
    for fields, count in (
        (HEAD, 1),
        (HEAD | {"data_parallel_size_local": 0}, 0),
        (HEAD | {"data_parallel_size_local": None}, 4),
        (OTHER, 2),
        (OTHER | {"data_parallel_size_local": None}, 3),
        (OTHER | {"data_parallel_size_local": None, "data_parallel_start_rank": 0}, 4),
        ({}, 1),
    ):
        assert make_config(fields)[0].num_local_replicas == count, fields
    assert not make_config(HEAD)[1] and not make_config(OTHER)[1]
    (note,) = make_config(HEAD | {"data_parallel_size_local": None})[1]
    assert note.startswith("--data-parallel-address 10.0.0.1 (all engines are on this machine")
    parallel = make_config(OTHER)[0].replica_engine.executor.parallel
    assert (parallel.master_addr, parallel.master_port, parallel.nnodes) == ("10.0.0.1", 29550, 1)


def test_who_may_join() -> None:
    roster = Engines(1, 6)

    def hello(rank: int, count: int, size: int = 6) -> NodeHello:
        return NodeHello(rank, size, "", "", "", "", 1, num_engines=count)

    joined: list[int] = []
    for rank, count, message in (
        (1, 0, "--nnodes: the server wants whole engines"),
        (1, 2, None),
        (0, 1, "engines on other machines than the server's are 1 to 5"),
        (5, 2, "engines on other machines than the server's are 1 to 5"),
        (2, 2, "--data-parallel-start-rank 2: another machine has engines from 1 on"),
        (3, 3, None),
        (1, 2, None),
    ):
        objection = roster.objection(hello(rank, count), joined)
        assert objection is None if message is None else message in str(objection)
        if objection is None:
            roster.admitted(hello(rank, count))
            joined.append(rank)
    assert "--data-parallel-size 4: the server was started with 6" in str(roster.objection(hello(1, 1, 4), []))
    assert [roster.machine_of(engine, joined) for engine in range(6)] == [None, 1, 1, 3, 3, 3]
    assert roster.objection(hello(3, 1), joined) is None, "if it is the same machine; members.py knows"
    assert roster.machine_of(5, joined) == 3, "as long as that has not joined"
    assert roster.missing([3]) == [1, 2] and roster.missing(joined) == []
    assert "--headless --data-parallel-start-rank 1" in roster.reminder([1, 2])
    assert [roster.title(hello(1, count)) for count in (1, 2)] == [
        "the machine of engine 1",
        "the machine of engines 1 to 2",
    ]


# -- a server and an agent


class FakeCore:
    """An engine core: a socket, and an end when it is told to."""

    def __init__(self, launch: EngineCoreLaunch) -> None:
        self.launch = launch
        self.pid = 1234
        self.exit_code: int | None = None
        self.has_hung_up = False
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.IDENTITY, engine_identity(launch.engine_epoch))
        self.socket.connect(launch.address)

    def fileno(self) -> int:
        return 0

    def poll(self) -> int | None:
        return self.exit_code

    def end(self, code: int) -> None:
        """All that it has said is on its way then."""
        if self.exit_code is None:
            self._context.destroy(linger=60_000)
            self.exit_code = code

    def begin_to_kill(self) -> None:
        self.end(-9)

    def hang_up(self) -> None:
        self.has_hung_up = True
        self.end(0)

    def wait(self, timeout: float | None = None) -> int:
        assert self.exit_code is not None
        return self.exit_code


class Heard:
    """What the server hears of an engine."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.exits: list[int | None] = []


class Machines:
    """A server with engine 0, which is not here, and an agent with engines 1 and 2, which take turns."""

    def __init__(self, folder: Path, key: Path, cores: list[FakeCore]) -> None:
        self.folder, self.key, self.cores = folder, key, cores
        self.config = EngineConfig(executor=cluster(key, nnodes=1, pipeline_parallel_size=1))
        self.server = Replicas(self.config, 1, 3)
        self.heard = {rank: Heard() for rank in (1, 2)}
        for rank, heard in self.heard.items():
            self.server.add(rank, heard.frames.append, heard.exits.append)
        self.agent: NodeAgent | None = self.start_agent()

    def start_agent(self) -> NodeAgent:
        port = self.config.executor.parallel.master_port
        executor = cluster(self.key, 1, port, nnodes=3, pipeline_parallel_size=1)
        executor = msgspec.structs.replace(executor, device=msgspec.structs.replace(executor.device, num_threads=3))
        secret = read_key_file(str(self.key))
        digests = program_digest().hex(), model_digest(executor.model)
        duties = ReplicaDuties(EngineConfig(executor=executor), 1, 2, 3, str(self.folder))
        return NodeAgent(executor.parallel, digests, secret, duties)

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE
        while not condition():
            assert time.monotonic() < deadline
            if self.agent is not None:
                self.agent._turn()
            self.server.turn()

    def run(self) -> None:
        for rank in self.heard:
            self.server.start(rank, 1, "info")
        assert self.server.sample(1) == WAITS, "no time counts before its machine is there"
        self.until(lambda: len(self.cores) == 2)

    def close(self) -> None:
        self.server.close()
        if self.agent is not None:
            self.agent._end()


@pytest.fixture
def machines(
    tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Machines]:
    cores: list[FakeCore] = []

    def launch(launch: EngineCoreLaunch) -> FakeCore:
        cores.append(FakeCore(launch))
        return cores[-1]

    monkeypatch.setattr(replica_duties, "launch_engine_core", launch)
    monkeypatch.setattr(agents, "PING_INTERVAL", 0.02)
    monkeypatch.setattr(members, "PING_INTERVAL", 0.02)
    monkeypatch.setattr(members, "GOODBYE_TIMEOUT", 0.0 if "goodbye" not in request.node.name else DEADLINE)
    result = Machines(tmp_path, key, cores)
    yield result
    result.close()


def test_engine_cores_start_with_what_is_the_machines_own(machines: Machines) -> None:
    machines.run()
    launches = sorted((core.launch for core in machines.cores), key=lambda launch: launch.replica)
    assert [launch.replica for launch in launches] == [0, 1]
    for index, launch in enumerate(launches):
        executor = launch.config.executor
        assert Path(executor.model.model).name == "model1" and executor.device.num_threads == 3
        assert (launch.config.num_replicas, executor.device.first_index, launch.engine_epoch) == (2, index, 1)
        assert executor.parallel.cluster_key == "" and Path(launch.ipc_dir).stat().st_mode & 0o777 == 0o700


def test_a_draft_model_is_the_machines_own() -> None:
    def config(name: str, draft: str | None) -> ExecutorConfig:
        model = None if draft is None else ModelConfig(model=draft)
        speculative = SpeculativeConfig(method="draft_model", num_speculative_tokens=2, draft=model)
        return ExecutorConfig(model=ModelConfig(model=name), speculative=speculative)

    found = with_files_of(config("/theirs", "/theirs/draft"), config("/own", "/own/draft"))
    assert found == config("/own", "/own/draft")
    with pytest.raises(ModelError, match="the server has a draft model; this machine needs the same option"):
        with_files_of(config("/theirs", "/theirs/draft"), config("/own", None))


def test_machines_have_the_core_in_common_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine core of another version would say what the server does not understand."""
    monkeypatch.setattr(identity, "_ROOT", tmp_path)
    for folder in ("engine_core", "executor"):
        (tmp_path / folder).mkdir()
    before = code_digest(), program_digest()
    (tmp_path / "engine_core" / "messages.py").write_text("new")
    assert code_digest() == before[0] and program_digest() != before[1]
    (tmp_path / "executor" / "messages.py").write_text("new")
    assert code_digest() != before[0]


def test_messages_pass_both_ways(machines: Machines) -> None:
    machines.run()
    core = next(core for core in machines.cores if core.launch.replica == 1)
    core.socket.send(b"hello")
    machines.until(lambda: machines.heard[2].frames == [b"hello"])
    long = bytes(3 * FRAME_BYTES)
    machines.server.send(2, long)
    machines.until(lambda: bool(core.socket.poll(10)))
    assert core.socket.recv() == long and machines.heard[1].frames == []


def test_an_engine_core_ends(machines: Machines) -> None:
    """All that it said is heard before."""
    machines.run()
    core = next(core for core in machines.cores if core.launch.replica == 0)
    words = np.zeros(SIZE // 8, np.int64)
    words[:6] = 0, 1, 0, 77, 5, 6
    Path(core.launch.record_path).write_bytes(words.tobytes())
    for number in range(1000):
        core.socket.send(b"%d" % number)
    core.end(1)
    heard = machines.heard[1]
    machines.until(lambda: bool(heard.exits))
    assert heard.exits == [1] and heard.frames == [b"%d" % number for number in range(1000)]
    assert machines.server.last_work(1).computing == {77: (5, 6)}
    assert machines.heard[2].exits == [], "the other engine goes on"
    machines.server.start(1, 2, "info")
    machines.until(lambda: len(machines.cores) == 3)
    assert machines.cores[2].launch.engine_epoch == 2
    machines.server.kill(1)
    machines.until(lambda: heard.exits == [1, -9])


def test_a_machine_is_lost_and_another_takes_its_place(machines: Machines) -> None:
    machines.run()
    agent, machines.agent = machines.agent, None
    assert agent is not None
    agent._end()
    machines.until(lambda: all(heard.exits == [None] for heard in machines.heard.values()))
    for rank in machines.heard:
        machines.server.start(rank, 2, "info")
        machines.server.send(rank, b"lost: nobody is there")
    machines.agent = machines.start_agent()
    machines.until(lambda: len(machines.cores) == 4)
    assert {core.launch.engine_epoch for core in machines.cores[2:]} == {2}


def test_goodbye(machines: Machines) -> None:
    machines.run()
    agent = machines.agent
    assert agent is not None
    thread = threading.Thread(target=machines.server.close)  # which waits for the agent to hear it
    thread.start()
    deadline = time.monotonic() + DEADLINE
    while agent._exit_code is None:
        assert time.monotonic() < deadline
        agent._turn()
    machines.agent = None
    agent._end()
    thread.join()
    assert agent._exit_code == 0 and all(core.has_hung_up for core in machines.cores)


def test_a_wrong_kind_of_machine_is_refused(machines: Machines) -> None:
    """It was started with --nnodes."""
    assert machines.agent is not None
    machines.agent._duties.num_engines = 0
    with pytest.raises(ModelError, match="does not admit this one: --nnodes: the server wants whole engines"):
        machines.until(lambda: False)
