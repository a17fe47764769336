"""Workers in separate processes, one per device, connected over ZeroMQ."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time

import msgspec
import zmq

from executor.base import WORKER_MODULE, WorkerDiedError
from executor.config import Config, ExecutorConfig
from executor.log import get_logger
from executor.messages import FromWorker, ToWorker, WorkerShutdown
from executor.parallel import ParallelState, SharedByRanks, about_ranks, places, split_cores
from executor.process import ChildProcess, prepared_child

logger = get_logger()

LAST_WORDS_TIMEOUT = 500
"""Milliseconds to wait for the last message of a worker that exited with an error."""
SHUTDOWN_TIMEOUT = 2.0
"""Seconds that the workers together have to exit."""


class WorkerLaunch(Config, frozen=True):
    """The start message of a worker process."""

    parallel: ParallelState
    config: ExecutorConfig
    input_address: str
    output_address: str
    log_level: str = "info"
    descriptors: tuple[str, ...] = ()
    """Names of the descriptors that come with the message, in order. ``kv``: the memory of the KV cache;
    others: see ``SharedByRanks``."""
    cores: tuple[int, ...] = ()
    """The cores that the worker runs on; empty: all that it may use."""


class MultiprocExecutor:
    """Starts worker processes and exchanges messages with them. See ``executor/base.py``."""

    def __init__(self, config: ExecutorConfig, ipc_dir: str, log_level: str = "info") -> None:
        self.num_ranks = config.parallel.world_size
        self._config = config
        self._ipc_dir = ipc_dir
        self._log_level = log_level
        self._context = zmq.Context()
        self._life = 0
        self._inputs: list[zmq.Socket[bytes]] = []
        self._output: zmq.Socket[bytes] | None = None
        self._children: list[ChildProcess] = []
        self._kv_memory: dict[int, int] = {}
        """By rank: a file in memory for the KV cache. It outlives the worker, who alone writes it."""
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromWorker)

    def start(self) -> None:
        self._life += 1  # new addresses: nothing from an earlier life can reach us
        output_address = f"ipc://{self._ipc_dir}/{self._life}.out"
        self._output = self._bind(zmq.PULL, output_address)
        config = self._config if self._life == 1 else msgspec.structs.replace(self._config, memory_share=None)
        ranks = places(config.parallel)
        cores: list[tuple[int, ...]] = [()] * len(ranks)
        shared = SharedByRanks(ranks)
        if self._config.parallel.num_shares > 1:
            cores = split_cores(len(ranks))
            if self._life == 1:
                logger.info("%s", about_ranks(cores))
        for parallel in ranks:
            input_address = f"ipc://{self._ipc_dir}/{self._life}.{parallel.rank}.in"
            self._inputs.append(self._bind(zmq.PUSH, input_address))
            given = self._descriptors(parallel.rank) | shared.of(parallel)
            launch = WorkerLaunch(
                parallel=parallel,
                config=config,
                input_address=input_address,
                output_address=output_address,
                log_level=self._log_level,
                descriptors=tuple(given),
                cores=cores[parallel.rank],
            )
            payload = msgspec.msgpack.encode(launch)
            descriptors = tuple(given.values())
            child = prepared_child(WORKER_MODULE, payload, descriptors)
            self._children.append(child or ChildProcess(WORKER_MODULE, payload, descriptors=descriptors))
        shared.close()

    def _descriptors(self, rank: int) -> dict[str, int]:
        """What a rank's worker gets to map, by name."""
        if rank not in self._kv_memory:
            self._kv_memory[rank] = os.memfd_create(f"octavo kv {rank}", os.MFD_CLOEXEC)
        return {"kv": self._kv_memory[rank]}

    def _bind(self, kind: int, address: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        socket.set_hwm(0)
        socket.bind(address)
        return socket

    def submit(self, message: ToWorker) -> None:
        frame = self._encoder.encode(message)
        for rank, socket in enumerate(self._inputs):
            try:
                socket.send(frame, zmq.NOBLOCK)
            except zmq.Again:  # queues are unbounded, so the other end is gone
                raise WorkerDiedError(f"worker {rank} (pid {self._children[rank].pid}) closed its connection") from None

    def receive(self) -> list[FromWorker]:
        messages = self._drain()
        if messages:
            return messages
        for rank, child in enumerate(self._children):
            code = child.poll()
            if code is not None:
                assert self._output is not None
                if code > 0:  # it exited by itself, and its last message may still be in transit
                    self._output.poll(LAST_WORDS_TIMEOUT)
                messages = self._drain()
                if messages:
                    return messages
                raise WorkerDiedError(f"worker {rank} (pid {child.pid}) ended with exit code {code}", code)
        return []

    def _drain(self) -> list[FromWorker]:
        messages: list[FromWorker] = []
        assert self._output is not None
        while True:
            try:
                messages.append(self._decoder.decode(self._output.recv(zmq.NOBLOCK)))
            except zmq.Again:
                return messages

    def poll_fds(self) -> list[zmq.Socket[bytes] | int]:
        assert self._output is not None
        return [self._output, *(child.fileno() for child in self._children)]

    def worker_pids(self) -> tuple[int, ...]:
        return tuple(child.pid for child in self._children)

    def shutdown(self) -> None:
        if self._output is None:
            self.forget_memory()
            return
        for socket in self._inputs:
            with contextlib.suppress(zmq.ZMQError):
                socket.send(self._encoder.encode(WorkerShutdown()), zmq.NOBLOCK)
        for child in self._children:
            child.hang_up()
        deadline = time.monotonic() + SHUTDOWN_TIMEOUT
        for child in self._children:
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
        self._close()
        self.forget_memory()

    def forget_memory(self) -> None:
        for descriptor in self._kv_memory.values():
            os.close(descriptor)
        self._kv_memory = {}

    def kill(self) -> None:
        if self._output is None:
            return
        for child in self._children:
            child.kill()
        self._close()

    def _close(self) -> None:
        assert self._output is not None
        for socket in (*self._inputs, self._output):
            address = socket.getsockopt_string(zmq.LAST_ENDPOINT)
            socket.close(linger=0)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(address.removeprefix("ipc://"))
        self._children, self._inputs, self._output = [], [], None
