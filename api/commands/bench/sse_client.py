"""An HTTP/1.1 client for streams of server-sent events that costs little: a few microseconds an event.

It exists for the load generators beside it. A general client spends more time on an event than a fast server does,
and would be what is measured. ``httptools`` frames the answers.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

MAX_ERROR_TEXT = 200
"""Characters of an error that are kept."""
DELTA_TEXTS = ("content", "reasoning_content", "reasoning", "tool_calls", "refusal")
"""Where the delta of a chat stream may have what a token brought."""
IDLE_RETRY = 1.0
"""Seconds of rest after which a server may have closed a connection for no bad reason."""


@dataclass
class Response:
    """A response whose body is complete. ``body`` is empty where a sink took it."""

    status: int
    headers: dict[str, str]
    body: bytes = b""


Sink = Callable[[bytes], None]


class HttpConnection(asyncio.Protocol):
    """One connection, one request at a time. The body of a success goes to a sink as it comes."""

    def __init__(self) -> None:
        self.has_received = False
        """Whether anything came since the last request was sent."""
        self.is_open = False
        self.idle_since = 0.0
        self._transport: asyncio.Transport | None = None
        self._sink: Sink | None = None
        self._done: asyncio.Future[Response] | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._headers: dict[str, str] = {}
        self._response: Response | None = None
        self._parts: list[bytes] = []
        """Of the body, what came with the bytes that are parsed."""
        self._body: list[bytes] = []

    async def request(self, data: bytes, sink: Sink | None = None, timeout: float | None = None) -> Response:
        """Sends an encoded request and waits for the end of its response.

        Args:
            data: Head and body.
            sink: Takes the body of a response with status 200, in the parts in which it arrives.
            timeout: Seconds until the connection is given up.

        Raises:
            ConnectionError: The connection broke, or what came is not HTTP.
            TimeoutError: It took too long.
        """
        loop = asyncio.get_running_loop()
        assert self._transport is not None and self._done is None
        self.has_received = False
        self._sink, self._done = sink, loop.create_future()
        timer = loop.call_later(timeout, self._fail, TimeoutError("timeout")) if timeout else None
        try:
            self._transport.write(data)
            return await self._done
        finally:
            if timer is not None:
                timer.cancel()
            if not self._done.done() or self._done.cancelled():
                self.close()
            self._done = None

    def close(self) -> None:
        self.is_open = False
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop has a class of its own
        self.is_open = True

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        if self._response is not None and exc is None and not self._has_length():
            self._take_parts()
            self._finish()
        self._fail(ConnectionError(str(exc) if exc else "the server closed the connection"))

    def data_received(self, data: bytes) -> None:
        self.has_received = True
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(ConnectionError(f"unreadable: {error}"))
            return
        if self._parts:
            self._take_parts()

    def _take_parts(self) -> None:
        parts, self._parts = self._parts, []
        if self._sink is not None and self._response is not None and self._response.status == 200:
            self._sink(parts[0] if len(parts) == 1 else b"".join(parts))
        else:
            self._body += parts

    # What the parser calls.

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        headers, self._headers = self._headers, {}
        status = self._parser.get_status_code()
        if status >= 200:  # 100 Continue and the like come before the answer
            self._response = Response(status, headers)

    def on_body(self, part: bytes) -> None:
        self._parts.append(part)

    def on_message_complete(self) -> None:
        if self._response is not None:
            if self._parts:
                self._take_parts()
            self._finish()

    def _has_length(self) -> bool:
        """The body has an end of its own, rather than that of the connection."""
        assert self._response is not None
        return not {"content-length", "transfer-encoding"}.isdisjoint(self._response.headers)

    def _finish(self) -> None:
        response, done = self._response, self._done
        assert response is not None
        response.body = b"".join(self._body)
        if not self._parser.should_keep_alive() or not self._has_length():
            self.close()
        self._response, self._sink, self._body = None, None, []
        if done is not None and not done.done():
            done.set_result(response)

    def _fail(self, error: Exception) -> None:
        self.close()
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)


class HttpClient:
    """Connections to one server, kept alive."""

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        timeout: float | None = None,
        *,
        insecure: bool = False,
        keep_alive: bool = True,
    ) -> None:
        """Connects later.

        Args:
            base_url: Such as ``http://127.0.0.1:8000``; a path, without ``/v1``, goes before those of requests.
            api_key: Sent as a bearer token.
            timeout: Seconds that a request may take.
            insecure: Trust any certificate.
            keep_alive: Keep connections; otherwise each request has its own.
        """
        url = urlsplit(base_url if "//" in base_url else f"http://{base_url}")
        self._ssl = ssl.create_default_context() if url.scheme == "https" else None
        if self._ssl is not None and insecure:
            self._ssl.check_hostname = False
            self._ssl.verify_mode = ssl.CERT_NONE
        self._host = url.hostname or "127.0.0.1"
        self._port = url.port or (443 if self._ssl else 80)
        self._prefix = url.path.rstrip("/").removesuffix("/v1")
        authorization = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._headers = f"Host: {url.netloc}\r\n{authorization}"
        self._keep_alive = keep_alive
        if not keep_alive:
            self._headers += "Connection: close\r\n"
        self._timeout = timeout
        self._idle: list[HttpConnection] = []

    def encode(self, method: str, path: str, body: Any = None) -> bytes:
        """The bytes of a request; ``body`` becomes JSON."""
        head = f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._headers}"
        if body is None:
            return f"{head}\r\n".encode()
        data = json.dumps(body).encode()
        return f"{head}Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data

    async def send(self, data: bytes, sink: Sink | None = None) -> Response:
        """Sends an encoded request over a connection that is idle, or a new one.

        Raises:
            OSError: The server cannot be reached, the connection broke, or it took too long.
        """
        began = time.monotonic()
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_open:
                continue
            try:
                return await self._send_over(connection, data, sink)
            except ConnectionError:
                # A server may close a connection that rests just when the next request comes.
                if connection.has_received or began - connection.idle_since < IDLE_RETRY:
                    raise
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(HttpConnection, self._host, self._port, ssl=self._ssl)
        return await self._send_over(connection, data, sink)

    async def _send_over(self, connection: HttpConnection, data: bytes, sink: Sink | None) -> Response:
        response = await connection.request(data, sink, self._timeout)
        if not self._keep_alive:
            connection.close()
        elif connection.is_open:
            connection.idle_since = time.monotonic()
            self._idle.append(connection)
        return response

    async def call(self, method: str, path: str, body: Any = None) -> Any:
        """Sends a request and returns the JSON of its answer.

        Raises:
            OSError: It failed; the message has the status and what the server said.
        """
        response = await self.send(self.encode(method, path, body))
        if response.status != 200:
            raise OSError(f"{method} {path}: status {response.status}: {shorten(response.body)}")
        return json.loads(response.body)

    def close(self) -> None:
        """Closes the idle connections."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()


