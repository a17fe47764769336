"""Images from other servers and from files, where the operator allows it."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import os
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from engine_core.launch import open_regular

MAX_BYTES = 32 << 20
"""Size of an image."""
MAX_REDIRECTS = 3
CONNECT_TIMEOUT = 5.0
DEADLINE = 20.0
"""Seconds for an image, redirects included."""
ANY = "*"
_CHUNK = 1 << 16


class FetchError(ValueError):
    """An image that cannot be had; the message is for the client and tells nothing about the network."""


@dataclass(frozen=True)
class MediaAccess:
    """What URLs of images may refer to."""

    domains: Sequence[str] = ()
    """Hosts; ``*``: every one with a public address. Empty: none."""
    folder: str = ""
    """Folder whose files may be read; empty: none."""

    def fetch(self, url: str) -> bytes:
        """The content of an ``http``, ``https`` or ``file`` URL. Blocks.

        Raises:
            FetchError: It is not allowed, too large, too slow, or not there.
        """
        parts = _split(url)
        if parts.scheme == "file":
            return self._read(parts)
        deadline = time.monotonic() + DEADLINE
        for _ in range(MAX_REDIRECTS + 1):
            try:
                found = self._get(parts, deadline)
            except (OSError, http.client.HTTPException, ValueError) as error:
                if isinstance(error, FetchError):
                    raise
                raise FetchError(f"{parts.hostname} does not answer") from None
            if isinstance(found, bytes):
                return found
            parts = _split(found, parts.geturl())
        raise FetchError(f"it was redirected more than {MAX_REDIRECTS} times")

    def _read(self, parts: SplitResult) -> bytes:
        if not self.folder:
            raise FetchError("files need a server started with --allowed-local-media-path")
        name = unquote(parts.path)
        if "\0" in name:
            raise FetchError("it is no valid URL")
        path = Path(os.path.realpath(name))
        if parts.netloc not in ("", "localhost") or not path.is_relative_to(os.path.realpath(self.folder)):
            raise FetchError("the file is not in the folder that --allowed-local-media-path allows")
        try:
            with open_regular(path) as file:
                data = file.read(MAX_BYTES + 1)
        except (OSError, ValueError):
            raise FetchError("there is no such file") from None
        _check_size(data)
        return data

    def _get(self, parts: SplitResult, deadline: float) -> bytes | str:
        """The content, or where it moved to."""
        host, port = parts.hostname, parts.port
        if parts.scheme not in ("http", "https") or not host:
            raise FetchError("a URL must begin with data:, https:, http: or file:")
        is_named = host in map(str.lower, self.domains)
        if not is_named and ANY not in self.domains:
            raise FetchError(f"{host} is not among --allowed-media-domains")
        connection = _Connection(host, port or (443 if parts.scheme == "https" else 80), is_any=not is_named)
        connection.is_secure = parts.scheme == "https"
        timer = threading.Timer(max(0.0, deadline - time.monotonic()), connection.cut)
        timer.start()
        try:
            return self._ask(connection, parts, deadline)
        finally:
            timer.cancel()
            connection.close()

    def _ask(self, connection: _Connection, parts: SplitResult, deadline: float) -> bytes | str:
        path = parts.path or "/"
        connection.putrequest("GET", f"{path}?{parts.query}" if parts.query else path)
        connection.putheader("Accept", "image/*")
        connection.endheaders()
        response = connection.getresponse()
        target = response.getheader("Location")
        if response.status in (301, 302, 303, 307, 308) and target:
            return target
        if response.status != 200:
            raise FetchError(f"{connection.host} answers with status {response.status}")
        data = bytearray()
        while chunk := response.read1(_CHUNK):
            data += chunk
            _check_size(data)
            if time.monotonic() > deadline:
                raise FetchError(f"it takes longer than {DEADLINE:.0f} s")
        return bytes(data)


def _split(url: str, base: str = "") -> SplitResult:
    """The parts of a URL, which may be relative to another."""
    try:
        return urlsplit(urljoin(base, url))
    except ValueError:
        raise FetchError("it is no valid URL") from None


def _check_size(data: bytes | bytearray) -> None:
    if len(data) > MAX_BYTES:
        raise FetchError(f"it is larger than {MAX_BYTES >> 20} MiB")


class _Connection(http.client.HTTPConnection):
    """Connects to an address that was checked, so that a name cannot mean another one the next time."""

    def __init__(self, host: str, port: int, *, is_any: bool) -> None:
        super().__init__(host, port, timeout=CONNECT_TIMEOUT)
        self.is_secure = False
        self._is_any = is_any

    def cut(self) -> None:
        """Ends what another thread waits for."""
        with contextlib.suppress(OSError):
            if self.sock is not None:
                self.sock.shutdown(socket.SHUT_RDWR)

    def connect(self) -> None:
        for family, kind, number, _, address in socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM):
            if self._is_any and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_global:
                raise FetchError(f"{self.host} has no public address; name it with --allowed-media-domains")
            made = socket.socket(family, kind, number)
            made.settimeout(CONNECT_TIMEOUT)
            try:
                made.connect(address)
            except OSError:
                made.close()
                continue
            self.sock = made
            if self.is_secure:
                self.sock = ssl.create_default_context().wrap_socket(made, server_hostname=self.host)
            return
        raise OSError("no address answers")
