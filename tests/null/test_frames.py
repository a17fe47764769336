"""Frames over a Unix socket."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import numpy as np
import pytest

from engine_core.frames import FrameSocket

Pair = tuple[FrameSocket, FrameSocket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    first, second = socket.socketpair()
    left, right = FrameSocket(first), FrameSocket(second)
    yield left, right
    left.close()
    right.close()


def received(end: FrameSocket, other: FrameSocket, count: int) -> list[bytes]:
    """The next frames, while the other end sends what it has kept."""
    frames: list[bytes] = []
    while len(frames) < count and not end.is_closed:
        other.flush()
        frames += end.receive()
    return frames


def test_frames_come_in_order_and_whole(pair: Pair) -> None:
    left, right = pair
    generator = np.random.default_rng(1)
    frames = [generator.bytes(size) for size in (0, 1, 300, 1 << 20, 5, 3 << 19, 0, 7)] * 3
    for frame in frames:
        left.send(frame)
    assert left.has_unsent, "nobody has taken as much yet"
    assert received(right, left, len(frames)) == frames
    assert not left.has_unsent and right.receive() == [] and not right.is_closed
    right.send(b"back")
    assert left.receive() == [b"back"]


def test_parts_of_a_frame_wait_for_the_rest() -> None:
    first, second = socket.socketpair()
    end = FrameSocket(second)
    data = (3).to_bytes(8, "little") + b"abc" + (2).to_bytes(8, "little") + b"de"
    frames = []
    for byte in data:
        first.send(bytes([byte]))
        frames += end.receive()
    assert frames == [b"abc", b"de"]
    first.close()
    end.close()


def test_the_last_frames_of_an_end_that_is_gone(pair: Pair) -> None:
    left, right = pair
    left.send(b"last")
    left.close()
    assert right.receive() == [b"last"] and not right.is_closed
    assert right.receive() == [] and right.is_closed
    right.send(b"nobody hears it")
    right.flush()
    assert right.receive() == []


def test_closing_waits_for_the_rest_as_long_as_it_may(pair: Pair) -> None:
    left, right = pair
    left.send(bytes(1 << 22))
    left.close(linger=0.01)
    assert received(right, right, 1) == [] and right.is_closed
