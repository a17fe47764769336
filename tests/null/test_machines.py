"""Several machines: who may join, what passes between them, and what happens when one is lost. No model, no process."""

from __future__ import annotations

import contextlib
import pickle
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
import zmq

from api.cli import resolve, serve_parser
from api.config import make_config
from api.flags import ConfigError
from api.machines import first_host, place_from
from executor import multiproc
from executor.base import ModelError, WorkerDiedError
from executor.config import ExecutorConfig, ModelConfig, ParallelConfig
from executor.identity import model_digest, program_digest
from executor.messages import EXIT_MODEL, Heartbeat, InitKVCache, WorkerFailed
from executor.multiproc import LISTENER, LocalWorkers
from executor.nodes import agent as agents
from executor.nodes import members
from executor.nodes.addresses import endpoint_of, private_address
from executor.nodes.agent import NodeAgent
from executor.nodes.head import RUNNING, NodesExecutor
from executor.nodes.key_files import create_key_file, read_key_file
from executor.nodes.keys import Curve, Gate
from executor.nodes.messages import NodeHello, NodeStatus
from executor.nodes.worker_duties import WorkerDuties
from executor.parallel import SharedByRanks, awaited_from_afar, leaders, near_place, places
from tests.null.test_multiproc import FakeChild, Peer
from tests.ports import free_port

DEADLINE = 120.0
MESSAGE = InitKVCache((1,), 1)


# -- options


def test_a_key_file(tmp_path: Path) -> None:
    path = tmp_path / "key"
    create_key_file(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(read_key_file(str(path))) == 32
    with pytest.raises(ModelError, match="exists already"):
        create_key_file(path)
    with pytest.raises(ModelError, match="cannot be written: No such file or directory"):
        create_key_file(tmp_path / "no" / "key")
    with pytest.raises(ModelError, match="--cluster-key .*: No such file or directory; octavo cluster-key FILE makes"):
        read_key_file(str(tmp_path / "other"))
    path.write_text("secret")
    with pytest.raises(ModelError, match="--cluster-key .*: not a file that octavo cluster-key has made"):
        read_key_file(str(path))


CLUSTER = {"nnodes": 2, "pipeline_parallel_size": 2, "master_addr": "10.0.0.1", "cluster_key": "key"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cluster_key": ""}, "--nnodes 2 needs --cluster-key FILE"),
        ({"master_addr": ""}, "--nnodes 2 needs --master-addr: the address of machine 0"),
        ({"master_addr": "0.0.0.0"}, "--nnodes 2 needs --master-addr: the address of machine 0"),
        ({"master_addr": "0"}, "--nnodes 2 needs --master-addr: the address of machine 0"),
        ({"master_addr": "[0::0]"}, "--nnodes 2 needs --master-addr: the address of machine 0"),
        ({"node_address": "::"}, "--node-address ::: must be one address of this machine"),
        ({"node_rank": 2}, "--node-rank 2: must be less than --nnodes, which is 2"),
        ({"nnodes": 1, "node_rank": 1}, "--node-rank 1: needs --nnodes"),
        ({"pipeline_parallel_size": 1}, "-parallel-size 2 or more, or --tensor-parallel-size 2 or more"),
        ({"nnodes": 4}, "use --pipeline-parallel-size 4 or more, or --tensor-parallel-size 2 or more"),
        ({"nnodes": 3, "tensor_parallel_size": 4}, "2 pipeline stages cannot have the same number of machines"),
        ({"nnodes": 1, "private_interface": "eth1"}, "--private-interface eth1: .* it needs --nnodes"),
        ({"data_parallel_size": 2}, "with several engines, each has one machine; omit --nnodes"),
        ({"kv_cache_dir": "/kv"}, "--kv-cache-dir keeps the KV cache of one machine"),
        ({"distributed_executor_backend": "simulated", "pipeline_parallel_size": 1}, "workers are processes"),
    ],
)
def test_what_machines_cannot_do_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(CLUSTER | fields)
    make_config(CLUSTER | {"node_rank": 1, "node_address": "10.0.0.2"})


