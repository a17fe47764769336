"""uvicorn's HTTP parser with bounds on what a client may send and hold, in bytes and in time.

``Connections`` belongs to a server: it makes the protocol of each connection and looks at all of them once a second, so
that no chunk of data costs a timer. Bodies are bounded where they are read (``api/http/body_budget.py``); what no
endpoint reads is bounded here.
"""

from __future__ import annotations

import asyncio
import fcntl
import re
import select
import socket
import struct
import termios
import time
from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple

import httptools
from uvicorn import Config
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from api.errors import KINDS, RequestError
from api.http.errors import HEADERS, render

MAX_HEAD_BYTES = 64 << 10
MAX_HEADERS = 128
MAX_PIPELINED = 64
"""Requests that may wait on one connection behind the one that is answered."""
MAX_FRAMING_RATIO = 16
"""Bytes of chunk headers and extensions for each byte of a body, beside one head's worth. One chunk a byte takes 6."""
MAX_CONNECTIONS = 8192
SWEEP_INTERVAL = 1.0

FIRST_LOOK = 0.005
"""Seconds until it is seen whether a client that sends no more is still there; the next looks double them."""
LAST_LOOK = 1.0

_PIECE = 16 << 10
"""Bytes that the parser is fed at once: as far as a bound may be passed before anybody notices."""
_BYTES_ACKED = 120
"""Offset of tcpi_bytes_acked in Linux's struct tcp_info."""
_HOST = re.compile(rb"[A-Za-z0-9._~%!$&'()*+,;=:\[\]-]*")
"""RFC 3986's host and port, roughly: nothing that begins a path, a query or a user name."""


class Limits(NamedTuple):
    """Seconds that a connection may take, and how many there are."""

    head: float = 10.0
    """From connecting, or from a later head's first byte, to the head's end."""
    reader: float = 60.0
    """Without taking any of what waits to be sent."""
    unread_body: float = 30.0
    """For the rest of a body whose request has its answer already."""
    goodbye: float = 2.0
    """From an answer that ends a connection to its end. Closing at once could make the client lose the answer."""
    connections: int = MAX_CONNECTIONS


