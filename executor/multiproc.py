"""Workers in separate processes, one per device, connected over ZeroMQ."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence

import msgspec
import zmq

from executor.base import WORKER_MODULE, WorkerDiedError
from executor.config import Config, ExecutorConfig
from executor.liveness import ProcessSample
from executor.log import get_logger
from executor.messages import FromWorker, ToWorker, WorkerShutdown
from executor.parallel import ParallelState, SharedByRanks, about_ranks, awaited_from_afar, places, split_cores
from executor.process import ChildProcess, prepared_child

logger = get_logger()

LAST_WORDS_TIMEOUT = 500
"""Milliseconds to wait for the last message of a worker that exited with an error."""
SHUTDOWN_TIMEOUT = 2.0
"""Seconds that the workers together have to exit."""


class Network(Config, frozen=True):
    """How workers of several machines reach each other."""

    cluster_key: bytes
    """The secret of ``nodes/keys.py``."""
    addresses: tuple[str, ...]
    """Of each machine, by node rank."""
    endpoints: dict[str, str]
    """Where messages between machines go, by the name of the event that they cause (``hidden_event``)."""


class WorkerLaunch(Config, frozen=True):
    """The start message of a worker process."""

    parallel: ParallelState
    config: ExecutorConfig
    input_address: str
    output_address: str
    log_level: str = "info"
    descriptors: tuple[str, ...] = ()
    """Names of the descriptors that come with the message, in order. ``kv``: the memory of the KV cache; those that
    begin with ``LISTENER``: listening sockets of this rank's ``Network.endpoints``; others: see ``SharedByRanks``."""
    network: Network | None = None
    """None: all workers are on this machine."""
    cores: tuple[int, ...] = ()
    """The cores that the worker runs on; empty: all that it may use."""


LISTENER = "listen:"
"""Prefix of the names of listening sockets."""
STORE = "store"
"""Name of the endpoint at which machines find each other with ``--private-interface``."""


