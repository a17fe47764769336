"""What clients may send, hold and leave unread: bounds of bytes, of numbers and of time."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, ClassVar, cast

import pytest

from api.admission import JsonMeter
from api.config import ServerConfig
from api.errors import RequestError
from api.http import body as body_module
from api.http.body_budget import BodyBudget, BodyLimits
from api.server import http_protocol
from api.server.http_protocol import MAX_HEAD_BYTES, MAX_HEADERS, MAX_PIPELINED, Connections, Limits
from tests.fakes import Connection, FakeServer
from tests.unit.sockets import DEADLINE, Clock, running, talk, until

GET = b"GET /version HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n"
CLOSE = b"Connection: close\r\n\r\n"
BODY = b'{"prompt": "x", "max_tokens": 2}'
ONE_CHUNK = b"%x\r\n%b\r\n" % (len(BODY), BODY)
ENDLESS = b'{"prompt": "x", "max_tokens": 400, "ignore_eos": true, "stream": true}'


def refusal(answer: bytes, status: int) -> str:
    """The message of an answer that must be an error with that status, and the connection's last word."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), answer[:300]
    assert b"connection: close" in head.lower()
    error = json.loads(body)["error"]
    assert error["code"] == status
    return str(error["message"])


class Client:
    """A connection that is kept."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def rest(self) -> bytes:
        """All that comes until the server ends the connection."""
        try:
            return await asyncio.wait_for(self.reader.read(), DEADLINE)
        except ConnectionError:
            return b""


@asynccontextmanager
async def client(port: int) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield Client(reader, writer)
    finally:
        writer.close()


async def test_heads_that_are_too_large(server: FakeServer) -> None:
    async with running(server) as port:
        value = b"a" * (MAX_HEAD_BYTES - 200)
        assert (await talk(port, GET + b"X-A: " + value + b"\r\n" + CLOSE)).startswith(b"HTTP/1.1 200")
        for large in (
            GET + b"X-A: " + b"a" * (70 << 10) + b"\r\n" + CLOSE,
            GET + b"a" * (70 << 10) + b": 1\r\n" + CLOSE,
            b"GET /" + b"a" * (70 << 10) + b" HTTP/1.1\r\nHost: localhost\r\n" + CLOSE,
            GET + b"X-A: " + b"a" * (1 << 20),
        ):
            assert "65536 bytes" in refusal(await talk(port, large), 431)
        headers = b"".join(b"X-%d: 1\r\n" % i for i in range(MAX_HEADERS - 2))
        assert (await talk(port, GET + headers + CLOSE)).startswith(b"HTTP/1.1 200")
        assert "headers" in refusal(await talk(port, GET + b"a:\r\n" * 9000 + CLOSE), 431)


async def test_heads_that_mean_two_things(server: FakeServer) -> None:
    async with running(server) as port:
        for head, status in (
            (b"GET /version HTTP/1.1\r\n", 400),
            (GET + b"Host: localhost\r\n", 400),
            (GET + b"host: other\r\n", 400),
            (b"GET /version HTTP/1.1\r\nHost: localhost/x\r\n", 400),
            (b"GET /version HTTP/1.1\r\nHost: a@localhost\r\n", 400),
            (b"GET /version HTTP/2.0\r\nHost: localhost\r\n", 505),
            (b"GET /version HTTP/1.1\nHost: localhost\n", 400),
            (GET + b"X-A: 1\r\n folded\r\n", 400),
            (GET + b"X-A : 1\r\n", 400),
            (CHUNKED + b"Content-Length: 3\r\n", 400),
            (POST + b"Content-Length: 3\r\nContent-Length: 4\r\n", 400),
            (POST + b"Transfer-Encoding: chunked, identity\r\n", 400),
        ):
            answer = await talk(port, head + CLOSE)
            if not answer.startswith(b"HTTP/1.1 505"):  # the parser may be the first to refuse a version
                refusal(answer, 400 if status == 505 else status)
        for line in (b"GET /version\r\n", b"GET /version\r\n\r\n"):
            assert b" 200 " not in await talk(port, line + CLOSE)
        # Balancers ask like this; it cannot be a browser.
        assert (await talk(port, b"GET /version HTTP/1.0\r\n\r\n")).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("key", [None, "secret"])
async def test_trailers(key: str | None) -> None:
    """They are bounded, also before anybody asks for a key, and never become headers."""
    server = FakeServer(ServerConfig(api_key=[key] if key else []))
    end = ONE_CHUNK + b"0\r\n"
    async with running(server) as port:
        some = b"X-A: 1\r\nX-B: 2\r\n\r\n"
        status = b"HTTP/1.1 401" if key else b"HTTP/1.1 200"
        assert (await talk(port, CHUNKED + CLOSE, end + some)).startswith(status)
        assert (await talk(port, CHUNKED + CLOSE, end + b"Authorization: Bearer secret\r\n\r\n")).startswith(status)
        for many in (
            b"A:\r\n" * 100_000,
            b"X-A: " + b"a" * (1 << 20),
            b"a" * (1 << 20),
            (b"X-A: " + b"a" * 8000 + b"\r\n") * 10,
        ):
            async with client(port) as one:
                await one.send(CHUNKED + b"\r\n" + end)
                if key:
                    assert (await one.reader.readuntil(b"\r\n\r\n")).startswith(status)
                try:
                    for begin in range(0, len(many), 8000):
                        await one.send(many[begin : begin + 8000])
                    answer = await one.rest()
                except ConnectionError:
                    continue  # cut before we were through
                assert b" 200 " not in answer
    assert server.traffic.bodies.num_bytes == 0


async def test_what_surrounds_chunks(server: FakeServer) -> None:
    async with running(server) as port:
        single = b"".join(b"1;a=b\r\n%b\r\n" % BODY[i : i + 1] for i in range(len(BODY))) + b"0\r\n\r\n"
        assert b'"text":"xx"' in await talk(port, CHUNKED + CLOSE, single)
        refusal(await talk(port, CHUNKED + b"\r\n", b"1;" + b"a" * (1 << 20)), 431)
        refusal(await talk(port, CHUNKED + b"\r\n", (b"1;" + b"a" * 5000 + b"\r\n \r\n") * 40), 431)
        # Against a body that nobody reads.
        assert b" 200 " not in await talk(
            port, CHUNKED.replace(b"/v1/completions", b"/nowhere") + b"\r\n", b"1;" * 99999
        )


async def test_pipelines(server: FakeServer) -> None:
    """Requests that come before the answers are answered in order, up to a number."""
    async with running(server) as port:
        few = await talk(port, (GET + b"\r\n") * (MAX_PIPELINED // 2) + GET + CLOSE)
        assert few.count(b"HTTP/1.1 200") == MAX_PIPELINED // 2 + 1
        many = await talk(port, (GET + b"\r\n") * 5000)
        assert MAX_PIPELINED <= many.count(b"HTTP/1.1 200") <= MAX_PIPELINED + 2
        assert many.count(b"HTTP/1.1") == many.count(b"HTTP/1.1 200")
        # What is wrong behind a good request does not cost it its answer.
        answer = await talk(port, POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY + b"\0\0\r\n\r\n")
        assert answer.count(b"HTTP/1.1") == 1 and b'"text":"xx"' in answer


async def test_who_leaves_with_requests_in_line(server: FakeServer) -> None:
    async with running(server) as port, client(port) as one:
        server.engine.steps_left = 5
        await one.send((POST + b"Content-Length: %d\r\n\r\n" % len(ENDLESS) + ENDLESS) * 2)
        await one.reader.readuntil(b"data: ")
        one.writer.close()
        await until(lambda: not server.engine.num_unfinished)


async def test_clients_that_ask_for_another_protocol(server: FakeServer) -> None:
    """Java's asks for HTTP/2 with each request. It gets its answer in HTTP/1.1, and its body is no second request."""
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n"
    head = POST + upgrade + b"Content-Length: %d\r\n\r\n" % len(BODY)
    chunked = CHUNKED + upgrade + b"\r\n"
    async with running(server) as port:
        for parts in (
            (head + BODY + GET + CLOSE,),
            (head, BODY, GET + CLOSE),
            (head + BODY[:5], BODY[5:] + GET + CLOSE),
            (chunked + ONE_CHUNK + b"0\r\n\r\n" + GET + CLOSE,),
            (chunked, ONE_CHUNK, b"0\r\nX: 1\r\n\r\n", GET + CLOSE),
        ):
            answer = await talk(port, *parts)
            assert b'"text":"xx"' in answer and answer.count(b"HTTP/1.1 200") == 2, answer
        answer = await talk(port, GET + upgrade + b"\r\n" + GET + CLOSE)
        assert answer.count(b"HTTP/1.1 200") == 2
        socket_head = GET + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
        assert (await talk(port, socket_head + GET + CLOSE)).count(b"HTTP/1.1 200") == 2
        hidden = GET + b"\r\n"
        answer = await talk(port, POST + upgrade + b"Content-Length: %d\r\n\r\n" % len(hidden), hidden, GET + CLOSE)
        assert answer.count(b"HTTP/1.1 400") == 1 and answer.count(b"HTTP/1.1 200") == 1
    assert server.traffic.num_open == 0


