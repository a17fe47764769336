"""Ports for servers that must know theirs before they listen."""

from __future__ import annotations

import itertools
import os
import socket

_FIRST, _COUNT = 12_000, 16_000
"""Below the range from which the kernel takes the port of a socket bound to port 0, so that no such socket gets one."""
_numbers = itertools.count(os.getpid() * 101)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody uses, another one each time."""
    for _ in range(_COUNT):
        port = _FIRST + next(_numbers) % _COUNT
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no port is free")
