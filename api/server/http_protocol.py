"""uvicorn's HTTP protocol with limits on what clients may send and hold, in bytes and time.

A server has one ``Connections``: it creates the protocol of each connection and checks all of them once a second, so
that chunks of data need no timers. Bodies are limited where they are read (``api/http/body_budget.py``); everything
that no endpoint reads is limited here.
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
"""Pipelined requests that may wait on a connection."""
MAX_FRAMING_RATIO = 16
"""Bytes of chunk framing per byte of a body, on top of one head's worth. One-byte chunks need 6."""
MAX_CONNECTIONS = 8192
SWEEP_INTERVAL = 1.0

FIRST_LOOK = 0.005
"""Seconds until the first check whether a half-closed client is still there; doubles with each check."""
LAST_LOOK = 1.0

_PIECE = 16 << 10
"""Bytes fed to the parser at once, by which a limit may be exceeded before this is noticed."""
_BYTES_ACKED = 120
"""Offset of tcpi_bytes_acked in Linux's struct tcp_info."""
_HOST = re.compile(rb"[A-Za-z0-9._~%!$&'()*+,;=:\[\]-]*")
"""RFC 3986 host and port, roughly: no path, query or user name."""


class Limits(NamedTuple):
    """Time limits of connections in seconds, and their number."""

    head: float = 10.0
    """From connecting, or from the first byte of a later head, to the end of the head."""
    reader: float = 60.0
    """Without reading any of the pending output."""
    unread_body: float = 30.0
    """For the rest of a body whose request has been answered."""
    goodbye: float = 2.0
    """From the last answer of a connection to its close. Closing at once could lose the answer."""
    connections: int = MAX_CONNECTIONS


class Connections:
    """The connections of a server."""

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
        """Creates the protocol of a new connection, for uvicorn."""
        return BoundedHttpProtocol(self, config, server_state, app_state, _loop)

    @property
    def num_open(self) -> int:
        return len(self._open)

    def all(self) -> list[BoundedHttpProtocol]:
        """The open connections."""
        return list(self._open)

    def add(self, connection: BoundedHttpProtocol) -> None:
        """Registers a new connection."""
        self._open.add(connection)
        if self._timer is None:
            self._timer = connection.loop.call_later(SWEEP_INTERVAL, self._on_timer, connection.loop)

    def discard(self, connection: BoundedHttpProtocol) -> None:
        """Removes a closed connection."""
        self._open.discard(connection)

    def sweep(self) -> None:
        """Closes connections that exceed a time limit."""
        now = self.clock()
        # Near the limit, idle connections are closed to make room.
        is_crowded = len(self._open) > self.limits.connections * 9 // 10
        for connection in self.all():
            connection.check(now, is_crowded=is_crowded)

    def _on_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        self.sweep()
        if self._open:
            self._timer = loop.call_later(SWEEP_INTERVAL, self._on_timer, loop)


