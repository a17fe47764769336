"""The api's socket to an engine core."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections import deque
from collections.abc import Callable

import msgspec

from engine_core.launch import FrameSocket, engine_identity, get_logger
from engine_core.messages import FromEngineCore

logger = get_logger()

ROWS_PER_TURN = 768
"""Tokens taken from the engine core per iteration of the event loop, about seven milliseconds of work, so that their
consumers and new connections get their turns. Several steps at once are cheaper than one by one, since their events
share writes."""
BYTES_PER_ROW = 16
"""Bytes of a message that count as one row. A row with more than a token takes more of both, bytes and time."""
BACKLOG = 8


class CoreSocket:
    """A listening socket that knows one engine core at a time and ignores all earlier ones.

    Attributes:
        epoch: Number of the engine core that it talks to. A connection begins with it.
    """

    def __init__(self, handle: Callable[[FromEngineCore], None]) -> None:
        """Creates the socket; ``open`` binds it.

        Args:
            handle: Called with each message of the engine core.
        """
        self.epoch = 0
        self._handle = handle
        self._decoder = msgspec.msgpack.Decoder(FromEngineCore)
        self._path = ""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._link: _Link | None = None
        """The connection of the present engine core, or of the last one."""
        self._strangers: list[_Link] = []
        """Connections that have not said whose they are."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._receives_soon = self._is_closing = False

    def open(self, path: str) -> None:
        """Binds the socket and listens in the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._path = path
        self._listener.setblocking(False)
        self._listener.bind(path)
        self._listener.listen(BACKLOG)
        self._loop.add_reader(self._listener.fileno(), self._on_connection)

    def stop(self) -> None:
        """Handles no more messages."""
        self._is_closing = True
        if self._loop is not None:  # what nobody reads would wake it again and again
            for descriptor in (self._listener.fileno(), *(link.socket.fileno() for link in self._links())):
                self._loop.remove_reader(descriptor)

    def close(self) -> None:
        """Releases everything."""
        self.stop()
        for link in self._links():
            self._drop(link)
        if self._path:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
        self._listener.close()

    def _links(self) -> list[_Link]:
        return [*self._strangers, *filter(None, (self._link,))]

    def _accept(self) -> None:
        """Accepts the connections of engine cores, and listens to what they say first."""
        assert self._loop is not None
        with contextlib.suppress(OSError):  # there are no more, or too many open files
            while True:
                link = _Link(FrameSocket(self._listener.accept()[0]))
                self._strangers.append(link)
                self._loop.add_reader(link.socket.fileno(), self._on_readable, link)
        for link in list(self._strangers):
            self._meet(link)

    def _meet(self, link: _Link) -> None:
        """Keeps a connection if it is that of the present engine core, once that is known."""
        link.read()
        if link.identity == engine_identity(self.epoch):
            self._strangers.remove(link)
            if self._link is not None:
                self._drop(self._link)
            self._link = link
        elif link.identity or link.socket.is_closed:
            self._drop(link)

    def _drop(self, link: _Link) -> None:
        assert self._loop is not None
        self._loop.remove_reader(link.socket.fileno())
        self._loop.remove_writer(link.socket.fileno())
        link.socket.close()
        if link is self._link:
            self._link = None
        else:
            self._strangers.remove(link)

    def _present(self) -> _Link | None:
        """The connection of the present engine core."""
        link = self._link
        return link if link is not None and link.identity == engine_identity(self.epoch) else None

    def send(self, frame: bytes) -> None:
        """Sends an encoded message. It is lost if the engine core is gone; the journal has the request."""
        link = self._present()
        if link is None:
            logger.debug("message not delivered: there is no engine core")
            return
        link.socket.send(frame)
        if link.socket.has_unsent:
            assert self._loop is not None
            self._loop.add_writer(link.socket.fileno(), self._flush, link)

    def _flush(self, link: _Link) -> None:
        link.socket.flush()
        if not link.socket.has_unsent:
            assert self._loop is not None
            self._loop.remove_writer(link.socket.fileno())

    def _receive_soon(self) -> None:
        """Schedules ``_receive`` for the next iteration of the loop, once per iteration."""
        if not self._receives_soon:
            self._receives_soon = True
            assert self._loop is not None
            self._loop.call_soon(self._receive)

    def _on_connection(self) -> None:
        self._accept()
        if not self._receives_soon:
            self._receive()

    def _on_readable(self, link: _Link) -> None:
        if link is not self._link:
            self._meet(link)
        if not self._receives_soon:
            self._receive()

    def _receive(self) -> None:
        """Handles the available messages, a few per iteration of the event loop."""
        self._receives_soon = False
        if self.take():
            self._receive_soon()

    def take(self) -> bool:
        """Handles messages of about ``ROWS_PER_TURN`` rows. Returns False if there are no more."""
        num_rows = 0
        while num_rows < ROWS_PER_TURN:
            frame = None if self._is_closing else self._next()
            if frame is None:
                return False
            num_rows += 1 + len(frame) // BYTES_PER_ROW
            try:
                self._handle(self._decoder.decode(frame))
            except Exception:
                logger.exception("a message of the engine core could not be handled")
        return True

    def _next(self) -> bytes | None:
        """The next frame of the present engine core; None: there is none."""
        if self._present() is None:
            if self._link is not None:
                self._drop(self._link)  # that of an earlier one
            self._accept()  # it may have ended before the loop saw its connection
        link = self._link
        if link is None:
            return None
        if not link.frames:
            link.read()
        if link.frames:
            return link.frames.popleft()
        if link.socket.is_closed:
            self._drop(link)
        return None


class _Link:
    """The connection of an engine core."""

    def __init__(self, connection: FrameSocket) -> None:
        self.socket = connection
        self.identity = b""
        """Its first frame; empty until that has come."""
        self.frames: deque[bytes] = deque()
        """Those that were read and not handled."""

    def read(self) -> None:
        """Reads frames that have arrived."""
        self.frames += self.socket.receive()
        if not self.identity and self.frames:
            self.identity = self.frames.popleft()