def test_launchers_say_where_a_process_is() -> None:
    slurm = {"SLURM_NNODES": "4", "SLURM_NODEID": "3", "SLURM_JOB_NODELIST": "node[07-09,12],gpu1"}
    assert place_from(slurm, ()) == {"nnodes": 4, "node_rank": 3, "master_addr": "node07"}
    assert place_from(slurm, ("nnodes", "master_addr")) == {"node_rank": 3}
    workers = {"LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "0", "LWS_LEADER_ADDRESS": "m-0.m.default"}
    assert place_from(slurm | workers, ()) == {"nnodes": 2, "node_rank": 0, "master_addr": "m-0.m.default"}
    assert place_from({"SLURM_NNODES": "4"}, ()) == {}
    with pytest.raises(ConfigError, match="SLURM_NODEID: expected a number, got 'x'"):
        place_from(slurm | {"SLURM_NODEID": "x"}, ())
    assert [first_host(names) for names in ("a", "a,b", "n[1,3]", "n[01-02]-x,m")] == ["a", "a", "n1", "n01-x"]


def test_a_leader_without_its_private_interface_says_so(key: Path, tmp_path: Path) -> None:
    leader = NodesExecutor(cluster(key, private_interface="eth99"), str(tmp_path))
    (failure,) = leader.receive()
    assert isinstance(failure, WorkerFailed) and failure.message.startswith("--private-interface eth99: ")
    leader.shutdown()


DEPLOY = Path(__file__).resolve().parents[2] / "docs" / "deploy"


def test_the_files_for_kubernetes_and_slurm() -> None:
    workers, service, policy = yaml.safe_load_all((DEPLOY / "leaderworkerset.yaml").read_text())
    template = workers["spec"]["leaderWorkerTemplate"]
    assert template["restartPolicy"] == "None", "else the leader is restarted with the others"
    labels = []
    for rank, name in enumerate(["leaderTemplate", "workerTemplate"]):
        pod = template[name]
        (container,) = pod["spec"]["containers"]
        program, word, *arguments = container["command"]
        assert (program, word) == ("octavo", "serve")
        environment = {"LWS_GROUP_SIZE": str(template["size"]), "LWS_WORKER_INDEX": str(rank)}
        environment["LWS_LEADER_ADDRESS"] = "octavo-0.octavo.default"
        config, notes = resolve(serve_parser().parse(arguments), environment)
        assert (config.engine.executor.parallel.nnodes, config.engine.executor.parallel.node_rank) == (2, rank)
        assert config.engine.executor.parallel.master_addr == "octavo-0.octavo.default" and not notes
        (mount,), (volume,) = container["volumeMounts"], pod["spec"]["volumes"]
        assert mount["name"] == volume["name"] and config.engine.executor.parallel.cluster_key.startswith(
            mount["mountPath"] + "/"
        )
        labels.append(pod["metadata"]["labels"])
    assert service["spec"]["selector"] == labels[0]
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels[1].items()
    subprocess.run(["bash", "-n", DEPLOY / "slurm.sh"], check=True)


def test_a_private_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    assert private_address("lo") == "127.0.0.1"
    for name in ("none0", "lo" + 20 * "o"):
        with pytest.raises(ModelError, match=f"^--private-interface {name}: has no IPv4 address here: "):
            private_address(name)
    for address in ("10.0.0.1", "100.64.0.1"):  # a private network; a VPN that uses the addresses of carriers
        monkeypatch.setattr("fcntl.ioctl", lambda *_: bytes(20) + socket.inet_aton(address))  # noqa: B023
        assert private_address("lo") == address
    monkeypatch.setattr("fcntl.ioctl", lambda *_: bytes(20) + socket.inet_aton("8.8.8.8"))
    with pytest.raises(ModelError, match=r"^--private-interface lo: 8.8.8.8 is no private address"):
        private_address("lo")


# -- who is where


def test_stages_are_dealt_to_machines() -> None:
    ranks = places(ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=3, nnodes=2))
    assert [each.node_rank for each in ranks] == [0, 0, 0, 0, 1, 1]
    assert [each.local_rank for each in ranks] == [0, 1, 2, 3, 0, 1]
    awaited = [{name: each.rank for name, each in awaited_from_afar(ranks, own).items()} for own in ranks]
    tokens = [{f"tokens.{rank}": 4} for rank in range(4)]
    assert awaited == [*tokens, {"hidden.4": 2}, {"hidden.5": 2}]
    for own in (ranks[:4], ranks[4:]):
        shared = SharedByRanks(own)
        names = [set(shared.of(each)) for each in own]
        assert all("rendezvous" in each for each in names)
        names = [each - {"rendezvous"} for each in names]
        shared.close()
        if own[0].node_rank == 0:
            assert names[0] == {"ranks", "stages", "hidden.2", "hidden.3"}
            assert names[3] == {"ranks", "stages", "hidden.3"}
        else:
            assert names == [{"ranks"}, {"ranks"}]


