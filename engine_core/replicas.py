"""Engines of a server on other machines, as the server sees them: launched through agents, who pass messages on."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec.structs import replace

from engine_core.config import EngineConfig
from engine_core.last_work import LastWork, read_flight_record
from engine_core.launch import EngineCoreLaunch
from executor.liveness import ProcessSample
from executor.log import get_logger
from executor.nodes.key_files import read_key_file
from executor.nodes.members import Members
from executor.nodes.messages import (
    EngineEnded,
    EngineStatus,
    FromEngine,
    FromMember,
    KillEngine,
    LaunchEngine,
    NodeHello,
    ToEngine,
)

logger = get_logger()

WAITS = ProcessSample("D", 0.0)
"""Of an engine core that waits for its machine: no time in which it could do anything."""


class Engines:
    """Machines that each have some of the engines. See ``executor.nodes.members.Roster``."""

    option = "--data-parallel-address"

    def __init__(self, first: int, size: int) -> None:
        """
        Args:
            first: The first engine that is on another machine.
            size: All engines.
        """
        self._first, self._size = first, size
        self.counts: dict[int, int] = {}
        """Engines of machines that joined once, by the number of their first."""

    def machine_of(self, engine: int, joined: Collection[int]) -> int | None:
        """The rank of the machine that has an engine; None: it has not joined."""
        return next((rank for rank in joined if rank <= engine < rank + self.counts[rank]), None)

    def missing(self, joined: Collection[int]) -> list[int]:
        return [each for each in range(self._first, self._size) if self.machine_of(each, joined) is None]

    def objection(self, hello: NodeHello, joined: Collection[int]) -> str | None:
        first, last = hello.node_rank, hello.node_rank + hello.num_engines - 1
        if not hello.num_engines:
            return "--nnodes: the server wants whole engines; use --headless --data-parallel-start-rank"
        if hello.nnodes != self._size:
            return f"--data-parallel-size {hello.nnodes}: the server was started with {self._size}"
        if first < self._first or last >= self._size:
            return (
                f"--data-parallel-start-rank {first} --data-parallel-size-local {hello.num_engines}: engines on other "
                f"machines than the server's are {self._first} to {self._size - 1}"
            )
        for rank in joined:
            if rank != first and rank <= last and first < rank + self.counts[rank]:
                return f"--data-parallel-start-rank {first}: another machine has engines from {rank} on"
        return None

    def admitted(self, hello: NodeHello) -> None:
        self.counts[hello.node_rank] = hello.num_engines

    def title(self, hello: NodeHello) -> str:
        first, last = hello.node_rank, hello.node_rank + hello.num_engines - 1
        return f"the machine of engine {first}" if last <= first else f"the machine of engines {first} to {last}"

    def reminder(self, missing: list[int]) -> str:
        return (
            f"the machine of engine {missing[0]} of {self._size}: start the same command there with --headless "
            f"--data-parallel-start-rank {missing[0]}"
        )


@dataclass
class Remote:
    """An engine on another machine, in one of its lives."""

    rank: int
    on_frame: Callable[[bytes], None]
    """Called with each message."""
    on_exit: Callable[[int | None], None]
    """Called once all its messages have been passed on, with the exit code; None: its machine is lost."""
    life: str = ""
    launch: bytes = b""
    machine: int | None = None
    """The rank of the machine that was told to start it; None: none yet."""
    joined: tuple[bytes, int] = (b"", 0)
    """What identified that machine."""
    sample: ProcessSample | None = None
    """What the agent last said about its process."""
    record: bytes = b""
    """The flight record of the last one that ended."""


class Replicas:
    """The engines of a server that are on other machines. Everything happens within ``turn``."""

    def __init__(self, config: EngineConfig, first: int, size: int) -> None:
        """Waits for connections.

        Args:
            config: Of each engine. Its ``executor.parallel`` says where to wait.
            first: The first engine that is on another machine.
            size: All engines.

        Raises:
            ModelError: The key cannot be read, or the address cannot be used.
        """
        self._config = config
        self._roster = Engines(first, size)
        self._members = Members(config.executor, read_key_file(config.executor.parallel.cluster_key), self._roster)
        self._remotes: dict[int, Remote] = {}

    def poll_fds(self) -> list[Any]:
        """Sockets of ZeroMQ, and descriptors, that become readable when ``turn`` has something to do."""
        return self._members.poll_fds()

    def add(self, rank: int, on_frame: Callable[[bytes], None], on_exit: Callable[[int | None], None]) -> None:
        """An engine that is on another machine. See ``Remote``."""
        self._remotes[rank] = Remote(rank, on_frame, on_exit)

    def start(self, rank: int, epoch: int, log_level: str) -> None:
        """Starts an engine core, once its machine has joined."""
        remote = self._remotes[rank]
        executor = replace(self._config.executor, parallel=replace(self._config.executor.parallel, cluster_key=""))
        launch = EngineCoreLaunch(
            config=replace(self._config, executor=executor),
            address="",
            ipc_dir="",
            engine_epoch=epoch,
            log_level=log_level,
        )
        remote.life, remote.launch = f"{self._members.session}.{rank}.{epoch}", msgspec.msgpack.encode(launch)
        remote.machine, remote.sample, remote.record = None, None, b""
        self._launch(remote)

    def _launch(self, remote: Remote) -> None:
        joined = self._members.joined
        machine = self._roster.machine_of(remote.rank, joined)
        if machine is not None:
            remote.machine, remote.joined = machine, joined[machine]
            self._members.send(machine, LaunchEngine(remote.life, remote.rank, remote.launch))

    def send(self, rank: int, frame: bytes) -> None:
        """Sends a message to an engine core. It is lost if that is gone, or not there yet."""
        remote = self._remotes[rank]
        if remote.machine is not None:
            self._members.send(remote.machine, ToEngine(remote.life, frame))

    def kill(self, rank: int) -> None:
        """Kills an engine core, whose exit is then handled like any other."""
        remote = self._remotes[rank]
        if remote.machine is not None:
            self._members.send(remote.machine, KillEngine(remote.life))

    def sample(self, rank: int) -> ProcessSample | None:
        """What the agent last said about the engine core's process."""
        remote = self._remotes[rank]
        return WAITS if remote.machine is None else remote.sample

    def last_work(self, rank: int) -> LastWork:
        """The work of the last engine core when it ended. Nothing is known of a machine that is lost."""
        record = self._remotes[rank].record
        if not record:
            return LastWork()
        with tempfile.NamedTemporaryFile() as file:
            file.write(record)
            file.flush()
            return read_flight_record(file.name)

    @property
    def has_messages(self) -> bool:
        """Whether something is there for ``turn`` already: ZeroMQ's descriptors tell of it once, and sending may have
        consumed that."""
        return self._members.has_messages

    def turn(self) -> None:
        """Handles what has arrived, and machines that have joined or are lost."""
        for _, message in self._members.take():
            self._handle(message)
        self._members.take_losses()  # the log has them
        for remote in list(self._remotes.values()):
            if remote.machine is None:
                if remote.life:
                    self._launch(remote)
            elif self._members.joined.get(remote.machine) != remote.joined:
                self._end(remote, None)

    def _handle(self, message: FromMember) -> None:
        if isinstance(message, EngineStatus):
            for remote in self._remotes.values():
                if remote.life in message.states:
                    remote.sample = ProcessSample(*message.states[remote.life])
            return
        for remote in self._remotes.values():
            if remote.life != message.life:
                continue
            if isinstance(message, FromEngine):
                remote.on_frame(message.frame)
            elif isinstance(message, EngineEnded):
                remote.record = message.record
                self._end(remote, message.exit_code)
            return

    def _end(self, remote: Remote, exit_code: int | None) -> None:
        remote.life, remote.machine = "", None
        remote.on_exit(exit_code)

    def close(self) -> None:
        """Ends the engines, and their agents."""
        self._members.dismiss()