class _Part(Enum):
    """The part of a request that comes next."""

    HEAD = 0
    BODY = 1
    """Includes trailers."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """Rejects requests with parts that are too large, too many or too slow, and ambiguous ones."""

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
        """Start time of the head. None between requests and in bodies."""
        self._head_bytes = 0
        """Parsed bytes of the head or trailers."""
        self._num_trailers = 0
        self._bare_bytes = 0
        """Bytes since the end of the last request, the end of the head or the last body byte."""
        self._wire_bytes = 0
        """Bytes since the end of the head."""
        self._body_bytes = 0
        self._running: RequestResponseCycle | None = None
        """The request being answered; the base class only knows the latest one received."""
        self._refusal: RequestError | None = None
        """Set before a parser callback raises."""
        self._is_known_head = False
        """Whether a head is being replayed to the parser."""
        self._is_deaf = False
        """Whether further input is discarded."""
        self._ends_at: float | None = None
        """Time at which the connection is closed, if decided."""
        self._taken = 0
        """Increases when the client reads."""
        self._stuck_since: float | None = None
        """Time since which the client has not read, despite pending output."""
        self._is_half_closed = False
        """Whether the client has half-closed the connection and may still wait for its answer."""

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
        """The client has stopped sending. If it still waits for an answer, the connection stays open until then.

        A client that has disconnected looks the same until something is sent to it, which its system then rejects. So
        if no part of the answer has been sent yet, ``100 Continue`` is sent, which is harmless and may precede any
        answer. HTTP/1.0 has no such status, and TLS cannot be half-closed: such clients count as disconnected.
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
        """Closes the connection if it exceeds a time limit.

        Args:
            now: Time on the clock of ``Connections``.
            is_crowded: Whether others need its place if it is idle.
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
            self._since = now  # we are not reading
        elif now - self._since >= limits.head:
            self._refuse_slow_head(limits.head)

    def _must_read(self) -> bool:
        """Whether there is output for the client to read."""
        is_answering = self._running is not None and not self._running.response_complete
        return is_answering or self.flow.write_paused or self.transport.is_closing()

    def _check_reader(self, now: float) -> None:
        unsent = self.transport.get_write_buffer_size() + _unsent_by_kernel(self.transport)
        taken = _bytes_taken(self.transport)
        if taken is None:
            # While writing is paused, the unsent output can only shrink.
            taken = -unsent if self.flow.write_paused or self.transport.is_closing() else self._taken + 1
        if self._stuck_since is None or not unsent or taken != self._taken:
            self._taken, self._stuck_since = taken, now
        elif now - self._stuck_since >= self._shared.limits.reader:
            self.transport.abort()

    def _refuse_slow_head(self, seconds: float) -> None:
        if self._is_deaf or self.transport.is_closing():
            return
        if self._bare_bytes:
            self._refuse(_error(408, f"the request head did not arrive within {seconds:g} s"))
        else:
            self.transport.close()  # a spare connection, as browsers open them

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
        """Answers a request that offered an upgrade, such as Java's client to HTTP/2, in HTTP/1.1.

        The parser treats the data after such a head as the other protocol, so a new parser takes over.
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
            # Trailers are dropped: none are used, and among the headers they could be mistaken for headers.
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
            self.cycle.more_body = True  # its task starts only after this turn of the loop
        else:
            self._check_head()
            super().on_headers_complete()
        # From here on, counts are for the body and trailers.
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
            self._ends_at = None  # the rest of an unwanted body has arrived
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
            self._fail(_error(400, f"the request must have exactly one Host header, got {len(hosts)}"))
        if hosts and not _HOST.fullmatch(hosts[0]):
            self._fail(_error(400, "the Host header is not a valid host name"))
        if len(self.pipeline) >= MAX_PIPELINED:
            self._fail(_error(400, f"more than {MAX_PIPELINED} pipelined requests on this connection"))

    def _count_head(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > MAX_HEAD_BYTES:
            self._fail(_too_large())

    def _fail(self, error: RequestError) -> None:
        """Rejects the request being parsed; for parser callbacks."""
        self._refusal = error
        raise error

    # -- refusals ------------------------------------------------------------------------------------------------

    def _refuse(self, error: RequestError) -> None:
        """Answers the request being parsed, unless earlier ones are unanswered, and closes the connection."""
        if self._is_deaf or self.transport.is_closing():
            return
        cycle = self.cycle
        is_idle = cycle is None or cycle.response_complete
        if self._part is _Part.HEAD:
            if is_idle:
                self._say_goodbye(error)
            else:
                self._stop_listening()  # the connection closes after the answers in progress
        elif is_idle or cycle.response_started or self.pipeline:
            self._is_deaf = True
            self.transport.close()
        else:
            cycle.disconnected = True
            cycle.message_event.set()
            self._say_goodbye(error)

    def _stop_listening(self) -> None:
        """Closes the connection after the answer to the latest request."""
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
    return _error(431, f"the request head, or the framing of its body, is larger than {MAX_HEAD_BYTES} bytes")


def _bytes_taken(transport: asyncio.Transport) -> int | None:
    """Bytes that the peer's kernel has acknowledged, until its buffer is full; None: unknown."""
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return None
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED + 8)
    except OSError:
        return None
    return int(struct.unpack_from("=Q", info, _BYTES_ACKED)[0]) if len(info) == _BYTES_ACKED + 8 else None


def _is_hung_up(transport: asyncio.Transport) -> bool:
    """Whether the peer neither sends nor reads. Event loops do not report this after end of file."""
    poll = select.poll()
    poll.register(transport.get_extra_info("socket").fileno(), 0)  # hang-ups and errors are always reported
    return bool(poll.poll(0))


def _unsent_by_kernel(transport: asyncio.Transport) -> int:
    """Bytes that the kernel holds for the peer. It reports free room late: for megabytes on a fast line."""
    sock = transport.get_extra_info("socket")
    if sock is None:
        return 0
    try:
        answer = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0" * 4)
    except OSError:
        return 0  # not available on every system and socket type
    return int(struct.unpack("i", answer)[0])
