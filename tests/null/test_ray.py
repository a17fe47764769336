"""Machines from Ray: what is asked of it, and what happens when agents end. Without Ray, see ``tests/stand_ins``."""

from __future__ import annotations

import errno
import importlib
import os
import re
import shlex
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from api.cli import resolve, serve_parser
from api.config import ServerConfig, make_config
from api.errors import EngineDeadError
from api.flags import ConfigError
from api.ray_machines import _placement, of_machine, with_machines
from executor.base import ModelError
from executor.nodes import ray_driver, ray_machines
from executor.nodes.key_files import HeldKey, read_key_file
from executor.nodes.ray_driver import AgentKeeper, load_ray
from executor.nodes.ray_messages import AgentLaunch, RayPlacement

STAND_INS = Path(__file__).resolve().parents[1] / "stand_ins"
RAY = {"distributed_executor_backend": "ray", "pipeline_parallel_size": 3}
OPTION = "--distributed-executor-backend ray"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pipeline_parallel_size": 1}, "Ray provides machines for pipeline stages; add --pipeline-parallel-size"),
        ({"node_rank": 1}, "--node-rank 1: with --distributed-executor-backend ray, machine 0 alone is started"),
        ({"ray_address": "ray://10.0.0.1:10001"}, "the server runs on a machine of the cluster.* without ray://"),
        ({"distributed_executor_backend": "mp"}, "--ray-address auto: needs --distributed-executor-backend ray or"),
        ({"nnodes": 4}, "--nnodes 4: 3 pipeline stages cannot have the same number of machines"),
        ({"data_parallel_size": 2}, "--nnodes 3: with several engines, each has one machine"),
        ({"master_addr": "0.0.0.0"}, "--nnodes 3 needs --master-addr"),
    ],
)
def test_what_ray_cannot_do_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(RAY | {"ray_address": "auto"} | fields)


ENGINES = {"data_parallel_backend": "ray", "data_parallel_size": 4}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data_parallel_size": 1}, "--data-parallel-backend ray: Ray provides machines for engines that are not on"),
        ({"data_parallel_size_local": 4}, "--data-parallel-backend ray: Ray provides machines for engines that are"),
        ({"data_parallel_rank": 1}, "--data-parallel-rank: with --data-parallel-backend ray, one server is started"),
        ({"headless": True, "data_parallel_start_rank": 1}, "--headless: with --data-parallel-backend ray, one server"),
        (
            {"data_parallel_hybrid_lb": True, "data_parallel_size_local": 2},
            "--data-parallel-hybrid-lb: with --data-par",
        ),
        ({"ray_address": "ray://10.0.0.1:10001"}, "the server runs on a machine of the cluster.* without ray://"),
        ({"data_parallel_address": "::"}, "engines on other machines need --data-parallel-address"),
        ({"distributed_executor_backend": "ray"}, "--distributed-executor-backend ray: Ray provides machines for pipe"),
        ({"distributed_executor_backend": "inline"}, "engines on other machines have workers in processes"),
        ({"enable_lora": True}, "--enable-lora: adapters are files of one machine"),
    ],
)
def test_what_ray_cannot_do_for_engines(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(ENGINES | {"ray_address": "auto"} | fields)


@pytest.mark.parametrize(
    ("local", "machines"),
    [(None, [(1, 1), (2, 1), (3, 1)]), (0, [(0, 1), (1, 1), (2, 1), (3, 1)]), (2, [(2, 2)]), (3, [(3, 1)])],
)
def test_machines_have_as_many_engines_as_this_one(local: int | None, machines: list[tuple[int, int]]) -> None:
    """All options of such a machine are those of ``octavo serve --headless``."""
    given = {"data_parallel_size": 4, "num_threads": 3}
    config = make_config(ENGINES | given | {"data_parallel_size_local": local})[0]
    placement = _placement(config, b"secret")
    assert (placement.nnodes, placement.num_cpus) == (1 + len(machines), 3 * max(1, 1 if local is None else local))
    assert [launch.title for launch in placement.agents] == [f"the machine of engine {first}" for first, _ in machines]
    theirs = {"data_parallel_address": "10.0.0.1", "cluster_key": "/key"}
    for launch, (first, count) in zip(placement.agents, machines, strict=True):
        own = msgspec.msgpack.decode(launch.config, type=ServerConfig)
        found = of_machine(own, launch.node_rank, "10.0.0.1", "/key")
        place = {"headless": True, "data_parallel_start_rank": first, "data_parallel_size_local": count}
        assert found == make_config(given | theirs | place)[0]
    server = {"data_parallel_size_local": 1 if local is None else local}
    assert of_machine(config, None, "10.0.0.1", "/key") == make_config(given | theirs | server)[0]


def test_there_is_a_machine_for_each_stage() -> None:
    for given, nnodes in (({}, 3), ({"nnodes": 2}, 2)):
        config, _ = make_config(RAY | given)
        assert config.engine.executor.parallel.nnodes == nnodes
    own = of_machine(config, 1, "10.0.0.1", "/key")
    theirs = {"nnodes": 2, "node_rank": 1, "master_addr": "10.0.0.1", "cluster_key": "/key"}
    assert own == make_config({"pipeline_parallel_size": 3} | theirs)[0], "an agent's options are those of octavo serve"


def test_a_key_that_is_in_no_folder(tmp_path: Path) -> None:
    key = HeldKey()
    assert read_key_file(key.path) == key.secret
    copy = HeldKey(key.secret)
    assert read_key_file(copy.path) == key.secret
    for each in (key, copy):
        each.close()
        with pytest.raises(ModelError, match="No such file"):
            read_key_file(each.path)


# -- placing


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "ray"}
    for name in before:
        del sys.modules[name]
    monkeypatch.syspath_prepend(str(STAND_INS))
    importlib.invalidate_caches()
    yield load_ray(OPTION)
    for name in [name for name in sys.modules if name.split(".")[0] == "ray"]:
        del sys.modules[name]
    sys.modules.update(before)


