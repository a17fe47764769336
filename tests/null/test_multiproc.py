"""Worker processes as the engine core sees them: who is gone, and what they said before."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest
import zmq

from executor import multiproc, process
from executor.base import WorkerDiedError
from executor.config import ExecutorConfig, ParallelConfig
from executor.messages import Heartbeat, InitKVCache, KVCacheReady, ModelRunnerOutput, WorkerFailed
from executor.multiproc import MultiprocExecutor, WorkerLaunch
from executor.parallel import places

ROOT = Path(__file__).resolve().parents[2]


def wait_for_title(pid: int) -> None:
    """Waits until a child has named itself, that is until it is tied to its parent's life."""
    deadline = time.monotonic() + 60
    while not Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"octavo"):
        assert time.monotonic() < deadline
        time.sleep(0.01)


class FakeChild:
    """A process that ends when it is told to."""

    last: FakeChild

    def __init__(self, module: str, payload: bytes, *, descriptors: Sequence[int] = ()) -> None:
        self.launch = msgspec.msgpack.decode(payload, type=WorkerLaunch)
        self.pid = 1234
        self.exit_code: int | None = None
        FakeChild.last = self

    def poll(self) -> int | None:
        return self.exit_code

    def fileno(self) -> int:
        return 0

    def hang_up(self) -> None:
        pass

    def wait(self, timeout: float | None = None) -> int:
        return self.exit_code or 0


class Peer:
    """The worker's sockets."""

    def __init__(self, launch: WorkerLaunch) -> None:
        self._context = zmq.Context()
        self.inputs = self._context.socket(zmq.PULL)
        self.outputs = self._context.socket(zmq.PUSH)
        self.inputs.connect(launch.input_address)
        self.outputs.connect(launch.output_address)

    def send(self, message: object) -> None:
        self.outputs.send(msgspec.msgpack.encode(message))

    def close(self) -> None:
        self._context.destroy(linger=2000)


@pytest.fixture
def executor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MultiprocExecutor]:
    monkeypatch.setattr(multiproc, "ChildProcess", FakeChild)
    monkeypatch.setattr(multiproc, "LAST_WORDS_TIMEOUT", 600_000)  # whoever waits for nothing is noticed
    result = MultiprocExecutor(ExecutorConfig(), str(tmp_path))
    result.start()
    yield result
    result.shutdown()
    assert not list(tmp_path.iterdir())


def receive(executor: MultiprocExecutor) -> list[object]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if messages := executor.receive():
            return list(messages)
    raise AssertionError("nothing came")


def test_a_worker_that_hung_up_is_dead(executor: MultiprocExecutor) -> None:
    message = InitKVCache((1,), 1)
    with pytest.raises(WorkerDiedError, match="worker 0 .* closed its connection"):
        executor.submit(message)
    peer = Peer(FakeChild.last.launch)
    peer.send(KVCacheReady(0))
    assert receive(executor) == [KVCacheReady(0)]
    assert executor._inputs[0].poll(60_000, zmq.POLLOUT)
    executor.submit(message)
    assert msgspec.msgpack.decode(peer.inputs.recv(), type=InitKVCache) == message
    peer.close()
    deadline = time.monotonic() + 60
    with pytest.raises(WorkerDiedError, match="worker 0 .* closed its connection"):
        while time.monotonic() < deadline:
            executor.submit(message)


def test_each_rank_is_told_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[WorkerLaunch] = []

    class Child(FakeChild):
        def __init__(self, module: str, payload: bytes, *, descriptors: Sequence[int] = ()) -> None:
            super().__init__(module, payload, descriptors=descriptors)
            launches.append(self.launch)

    monkeypatch.setattr(multiproc, "ChildProcess", Child)
    config = ExecutorConfig(parallel=ParallelConfig(tensor_parallel_size=2))
    executor = MultiprocExecutor(config, str(tmp_path))
    executor.start()
    assert executor.num_ranks == 2 and len(set(executor.poll_fds())) > 1
    assert [launch.parallel for launch in launches] == places(config.parallel)
    assert len({launch.input_address for launch in launches}) == 2
    peers = [Peer(launch) for launch in launches]
    message = InitKVCache((1,), 1)
    for socket in executor._inputs:
        assert socket.poll(60_000, zmq.POLLOUT)
    executor.submit(message)
    for rank, peer in enumerate(peers):
        assert msgspec.msgpack.decode(peer.inputs.recv(), type=InitKVCache) == message
        peer.send(Heartbeat(rank, 7))
        assert receive(executor) == [Heartbeat(rank, 7)]
        peer.close()
    executor.shutdown()


