"""What an agent does when its machine has whole engines of a server on another machine: starts their engine cores, and
passes their messages on. See ``executor/nodes/agent.py``."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from typing import Any

import msgspec
import zmq
from msgspec.structs import replace
from zmq.utils.monitor import parse_monitor_message

from engine_core.config import EngineConfig
from engine_core.last_work import SIZE
from engine_core.launch import EngineCoreLaunch, engine_identity, launch_engine_core
from executor.liveness import sample_process
from executor.log import get_logger, setup_logging
from executor.nodes.agent import NodeAgent, digests
from executor.nodes.key_files import read_key_file
from executor.nodes.messages import (
    EngineEnded,
    EngineStatus,
    FromEngine,
    FromMember,
    KillEngine,
    KillNode,
    LaunchEngine,
    ToAgent,
    ToEngine,
)
from executor.nodes.worker_duties import with_files_of
from executor.process import ChildProcess

logger = get_logger()

SHUTDOWN_TIMEOUT = 5.0
"""Seconds that engine cores together have to end."""
MAX_FRAMES_PER_TURN = 256
"""Messages of an engine core passed on in a turn, so that others have theirs."""


@dataclass
class Core:
    """An engine core of this machine."""

    life: str
    identity: bytes
    """With which it connects."""
    child: ChildProcess
    socket: zmq.Socket[bytes]
    folder: str
    """Of its sockets."""
    record_path: str
    is_connected: bool = False
    """Its last messages may be in transit. Its connection ends after them."""

    def __post_init__(self) -> None:
        self.monitor: zmq.Socket[bytes] = self.socket.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)

    def look_at_connection(self) -> None:
        """Finds out whether it is connected."""
        while self.monitor.poll(0):
            event = parse_monitor_message(self.monitor.recv_multipart())["event"]
            self.is_connected = event == zmq.EVENT_ACCEPTED

    def take(self) -> list[bytes]:
        """What it has said, a part at a time."""
        frames: list[bytes] = []
        while len(frames) < MAX_FRAMES_PER_TURN:
            try:
                identity, frame = self.socket.recv_multipart(zmq.NOBLOCK)[:2]
            except zmq.Again:
                break
            if identity == self.identity:
                frames.append(frame)
        return frames

    def send(self, frame: bytes) -> None:
        """Sends a message. ZeroMQ drops it if the engine core has not connected: it is not ready yet, or gone."""
        self.socket.send_multipart((self.identity, frame), zmq.NOBLOCK)

    def close(self) -> None:
        """Releases what a process that has ended had."""
        self.child.wait()
        self.socket.disable_monitor()
        self.monitor.close(linger=0)
        self.socket.close(linger=0)
        shutil.rmtree(self.folder, ignore_errors=True)


class ReplicaDuties:
    """See ``executor.nodes.agent.Duties``."""

    def __init__(self, config: EngineConfig, first: int, count: int, size: int, ipc_dir: str) -> None:
        """Starts nothing yet.

        Args:
            config: As the machine's own command line says, with the paths of the model's files here.
            first: Number of the first engine of this machine.
            count: Its engines.
            size: All engines of the server.
            ipc_dir: A directory of mode 0700 for sockets.
        """
        self.title = f"engines {first} to {first + count - 1} of {size}" if count > 1 else f"engine {first} of {size}"
        self.num_engines = count
        self._config = config
        self._first = first
        self._ipc_dir = ipc_dir
        self._context: zmq.Context[Any] = zmq.Context()
        self._cores: dict[str, Core] = {}
        self._num_launches = 0

    def poll_fds(self) -> list[Any]:
        return [source for core in self._cores.values() for source in (core.socket, core.monitor, core.child)]

    def take(self) -> list[FromMember]:
        result: list[FromMember] = []
        for core in list(self._cores.values()):
            code = core.child.poll()
            core.look_at_connection()
            has_ended = code is not None and not core.is_connected
            frames = core.take()
            result += [FromEngine(core.life, frame) for frame in frames]
            if code is not None and has_ended and len(frames) < MAX_FRAMES_PER_TURN:
                result.append(EngineEnded(core.life, code, _read(core.record_path)))
                self._forget(core)
        return result

    def handle(self, message: ToAgent, address: str) -> list[FromMember]:
        if isinstance(message, LaunchEngine):
            self._launch(message)
        elif isinstance(message, ToEngine):
            core = self._cores.get(message.life)
            if core is not None:
                core.send(message.frame)
        elif isinstance(message, KillEngine):
            core = self._cores.get(message.life)
            if core is not None:
                core.child.begin_to_kill()
        elif isinstance(message, KillNode):
            self.kill()
        return []

    def _launch(self, message: LaunchEngine) -> None:
        """All is the leader's but files, threads, cores and devices."""
        launch = msgspec.msgpack.decode(message.launch, type=EngineCoreLaunch)
        local_rank = message.engine - self._first
        self._num_launches += 1
        folder = f"{self._ipc_dir}/{self._num_launches}"
        os.mkdir(folder, 0o700)
        os.mkdir(f"{folder}/core", 0o700)
        executor = with_files_of(launch.config.executor, self._config.executor)
        device = replace(executor.device, first_index=local_rank * executor.parallel.world_size)
        own_cache = self._config.cache
        cache = replace(launch.config.cache, kv_cache_dir=own_cache.kv_cache_dir, kv_cache_disk=own_cache.kv_cache_disk)
        config = replace(
            launch.config, executor=replace(executor, device=device), cache=cache, num_replicas=self.num_engines
        )
        launch = replace(
            launch, config=config, address=f"ipc://{folder}/api", ipc_dir=f"{folder}/core", replica=local_rank
        )
        socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.set_hwm(0)
        identity = engine_identity(launch.engine_epoch)
        core = Core(message.life, identity, launch_engine_core(launch), socket, folder, launch.record_path)
        socket.bind(launch.address)
        self._cores[message.life] = core
        logger.info("engine %d: started its engine core", message.engine)

    def status(self) -> EngineStatus:
        states = {}
        for core in self._cores.values():
            sample = sample_process(core.child.pid)
            if sample is not None:
                states[core.life] = sample.state, sample.processor_seconds
        return EngineStatus(states=states)

    def kill(self) -> None:
        for core in self._cores.values():
            core.child.begin_to_kill()
        for core in list(self._cores.values()):
            self._forget(core)

    def forget_memory(self) -> None:
        pass  # engine cores end with all they have

    def close(self) -> None:
        """Engine cores get a moment to end by themselves."""
        for core in self._cores.values():
            core.child.hang_up()
        deadline = time.monotonic() + SHUTDOWN_TIMEOUT
        for core in self._cores.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                core.child.wait(max(0.0, deadline - time.monotonic()))
        self.kill()
        self._context.term()

    def _forget(self, core: Core) -> None:
        core.close()
        del self._cores[core.life]


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(SIZE)
    except OSError:
        return b""


def run_replicas(config: EngineConfig, first: int, count: int, size: int, ipc_dir: str, log_level: str) -> int:
    """Runs the engines of this machine, as the server on another one says. Returns the exit code.

    Args:
        config: As the machine's own command line says, with the paths of the model's files here. Its
            ``executor.parallel`` says where the server waits.
        first: Number of the first engine of this machine.
        count: Its engines.
        size: All engines of the server.
        ipc_dir: A directory of mode 0700 for sockets.
        log_level: Of the agent.

    Raises:
        ModelError: The key cannot be read, or the server does not admit the machine.
    """
    setup_logging(f"engines {first}-{first + count - 1}", log_level)
    parallel = replace(config.executor.parallel, nnodes=size, node_rank=first)
    secret = read_key_file(parallel.cluster_key)
    return NodeAgent(
        parallel, digests(config.executor.model), secret, ReplicaDuties(config, first, count, size, ipc_dir)
    ).run()
