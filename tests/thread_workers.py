"""Workers that are threads of the test's process: ranks and pipeline stages with the kernels and links of a server."""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_core.config import CacheConfig, DeviceConfig, EngineConfig, ExecutorConfig, ModelConfig, ParallelConfig
from engine_core.core import EngineCore, create_executor
from engine_core.messages import EngineReady, ToEngineCore
from executor.base import REGISTRY
from executor.liveness import ProcessSample
from executor.messages import FromWorker, ToWorker, WorkerShutdown
from executor.multiproc import Network
from executor.nodes.head import open_listeners
from executor.nodes.links import NetworkLinks
from executor.parallel import RANKS, ParallelState, SharedByRanks, places
from executor.worker import Worker
from tests.null.core_harness import Harness

ANSWER_TIMEOUT = 300.0
"""Seconds that a rank may take, the compiler of the kernels included."""


class _Rank:
    """A worker's thread and what it is sent."""

    def __init__(
        self,
        place: ParallelState,
        config: ExecutorConfig,
        send: Callable[[FromWorker], None],
        descriptors: dict[str, int],
        links: NetworkLinks | None = None,
    ) -> None:
        self.inbox: deque[ToWorker] = deque()
        self.event = os.eventfd(0, os.EFD_NONBLOCK)
        place = replace(place, memory_fd=descriptors.get(RANKS, -1))
        self.links = links
        self.worker = Worker(place, config, send, descriptors, links)
        self.thread = threading.Thread(target=self.worker.run, args=(self._receive,), daemon=True)
        self.thread.start()

    def submit(self, message: ToWorker) -> None:
        self.inbox.append(message)
        os.eventfd_write(self.event, 1)

    def _receive(self, wake_fds: Sequence[int]) -> ToWorker | None:
        poller = select.poll()
        for descriptor in (self.event, *wake_fds):
            poller.register(descriptor, select.POLLIN)
        while not self.inbox:
            if any(descriptor != self.event for descriptor, _ in poller.poll()):
                return None
            os.eventfd_read(self.event)
        return self.inbox.popleft()


class ThreadExecutor:
    """See ``executor/base.py``."""

    def __init__(self, config: ExecutorConfig, ipc_dir: str, log_level: str = "info") -> None:
        self.num_ranks = config.parallel.world_size
        self._config = config
        self._answers: deque[FromWorker] = deque()
        self._event = os.eventfd(0, os.EFD_NONBLOCK)
        self._ranks: list[_Rank] = []

    def start(self) -> None:
        ranks = places(self._config.parallel)
        nodes = range(self._config.parallel.nnodes)
        self._shared = [SharedByRanks([each for each in ranks if each.node_rank == node]) for node in nodes]
        interface = self._config.parallel.private_interface
        opened = [open_listeners(ranks, node, "127.0.0.1", interface) for node in nodes]
        listeners = {name: found for each in opened for name, found in each.items()}
        endpoints = {name: endpoint for name, (_, endpoint) in listeners.items()}
        network = Network(cluster_key=bytes(32), addresses=("127.0.0.1",) * len(nodes), endpoints=endpoints)
        sockets = {name: descriptor for name, (descriptor, _) in listeners.items()}
        for place in ranks:
            links = NetworkLinks(network, ranks, place, sockets) if len(nodes) > 1 else None
            given = self._shared[place.node_rank].of(place)
            self._ranks.append(_Rank(place, self._config, self._answer, given, links))

    def _answer(self, message: FromWorker) -> None:
        self._answers.append(message)
        os.eventfd_write(self._event, 1)

    def submit(self, message: ToWorker) -> None:
        for rank in self._ranks:
            rank.submit(message)

    def receive(self) -> list[FromWorker]:
        messages = []
        while self._answers:
            messages.append(self._answers.popleft())
        return messages

    def wait(self, *others: Any) -> None:
        """Waits for an answer, or for something else to become readable."""
        ready, _, _ = select.select([self._event, *others], [], [], ANSWER_TIMEOUT)
        assert ready, "no rank answers"
        if self._event in ready:
            os.eventfd_read(self._event)

    def poll_fds(self) -> list[Any]:
        return []

    def worker_pids(self) -> tuple[int, ...]:
        return ()

    def remote_samplers(self) -> Mapping[int, Callable[[], ProcessSample | None]]:
        return {}

    def shutdown(self) -> None:
        for rank in self._ranks:
            rank.submit(WorkerShutdown())
        for rank in self._ranks:
            rank.thread.join()
            os.close(rank.event)
        for rank in self._ranks:  # others may have waited for a message that was still under way
            if rank.links is not None:
                rank.links.close()
        self._ranks = []
        for shared in self._shared:
            shared.close()

    def kill(self) -> None:
        self.shutdown()

    def forget_memory(self) -> None:
        pass


class Engine(Harness):
    """An engine core and its workers, in one process."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__()
        with pytest.MonkeyPatch.context() as patch:
            for name in ("mp", "nodes"):
                patch.setitem(REGISTRY, name, "tests.thread_workers:ThreadExecutor")
            workers = create_executor(config, "", "info")
        assert isinstance(workers, ThreadExecutor)
        self.workers = workers
        self.core = EngineCore(config, self.workers, self, engine_epoch=1)
        self.core._start_workers()
        self.run_until(lambda: bool(self.messages(EngineReady)))

    def wait(self, fds: Sequence[Any], timeout: float | None) -> list[ToEngineCore] | None:
        if timeout != 0 and not self.inbox:
            self.workers.wait(*fds)
        messages, self.inbox = self.inbox, []
        return messages

    def run_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            assert self.core.exit_code is None, self.sent[-1]
            self.core.step()

    def finish(self, indices: Sequence[int]) -> list[list[int]]:
        """The tokens of requests, once they are done."""
        self.run_until(lambda: set(indices) <= self.reasons.keys())
        return [self.outputs[index] for index in indices]


@contextmanager
def engine(
    model: Path,
    num_ranks: int = 1,
    num_stages: int = 1,
    num_blocks: int | None = None,
    nnodes: int = 1,
    interface: str = "",
    **fields: Any,
) -> Iterator[Engine]:
    """An engine with workers of one thread each. ``fields``: more of ``ExecutorConfig``."""
    cache = CacheConfig(kv_cache_memory=4 << 20, num_gpu_blocks_override=num_blocks)
    executor = ExecutorConfig(
        model=ModelConfig(model=str(model), dtype="float32", max_model_len=256),
        parallel=ParallelConfig(
            tensor_parallel_size=num_ranks,
            pipeline_parallel_size=num_stages,
            nnodes=nnodes,
            private_interface=interface,
        ),
        device=DeviceConfig(num_threads=1),
        check_every_step=True,
        **fields,
    )
    num_threads = torch.get_num_threads()
    result = Engine(EngineConfig(cache=cache, executor=executor))
    try:
        yield result
    finally:
        result.core.close()
        torch.set_num_threads(num_threads)
