"""Frames between two processes of this machine, over a Unix socket.

Message queues move messages in threads of their own, which are two more wake-ups on each way. Here the sender's call
puts a frame where the receiver finds it.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections import deque

_LENGTH = struct.Struct("<Q")
CHUNK_BYTES = 1 << 18
"""Bytes that are read at once."""


class FrameSocket:
    """One end of a connection. Neither sending nor receiving waits.

    Attributes:
        is_closed: The other end is gone, and all that it sent was received.
    """

    def __init__(self, connection: socket.socket) -> None:
        """Takes over a connected stream socket."""
        connection.setblocking(False)
        self.is_closed = False
        self._connection = connection
        self._buffer = bytearray(CHUNK_BYTES)
        self._view = memoryview(self._buffer)
        self._partial = bytearray()
        """Received bytes of frames that are not complete."""
        self._unsent: deque[memoryview] = deque()

    @classmethod
    def connect(cls, path: str) -> FrameSocket:
        """Connects to a listening socket. Raises OSError."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(path)
        except BaseException:
            connection.close()
            raise
        return cls(connection)

    def fileno(self) -> int:
        return self._connection.fileno()

    @property
    def has_unsent(self) -> bool:
        """Whether ``flush`` must be called once the socket is writable."""
        return bool(self._unsent)

    def send(self, frame: bytes) -> None:
        """Sends a frame, or keeps what the other end does not take yet. Nothing is sent to one that is gone."""
        head = _LENGTH.pack(len(frame))
        if self._unsent:
            self._unsent += (memoryview(head), memoryview(frame))
            return
        try:
            sent = self._connection.sendmsg([head, frame], (), socket.MSG_NOSIGNAL)
        except BlockingIOError:
            sent = 0
        except OSError:
            return
        if sent < len(head) + len(frame):
            self._unsent.append(memoryview(head + frame)[sent:])

    def flush(self) -> None:
        """Sends what was kept, as far as the other end takes it."""
        while self._unsent:
            part = self._unsent[0]
            try:
                sent = self._connection.send(part, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            except OSError:
                self._unsent.clear()
                return
            if sent < len(part):
                self._unsent[0] = part[sent:]
            else:
                self._unsent.popleft()

    def receive(self) -> list[bytes]:
        """Some of the frames that have arrived; none if there are none."""
        while not self.is_closed:
            try:
                count = self._connection.recv_into(self._buffer)
            except BlockingIOError:
                break
            except OSError:
                count = 0
            if not count:
                self.is_closed = True
                break
            self._partial += self._view[:count]
            frames = self._cut()
            if frames:
                return frames
        return []

    def _cut(self) -> list[bytes]:
        """Takes the complete frames from what was received."""
        data, frames, begin = self._partial, [], 0
        with memoryview(data) as view:
            while len(data) - begin >= _LENGTH.size:
                first = begin + _LENGTH.size
                end = first + _LENGTH.unpack_from(data, begin)[0]
                if end > len(data):
                    break
                frames.append(bytes(view[first:end]))
                begin = end
        del data[:begin]
        return frames

    def close(self, linger: float = 0.0) -> None:
        """Closes the connection, after at most ``linger`` seconds in which the rest is sent."""
        deadline = time.monotonic() + linger
        while self._unsent and (left := deadline - time.monotonic()) > 0:
            poller = select.poll()
            poller.register(self._connection, select.POLLOUT)
            poller.poll(int(left * 1000) + 1)
            self.flush()
        self._unsent.clear()
        self._connection.close()
