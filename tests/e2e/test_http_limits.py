"""What strangers can make the api process hold."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

import httpx
import psutil

from tests.e2e.server import Server

MB = 1 << 20


def send(url: str, head: bytes, piece: bytes, total: int) -> None:
    """Sends a head and then pieces, until the server cuts the connection."""
    address = httpx.URL(url)
    sent = 0
    with socket.create_connection((address.host, address.port or 0), timeout=60) as connection:
        connection.sendall(head)
        with contextlib.suppress(ConnectionError):
            while sent < total:
                connection.sendall(piece)
                sent += len(piece)


def test_trailers_take_no_memory(tiny_model: Path) -> None:
    """Neither many nor long ones, with and without an answer that comes before them."""
    with Server("--model", str(tiny_model), "--api-key", "secret") as server:
        process = psutil.Process(server.process.pid)
        server.get("/v1/models").close()
        before = process.memory_info().rss
        chunk = b"2\r\n{}\r\n0\r\n"
        for path in (b"/v1/completions", b"/nowhere"):
            for key in (b"", b"Authorization: Bearer secret\r\n"):
                head = b"POST %b HTTP/1.1\r\nHost: localhost\r\n%bTransfer-Encoding: chunked\r\n\r\n" % (path, key)
                for piece in (b"A:\r\n" * 4000, b"X-A: " + b"a" * 16000 + b"\r\n", b"a" * 16000):
                    send(server.url, head + chunk, piece, 50 * MB)
        assert process.memory_info().rss - before < 30 * MB
        assert server.get("/health").status_code == 200
