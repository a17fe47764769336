"""What must not be possible between machines: that strangers take memory, that somebody is not heard any more, that
memory of another life is taken for that of this one."""

from __future__ import annotations

import socket
from typing import Any

import msgspec
import pytest
import zmq

from executor.base import WorkerDiedError
from executor.config import ParallelConfig
from executor.messages import EXIT_MODEL, InitKVCache, WorkerFailed
from executor.nodes.addresses import endpoint_of
from executor.nodes.frames import FRAME_BYTES, in_frames
from executor.nodes.head import DOWN, PREPARING, WAITING
from executor.nodes.key_files import read_key_file
from executor.nodes.keys import Curve
from executor.nodes.messages import NodeStatus, NodeUnknown, ToAgent
from executor.parallel import num_sharers
from tests.null.core_harness import Harness, worker_ready
from tests.null.test_machines import DEADLINE, Machines, key, machines, workers_of
from tests.null.test_multiproc import Peer

__all__ = ["key", "machines"]


def test_long_messages_are_sent_in_parts(machines: Machines) -> None:
    assert [len(part) for part in in_frames(b"a" * (2 * FRAME_BYTES + 1))] == [FRAME_BYTES, FRAME_BYTES, 1]
    assert [bytes(part) for part in in_frames(b"")] == [b""]
    machines.run()
    (theirs,) = (child.launch for child in machines.children if child.launch.parallel.rank == 1)
    peer = Peer(theirs)
    text = "x" * (3 * FRAME_BYTES)
    assert machines.agent is not None
    assert workers_of(machines.agent)._inputs[0].poll(5000, zmq.POLLOUT)
    ours = Peer(next(child.launch for child in machines.children if child.launch is not theirs))
    assert machines.leader._local._inputs[0].poll(5000, zmq.POLLOUT)
    machines.leader.submit(InitKVCache((1,), 1, text))
    machines.until(lambda: bool(peer.inputs.poll(10)))
    assert msgspec.msgpack.decode(peer.inputs.recv(), type=InitKVCache).kv_store == text
    peer.send(WorkerFailed(1, text))
    machines.until(lambda: bool(machines.received))
    assert machines.received == [WorkerFailed(1, text)]
    peer.close()
    ours.close()


def test_a_stranger_cannot_fill_memory_before_it_shows_a_key(machines: Machines) -> None:
    """It is sent away as soon as it announces a long frame, not once the frame is there."""
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
    with socket.create_connection(("127.0.0.1", machines.config.parallel.master_port), DEADLINE) as stranger:
        stranger.sendall(greeting)
        stranger.sendall(b"\x06" + (200 << 20).to_bytes(8, "big"))
        while stranger.recv(4096):  # its greeting, if that, then the end
            pass


def test_an_agent_that_reconnects_is_heard_though_its_last_connection_seems_alive(machines: Machines) -> None:
    """As after a network failure of which only one end knows."""
    context: zmq.Context[Any] = zmq.Context()
    decoder = msgspec.msgpack.Decoder(ToAgent)
    connections = []
    for _ in range(2):
        connection = context.socket(zmq.DEALER)
        connection.setsockopt(zmq.LINGER, 0)
        connection.setsockopt(zmq.IDENTITY, b"the same")
        Curve(read_key_file(str(machines.key))).join(connection)
        connection.connect(endpoint_of("127.0.0.1", machines.config.parallel.master_port))
        connection.send(msgspec.msgpack.encode(NodeStatus()))
        machines.until(lambda: bool(connection.poll(0)))  # noqa: B023
        assert decoder.decode(connection.recv()) == NodeUnknown()
        connections.append(connection)
    for connection in connections:
        connection.close()
    context.term()


def test_strangers_do_not_keep_the_core_or_zeromq_waiting(machines: Machines) -> None:
    members = machines.leader._members
    assert members is not None
    assert members._monitor.getsockopt(zmq.RCVHWM) == 0, "ZeroMQ's thread would wait until events are read"


def test_a_late_answer_of_a_machine_is_not_taken_for_one_to_the_next_attempt(machines: Machines) -> None:
    machines.run()
    leader = machines.leader
    leader.kill()
    leader.start()
    before = leader._life
    assert leader._phase == PREPARING
    leader._lost(WorkerDiedError("machine 2 has started again"))
    assert leader._phase == WAITING
    leader._advance()
    assert leader._life != before
    machines.run()
    assert leader._prepared[1].keys() == {"hidden.1"}


@pytest.mark.parametrize("forgets", [False, True])
def test_a_machine_that_is_lost_while_there_are_no_workers_loses_its_memory(machines: Machines, forgets: bool) -> None:
    """Asleep, the engine may still want what is in the caches."""
    machines.run()
    leader = machines.leader
    leader.kill()
    if forgets:
        leader.forget_memory()
    assert machines.agent is not None and leader._members is not None
    machines.agent._end()
    machines.agent = None
    machines.until(lambda: bool(leader._members and leader._members.missing))
    assert leader._phase == DOWN
    machines.agent = machines.start_agent()
    leader.start()
    if not forgets:
        with pytest.raises(WorkerDiedError) as caught:
            machines.until(lambda: False)
        assert caught.value.loses_memory
        leader.kill()
        leader.start()
    machines.run()


def test_an_engine_core_that_fails_does_not_dismiss_agents(monkeypatch: pytest.MonkeyPatch) -> None:
    """The api starts another one, which needs them."""
    harness = Harness()
    calls: list[str] = []
    monkeypatch.setattr(harness.executor, "kill", lambda: calls.append("kill"))
    monkeypatch.setattr(harness.executor, "shutdown", lambda: calls.append("shutdown"))

    def fail() -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(harness.executor, "start", lambda: None)
    monkeypatch.setattr(harness.core, "step", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        harness.core.run()
    assert calls == ["kill"]


def test_a_machine_with_other_kernels_cannot_take_the_place_of_another() -> None:
    harness = Harness(num_ranks=2)
    harness.run()
    harness.executor.loads_by_itself = False
    harness.executor.inbox.append(WorkerDiedError("machine 1 is gone", loses_memory=True))
    harness.core.step()
    ready = [worker_ready(rank=rank) for rank in range(2)]
    ready[1] = msgspec.structs.replace(ready[1], node_rank=1, kernels="avx2 kernels")
    harness.executor.inbox.append([*ready])
    harness.core.step()
    assert harness.core.exit_code == EXIT_MODEL


def test_ranks_that_share_a_memory() -> None:
    config = ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=3, nnodes=2)
    assert [num_sharers(config, node_rank) for node_rank in range(2)] == [4, 2]
    assert num_sharers(ParallelConfig(tensor_parallel_size=2, num_mirrors=3), 0) == 2
