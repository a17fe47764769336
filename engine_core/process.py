"""The engine core process: its socket to the api, and the loop."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec
import setproctitle
import zmq

from engine_core.core import EngineCore, create_executor
from engine_core.flight_record import FlightRecord
from engine_core.frames import FrameSocket
from engine_core.launch import EngineCoreLaunch, engine_identity
from engine_core.messages import FromEngineCore, SiblingRequests, ToEngineCore
from executor.log import get_logger, setup_logging
from executor.parallel import split_cores
from executor.process import read_payload

logger = get_logger()

LINGER = 2.0
"""Seconds at the end in which the api may still take messages."""
REQUESTS_PER_TURN = 64
"""Maximum requests received per turn of the loop, so that a burst delays running streams by milliseconds only."""


class SocketTransport:
    """A connection to the api, polled together with the executor and the api's pipe."""

    def __init__(self, path: str, identity: bytes) -> None:
        """Connects.

        Args:
            path: Of the api's socket.
            identity: What is said first: which engine core it is.
        """
        self._link = FrameSocket.connect(path)
        self._link.send(identity)
        self._frames: deque[bytes] = deque()
        """Those that were read and not handled."""
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToEngineCore)
        self._parent_pipe = sys.stdin.fileno()
        self._watched: Sequence[Any] | None = None
        self._watches_room = False
        self._poller = zmq.Poller()

    def send(self, message: FromEngineCore) -> None:
        self._link.send(self._encoder.encode(message))

    def wait(self, fds: Sequence[Any], timeout: float | None) -> list[ToEngineCore] | None:
        if fds != self._watched or self._link.has_unsent != self._watches_room:
            self._watch(fds)
        if self._frames:
            timeout = 0
        events = dict(self._poller.poll(None if timeout is None else int(timeout * 1000)))
        if self._parent_pipe in events:
            return None
        event = events.get(self._link.fileno(), 0)
        if event & zmq.POLLOUT:
            self._link.flush()
        if event & ~zmq.POLLOUT and not self._frames:
            self._frames += self._link.receive()
            if self._link.is_closed and not self._frames:
                return None
        return self._take()

    def _watch(self, fds: Sequence[Any]) -> None:
        self._watched, self._watches_room = fds, self._link.has_unsent
        self._poller = zmq.Poller()
        self._poller.register(self._link.fileno(), zmq.POLLIN | (zmq.POLLOUT if self._watches_room else 0))
        self._poller.register(self._parent_pipe, zmq.POLLIN)
        for fd in fds:
            self._poller.register(fd, zmq.POLLIN)

    def _take(self) -> list[ToEngineCore]:
        messages: list[ToEngineCore] = []
        room = REQUESTS_PER_TURN
        while self._frames and room > 0:  # the rest is for the next turn
            try:
                message = self._decoder.decode(self._frames.popleft())
                messages.append(message)
                room -= len(message.seeds) if isinstance(message, SiblingRequests) else 1
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                logger.error("dropped a malformed message: %s", error)
        return messages

    def close(self) -> None:
        self._link.close(LINGER)


def run() -> int:
    """Runs an engine core as its start message says. Returns the exit code."""
    try:
        launch = msgspec.msgpack.decode(read_payload(), type=EngineCoreLaunch)
    except EOFError:  # prepared, and never needed
        return 0
    name = "engine_core"
    num_replicas = launch.config.num_replicas
    if num_replicas > 1:
        name = f"engine_core {launch.replica}"
        setproctitle.setproctitle(f"octavo {name}")
        os.sched_setaffinity(0, split_cores(num_replicas)[launch.replica])
    setup_logging(name, launch.log_level)
    transport = SocketTransport(launch.address, engine_identity(launch.engine_epoch))
    executor = create_executor(launch.config, launch.ipc_dir, launch.log_level, launch.engine_epoch)
    try:
        record = FlightRecord(launch.record_path)
        return EngineCore(launch.config, executor, transport, launch.engine_epoch, record).run()
    finally:
        transport.close()
