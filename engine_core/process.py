"""The engine core process: its socket to the api, and the loop."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import msgspec
import setproctitle
import zmq

from engine_core.core import EngineCore, create_executor
from engine_core.flight_record import FlightRecord
from engine_core.launch import EngineCoreLaunch, engine_identity
from engine_core.messages import FromEngineCore, SiblingRequests, ToEngineCore
from executor.log import get_logger, setup_logging
from executor.parallel import split_cores
from executor.process import read_payload

logger = get_logger()

REQUESTS_PER_TURN = 64
"""Maximum requests received per turn of the loop, so that a burst delays running streams by milliseconds only."""


class ZmqTransport:
    """A DEALER socket to the api, polled together with the executor and the api's pipe."""

    def __init__(self, address: str, identity: bytes) -> None:
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, identity)
        self._socket.setsockopt(zmq.LINGER, 2000)
        self._socket.set_hwm(0)
        self._socket.connect(address)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToEngineCore)
        self._parent_pipe = sys.stdin.fileno()
        self._watched: Sequence[Any] | None = None
        self._poller = zmq.Poller()

    def send(self, message: FromEngineCore) -> None:
        self._socket.send(self._encoder.encode(message), zmq.NOBLOCK)

    def wait(self, fds: Sequence[Any], timeout: float | None) -> list[ToEngineCore] | None:
        if fds != self._watched:
            self._watched = fds
            self._poller = zmq.Poller()
            self._poller.register(self._socket, zmq.POLLIN)
            self._poller.register(self._parent_pipe, zmq.POLLIN)
            for fd in fds:
                self._poller.register(fd, zmq.POLLIN)
        events = dict(self._poller.poll(None if timeout is None else int(timeout * 1000)))
        if self._parent_pipe in events:
            return None
        messages: list[ToEngineCore] = []
        room = REQUESTS_PER_TURN
        while self._socket in events and room > 0:  # the rest is read in the next turn
            try:
                message = self._decoder.decode(self._socket.recv(zmq.NOBLOCK))
                messages.append(message)
                room -= len(message.seeds) if isinstance(message, SiblingRequests) else 1
            except zmq.Again:
                break
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                logger.error("dropped a malformed message: %s", error)
        return messages

    def close(self) -> None:
        self._socket.close()
        self._context.term()


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
    transport = ZmqTransport(launch.address, engine_identity(launch.engine_epoch))
    executor = create_executor(launch.config, launch.ipc_dir, launch.log_level, launch.engine_epoch)
    try:
        record = FlightRecord(launch.record_path)
        return EngineCore(launch.config, executor, transport, launch.engine_epoch, record).run()
    finally:
        transport.close()
