"""Engines on other machines: what stands for the socket and the supervisor of an engine core of this machine."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
from msgspec.structs import replace

from api.engine.core_socket import BYTES_PER_ROW, ROWS_PER_TURN
from api.errors import EngineDeadError
from engine_core.config import EngineConfig
from engine_core.launch import LastWork, ModelError, ProcessWatch, get_logger
from engine_core.messages import EXIT_MODEL, EngineCoreOutputs, FromEngineCore
from engine_core.replicas import Replicas

logger = get_logger()


class RemoteReplicas:
    """The engines of a server that are on other machines, within the event loop."""

    def __init__(self, config: EngineConfig, first: int, size: int) -> None:
        """Waits for nobody yet.

        Args:
            config: Of each engine. Its ``executor.parallel`` says where to wait for machines.
            first: The first engine that is on another machine.
            size: All engines.
        """
        self._config, self._first, self._size = config, first, size
        self._replicas: Replicas | None = None
        self._engines: dict[int, tuple[Callable[[bytes], None], Callable[[int | None], None]]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._descriptors: list[int] = []
        self._turns_soon = False

    def add(self, rank: int, on_frame: Callable[[bytes], None], on_exit: Callable[[int | None], None]) -> None:
        """Names whom to tell of an engine's messages, and of its end: with the exit code; None: its machine is lost."""
        self._engines[rank] = on_frame, on_exit

    def open(self) -> None:
        """Waits for the machines, in the running event loop.

        Raises:
            EngineDeadError: The key cannot be read, or the address cannot be used.
        """
        self._loop = asyncio.get_running_loop()
        try:
            self._replicas = Replicas(self._config, self._first, self._size)
        except ModelError as error:
            raise EngineDeadError(str(error), EXIT_MODEL) from None
        for rank, (on_frame, on_exit) in self._engines.items():
            self._replicas.add(rank, on_frame, on_exit)
        self._descriptors = [_descriptor(source) for source in self._replicas.poll_fds()]
        for descriptor in self._descriptors:
            self._loop.add_reader(descriptor, self._turn)

    @property
    def opened(self) -> Replicas:
        assert self._replicas is not None
        return self._replicas

    def _turn(self) -> None:
        self._turns_soon = False
        if self._replicas is not None:
            self._replicas.turn()
            if self._replicas.has_messages:
                self.turn_soon()

    def turn_soon(self) -> None:
        """Looks at what arrived, in the next iteration of the loop: ZeroMQ's descriptors tell of changes alone, and
        sending may have consumed one."""
        if not self._turns_soon and self._loop is not None:
            self._turns_soon = True
            self._loop.call_soon(self._turn)

    async def close(self) -> None:
        """Ends the engines, and waits until their agents have heard it."""
        if self._loop is not None:
            for descriptor in self._descriptors:
                self._loop.remove_reader(descriptor)
        replicas, self._replicas = self._replicas, None
        if replicas is not None:
            await asyncio.to_thread(replicas.close)


def _descriptor(source: Any) -> int:
    return source if isinstance(source, int) else int(source.fileno())


class RemoteSupervisor:
    """Starts and ends an engine core on another machine. See ``Supervisor``."""

    pid = None
    address = ""

    def __init__(self, replicas: RemoteReplicas, rank: int, log_level: str) -> None:
        self._replicas, self._rank, self._log_level = replicas, rank, log_level

    def start(self, engine_epoch: int) -> None:
        """Starts the engine core, once its machine is there."""
        self._replicas.opened.start(self._rank, engine_epoch, self._log_level)
        self._replicas.turn_soon()

    def watch(self) -> ProcessWatch:
        """Measures its silence."""
        return ProcessWatch(0, sample=lambda _: self._replicas.opened.sample(self._rank))

    def last_work(self) -> LastWork:
        """The work of the last engine core when it ended."""
        return self._replicas.opened.last_work(self._rank)

    def kill(self) -> None:
        """Kills a process that does not respond."""
        self._replicas.opened.kill(self._rank)
        self._replicas.turn_soon()

    async def stop(self, timeout: float = 5.0) -> None:
        """Nothing: ``RemoteReplicas.close`` ends all engines."""


class RemoteSocket:
    """Messages to and from an engine core on another machine. See ``CoreSocket``."""

    def __init__(self, replicas: RemoteReplicas, rank: int, handle: Callable[[FromEngineCore], None]) -> None:
        self.epoch = 0
        self._replicas, self._rank, self._handle = replicas, rank, handle
        self._decoder = msgspec.msgpack.Decoder(FromEngineCore)
        self._frames: deque[bytes] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._receives_soon = self._is_closing = False
        self._ahead: float | None = None
        """Seconds that this machine's clock is ahead of the other's, at least."""

    def open(self, address: str) -> None:
        """Listens in the running event loop."""
        self._loop = asyncio.get_running_loop()

    def stop(self) -> None:
        """Handles no more messages."""
        self._is_closing = True

    def close(self) -> None:
        """Releases everything."""
        self.stop()
        self._frames.clear()

    def begin_life(self) -> None:
        """What comes from now on is of another engine core, perhaps on another machine."""
        self._frames.clear()
        self._ahead = None

    def send(self, frame: bytes) -> None:
        """Sends an encoded message. It is lost if the engine core is gone."""
        if not self._is_closing:
            self._replicas.opened.send(self._rank, frame)
            self._replicas.turn_soon()

    def wait(self, milliseconds: int) -> bool:
        """Whether there is a message: the end of an engine core comes after its messages."""
        return bool(self._frames)

    def deliver(self, frame: bytes) -> None:
        """A message has come."""
        self._frames.append(frame)
        if not self._receives_soon:
            self._receives_soon = True
            assert self._loop is not None
            self._loop.call_soon(self._receive)

    def _receive(self) -> None:
        self._receives_soon = False
        if self.take() and not self._receives_soon:
            self._receives_soon = True
            assert self._loop is not None
            self._loop.call_soon(self._receive)

    def take(self) -> bool:
        """Handles messages of about ``ROWS_PER_TURN`` rows. Returns False if there are no more."""
        num_rows = 0
        while num_rows < ROWS_PER_TURN:
            if self._is_closing or not self._frames:
                return False
            frame = self._frames.popleft()
            num_rows += 1 + len(frame) // BYTES_PER_ROW
            try:
                self._handle(self._in_our_time(self._decoder.decode(frame)))
            except Exception:
                logger.exception("a message of an engine core could not be handled")
        return True

    def _in_our_time(self, message: FromEngineCore) -> FromEngineCore:
        """Times of the other machine's clock, which began at another time, in those of this one's."""
        if not isinstance(message, EngineCoreOutputs):
            return message
        ahead = time.monotonic() - message.timestamp
        self._ahead = ahead = ahead if self._ahead is None else min(ahead, self._ahead)
        outputs = tuple(
            each if each.scheduled_time is None else replace(each, scheduled_time=each.scheduled_time + ahead)
            for each in message.outputs
        )
        return replace(message, timestamp=message.timestamp + ahead, outputs=outputs)