class LocalWorkers:
    """The worker processes of this machine, and the frames that they exchange with the engine core."""

    def __init__(self, ipc_dir: str, log_level: str = "info") -> None:
        """Starts nothing.

        Args:
            ipc_dir: A directory of mode 0700 for the workers' sockets.
            log_level: Of the workers.
        """
        self._ipc_dir = ipc_dir
        self._log_level = log_level
        self._context = zmq.Context()
        self._life = 0
        self._first_rank = 0
        self._inputs: list[zmq.Socket[bytes]] = []
        self._output: zmq.Socket[bytes] | None = None
        self._children: list[ChildProcess] = []
        self._kv_memory: dict[int, int] = {}
        """By rank: a file in memory for the KV cache. It outlives the worker, who alone writes it."""

    def launch(
        self,
        config: ExecutorConfig,
        ranks: Sequence[ParallelState],
        network: Network | None = None,
        listeners: Mapping[str, int] | None = None,
    ) -> None:
        """Starts the workers. Each answers with ``WorkerReady`` or ``WorkerFailed``.

        Args:
            config: Of the workers.
            ranks: Their places, with consecutive ranks.
            network: How they reach ranks of other machines.
            listeners: Listening sockets for ``network``, by the names of events; of all ranks.
        """
        self._life += 1  # new addresses: nothing from an earlier life can reach us
        self._first_rank = ranks[0].rank
        output_address = f"ipc://{self._ipc_dir}/{self._life}.out"
        self._output = self._bind(zmq.PULL, output_address)
        config = config if self._life == 1 else msgspec.structs.replace(config, memory_share=None)
        cores: list[tuple[int, ...]] = [()] * len(ranks)
        sockets = listeners or {}
        shared, everyone = SharedByRanks(ranks), places(config.parallel)
        if len(ranks) > config.parallel.num_mirrors:
            cores = split_cores(len(ranks))
            if self._life == 1:
                logger.info("%s", about_ranks(cores))
        for parallel, own_cores in zip(ranks, cores, strict=True):
            input_address = f"ipc://{self._ipc_dir}/{self._life}.{parallel.rank}.in"
            self._inputs.append(self._bind(zmq.PUSH, input_address))
            given = self._descriptors(parallel.rank) | shared.of(parallel)
            if network is not None:
                given |= {LISTENER + name: sockets[name] for name in awaited_from_afar(everyone, parallel)}
                if STORE in sockets and parallel.rank == 0:
                    given[LISTENER + STORE] = sockets[STORE]
            launch = WorkerLaunch(
                parallel=parallel,
                config=config,
                input_address=input_address,
                output_address=output_address,
                log_level=self._log_level,
                descriptors=tuple(given),
                network=network,
                cores=own_cores,
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

    def send(self, frame: bytes) -> None:
        """Sends a message to every rank.

        Raises:
            WorkerDiedError: A worker has died.
        """
        for index, socket in enumerate(self._inputs):
            try:
                socket.send(frame, zmq.NOBLOCK)
            except zmq.Again:  # queues are unbounded, so the other end is gone
                raise WorkerDiedError(f"{self._name(index)} closed its connection") from None

    def _name(self, index: int) -> str:
        return f"worker {self._first_rank + index} (pid {self._children[index].pid})"

    def take(self) -> list[bytes]:
        """The messages that have arrived, without waiting.

        Raises:
            WorkerDiedError: A worker ended without giving a reason.
        """
        if self._output is None:
            return []
        frames = self._drain()
        if frames:
            return frames
        for index, child in enumerate(self._children):
            code = child.poll()
            if code is not None:
                if code > 0:  # it exited by itself, and its last message may still be in transit
                    self._output.poll(LAST_WORDS_TIMEOUT)
                frames = self._drain()
                if frames:
                    return frames
                raise WorkerDiedError(f"{self._name(index)} ended with exit code {code}", code)
        return []

    def _drain(self) -> list[bytes]:
        frames: list[bytes] = []
        assert self._output is not None
        while int(self._output.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            frames.append(self._output.recv(zmq.NOBLOCK))
        return frames

    def poll_fds(self) -> list[zmq.Socket[bytes] | int]:
        """What becomes readable when ``take`` has messages."""
        if self._output is None:
            return []
        return [self._output, *(child.fileno() for child in self._children)]

    @property
    def is_up(self) -> bool:
        """Whether there are workers."""
        return self._output is not None

    def worker_pids(self) -> tuple[int, ...]:
        return tuple(child.pid for child in self._children)

    def shutdown(self) -> None:
        """Stops the workers for good: gives them a moment to exit, then kills them. Their memory is gone."""
        if self._output is not None:
            self._stop()
        self.forget_memory()
        self._context.term()

    def _stop(self) -> None:
        frame = msgspec.msgpack.encode(WorkerShutdown())
        for socket in self._inputs:
            with contextlib.suppress(zmq.ZMQError):
                socket.send(frame, zmq.NOBLOCK)
        for child in self._children:
            child.hang_up()
        deadline = time.monotonic() + SHUTDOWN_TIMEOUT
        for child in self._children:
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
        self._close()

    def forget_memory(self) -> None:
        """Gives memory that outlives workers back to the system. There are no workers."""
        for descriptor in self._kv_memory.values():
            os.close(descriptor)
        self._kv_memory = {}

    def kill(self) -> None:
        """Kills the workers at once."""
        if self._output is None:
            return
        for child in self._children:  # all at once
            child.begin_to_kill()
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


class MultiprocExecutor(LocalWorkers):
    """Starts worker processes and exchanges messages with them. See ``executor/base.py``."""

    def __init__(self, config: ExecutorConfig, ipc_dir: str, log_level: str = "info") -> None:
        super().__init__(ipc_dir, log_level)
        self.num_ranks = config.parallel.world_size
        self._config = config
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromWorker)

    def start(self) -> None:
        self.launch(self._config, places(self._config.parallel))

    def submit(self, message: ToWorker) -> None:
        self.send(self._encoder.encode(message))

    def receive(self) -> list[FromWorker]:
        return [self._decoder.decode(frame) for frame in self.take()]

    def remote_samplers(self) -> Mapping[int, Callable[[], ProcessSample | None]]:
        return {}