def test_layers_are_dealt_to_machines() -> None:
    """Two machines for each of two stages; the first has two of three ranks."""
    ranks = places(ParallelConfig(tensor_parallel_size=3, pipeline_parallel_size=2, nnodes=4))
    assert [each.node_rank for each in ranks] == [0, 0, 1, 2, 2, 3]
    assert [each.local_rank for each in ranks] == [0, 1, 0, 0, 1, 0]
    assert [[each.rank for each in leaders(ranks, own)] for own in ranks] == [[0, 2]] * 3 + [[3, 5]] * 3
    awaited = [{name: each.rank for name, each in awaited_from_afar(ranks, own).items()} for own in ranks]
    assert awaited == [
        {"tokens.0": 3, "columns.0.2": 2},
        {"tokens.1": 3},
        {"tokens.2": 3, "columns.2.0": 0},
        {"hidden.3": 0, "columns.3.5": 5},
        {"hidden.4": 0},
        {"hidden.5": 0, "columns.5.3": 3},
    ]
    assert [(place.tp_rank, place.tp_size) for place in (near_place(ranks, own) for own in ranks)] == [
        *[(0, 2), (1, 2), (0, 1)] * 2
    ]
    for node, names in enumerate([{"ranks"}, set(), {"ranks"}, set()]):
        shared = SharedByRanks([each for each in ranks if each.node_rank == node])
        assert all(set(shared.of(each)) - {"rendezvous"} == names for each in ranks if each.node_rank == node)
        shared.close()


# -- a leader and an agent


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    create_key_file(path)
    return path


def cluster(key: Path, node_rank: int = 0, port: int = 0, **fields: Any) -> ExecutorConfig:
    place = {
        "master_addr": "127.0.0.1",
        "master_port": port or free_port(),
        "cluster_key": str(key),
        "node_rank": node_rank,
    }
    parallel = ParallelConfig(**{"nnodes": 2, "pipeline_parallel_size": 2, **place, **fields})
    return ExecutorConfig(model=ModelConfig(model=str(key.parent / f"model{node_rank}")), parallel=parallel)


def create_agent(config: ExecutorConfig, folder: Path) -> NodeAgent:
    secret = read_key_file(config.parallel.cluster_key)
    digests = program_digest().hex(), model_digest(config.model)
    return NodeAgent(config.parallel, digests, secret, WorkerDuties(config, secret, str(folder)))


def workers_of(agent: NodeAgent | None) -> LocalWorkers:
    """Of its machine."""
    assert agent is not None and isinstance(agent._duties, WorkerDuties)
    return agent._duties._local


