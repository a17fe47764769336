"""The secret of a cluster, and connections that only those who have it can make.

All machines of a cluster have the same file. Both key pairs of ZeroMQ's CURVE follow from it: that of the end that
waits for connections, and that of the end that makes them. Each proves to the other that it has its own, and all that
follows is encrypted and authenticated, with new keys for each connection. Needs no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq
from zmq.utils import z85

from executor.base import ModelError

KEY_BYTES = 32
_HEAD = "octavo-cluster-key-1:"
_MOST_BYTES = 4096
"""Size of the largest file that is read."""
FAILED_HANDSHAKES = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
"""Events of a socket whose other end has other keys."""
_ZAP_ADDRESS = "inproc://zeromq.zap.01"
_DOMAIN = b"octavo"


def create_key_file(path: Path) -> None:
    """Writes a new secret, which only this user can read.

    Raises:
        ModelError: The file exists, or cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise ModelError(f"{path}: exists already; machines that use it would no longer know the others") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be written: {error.strerror}") from None
    with os.fdopen(descriptor, "w") as file:
        file.write(f"{_HEAD}{secrets.token_hex(KEY_BYTES)}\n")


def read_key_file(path: str) -> bytes:
    """The secret in a file.

    Raises:
        ModelError: It cannot be read, or is no such file; the message names the option.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(_MOST_BYTES).decode("ascii", "replace").strip()
    except OSError as error:
        raise ModelError(
            f"--cluster-key {path}: {error.strerror}; octavo cluster-key FILE makes one, which all machines need"
        ) from None
    match = re.fullmatch(rf"{_HEAD}([0-9a-f]{{{2 * KEY_BYTES}}})", text)
    if match is None:
        raise ModelError(f"--cluster-key {path}: not a file that octavo cluster-key has made, or of another version")
    return bytes.fromhex(match[1])


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
