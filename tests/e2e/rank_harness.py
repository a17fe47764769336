"""An engine core in the test's thread, with workers in processes: of this machine, or of several."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import zmq

from engine_core.config import (
    CacheConfig,
    DeviceConfig,
    EngineConfig,
    ExecutorConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
)
from engine_core.core import EngineCore, create_executor
from engine_core.messages import EngineReady, ResolvedParams, ToEngineCore
from tests.e2e.server import PATIENCE, ROOT
from tests.null.core_harness import Harness, make_request

DEADLINE = 120.0
MAX_TOKENS = 120


class Ranks(Harness):
    """An engine core in this thread, and workers in processes."""

    def __init__(self, model: Path, ipc_dir: Path, parallel: ParallelConfig, device: str = "cpu") -> None:
        config = EngineConfig(
            cache=CacheConfig(kv_cache_memory=64 << 20),
            scheduler=SchedulerConfig(max_num_seqs=8),
            executor=ExecutorConfig(
                model=ModelConfig(model=str(model), dtype="float32", max_model_len=512),
                parallel=parallel,
                device=DeviceConfig(device=device, num_threads=1),
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

    def generate(self, disturb: Callable[[], None] | None = None, max_tokens: int = MAX_TOKENS) -> list[list[int]]:
        """The tokens of some requests that run together; once they are under way, something happens."""
        self.run_until(lambda: bool(self.messages(EngineReady)))
        first = len(self.outputs)
        indices = range(first, first + 6)
        for index in indices:
            params = ResolvedParams(temperature=index % 2 * 0.8, seed=index - first, max_tokens=max_tokens)
            prompt = [(7 * (index - first) + i * i) % 250 + 3 for i in range(20)]
            self.inbox.append(make_request(index, prompt, params=params))
        if disturb is not None:
            self.run_until(lambda: all(len(self.outputs.get(index, [])) >= max_tokens // 6 for index in indices))
            assert not self.reasons.keys() & set(indices), "the requests were too short for this test"
            disturb()
        self.run_until(lambda: set(indices) <= self.reasons.keys())
        return [self.outputs[index] for index in indices]


@contextmanager
def ranks(model: Path, ipc_dir: Path, count: int = 1, num_stages: int = 1, **fields: Any) -> Iterator[Ranks]:
    """An engine with some ranks. ``fields``: more of ``ParallelConfig``, and ``device``."""
    device = fields.pop("device", "cpu")
    parallel = ParallelConfig(tensor_parallel_size=count, pipeline_parallel_size=num_stages, **fields)
    result = Ranks(model, ipc_dir, parallel, device)
    try:
        yield result
    finally:
        result.core.close()


class Agent:
    """``octavo serve`` on another machine."""

    def __init__(self, *flags: str, prefix: Sequence[str] = (), env: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "api", "serve", *flags],
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            self.lines += lines

    def wait(self) -> int:
        """Waits for its end. Returns the exit code."""
        code = self.process.wait(PATIENCE)
        self._reader.join()
        return code

    def kill(self) -> None:
        self.process.kill()
        self.wait()