@pytest.mark.parametrize("is_streamed", [True, False])
async def test_who_sends_no_more_has_its_answers(server: FakeServer, is_streamed: bool) -> None:
    """As `nc -N` and shells' scripts do: the end of what a client sends is not the end of the client."""
    server.engine.steps_left = 0
    body = BODY[:-1] + b', "stream": true}' if is_streamed else BODY
    async with running(server) as port, client(port) as one:
        one.writer.write((POST + b"Content-Length: %d\r\n\r\n" % len(body) + body) * 2 + b"\r\n")
        one.writer.write_eof()
        await until(lambda: server.engine.num_unfinished)
        begin = await asyncio.wait_for(one.reader.readuntil(b"\r\n\r\n"), DEADLINE)
        assert begin.startswith(b"HTTP/1.1 100 ")
        server.engine.steps_left = None
        rest = await one.rest()
        assert rest.count(b"HTTP/1.1 200") == 2 and rest.count(b"connection: close") == 1
        assert rest.count(b"[DONE]" if is_streamed else b'"text":"xx"') == 2


async def test_who_sends_no_more_and_leaves(server: FakeServer) -> None:
    server.engine.steps_left = 0
    for version, body in ((b"HTTP/1.1", BODY), (b"HTTP/1.1", ENDLESS), (b"HTTP/1.0", BODY)):
        async with running(server) as port, client(port) as one:
            post = POST.replace(b"HTTP/1.1", version)
            one.writer.write(post + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            await until(lambda: server.engine.num_unfinished)
            one.writer.close()
            await until(lambda: not server.engine.num_unfinished)


async def test_half_a_body_is_no_request(server: FakeServer) -> None:
    async with running(server) as port, client(port) as one:
        one.writer.write(POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY[:-1])
        one.writer.write_eof()
        assert await one.rest() == b""


async def test_slow_heads(server: FakeServer) -> None:
    clock = Clock()
    connections = Connections(clock=clock)
    async with running(server, connections) as port:
        async with client(port) as silent, client(port) as slow, client(port) as later:
            await slow.send(GET)
            await later.send(GET + b"\r\n")
            await later.reader.readuntil(b"}")
            await until(lambda: connections.num_open == 3)
            clock.now += 9.9
            await slow.send(b"X-A: 1\r\n")
            await later.send(b"GET ")
            heads = [0, len(b"GET "), len(GET + b"X-A: 1\r\n")]
            await until(lambda: sorted(one._bare_bytes for one in connections.all()) == heads)
            connections.sweep()
            assert connections.num_open == 3
            clock.now += 0.1
            connections.sweep()
            assert "10 s" in refusal(await slow.rest(), 408)
            assert await silent.rest() == b""  # never asked for anything
            clock.now += 9.9
            connections.sweep()
            refusal(await later.rest(), 408)
        await until(lambda: not connections.num_open)


async def test_a_goodbye_ends(server: FakeServer) -> None:
    """A client that is refused and stays gets no place for ever, whatever it still sends."""
    clock = Clock()
    connections = Connections(clock=clock)
    async with running(server, connections) as port, client(port) as one:
        await one.send(GET + b"a:\r\n" * 500)
        assert (await one.reader.readuntil(b"}}")).startswith(b"HTTP/1.1 431")
        await one.send(b"a:\r\n" * 500)
        assert connections.num_open == 1
        clock.now += 2
        connections.sweep()
        await until(lambda: not connections.num_open)


async def test_a_body_that_nobody_reads(server: FakeServer) -> None:
    """The answer comes at once; the rest of the body may come, for a while."""
    clock = Clock()
    connections = Connections(clock=clock)
    head = b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
    async with running(server, connections) as port, client(port) as good, client(port) as bad:
        for one in (good, bad):
            await one.send(head)
            assert (await one.reader.readuntil(b"}}")).startswith(b"HTTP/1.1 404")
        await good.send(b"x" * 1000 + GET + b"\r\n")
        assert b" 200 " in await good.reader.readuntil(b"}")
        clock.now += 30
        await bad.send(b"x")
        connections.sweep()
        assert await bad.rest() == b""
        await good.send(GET + b"\r\n")
        assert b" 200 " in await good.reader.readuntil(b"}")


def narrow_socket(port: int) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", port))
    sock.setblocking(False)
    return sock


def bytes_taken(connections: Connections, sock: socket.socket) -> int:
    """What the server is told of how much a client has read."""
    name = sock.getsockname()
    (one,) = (one for one in connections.all() if one.transport.get_extra_info("peername") == name)
    taken = http_protocol._bytes_taken(one.transport)
    assert taken is not None
    return taken


async def test_readers_that_do_not_read() -> None:
    """They are cut, and their requests with them; those that read a little are not."""
    server = FakeServer(ServerConfig(max_logprobs=-1))
    clock = Clock()
    connections = Connections(clock=clock)
    loop = asyncio.get_running_loop()
    # Each event is large, so that buffers are full soon.
    body = b'{"prompt": "x", "max_tokens": 500, "ignore_eos": true, "stream": true, "logprobs": 100, "n": 4}'
    async with running(server, connections) as port:
        deaf, slow = narrow_socket(port), narrow_socket(port)
        for sock in (deaf, slow):
            await loop.sock_sendall(sock, POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        await until(lambda: sum(one.flow.write_paused for one in connections.all()) == 2)
        assert server.engine.num_unfinished == 8
        connections.sweep()
        num_rounds = 0
        # Three rounds if the deaf kernel takes no byte after the first sweep. It may take some when its window is
        # probed.
        while connections.num_open == 2:
            assert num_rounds < 20
            num_rounds += 1
            taken = bytes_taken(connections, slow)
            received = 0
            while received < 200_000:
                received += len(await loop.sock_recv(slow, 65536))
            await until(lambda before=taken: bytes_taken(connections, slow) != before)
            clock.now += 20
            connections.sweep()
        assert num_rounds >= 3
        await until(lambda: server.engine.num_unfinished == 4)
        assert connections.num_open == 1
        slow.close()
        deaf.close()
        await until(lambda: not server.engine.num_unfinished)


async def test_a_reader_that_takes_nothing_of_a_short_answer(server: FakeServer) -> None:
    """So short that no buffer of ours is full: it still has nobody to read it."""
    clock = Clock()
    connections = Connections(clock=clock)
    loop = asyncio.get_running_loop()
    body = b'{"prompt": "x", "max_tokens": 400, "ignore_eos": true, "stream": true, "n": 2}'
    async with running(server, connections) as port:
        server.engine.steps_left = 60
        deaf, slow, idle = narrow_socket(port), narrow_socket(port), narrow_socket(port)
        for sock in (deaf, slow):
            await loop.sock_sendall(sock, POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        await until(lambda: server.engine.steps_left == 0)
        assert not any(one.flow.write_paused for one in connections.all())
        connections.sweep()
        taken = bytes_taken(connections, slow)
        number = 0
        while connections.num_open == 3:
            assert number < 18
            number += 1
            assert await loop.sock_recv(slow, 1500)
            if number % 3 == 0:  # the kernel reports no small reads
                await until(lambda before=taken: bytes_taken(connections, slow) != before)
                taken = bytes_taken(connections, slow)
            clock.now += 10
            await loop.sock_sendall(idle, b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")  # not about to be cut
            assert await loop.sock_recv(idle, 4096)
            connections.sweep()
        assert number >= 6
        await until(lambda: server.engine.num_unfinished == 2)
        assert connections.num_open == 2
        for sock in (deaf, slow, idle):
            sock.close()
        await until(lambda: not server.engine.num_unfinished)


async def test_too_many_connections(server: FakeServer) -> None:
    connections = Connections(Limits(connections=10))
    async with running(server, connections) as port:
        clients = [await asyncio.open_connection("127.0.0.1", port) for _ in range(10)]
        await until(lambda: connections.num_open == 10)
        assert "too many connections" in refusal(await talk(port), 503)
        for reader, writer in clients:
            writer.write(GET + b"\r\n")
            assert b" 200 " in await reader.readuntil(b"}")
        connections.sweep()  # all are idle now, and others want to come in
        await until(lambda: not connections.num_open)
        assert b" 200 " in await talk(port, GET + CLOSE)
        for _, writer in clients:
            writer.close()


# -- bodies ------------------------------------------------------------------------------------------------------


def post_head(size: int) -> bytes:
    return POST + b"Content-Length: %d\r\n\r\n" % size


def padded(size: int) -> bytes:
    """A good request of so many bytes."""
    body = b'{"prompt": "x", "max_tokens": 2, "user": "%b"}'
    return body % (b"a" * (size - len(body) + 2))


async def test_bodies_that_stop(server: FakeServer) -> None:
    clock = Clock()
    server.traffic.bodies = budget = BodyBudget(clock=clock)
    async with running(server) as port, client(port) as idle, client(port) as trickle, client(port) as slow:
        body = padded(200_000)
        for one in (idle, trickle, slow):
            await one.send(post_head(len(body)) + body[:20_000])
        await until(lambda: budget.num_bytes == 60_000)
        budget.sweep()
        sent = 20_000
        for second in range(1, 31):
            clock.now += 1
            await trickle.send(b"a")
            await slow.send(body[sent : sent + 2000])
            sent += 2000
            await until(lambda total=60_000 + second * 2001: budget.num_bytes == total)
            budget.sweep()
        assert "body stalled" in refusal(await idle.rest(), 408)
        # The window of the other one began with a lot.
        for _ in range(30):
            clock.now += 1
            await trickle.send(b"a")
            await slow.send(body[sent : sent + 2000])
            sent += 2000
            await until(lambda size=sent: has_body_of(budget, size))
            budget.sweep()
        refusal(await trickle.rest(), 408)
        await slow.send(body[sent:])
        assert b'"text":"xx"' in await slow.reader.readuntil(b"}}")
    assert budget.num_bytes == 0
    assert server.traffic.num_open == 0


async def test_errors_of_slow_bodies_have_the_shape_of_the_endpoint(server: FakeServer) -> None:
    clock = Clock()
    server.traffic.bodies = budget = BodyBudget(clock=clock)
    async with running(server) as port, client(port) as one:
        await one.send(post_head(100).replace(b"/v1/completions", b"/v1/messages") + b"{")
        await until(lambda: budget.num_bytes)
        clock.now += 30
        budget.sweep()
        answer = await one.rest()
        assert answer.startswith(b"HTTP/1.1 408")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["type"] == "error"


LIMITS = BodyLimits(total=4 << 20, small=64 << 10)


async def test_memory_of_bodies_is_shared(server: FakeServer) -> None:
    """Bodies wait for memory; small ones do not, and the oldest does not either."""
    clock = Clock()
    server.traffic.bodies = budget = BodyBudget(LIMITS, clock)
    body = padded(2 << 20)
    async with running(server) as port, client(port) as first, client(port) as second, client(port) as third:
        clients = (first, second, third)
        sends = []
        for one in clients:
            await one.send(post_head(len(body)) + body[:1000])
            sends.append(asyncio.create_task(one.send(body[1000:-1])))
        await until(lambda: len(budget.waiting) >= 1 and has_body_of(budget, len(body) - 1))
        assert budget.num_bytes < LIMITS.total + len(body)
        small = padded(1000)
        assert b'"text":"xx"' in await talk(port, POST + b"Content-Length: 1000\r\n" + CLOSE, small)
        # One after the other gets through, though each stops for a moment before its end.
        for one, send in zip(clients, sends, strict=True):
            await asyncio.wait_for(send, DEADLINE)
            await one.send(body[-1:])
            assert b'"text":"xx"' in await asyncio.wait_for(one.reader.readuntil(b"}}"), DEADLINE)
    assert budget.num_bytes == 0


def has_body_of(budget: BodyBudget, size: int) -> bool:
    return any(body.size == size for body in budget.bodies)


async def test_who_waits_too_long_for_memory(server: FakeServer) -> None:
    """Those that stopped make room for those that wait; those that wait are told when it takes too long."""
    clock = Clock()
    server.traffic.bodies = budget = BodyBudget(LIMITS, clock)
    body = padded(3 << 20)
    async with running(server) as port, client(port) as stopped, client(port) as other:
        await stopped.send(post_head(len(body)) + body[:-1])
        await until(lambda: has_body_of(budget, len(body) - 1))
        send = asyncio.create_task(other.send(post_head(len(body)) + body))
        await until(lambda: budget.waiting)
        budget.sweep()
        clock.now += 5
        budget.sweep()
        refusal(await stopped.rest(), 408)
        assert b'"text":"xx"' in await asyncio.wait_for(other.reader.readuntil(b"}}"), DEADLINE)
        await send
    async with running(server) as port, client(port) as slow, client(port) as other:
        sent = 3 << 20
        large = padded(4 << 20)
        await slow.send(post_head(len(large)) + large[:sent])
        await until(lambda: has_body_of(budget, sent))
        send = asyncio.create_task(other.send(post_head(len(large)) + large))
        await until(lambda: budget.waiting)
        for _ in range(11):
            budget.sweep()
            clock.now += 1
            await slow.send(large[sent : sent + 80_000])  # faster than it would have to be
            sent += 80_000
            await until(lambda size=sent: has_body_of(budget, size))
        budget.sweep()
        answer = await asyncio.wait_for(other.reader.readuntil(b"}}"), DEADLINE)
        assert answer.startswith(b"HTTP/1.1 503") and b"retry-after: 1" in answer
        other.writer.close()
        await asyncio.gather(send, return_exceptions=True)
        await slow.send(large[sent:])
        assert b'"text":"xx"' in await asyncio.wait_for(slow.reader.readuntil(b"}}"), DEADLINE)
    assert budget.num_bytes == 0


# -- names of the server -----------------------------------------------------------------------------------------


async def status(server: FakeServer, *hosts: bytes, path: str = "/version") -> int | None:
    connection = Connection(server.app, path, b"", [(b"host", host) for host in hosts], method="GET")
    await connection.task
    return connection.status


@pytest.mark.parametrize("path", ["/", "/docs", "/version", "/metrics", "/v1/models", "/nowhere"])
async def test_a_server_for_this_machine_answers_to_its_names(path: str) -> None:
    server = FakeServer(ServerConfig(host="localhost", allowed_hosts=["llm.example"]))
    for good in (
        "localhost:8000",
        "LOCALHOST",
        "localhost.",
        "127.0.0.1:8000",
        "[::1]:8000",
        "192.0.2.7",
        "a.localhost:1",
        "host.docker.internal:8000",
        "llm.example:443",
    ):
        assert await status(server, good.encode(), path=path) != 403, good
    for bad in (
        "attacker.example",
        "attacker.example:8000",
        "localhost.attacker.example",
        "127.0.0.1.nip.io",
        "1.2.3",
        "",
    ):
        assert await status(server, bad.encode(), path=path) == 403, bad
    connection = Connection(server.app, path, b"", [(b"host", b"attacker.example:80")], method="GET")
    await connection.task
    error = json.loads(connection.body)["error"]
    assert "--allowed-hosts attacker.example " in error["message"]
    assert error["type"] == "PermissionDeniedError"


@pytest.mark.parametrize(
    ("config", "is_open"),
    [
        (ServerConfig(), False),
        (ServerConfig(host="127.0.0.9"), False),
        (ServerConfig(host="::1"), False),
        (ServerConfig(host="localhost"), False),
        (ServerConfig(allowed_hosts=["*"]), True),
        (ServerConfig(api_key=["secret"]), True),
        (ServerConfig(uds="/tmp/x.sock"), True),
        (ServerConfig(host="0.0.0.0"), True),
        (ServerConfig(host=""), True),
        (ServerConfig(host="192.0.2.1"), True),
        (ServerConfig(host="0.0.0.0", allowed_hosts=["llm.example"]), False),
        (ServerConfig(api_key=["secret"], allowed_hosts=["llm.example"]), False),
    ],
)
async def test_who_answers_to_any_name(config: ServerConfig, is_open: bool) -> None:
    assert await status(FakeServer(config), b"attacker.example") == (200 if is_open else 403)


async def test_a_body_that_is_refused_is_gone_at_once() -> None:
    """Even while the error, whose traceback knows the frame that read it, is still being answered."""

    class Coming:
        headers: ClassVar[dict[str, str]] = {}

        async def stream(self) -> AsyncIterator[bytes]:
            for _ in range(9):
                yield b" " * 1000

    with BodyBudget().open() as held, pytest.raises(RequestError) as caught:
        await body_module._read(cast(Any, Coming()), 5000, held, JsonMeter(1000))
    sizes = [len(entry.frame.f_locals["body"]) for entry in caught.traceback if entry.name == "_read"]
    assert sizes == [0]
