"""Connections that only those who have the secret of a cluster can make.

All machines of a cluster have the same secret (``key_files.py``). Both key pairs of ZeroMQ's CURVE follow from it:
that of the end that waits for connections, and that of the end that makes them. Each proves to the other that it has
its own, and all that follows is encrypted and authenticated, with new keys for each connection. Needs no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import threading
from collections.abc import Callable
from typing import Any

import zmq
from zmq.utils import z85

from executor.nodes.key_files import KEY_BYTES

FAILED_HANDSHAKES = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
"""Events of a socket whose other end has other keys."""
_ZAP_ADDRESS = "inproc://zeromq.zap.01"
_DOMAIN = b"octavo"


class Curve:
    """The key pairs that follow from a secret."""

    def __init__(self, secret: bytes) -> None:
        self._server = _pair(secret, b"octavo waits")
        self._client = _pair(secret, b"octavo joins")

    def accept(self, socket: zmq.Socket[bytes]) -> None:
        """Prepares a socket that will wait for connections. Its context needs a ``Gate``."""
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._server[1])
        socket.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN)

    def join(self, socket: zmq.Socket[bytes]) -> None:
        """Prepares a socket that will make connections."""
        socket.setsockopt(zmq.CURVE_SERVERKEY, self._server[0])
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self._client[0])
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._client[1])

    def admits(self, public_key: bytes) -> bool:
        """Whether a key that the other end has proved to have is that of the cluster."""
        return secrets.compare_digest(public_key, z85.decode(self._client[0]))


def _pair(secret: bytes, purpose: bytes) -> tuple[bytes, bytes]:
    """A public and a secret key."""
    own = z85.encode(hashlib.blake2b(secret, key=purpose, digest_size=KEY_BYTES).digest())
    return zmq.curve_public(own), own


class Gate:
    """Decides, in a thread, who may connect to the sockets of a context (ZeroMQ's ZAP, RFC 27)."""

    def __init__(
        self, context: zmq.Context[Any], curve: Curve, on_tick: Callable[[], None] | None = None, tick: float = 1.0
    ) -> None:
        """Begins. Must precede the binding of sockets.

        Args:
            context: Of the sockets.
            curve: The cluster's keys.
            on_tick: Called in the thread, about every ``tick`` seconds.
            tick: Seconds.
        """
        self._curve = curve
        self._on_tick, self._tick = on_tick, tick
        self._socket: zmq.Socket[bytes] = context.socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(_ZAP_ADDRESS)
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="gate", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._stop, zmq.POLLIN)
        with contextlib.suppress(zmq.ContextTerminated), self._socket:
            while True:
                events = dict(poller.poll(None if self._on_tick is None else int(self._tick * 1000)))
                if self._stop in events:
                    return
                if self._socket in events:
                    self._answer(self._socket.recv_multipart())
                if self._on_tick is not None:
                    self._on_tick()

    def _answer(self, frames: list[bytes]) -> None:
        version, request_id, domain, _, _, mechanism, *credentials = [*frames, b"", b"", b"", b"", b""][:7]
        good = version == b"1.0" and domain == _DOMAIN and mechanism == b"CURVE"
        good = good and bool(credentials) and self._curve.admits(credentials[0])
        verdict = (b"200", b"OK", b"octavo") if good else (b"400", b"wrong cluster key", b"")
        self._socket.send_multipart([b"1.0", request_id, *verdict, b""])

    def close(self) -> None:
        """Ends the thread. Nobody can connect any more."""
        if self._thread.is_alive():
            os.eventfd_write(self._stop, 1)
            self._thread.join()
        if self._stop >= 0:
            os.close(self._stop)
            self._stop = -1