class Machines:
    """A leader and an agent, which take turns, and their workers, which do nothing by themselves."""

    def __init__(self, folder: Path, key: Path) -> None:
        self.config = cluster(key)
        self.folder, self.key = folder, key
        self.children: list[FakeChild] = []
        self.leader = self.start_leader()
        self.agent: NodeAgent | None = self.start_agent()
        self.received: list[object] = []

    def start_leader(self) -> NodesExecutor:
        executor = NodesExecutor(self.config, str(self.folder))
        executor.start()
        return executor

    def start_agent(self, **fields: Any) -> NodeAgent:
        return create_agent(cluster(self.key, 1, self.config.parallel.master_port, **fields), self.folder / "1")

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE
        while not condition():
            assert time.monotonic() < deadline
            if self.agent is not None:
                self.agent._turn()
            self.received += self.leader.receive()

    def run(self) -> None:
        self.until(lambda: self.leader._phase == RUNNING)

    def close(self) -> None:
        self.leader.shutdown()
        if self.agent is not None:
            self.agent._end()


@pytest.fixture
def machines(tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machines]:
    (tmp_path / "1").mkdir()
    children: list[FakeChild] = []

    class Child(FakeChild):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            children.append(self)

        def begin_to_kill(self) -> None:
            pass

        def kill(self) -> None:
            pass

    monkeypatch.setattr(multiproc, "ChildProcess", Child)
    monkeypatch.setattr(agents, "PING_INTERVAL", 0.02)
    monkeypatch.setattr(members, "PING_INTERVAL", 0.02)
    monkeypatch.setattr(members, "GOODBYE_TIMEOUT", 0.0)  # they are in one thread
    result = Machines(tmp_path, key)
    result.children = children
    yield result
    result.close()


def test_messages_reach_workers_and_come_back(machines: Machines) -> None:
    machines.run()
    launches = sorted((child.launch for child in machines.children), key=lambda launch: launch.parallel.rank)
    assert [launch.parallel for launch in launches] == places(machines.config.parallel)
    assert [Path(launch.config.model.model).name for launch in launches] == ["model0", "model1"]
    network = launches[0].network
    assert network is not None and network == launches[1].network
    assert set(network.endpoints) == {"hidden.1", "tokens.0"}
    assert [name for launch in launches for name in launch.descriptors] == [
        *("kv", f"{LISTENER}tokens.0"),
        *("kv", f"{LISTENER}hidden.1"),
    ]
    assert machines.leader.worker_pids() == (1234, 1234) and set(machines.leader.remote_samplers()) == {1}
    peers = [Peer(launch) for launch in launches]
    assert machines.agent is not None
    for local in (machines.leader._local, workers_of(machines.agent)):
        assert local._inputs[0].poll(5000, zmq.POLLOUT)
    machines.leader.submit(MESSAGE)
    for rank, peer in enumerate(peers):
        machines.until(lambda: bool(peer.inputs.poll(10)))  # noqa: B023
        assert msgspec.msgpack.decode(peer.inputs.recv(), type=InitKVCache) == MESSAGE
        peer.send(Heartbeat(rank, 7))
    machines.until(lambda: len(machines.received) == 2)
    assert {each.rank for each in machines.received if isinstance(each, Heartbeat)} == {0, 1}
    for peer in peers:
        peer.close()


def lives_again(machines: Machines, message: str, *, loses_memory: bool) -> None:
    """Something is wrong; the core then starts the workers again, with success."""
    with pytest.raises(WorkerDiedError, match=message) as caught:
        machines.until(lambda: False)
    assert caught.value.loses_memory == loses_memory
    machines.leader.kill()
    machines.leader.start()
    assert machines.leader.worker_pids() == ()
    if machines.agent is None:
        machines.agent = machines.start_agent()
    machines.run()
    assert machines.received == []