class Agents:
    """Instead of agents: each ends when it is told to, with an exit code or an error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._lock = threading.Lock()
        self.launches: list[AgentLaunch] = []
        self.endings: dict[int, int | Exception] = {}
        """By number of the agent, in the order of their starts."""
        monkeypatch.setattr(ray_driver, "AgentActor", lambda: self)

    def run(self, message: bytes) -> int:
        with self._lock:
            number = len(self.launches)
            self.launches.append(msgspec.msgpack.decode(message, type=AgentLaunch))
        while number not in self.endings:
            os.sched_yield()
        ending = self.endings[number]
        if isinstance(ending, Exception):
            raise ending
        return ending


@pytest.fixture
def agents(monkeypatch: pytest.MonkeyPatch) -> Iterator[Agents]:
    monkeypatch.setattr(ray_driver, "TURN", 0.01)
    monkeypatch.setattr(ray_driver, "SHORT_TURN", 0.001)
    result = Agents(monkeypatch)
    yield result
    result.endings = dict.fromkeys(range(100), 0)  # threads end


AGENTS = tuple(
    AgentLaunch(config=b"", node_rank=rank, master_addr="", title=f"machine {rank}", folder="/", secret=b"secret")
    for rank in (1, 2)
)
PLACEMENT = RayPlacement(option=OPTION, address="", nnodes=3, num_cpus=4, num_gpus=2, agents=AGENTS)


def until(keeper: AgentKeeper, condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        keeper.turn()
    raise AssertionError


def test_agents_are_placed_on_machines_of_their_own(ray: Any, agents: Agents, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "num_nodes", 3)
    keeper = AgentKeeper(ray, PLACEMENT)
    keeper.connect()
    keeper.place()
    until(keeper, lambda: len(agents.launches) == 2)
    assert sorted(each.node_rank for each in agents.launches) == [1, 2]
    assert {each.master_addr for each in agents.launches} == {"127.0.0.1"} == {keeper.address}
    strategies = [actor.options["scheduling_strategy"] for actor in ray.actors]
    assert [each.bundle for each in strategies] == [1, 2]
    group = strategies[0].group
    assert group.strategy == "STRICT_SPREAD" and group.bundles == [{"node:127.0.0.1": 0.001}, {"CPU": 4}, {"CPU": 4}]
    assert all((actor.options["num_cpus"], actor.options["num_gpus"]) == (4, 0) for actor in ray.actors)


def test_agents_take_gpus_where_there_are_any(ray: Any, agents: Agents, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would hide them otherwise."""
    monkeypatch.setattr(ray, "num_nodes", 3)
    monkeypatch.setattr(ray, "num_gpus", 8)
    keeper = AgentKeeper(ray, PLACEMENT)
    keeper.connect()
    keeper.place()
    until(keeper, lambda: len(agents.launches) == 2)
    assert ray.actors[0].options["scheduling_strategy"].group.bundles[1:] == [{"CPU": 4, "GPU": 2}] * 2
    assert all(actor.options["num_gpus"] == 2 for actor in ray.actors)
    assert keeper._too_few(0).endswith("each with 4 of its CPUs and 2 of its GPUs; ray status shows what is taken")