# -- streams ---------------------------------------------------------------------------------------------------


class EventStream:
    """Reads server-sent events and notes when those with tokens came; most of them are never parsed.

    Only the events before the first token and the last few can be without one (role, finish reason, usage), so only
    these are looked into, and the last ones not before the stream is over.
    """

    def __init__(self, *, keep_events: bool = False) -> None:
        self.times: list[float] = []
        """When each event that carries tokens came (``time.perf_counter`` seconds)."""
        self.events: list[bytes] = []
        """The data of all events, if they are kept."""
        self.usage: dict[str, Any] = {}
        self.error = ""
        self.is_done = False
        """The stream had its regular end."""
        self._keep_events = keep_events
        self._rest = b""
        self._has_token = False
        self._last: deque[bytes] = deque(maxlen=4)

    def feed(self, data: bytes) -> None:
        now = time.perf_counter()
        if self._rest:
            data = self._rest + data
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        *events, self._rest = data.split(b"\n\n")
        for event in events:
            if not event.startswith(b"data:"):
                event = b"".join(line for line in event.split(b"\n") if line.startswith(b"data:"))
                if not event:
                    continue
            data = event[5:]
            if data.endswith(b"[DONE]"):
                self.is_done = True
                continue
            if self._keep_events:
                self.events.append(data)
            if not self._has_token:
                content = json.loads(data)
                if not has_token(content):
                    self._note(content)
                    continue
                self._has_token = True
            self.times.append(now)
            self._last.append(data)

    def finish(self) -> None:
        """Looks into the last events; to be called at the end of the stream."""
        is_last = True
        while self._last:
            content = json.loads(self._last.pop())
            self._note(content)
            is_last = is_last and not has_token(content)
            if is_last:
                self.times.pop()
        if not self.is_done and not self.error:
            self.error = "the stream ended early"

    def _note(self, content: dict[str, Any]) -> None:
        self.usage = self.usage or content.get("usage") or {}
        if content.get("error"):
            self.error = self.error or shorten(json.dumps(content["error"]).encode())
        if any(choice.get("finish_reason") for choice in content.get("choices") or ()):
            self.is_done = True

    def text(self) -> str:
        """All generated text, if events are kept."""
        choices = (choice for event in self.events for choice in json.loads(event).get("choices") or ())
        return "".join(choice.get("text") or (choice.get("delta") or {}).get("content") or "" for choice in choices)


def has_token(content: dict[str, Any]) -> bool:
    """Whether an event of a completion or chat stream carries a token.

    One without text does if it is in the middle: the text of its token is not complete yet.
    """
    for choice in content.get("choices") or ():
        delta = choice.get("delta")
        text = choice.get("text") if delta is None else any(map(delta.get, DELTA_TEXTS))
        is_inside = choice.get("finish_reason") is None and (delta is None or "role" not in delta)
        if text or is_inside:
            return True
    return False


def shorten(data: bytes) -> str:
    return " ".join(data.decode("utf-8", "replace").split())[:MAX_ERROR_TEXT]