@pytest.mark.timeout(200)
def test_a_killed_worker_is_noticed_at_once_and_its_results_are_used(executor: MultiprocExecutor) -> None:
    peer = Peer(FakeChild.last.launch)
    peer.send(ModelRunnerOutput(1))
    peer.close()
    FakeChild.last.exit_code = -9
    received: list[object] = []
    with pytest.raises(WorkerDiedError, match="exit code -9"):
        while True:
            received += executor.receive()
    assert received in ([], [ModelRunnerOutput(1)])


@pytest.mark.timeout(200)
def test_the_reason_of_a_worker_that_ended_by_itself_is_waited_for(
    executor: MultiprocExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = Peer(FakeChild.last.launch)
    failure = WorkerFailed(0, "no such weights", 78)
    FakeChild.last.exit_code = 78
    monkeypatch.setattr(multiproc, "LAST_WORDS_TIMEOUT", 60_000)
    timer = threading.Timer(0.1, peer.send, (failure,))
    timer.start()
    assert executor.receive() == [failure]
    timer.join()
    peer.close()
    monkeypatch.setattr(multiproc, "LAST_WORDS_TIMEOUT", 0)
    with pytest.raises(WorkerDiedError, match="exit code 78"):
        executor.receive()


def test_a_child_without_a_parent_ends_before_it_does_anything() -> None:
    code = "from executor.process import become_child; become_child('orphan')"
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE)
    assert child.wait(120) == 0
    assert child.stdin is not None
    child.stdin.close()
    orphan = subprocess.run([sys.executable, "-c", code], cwd=ROOT, input=b"", timeout=120, check=False)
    assert orphan.returncode == 1


def test_a_prepared_child_gets_its_start_message_once() -> None:
    process.prepare_child("json.tool")
    child = process.prepared_child("json.tool", b"")
    assert child is not None and process.prepared_child("json.tool", b"") is None
    child.kill()


def test_descriptors_reach_a_child_with_its_start_message(tmp_path: Path) -> None:
    (tmp_path / "child_that_writes.py").write_text(
        "import os, sys\n"
        "from executor.process import read_descriptors, read_payload\n"
        "assert read_payload() == b'go'\n"
        "first, second = read_descriptors()\n"
        "os.write(first, b'one'), os.write(second, b'two')\n"
        "assert read_descriptors() == []\n"
    )
    environment = {"PYTHONPATH": str(tmp_path)}
    files = [os.memfd_create("first"), os.memfd_create("second")]
    child = process.ChildProcess("child_that_writes", b"go", environment, descriptors=files)
    assert child.wait(120) == 0  # both at once would write at the same place: such files have one offset for all
    process.prepare_child("child_that_writes", environment)
    prepared = process.prepared_child("child_that_writes", b"go", files)
    assert prepared is not None and prepared.wait(120) == 0
    assert [os.pread(file, 9, 0) for file in files] == [b"oneone", b"twotwo"]
    for file in files:
        os.close(file)


def test_a_prepared_child_that_is_dead_or_discarded_is_not_used() -> None:
    process.prepare_child("json.tool")
    process.discard_child("json.tool")
    assert process.prepared_child("json.tool", b"") is None
    process.discard_child("json.tool")
    process.prepare_child("json.tool")
    process._prepared["json.tool"]._process.kill()
    process._prepared["json.tool"]._process.wait()
    assert process.prepared_child("json.tool", b"") is None


def test_an_engine_core_that_is_never_needed_ends_without_a_word() -> None:
    child = subprocess.Popen(process.child_command("engine_core"), stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdin is not None and child.stderr is not None
    wait_for_title(child.pid)
    child.stdin.close()
    assert child.wait(120) == 0
    assert child.stderr.read() == b""
    child.stderr.close()
