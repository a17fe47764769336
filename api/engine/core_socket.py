"""The api's socket to an engine core. This module is the only user of ZeroMQ in this package."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec
import zmq

from engine_core.launch import engine_identity, get_logger
from engine_core.messages import FromEngineCore

logger = get_logger()

ROWS_PER_TURN = 768
"""Tokens taken from the engine core per iteration of the event loop, about seven milliseconds of work, so that their
consumers and new connections get their turns. Several steps at once are cheaper than one by one, since their events
share writes."""
BYTES_PER_ROW = 16
"""Bytes of a message that count as one row. A row with more than a token takes more of both, bytes and time."""


class CoreSocket:
    """A ROUTER socket that knows one engine core at a time and ignores all earlier ones.

    Attributes:
        epoch: Number of the engine core that it talks to.
    """

    def __init__(self, handle: Callable[[FromEngineCore], None]) -> None:
        """Creates the socket; ``open`` binds it.

        Args:
            handle: Called with each message of the engine core.
        """
        self.epoch = 0
        self._handle = handle
        self._decoder = msgspec.msgpack.Decoder(FromEngineCore)
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._fd = -1
        self._receives_soon = self._is_closing = False

    def open(self, address: str) -> None:
        """Binds the socket and listens in the running event loop."""
        self._loop = asyncio.get_running_loop()
        socket = self._socket
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.LINGER, 0)
        socket.set_hwm(0)
        socket.bind(address)
        self._fd = int(socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self._on_readable)

    def begin_life(self) -> None:
        """There is a new engine core: the epoch tells its messages from others."""

    def stop(self) -> None:
        """Handles no more messages."""
        self._is_closing = True

    def close(self) -> None:
        """Releases everything."""
        self.stop()
        if self._fd >= 0:
            assert self._loop is not None
            self._loop.remove_reader(self._fd)
        self._socket.close(linger=0)
        self._context.term()

    def send(self, frame: bytes) -> None:
        """Sends an encoded message. It is lost if the engine core is gone."""
        try:
            self._socket.send_multipart((engine_identity(self.epoch), frame), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            # The process is gone but its exit is not noticed yet; the journal has the request.
            logger.debug("message not delivered: %s", error)
        # ZeroMQ's descriptor is edge-triggered; sending may have consumed an event.
        if not self._socket.closed and int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._receive_soon()

    def wait(self, milliseconds: int) -> bool:
        """Blocks until there is a message, at most for that time. Returns whether there is one."""
        return bool(self._socket.poll(milliseconds))

    def _receive_soon(self) -> None:
        """Schedules ``_receive`` for the next iteration of the loop, once per iteration."""
        if not self._receives_soon:
            self._receives_soon = True
            assert self._loop is not None
            self._loop.call_soon(self._receive)

    def _on_readable(self) -> None:
        if not self._receives_soon:
            self._receive()

    def _receive(self) -> None:
        """Handles the available messages, a few per iteration of the event loop."""
        self._receives_soon = False
        if self.take():
            self._receive_soon()

    def take(self) -> bool:
        """Handles messages of about ``ROWS_PER_TURN`` rows. Returns False if there are no more."""
        expected = engine_identity(self.epoch)
        num_rows = 0
        while num_rows < ROWS_PER_TURN:
            if self._is_closing:
                return False
            try:
                identity, frame = self._socket.recv_multipart(zmq.NOBLOCK)[:2]
            except zmq.Again:
                return False
            if identity != expected:
                continue
            num_rows += 1 + len(frame) // BYTES_PER_ROW
            try:
                self._handle(self._decoder.decode(frame))
            except Exception:  # go on: ZeroMQ's descriptor signals again only after all messages were taken
                logger.exception("a message of the engine core could not be handled")
        return True
