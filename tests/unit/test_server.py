"""Ports, sockets and heads of requests: what lies before the application."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest

from api.config import ServerConfig
from api.server import run
from api.server.http_protocol import MAX_HEAD_BYTES, Connections
from api.server.run import PortInUseError, open_listener
from tests.fakes import FakeServer
from tests.unit.sockets import Clock, running, talk, until


def test_a_free_port() -> None:
    with open_listener(ServerConfig(port=0)) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(listener.getsockname(), timeout=60)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_port_that_is_taken(host: str) -> None:
    with open_listener(ServerConfig(host=host, port=0)) as other:
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(PortInUseError, match=rf"cannot listen on {host}:{port}: .*in use; .* --port"):
            open_listener(ServerConfig(host=host, port=port))


@pytest.mark.parametrize("is_pipe", [False, True])
def test_output_that_goes_nowhere(is_pipe: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, or a pipe that nobody reads: the server goes on."""
    if is_pipe:
        reader, descriptor = os.pipe()
        os.close(reader)
    else:
        descriptor = os.open("/dev/full", os.O_WRONLY)
    with os.fdopen(descriptor, "w") as output:
        monkeypatch.setattr("sys.stdout", output)
        run._write("Serving")
        run._write("Serving")
        monkeypatch.undo()  # closing the file flushes it


def test_an_address_that_is_not_ours() -> None:
    with pytest.raises(PortInUseError, match="cannot listen on 192.0.2.1:0"):
        open_listener(ServerConfig(host="192.0.2.1", port=0))
    with pytest.raises(PortInUseError, match="cannot listen on no.such.host.invalid"):
        open_listener(ServerConfig(host="no.such.host.invalid", port=0))


def test_unix_sockets(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    config = ServerConfig(uds=str(path))
    first = open_listener(config)
    first.listen()
    with pytest.raises(PortInUseError, match="another server is listening"):
        open_listener(config)
    first.close()
    open_listener(config).close()  # the file that is left does not stand in the way
    file = tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(PortInUseError, match="not a socket"):
        open_listener(ServerConfig(uds=str(file)))
    assert file.read_text() == "precious"


async def test_heads_of_requests(server: FakeServer) -> None:
    async with running(server, Connections(clock=Clock())) as port:
        good = b"GET /version HTTP/1.1\r\nHost: localhost\r\n"
        close = b"Connection: close\r\n\r\n"
        assert (await talk(port, good + close)).startswith(b"HTTP/1.1 200")
        assert (await talk(port, good, b"X-A: 1\r\n", close)).startswith(b"HTTP/1.1 200")
        # Several requests on one connection, each within the bound, together beyond it.
        many = [good + b"X-A: " + b"a" * (MAX_HEAD_BYTES // 4) + b"\r\n\r\n"] * 8
        assert (await talk(port, *many, good + close)).count(b"HTTP/1.1 200") == 9
        endless = [b"X-A: " + b"a" * 8000 + b"\r\n"] * (MAX_HEAD_BYTES // 8000 + 2)
        assert b" 200 " not in await talk(port, good, *endless)
        assert b" 200 " not in await talk(port, b"GET /" + b"a" * 8000, *[b"a" * 8000] * 10)
        for nonsense in (b"\r\n\r\n\0\0", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", b"GET\r\n\r\n", b"{}\r\n\r\n"):
            assert b" 200 " not in await talk(port, nonsense)
        body = b'{"prompt": "x", "max_tokens": 2}'
        post = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head = post + b"Content-Length: %d\r\n" % len(body)
        assert b'"text":"xx"' in await talk(port, head + close, body[:9], body[9:])
        chunked = b"".join(b"%x\r\n%b\r\n" % (1, body[i : i + 1]) for i in range(len(body))) + b"0\r\n\r\n"
        assert b'"text":"xx"' in await talk(port, post + b"Transfer-Encoding: chunked\r\n" + close, chunked)
        assert b" 400 " in await talk(port, head + b"Content-Length: 3\r\n" + close, body)
    assert server.engine.num_unfinished == 0
    assert server.traffic.num_open == 0


async def test_bodies_are_no_heads(server: FakeServer) -> None:
    """A body that comes apart from its head may be long, and so may its answer take."""
    clock = Clock()
    connections = Connections(clock=clock)
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
    )
    close = b"Connection: close\r\n\r\n"
    async with running(server, connections) as port:
        large = b'{"prompt": "x", "max_tokens": 2, "user": "%b"}' % (b"a" * 2 * MAX_HEAD_BYTES)
        assert b'"text":"xx"' in await talk(port, head % len(large) + close, large)
        two = (head % len(large) + b"\r\n", large) * 2
        assert (await talk(port, *two, head % len(large) + close, large)).count(b'"text":"xx"') == 3
        server.engine.steps_left = 1
        body = b'{"prompt": "x", "max_tokens": 2, "stream": true}'
        answer = asyncio.create_task(talk(port, head % len(body) + close, body))
        await until(lambda: server.engine.num_unfinished)
        clock.now += 1000
        connections.sweep()
        server.engine.steps_left = None
        assert b"[DONE]" in await answer


async def test_a_dropped_connection_aborts(server: FakeServer) -> None:
    body = b'{"prompt": "x", "max_tokens": 400, "ignore_eos": true, "stream": true}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += b"Content-Length: %d\r\n\r\n"
    async with running(server) as port:
        server.engine.steps_left = 5
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head % len(body) + body)
        await reader.readuntil(b"data: ")
        assert server.engine.num_unfinished == 1
        writer.close()
        await until(lambda: not server.engine.num_unfinished)