class Connections:
    """What the connections of a server have in common."""

    def __init__(self, limits: Limits | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits or Limits()
        self.clock = clock
        self._open: set[BoundedHttpProtocol] = set()
        self._timer: asyncio.TimerHandle | None = None

    def protocol(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> BoundedHttpProtocol:
        """The protocol of a new connection, as uvicorn makes it."""
        return BoundedHttpProtocol(self, config, server_state, app_state, _loop)

    @property
    def num_open(self) -> int:
        return len(self._open)

    def all(self) -> list[BoundedHttpProtocol]:
        """Those that are open."""
        return list(self._open)

    def add(self, connection: BoundedHttpProtocol) -> None:
        """A connection was made."""
        self._open.add(connection)
        if self._timer is None:
            self._timer = connection.loop.call_later(SWEEP_INTERVAL, self._on_timer, connection.loop)

    def discard(self, connection: BoundedHttpProtocol) -> None:
        """A connection is gone."""
        self._open.discard(connection)

    def sweep(self) -> None:
        """Ends what took too long."""
        now = self.clock()
        # Near the bound, connections that nobody uses make room.
        is_crowded = len(self._open) > self.limits.connections * 9 // 10
        for connection in self.all():
            connection.check(now, is_crowded=is_crowded)

    def _on_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        self.sweep()
        if self._open:
            self._timer = loop.call_later(SWEEP_INTERVAL, self._on_timer, loop)


class _Part(Enum):
    """Of a request, that comes next."""

    HEAD = 0
    BODY = 1
    """And trailers."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """Refuses requests whose parts are too large, too many or too slow, and those that could be read in two ways."""

    def __init__(
        self,
        shared: Connections,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._shared = shared
        self._part = _Part.HEAD
        self._since: float | None = shared.clock()
        """When the head began. None between requests and in bodies."""
        self._head_bytes = 0
        """Of the head, or of the trailers, as far as they were parsed."""
        self._num_trailers = 0
        self._bare_bytes = 0
        """What came since the last request's end, the head's end or the last byte of a body."""
        self._wire_bytes = 0
        """What came since the head's end."""
        self._body_bytes = 0
        self._running: RequestResponseCycle | None = None
        """The request that is answered; the base class only knows the last one that came."""
        self._refusal: RequestError | None = None
        """Set before an exception leaves a callback of the parser."""
        self._is_known_head = False
        """The parser is told a head once more."""
        self._is_deaf = False
        """What still comes is thrown away."""
        self._ends_at: float | None = None
        """When the connection is cut, if that is settled."""
        self._taken = 0
        """Grows when the client takes something."""
        self._stuck_since: float | None = None
        """Since when it did not, though there was something to take."""
        self._is_half_closed = False
        """The client sends no more, but may wait for its answer."""

    # -- the connection ------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._shared.add(self)
        if self._shared.num_open > self._shared.limits.connections:
            self._refuse(_error(503, "too many connections are open"))
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._shared.discard(self)
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends no more. If it waits for an answer the connection stays open until it has that.

        A client that is gone looks the same until something is sent to it: then its system answers that nobody is
        there. So a client that has no part of its answer yet is sent ``100 Continue``, which says nothing and may come
        before any answer. HTTP/1.0 has no such thing, and TLS no half of a connection: there it counts as gone.
        """
        if self._is_half_closed:
            return True
        is_over = self.cycle is None or self.cycle.response_complete or self._ends_at is not None
        if is_over or self._part is _Part.BODY or self.transport.get_extra_info("ssl_object") is not None:
            return False
        assert self._running is not None
        if self._running.scope["http_version"] == "1.0":
            return False
        self._is_half_closed = True
        self.cycle.keep_alive = False
        if not self._running.response_started:
            self.transport.write(STATUS_LINE[100] + b"\r\n")
        self._look_for_client(FIRST_LOOK)
        return True

    def _look_for_client(self, delay: float) -> None:
        if self.transport.is_closing():
            return
        if _is_hung_up(self.transport):
            self.transport.abort()
        else:
            self.loop.call_later(delay, self._look_for_client, min(2 * delay, LAST_LOOK))

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def shutdown(self) -> None:
        if self._is_deaf:
            self.transport.abort()
        else:
            super().shutdown()

    def check(self, now: float, *, is_crowded: bool = False) -> None:
        """Ends the connection if it took too long.

        Args:
            now: On the clock of ``Connections``.
            is_crowded: Others need its place, should nobody use it.
        """
        limits = self._shared.limits
        if self._ends_at is not None and now >= self._ends_at:
            self.transport.abort()
        elif self._must_read():
            self._check_reader(now)
        else:
            self._stuck_since = None
        if self._since is None:
            if is_crowded and self._part is _Part.HEAD and self.timeout_keep_alive_task is not None:
                self.transport.close()
        elif self.flow.read_paused:
            self._since = now  # it is us who do not read
        elif now - self._since >= limits.head:
            self._refuse_slow_head(limits.head)

    def _must_read(self) -> bool:
        """Whether the client has an answer to read."""
        is_answering = self._running is not None and not self._running.response_complete
        return is_answering or self.flow.write_paused or self.transport.is_closing()

    def _check_reader(self, now: float) -> None:
        unsent = self.transport.get_write_buffer_size() + _unsent_by_kernel(self.transport)
        taken = _bytes_taken(self.transport)
        if taken is None:
            # While writing is paused, what is not sent can only become less.
            taken = -unsent if self.flow.write_paused or self.transport.is_closing() else self._taken + 1
        if self._stuck_since is None or not unsent or taken != self._taken:
            self._taken, self._stuck_since = taken, now
        elif now - self._stuck_since >= self._shared.limits.reader:
            self.transport.abort()

    def _refuse_slow_head(self, seconds: float) -> None:
        if self._is_deaf or self.transport.is_closing():
            return
        if self._bare_bytes:
            self._refuse(_error(408, f"the head of the request did not come within {seconds:g} s"))
        else:
            self.transport.close()  # a connection on stock, as browsers open them

    # -- what comes in -------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._is_deaf:
            return
        if self._since is None and self._part is _Part.HEAD:
            self._since = self._shared.clock()
        if len(data) <= _PIECE:
            self._feed(data)
            return
        view = memoryview(data)
        for begin in range(0, len(data), _PIECE):
            self._feed(view[begin : begin + _PIECE])
            if self._is_deaf:
                return

    def _feed(self, data: bytes | memoryview) -> None:
        self._bare_bytes += len(data)
        self._wire_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._go_on_without_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self._refuse(self._refusal or _error(400, "the request is not valid HTTP"))
        else:
            is_framed = self._part is _Part.BODY
            if self._bare_bytes > MAX_HEAD_BYTES or (
                is_framed and self._wire_bytes > MAX_HEAD_BYTES + MAX_FRAMING_RATIO * self._body_bytes
            ):
                self._refuse(_too_large())

    def _go_on_without_upgrade(self, rest: bytes | memoryview) -> None:
        """A request asked for another protocol, as Java's client asks for HTTP/2. It is answered in this one.

        The parser takes what follows such a head for the other protocol, so another parser reads it as what it is.
        """
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        framing = [
            name + b": " + value + b"\r\n"
            for name, value in self.headers
            if name in (b"content-length", b"transfer-encoding")
        ]
        self._is_known_head = True
        self._feed(b"POST / HTTP/1.1\r\nHost: x\r\n" + b"".join(framing) + b"\r\n")
        if rest and not self._is_deaf:
            self._feed(rest)

    def on_message_begin(self) -> None:
        if self._is_known_head:
            return
        super().on_message_begin()
        if self._since is None:
            self._since = self._shared.clock()

    def on_url(self, url: bytes) -> None:
        if self._is_known_head:
            return
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_known_head:
            return
        self._count_head(len(name) + len(value) + 4)
        if self._part is _Part.BODY:
            # A trailer. Nobody here reads any, and among the headers it could pass for one.
            self._num_trailers += 1
            if self._num_trailers > MAX_HEADERS:
                self._fail(_error(431, f"the request has more than {MAX_HEADERS} trailers"))
            return
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS:
            self._fail(_error(431, f"the request has more than {MAX_HEADERS} headers"))

    def on_headers_complete(self) -> None:
        if self._is_known_head:
            self._is_known_head = False
            self.cycle.more_body = True  # nobody has looked yet: its task begins after this turn of the loop
        else:
            self._check_head()
            super().on_headers_complete()
        # From here on, counts are those of body and trailers.
        self._part = _Part.BODY
        self._since = None
        self._head_bytes = self._num_trailers = 0
        self._bare_bytes = self._wire_bytes = self._body_bytes = 0

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        self._bare_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._part = _Part.HEAD
        self._head_bytes = self._bare_bytes = 0
        if self._ends_at is not None and not self._is_deaf:
            self._ends_at = None  # the rest of a body came that nobody wanted
        super().on_message_complete()

    def on_response_complete(self) -> None:
        if self._part is _Part.BODY and not self.pipeline and not self._is_deaf:
            self._ends_at = self._shared.clock() + self._shared.limits.unread_body
        super().on_response_complete()

    def _check_head(self) -> None:
        version = self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            self._fail(_error(505, f"HTTP/{version} is not supported; use HTTP/1.1"))
        hosts = [value for name, value in self.headers if name == b"host"]
        if len(hosts) > 1 or (not hosts and version == "1.1"):
            self._fail(_error(400, f"the request has {len(hosts)} Host headers; it needs one"))
        if hosts and not _HOST.fullmatch(hosts[0]):
            self._fail(_error(400, "the Host header is not a host name"))
        if len(self.pipeline) >= MAX_PIPELINED:
            self._fail(_error(400, f"more than {MAX_PIPELINED} requests wait on this connection"))

    def _count_head(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > MAX_HEAD_BYTES:
            self._fail(_too_large())

    def _fail(self, error: RequestError) -> None:
        """Ends the request that is parsed; for callbacks of the parser."""
        self._refusal = error
        raise error

    # -- refusals ------------------------------------------------------------------------------------------------

    def _refuse(self, error: RequestError) -> None:
        """Answers the request that is parsed, unless others before it have no answer yet, and ends the connection."""
        if self._is_deaf or self.transport.is_closing():
            return
        cycle = self.cycle
        is_idle = cycle is None or cycle.response_complete
        if self._part is _Part.HEAD:
            if is_idle:
                self._say_goodbye(error)
            else:
                self._stop_listening()  # the connection ends with the answers that are under way
        elif is_idle or cycle.response_started or self.pipeline:
            self._is_deaf = True
            self.transport.close()
        else:
            cycle.disconnected = True
            cycle.message_event.set()
            self._say_goodbye(error)

    def _stop_listening(self) -> None:
        """The connection ends with the answer to the last request that came."""
        self._is_deaf = True
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
        else:
            self.cycle.keep_alive = False

    def _say_goodbye(self, error: RequestError) -> None:
        self._is_deaf = True
        body = render(error)
        headers = {
            **HEADERS.get(error.status, {}),
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self.transport.write(STATUS_LINE[error.status] + head.encode("ascii") + b"\r\n" + body)
        self.transport.write_eof()
        self._ends_at = self._shared.clock() + self._shared.limits.goodbye


def _error(status: int, message: str) -> RequestError:
    return RequestError(message, status=status, kind=KINDS[status])


def _too_large() -> RequestError:
    return _error(431, f"the head of the request, or what surrounds its body, is larger than {MAX_HEAD_BYTES} bytes")


def _bytes_taken(transport: asyncio.Transport) -> int | None:
    """Bytes that the peer's kernel acknowledged, which it does until its own buffer is full; None: it is not known."""
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return None
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED + 8)
    except OSError:
        return None
    return int(struct.unpack_from("=Q", info, _BYTES_ACKED)[0]) if len(info) == _BYTES_ACKED + 8 else None


def _is_hung_up(transport: asyncio.Transport) -> bool:
    """Whether the peer neither sends nor reads. Loops do not tell once they have read the end of what it sent."""
    poll = select.poll()
    poll.register(transport.get_extra_info("socket").fileno(), 0)  # hang-ups and errors are told unasked
    return bool(poll.poll(0))


def _unsent_by_kernel(transport: asyncio.Transport) -> int:
    """Bytes that the kernel holds for the peer. It says late that there is room again: for megabytes on a fast line."""
    sock = transport.get_extra_info("socket")
    if sock is None:
        return 0
    try:
        answer = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0" * 4)
    except OSError:
        return 0  # not every system says so of every kind of socket
    return int(struct.unpack("i", answer)[0])