def test_a_worker_of_another_machine_dies(machines: Machines) -> None:
    machines.run()
    (theirs,) = (child for child in machines.children if child.launch.parallel.rank == 1)
    theirs.exit_code = -9
    assert machines.agent is not None
    memory = workers_of(machines.agent)._kv_memory
    lives_again(machines, r"^worker 1 \(pid 1234\) ended with exit code -9 on machine 1 \(", loses_memory=False)
    assert memory and workers_of(machines.agent)._kv_memory is memory


def test_an_agent_dies(machines: Machines) -> None:
    machines.run()
    assert machines.agent is not None
    machines.agent._end()
    machines.agent = None
    lives_again(machines, r"^machine 1 \(.*, 127.0.0.1\) is gone$", loses_memory=True)


def test_a_machine_that_is_silent_is_lost_and_may_come_back(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    machines.run()
    agent, machines.agent = machines.agent, None
    monkeypatch.setattr(members, "NODE_TIMEOUT", 0.1)
    with pytest.raises(WorkerDiedError, match=r"^machine 1 \(.*\) has said nothing for \d s$"):
        machines.until(lambda: False)
    monkeypatch.undo()
    machines.agent = agent
    machines.leader.kill()
    machines.leader.start()


def test_an_agent_that_hears_nothing_ends_its_workers_and_joins_again(
    machines: Machines, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The leader stands still, or its cable is pulled. The cache stays with the agent."""
    machines.run()
    agent = machines.agent
    assert agent is not None
    monkeypatch.setattr(agents, "NODE_TIMEOUT", 0.1)
    deadline = time.monotonic() + DEADLINE
    while workers_of(agent).is_up:
        assert time.monotonic() < deadline
        agent._turn()
    assert "the leader has said nothing for " in caplog.text
    monkeypatch.setattr(agents, "NODE_TIMEOUT", DEADLINE)
    lives_again(machines, r"^machine 1 \(.*\) has started again$", loses_memory=False)


def test_a_leader_without_its_address_waits_for_it(
    machines: Machines, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise ModelError("--private-interface eth1: has no IPv4 address here")

    machines.run()
    machines.leader.kill()
    monkeypatch.setattr("executor.nodes.head.open_listeners", refuse)
    machines.leader.start()
    for _ in range(3):
        machines.received += machines.leader.receive()
    assert caplog.text.count("--private-interface eth1: has no IPv4 address here; waiting for it") == 1
    monkeypatch.undo()
    machines.run()
    assert machines.received == []


def test_a_new_leader_is_joined_and_knows_nothing_of_old_memory(machines: Machines) -> None:
    machines.run()
    agent = machines.agent
    assert agent is not None and workers_of(agent)._kv_memory
    session = agent._session
    leader = machines.leader
    assert leader._members is not None
    leader._members.close()  # as if it were killed
    leader._members = None
    leader.shutdown()
    machines.leader = machines.start_leader()
    machines.until(lambda: agent._session != session)
    assert not workers_of(agent).is_up and not workers_of(agent)._kv_memory
    machines.run()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"nnodes": 3, "pipeline_parallel_size": 3}, "--nnodes 3: machine 0 was started with --nnodes 2"),
        ({"nnodes": 2, "node_rank": 2}, "--node-rank 2: must be from 1 to 1"),
    ],
)
def test_a_machine_that_does_not_fit_is_refused(machines: Machines, fields: dict[str, Any], message: str) -> None:
    machines.run()
    assert machines.agent is not None
    machines.agent._end()
    machines.agent = None
    parallel = {"node_rank": 1, **fields}
    config = cluster(machines.key, parallel.pop("node_rank"), machines.config.parallel.master_port, **parallel)
    agent = create_agent(config, machines.folder / "1")
    with pytest.raises(ModelError, match=f"^machine 0 does not admit this one: {message}"):
        for _ in range(1000):
            agent._turn()
            try:
                machines.leader.receive()
            except WorkerDiedError:
                machines.leader.kill()
                machines.leader.start()
    agent._end()


def test_other_files_or_another_program_are_refused(machines: Machines) -> None:
    assert machines.leader._members is not None
    objection = machines.leader._members._objection
    assert machines.agent is not None
    code, model = machines.agent._digests
    hello = NodeHello(1, 2, code, model, "127.0.0.1", "host", 1)
    assert objection(hello) is None
    assert "version of Octavo" in str(objection(msgspec.structs.replace(hello, code="0")))
    assert "files of the model" in str(objection(msgspec.structs.replace(hello, model="0")))


def test_a_leader_that_cannot_wait_for_others_says_so(key: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = cluster(key, port=int(taken.getsockname()[1]))
        executor = NodesExecutor(config, str(tmp_path))
        executor.start()
        (failure,) = executor.receive()
    assert isinstance(failure, WorkerFailed) and failure.exit_code == EXIT_MODEL
    assert "cannot wait for other machines at tcp://127.0.0.1" in failure.message
    executor.shutdown()


# -- strangers


def test_strangers_are_not_heard(machines: Machines, tmp_path: Path) -> None:
    port = machines.config.parallel.master_port
    forged = [pickle.dumps(print), b"\0" * 64, b"GET / HTTP/1.1\r\n\r\n", bytes(range(256)) * 10]
    for data in forged:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(data)
    context: zmq.Context[Any] = zmq.Context()
    other = tmp_path / "other"
    create_key_file(other)
    sockets = []
    for curve in (None, Curve(read_key_file(str(other)))):
        stranger = context.socket(zmq.DEALER)
        stranger.setsockopt(zmq.LINGER, 0)
        if curve is not None:
            curve.join(stranger)
        stranger.connect(endpoint_of("127.0.0.1", port))
        with contextlib.suppress(zmq.Again):  # it has been turned away already, and would wait for ever
            stranger.send(msgspec.msgpack.encode(NodeStatus()), zmq.NOBLOCK)
        sockets.append(stranger)
    machines.run()
    assert not any(stranger.poll(0) for stranger in sockets), "they would have been asked who they are"
    for stranger in sockets:
        stranger.close()
    context.term()


def test_one_end_of_the_key_is_not_enough() -> None:
    """A client that knows the server's public key, but not the clients' secret one."""
    ours, theirs = Curve(b"a" * 32), Curve(b"b" * 32)
    context: zmq.Context[Any] = zmq.Context()
    gate = Gate(context, ours)
    server, client, good = context.socket(zmq.PULL), context.socket(zmq.PUSH), context.socket(zmq.PUSH)
    ours.accept(server)
    port = server.bind_to_random_port("tcp://127.0.0.1")
    ours.join(client)
    client.setsockopt(zmq.CURVE_PUBLICKEY, theirs._client[0])
    client.setsockopt(zmq.CURVE_SECRETKEY, theirs._client[1])
    ours.join(good)
    for socket_, data in ((client, b"bad"), (good, b"good")):
        socket_.setsockopt(zmq.LINGER, 0)
        socket_.connect(f"tcp://127.0.0.1:{port}")
        with contextlib.suppress(zmq.Again):  # who has been turned away already would wait for ever
            socket_.send(data, zmq.NOBLOCK if socket_ is client else 0)
    assert server.poll(int(1000 * DEADLINE)) and server.recv() == b"good"
    assert not server.poll(50)
    for socket_ in (server, client, good):
        socket_.close()
    gate.close()
    context.term()


def test_an_agent_with_another_key_says_so(
    machines: Machines, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert machines.agent is not None
    machines.agent._end()
    other = tmp_path / "other"
    create_key_file(other)
    machines.agent = create_agent(cluster(other, 1, machines.config.parallel.master_port), tmp_path / "1")
    agent = machines.agent
    machines.until(lambda: "keys do not match" in agent._obstacle)
    assert not agent._has_joined