@pytest.mark.parametrize(
    ("fields", "num_gpus"),
    [
        (RAY, 1),
        (RAY | {"device": "cpu"}, 0),
        (RAY | {"pipeline_parallel_size": 5, "tensor_parallel_size": 2, "nnodes": 3}, 4),
        (RAY | {"pipeline_parallel_size": 1, "tensor_parallel_size": 5, "nnodes": 2}, 3),
        (ENGINES | {"data_parallel_size": 4, "data_parallel_size_local": 2, "tensor_parallel_size": 2}, 4),
    ],
)
def test_gpus_of_an_agent(fields: dict[str, Any], num_gpus: int) -> None:
    assert _placement(make_config(fields)[0], b"secret").num_gpus == num_gpus


def test_an_agent_that_ends_is_started_again_later_each_time(
    ray: Any, agents: Agents, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [1000.0]
    monkeypatch.setattr(ray, "num_nodes", 3)
    keeper = AgentKeeper(ray, PLACEMENT, lambda: now[0])
    keeper.connect()
    keeper.place()
    until(keeper, lambda: len(agents.launches) == 2)
    now[0] += 100
    agents.endings[0] = ray.exceptions.RayError("The actor died unexpectedly before finishing this task.\n\tclass")
    until(keeper, lambda: len(agents.launches) == 3)
    assert agents.launches[2] == agents.launches[0], "at once: it had run for long"
    assert re_search(caplog, "machine [12]: The actor died unexpectedly before finishing this task.; Ray starts")
    agents.endings[2] = 78
    until(keeper, lambda: bool(keeper._waiting))
    assert keeper._waiting[0].start_at == now[0] + 1 and len(agents.launches) == 3
    assert re_search(caplog, "its agent ended with exit code 78; Ray starts another in 1 s")
    now[0] += 1
    until(keeper, lambda: len(agents.launches) == 4)
    agents.endings[3] = 78
    until(keeper, lambda: bool(keeper._waiting))
    assert keeper._waiting[0].start_at == now[0] + 2
    assert [actor.is_killed for actor in ray.actors].count(True) == 3


def re_search(caplog: pytest.LogCaptureFixture, pattern: str) -> bool:
    return any(re.search(pattern, record.getMessage()) for record in caplog.records)


def test_too_few_machines_and_no_room(
    ray: Any, agents: Agents, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(ray_driver, "TURN", 0.0)
    now = [0.0]

    def clock() -> float:
        now[0] += 1.0
        return now[0]

    too_few = "the Ray cluster has 2 of 3 machines; ray start --address=127.0.0.1:6379 on another adds it"
    keeper = AgentKeeper(ray, PLACEMENT, clock)
    keeper.connect()
    with pytest.raises(ModelError, match=f"^--distributed-executor-backend ray: {too_few}$"):
        keeper.place()
    assert 300 <= now[0] < 320
    said = [record.getMessage() for record in caplog.records if "waiting for machines" in record.getMessage()]
    assert set(said) == {f"waiting for machines: {too_few}"} and len(said) == 60
    monkeypatch.setattr(ray, "num_nodes", 3)
    monkeypatch.setattr(ray.util, "has_room", False)
    with pytest.raises(
        ModelError, match="Ray has no room for 2 agents on machines other than this one, each with 4 of"
    ):
        AgentKeeper(ray, PLACEMENT, clock).place()
    assert not agents.launches


def test_no_cluster(ray: Any) -> None:
    placement = msgspec.structs.replace(PLACEMENT, address="192.0.2.1:6379")
    message = (
        r"^--ray-address 192.0.2.1:6379: cannot join a Ray cluster \(Failed to connect to Ray cluster at "
        r"192.0.2.1:6379\); ray start --head begins one here$"
    )
    with pytest.raises(ModelError, match=message):
        AgentKeeper(ray, placement).connect()


def test_ray_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        ModelError,
        match=r"^--data-parallel-backend ray: Ray is not installed; pip install 'octavo\[ray\]' on all machines",
    ):
        load_ray("--data-parallel-backend ray")


@pytest.mark.parametrize(
    ("module", "message"), [("no_ray", "Ray is not installed"), ("broken_ray", "Ray's driver has failed")]
)
def test_the_server_says_so(monkeypatch: pytest.MonkeyPatch, module: str, message: str) -> None:
    """The process that asks Ray is a real one, without Ray."""
    config = make_config(RAY)[0]
    monkeypatch.setattr(ray_machines, "DRIVER_MODULE", f"tests.stand_ins.{module}")
    with pytest.raises(EngineDeadError, match=message) as caught, with_machines(config):
        raise AssertionError
    assert caught.value.exit_code == 78


def test_no_process_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(ray_machines, "ChildProcess", fail)
    message = "^--distributed-executor-backend ray: Resource temporarily unavailable$"
    with pytest.raises(EngineDeadError, match=message), with_machines(make_config(RAY)[0]):
        raise AssertionError


def test_what_an_agent_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    placements: list[RayPlacement] = []

    class Machines:
        def __init__(self, placement: RayPlacement) -> None:
            placements.append(placement)
            self.is_open = True

        def start(self) -> str:
            return "10.0.0.1"

        def close(self) -> None:
            self.is_open = False

    monkeypatch.setattr("api.ray_machines.RayMachines", Machines)
    config = make_config(RAY | {"api_key": ["a"], "admin_api_key": ["b"], "num_threads": 8, "ray_address": "h:1"})[0]
    with with_machines(config) as own:
        secret = read_key_file(own.engine.executor.parallel.cluster_key)
        assert own == of_machine(config, None, "10.0.0.1", own.engine.executor.parallel.cluster_key)
    (placement,) = placements
    assert (placement.address, placement.nnodes, placement.num_cpus) == ("h:1", 3, 8)
    assert [(each.node_rank, each.secret, each.master_addr) for each in placement.agents] == [
        (1, secret, ""),
        (2, secret, ""),
    ]
    theirs = msgspec.msgpack.decode(placement.agents[0].config, type=ServerConfig)
    assert theirs == msgspec.structs.replace(config, api_key=[], admin_api_key=[])
    with with_machines(make_config(RAY | {"cluster_key": "/key"})[0]) as own:
        assert own.engine.executor.parallel.cluster_key == "/key"
    assert placements[1].agents[0].secret == b"", "each machine has a file of its own"
    with with_machines(make_config({})[0]) as own:
        assert own == make_config({})[0] and len(placements) == 2


DEPLOY = Path(__file__).resolve().parents[2] / "docs" / "deploy"


def arguments_of(command: list[str]) -> ServerConfig:
    program, word, *arguments = command
    assert (program, word) == ("octavo", "serve")
    config, notes = resolve(serve_parser().parse(arguments), {})
    assert not notes and config.engine.executor.distributed_executor_backend == "ray"
    return config


def test_the_file_for_kuberay() -> None:
    job, service = yaml.safe_load_all((DEPLOY / "kuberay.yaml").read_text())
    spec = job["spec"]
    cluster = spec["rayClusterSpec"]
    parallel = arguments_of(shlex.split(spec["entrypoint"])).engine.executor.parallel
    (workers,) = cluster["workerGroupSpecs"]
    assert parallel.nnodes == 1 + workers["replicas"] and cluster["authOptions"]["mode"] == "token"
    head, worker = cluster["headGroupSpec"], workers
    assert head["rayStartParams"]["num-cpus"] == "0" and worker["rayStartParams"]["num-cpus"] == "1"
    assert service["spec"]["selector"] == head["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] != worker["template"]["metadata"]["labels"]


def test_the_file_for_compose() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    leader, worker = compose["services"]["leader"], compose["services"]["worker"]
    assert arguments_of(leader["command"]).engine.executor.parallel.nnodes == 2
    shell, flag, script, name = leader["entrypoint"]
    assert (shell, flag, name) == ("bash", "-c", "--")
    port = re.search(r"ray start --head --port=(\d+) ", script)
    assert port is not None and f"--address=leader:{port[1]}" in worker["entrypoint"]
    for service in (leader, worker):
        (secret,) = service["secrets"]
        assert (
            service["environment"]["RAY_AUTH_TOKEN_PATH"] == f"/run/secrets/{secret}" and secret in compose["secrets"]
        )
        assert service["volumes"][0].partition(":")[0] in compose["volumes"]
