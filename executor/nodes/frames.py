"""Long messages in short frames.

ZeroMQ reads a frame as a whole before it looks into it, even that of an end which has yet to prove that it has the
key. So the longest frame is what a stranger's connection can take of the memory.
"""

from __future__ import annotations

from typing import Any

import zmq

FRAME_BYTES = 1 << 16
"""Size of the longest part of a message."""
_ENVELOPE_BYTES = 256
"""What encryption adds to a part, and more."""


def bound_frames(connection: zmq.Socket[Any]) -> None:
    """Prepares a socket, which will end the connections of those who send longer frames."""
    connection.setsockopt(zmq.MAXMSGSIZE, FRAME_BYTES + _ENVELOPE_BYTES)


def in_frames(data: bytes | memoryview) -> list[memoryview]:
    """A message's bytes in parts, at least one."""
    view = memoryview(data)
    return [view[begin : begin + FRAME_BYTES] for begin in range(0, max(1, len(view)), FRAME_BYTES)]
