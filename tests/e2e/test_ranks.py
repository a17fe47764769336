"""Two ranks or two stages that share a model: whichever dies or stops, streams go on with the tokens of one rank."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq

from engine_core.config import CacheConfig, DeviceConfig, EngineConfig, ExecutorConfig, ModelConfig, ParallelConfig
from engine_core.core import EngineCore, create_executor
from engine_core.messages import EngineReady, ResolvedParams, ToEngineCore, WorkersLost
from tests.e2e.server import Server
from tests.e2e.test_faults import NUM_STREAMS, run_streams
from tests.null.core_harness import Harness, make_request

pytestmark = pytest.mark.alone  # ranks wait for each other

DEADLINE = 120.0
MAX_TOKENS = 120


class Ranks(Harness):
    """An engine core in this thread, and workers in processes."""

    def __init__(self, model: Path, ipc_dir: Path, num_ranks: int, num_stages: int) -> None:
        config = EngineConfig(
            cache=CacheConfig(kv_cache_memory=64 << 20),
            executor=ExecutorConfig(
                model=ModelConfig(model=str(model), dtype="float32", max_model_len=512),
                parallel=ParallelConfig(tensor_parallel_size=num_ranks, pipeline_parallel_size=num_stages),
                device=DeviceConfig(num_threads=1),
            ),
        )
        super().__init__()
        self.workers = create_executor(config, str(ipc_dir), "info")
        self.core = EngineCore(config, self.workers, self, engine_epoch=1)
        self.core._start_workers()

    def wait(self, fds: Sequence[Any], timeout: float | None) -> list[ToEngineCore] | None:
        poller = zmq.Poller()
        for fd in fds:
            poller.register(fd, zmq.POLLIN)
        poller.poll(100 if timeout is None else min(100, int(timeout * 1000)))
        messages, self.inbox = self.inbox, []
        return messages

    def run_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE
        while not condition():
            assert self.core.exit_code is None and time.monotonic() < deadline, self.sent[-1]
            self.core.step()

    def generate(self, disturb: Callable[[], None] | None = None) -> list[list[int]]:
        """The tokens of some requests that run together; once they are under way, something happens."""
        self.run_until(lambda: bool(self.messages(EngineReady)))
        first = len(self.outputs)
        indices = range(first, first + 6)
        for index in indices:
            params = ResolvedParams(temperature=index % 2 * 0.8, seed=index - first, max_tokens=MAX_TOKENS)
            prompt = [(7 * (index - first) + i * i) % 250 + 3 for i in range(20)]
            self.inbox.append(make_request(index, prompt, params=params))
        if disturb is not None:
            self.run_until(lambda: all(len(self.outputs.get(index, [])) >= 20 for index in indices))
            assert not self.reasons.keys() & set(indices), "the requests were too short for this test"
            disturb()
        self.run_until(lambda: set(indices) <= self.reasons.keys())
        return [self.outputs[index] for index in indices]


@contextmanager
def ranks(model: Path, ipc_dir: Path, count: int, num_stages: int = 1) -> Iterator[Ranks]:
    result = Ranks(model, ipc_dir, count, num_stages)
    try:
        yield result
    finally:
        result.core.close()
        result.workers._context.term()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def expected(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """The tokens of one rank."""
    with ranks(tiny_model, tmp_path_factory.mktemp("ipc"), 1) as one:
        tokens = one.generate()
    assert [len(output) for output in tokens] == [MAX_TOKENS] * 6
    return tokens


KILL, STOP = (signal.SIGKILL, "ended with exit code -9"), (signal.SIGSTOP, "has been stopped for")


def check_faults(two: Ranks, expected: list[list[int]], *faults: tuple[tuple[signal.Signals, str], int]) -> None:
    """Kills or stops ranks, one after another."""
    assert two.generate() == expected
    assert len(two.workers.worker_pids()) == 2 and not two.messages(WorkersLost)
    for number, ((what, reason), rank) in enumerate(faults, start=1):
        before = two.workers.worker_pids()
        assert two.generate(lambda: os.kill(before[rank], what)) == expected  # noqa: B023
        lost = two.messages(WorkersLost)
        assert len(lost) == number and f"worker {rank} (pid {before[rank]}) {reason}" in lost[-1].reason
        assert not set(two.workers.worker_pids()) & set(before)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine_core.worker_watch.STOPPED_TIMEOUT", 1.5)


@pytest.mark.timeout(300)
def test_either_rank_may_die_or_stop(expected: list[list[int]], tiny_model: Path, tmp_path: Path) -> None:
    with ranks(tiny_model, tmp_path, 2) as two:
        check_faults(two, expected, (KILL, 0), (STOP, 1))


@pytest.mark.timeout(300)
def test_a_stage_may_die(expected: list[list[int]], tiny_model: Path, tmp_path: Path) -> None:
    with ranks(tiny_model, tmp_path, 1, 2) as two:
        check_faults(two, expected, (KILL, 1))


@pytest.mark.timeout(300)
def test_streams_of_a_server_survive_either_rank(tiny_model: Path) -> None:
    flags = ["--model", str(tiny_model), "--dtype", "float32", "--kv-cache-memory", "64MiB", "--max-model-len", "512"]
    with Server(*flags, "--num-threads", "1", "-tp", "2") as server:
        undisturbed = asyncio.run(run_streams(server))
        assert len(undisturbed) == NUM_STREAMS
        streams = asyncio.run(run_streams(server, signal.SIGKILL, "octavo worker 1", "octavo worker 0"))
        assert [stream.tokens for stream in streams] == [stream.tokens for stream in undisturbed]
        assert 1 <= server.metric("octavo:engine_restarts_total") <= 2  # two deaths at once are one restart
