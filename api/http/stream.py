"""Sends answers to clients, as streams of server-sent events or as whole bodies.

``TokenStream`` is on the path of every generated token, thousands of times a second, so add to it with care. An event
has the output of one step for one choice, which is one token. Events that are ready together are sent in one write. The
constant parts of an event are encoded once per choice, and there is one wait between two tokens.

``sse_starlette`` provides the headers of the response and formats rare events. Its own loop is not used: with four
tasks per response and a cancel scope per event, it makes a token at least 50 % more expensive for the process.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Generator, Iterable
from functools import cache
from typing import Any, Protocol

import msgspec
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.engine.channel import Delta
from api.engine.place import RANK_HEADER
from api.errors import EngineDeadError, RequestError
from api.generation.generation import EngineWork, Generation, WholeReply
from api.http.errors import render, to_request_error
from api.http.load_header import LOAD_HEADER, load_header
from api.http.server_send import SERVER_SEND
from api.http.tracing import trace_headers
from engine_core.launch import get_logger

logger = get_logger()

FOLDED_AT_ONCE = 256
"""Deltas of a whole answer to fold without a pause, which takes some milliseconds."""
DONE = ServerSentEvent("[DONE]", sep="\n").encode()
KEEP_ALIVE = ServerSentEvent(comment="keep-alive", sep="\n").encode()
MARK = "\0"
"""Placeholder for the text when the constant parts of an event are encoded."""

_MARK_JSON = msgspec.json.encode(MARK)
_NO_CHOICES = b'"choices":[]'


def event(data: bytes) -> bytes:
    """A server-sent event with a JSON value, which must have no line breaks."""
    return b"data: " + data + b"\n\n"


def typed_event(name: str, data: bytes) -> bytes:
    """A server-sent event with a name and a JSON value."""
    return b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"


def split_at_mark(whole: bytes) -> tuple[bytes, bytes]:
    """The parts of an encoded event before and after its text, which is ``MARK``."""
    before, _, after = whole.partition(_MARK_JSON)
    return before, after


def around_choices(whole: bytes) -> tuple[bytes, bytes]:
    """The parts of an encoded answer before and after its list of choices, which must be empty."""
    before, _, after = whole.partition(_NO_CHOICES)  # cannot occur in a string: its quotes would be escaped
    return before + _NO_CHOICES[:-1], _NO_CHOICES[-1:] + after


def joined(lists: Iterable[bytes]) -> msgspec.Raw:
    """Concatenates encoded lists, given without their brackets, into one list."""
    return msgspec.Raw(b"[" + b",".join(filter(None, lists)) + b"]")


def error_event(error: RequestError) -> bytes:
    """The last event of a stream that fails. ``DONE`` does not follow, since it means that the answer is complete."""
    return event(render(error))


class Reply(WholeReply, Protocol):
    """Formats the outputs of requests for an endpoint that can stream."""

    @property
    def keep_alive(self) -> bytes:
        """Data to send when there have been no events for a while."""

    def event(self, delta: Delta) -> bytes:
        """The server-sent events that a delta completes; empty if it completes none."""

    def last_event(self) -> bytes:
        """The data after the last delta."""

    def error_event(self, error: RequestError) -> bytes:
        """The data after the last delta of a generation that fails."""


_RANK_HEADER = RANK_HEADER.lower().encode()
MAX_RANK_DIGITS = 6
"""Longer numbers are no rank of any server."""


class Disconnect:
    """An awaitable that completes when the client has disconnected. The request's body must have been read."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive

    def __await__(self) -> Generator[Any, None, None]:
        return self._wait().__await__()

    async def _wait(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass


def look_at(scope: Scope, work: EngineWork) -> None:
    """Passes on what the headers of an HTTP request say: which engine is wanted, and its trace if tracing is enabled.

    Raises:
        RequestError: The header that names the engine has no number.
    """
    for name, value in scope["headers"]:
        if name == _RANK_HEADER:
            if not value.isdigit() or len(value) > MAX_RANK_DIGITS:
                raise RequestError(f"{RANK_HEADER} must be a number from 0", RANK_HEADER)
            work.data_parallel_rank = int(value)
    if work.metrics.on_trace is not None:
        work.trace_headers = trace_headers(scope)


class TokenStream(Response):
    """Streams an answer as server-sent events, one per token.

    The response head is sent with the first event or keep-alive comment, so that a request that fails before gets an
    error status.
    """

    def __init__(self, generation: Generation, reply: Reply, keep_alive_interval: float) -> None:
        # Not the base class's: rendering no body and describing it would take longer than some tokens do.
        self.status_code = 200
        self.background = None
        self.raw_headers = list(_stream_headers())
        if generation.headers:
            self.headers.update(generation.headers)
        self._keep_alive_interval = keep_alive_interval
        self._generation = generation
        self._reply = reply
        self._last_write = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        generation = self._generation
        try:
            look_at(scope, generation)
            await generation.start(Disconnect(receive))
            self._last_write = self._loop.time()
            if self._keep_alive_interval > 0:
                self._timer = self._loop.call_later(self._keep_alive_interval, self._watch_silence)
            await self._stream(send, scope.get(SERVER_SEND, send))
        finally:
            if self._timer is not None:
                self._timer.cancel()
            generation.close()

    def _watch_silence(self) -> None:
        now = self._loop.time()
        due = self._last_write + self._keep_alive_interval
        if due <= now:
            self._generation.wake()
            due = now + self._keep_alive_interval
        self._timer = self._loop.call_at(due, self._watch_silence)

    async def _stream(self, send: Send, send_part: Send) -> None:
        """Sends the answer.

        Args:
            send: Sends the head.
            send_part: Sends the parts of the body.
        """
        generation, to_event, time = self._generation, self._reply.event, self._loop.time
        num_open = generation.num_choices
        is_started = False
        data: bytes
        while num_open:
            deltas = await generation.take()
            if generation.disconnected:
                return
            try:
                if len(deltas) == 1 and deltas[0].finish_reason is None:
                    data = to_event(deltas[0])
                elif deltas:
                    data, num_finished = self._events(deltas)
                    num_open -= num_finished
                    if not num_open:
                        data += self._reply.last_event()
                else:
                    data = self._reply.keep_alive
            except Exception as error:
                if not is_started:
                    raise
                await self._end_with_error(error, send_part)
                return
            if not data and num_open:
                continue  # the text is held back, since it may turn out to be markup
            if not is_started:
                is_started = True
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            self._last_write = time()
            await send_part({"type": "http.response.body", "body": data, "more_body": bool(num_open)})

    def _events(self, deltas: list[Delta]) -> tuple[bytes, int]:
        """The events of deltas, and the number of choices that they end.

        Raises:
            RequestError: A choice failed.
            EngineDeadError: A choice failed because the engine is dead.
        """
        num_finished = 0
        parts = []
        for delta in deltas:
            if delta.finish_reason is not None:
                num_finished += 1
                if delta.error is not None:
                    raise self._generation.failure(delta)
            parts.append(self._reply.event(delta))
        return b"".join(parts), num_finished

    async def _end_with_error(self, error: Exception, send: Send) -> None:
        """Sends an error as the last event, since the status has already been sent."""
        if not isinstance(error, (RequestError, EngineDeadError)):
            logger.error("request %s failed", self._generation.request_id, exc_info=error)
        data = self._reply.error_event(to_request_error(error))
        await send({"type": "http.response.body", "body": data, "more_body": False})


class WholeAnswer(Response):
    """Sends a whole answer, built from the same deltas as a stream."""

    media_type = "application/json"

    def __init__(self, generation: EngineWork, reply: WholeReply) -> None:
        super().__init__()
        self._generation = generation
        self._reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        generation = self._generation
        try:
            look_at(scope, generation)
            await generation.start(Disconnect(receive), quiet=True)
            await self._fold(await generation.choose(await self._collect()))
            if generation.disconnected:
                return
            self.body = await generation.build(self._reply)
            load = load_header(scope, generation.metrics)
            self.init_headers(generation.headers if load is None else {**generation.headers, LOAD_HEADER: load})
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await scope.get(SERVER_SEND, send)({"type": "http.response.body", "body": self.body})
        finally:
            generation.close()

    async def _collect(self) -> list[Delta]:
        """All deltas of all choices; fewer if the client disconnects."""
        generation = self._generation
        deltas: list[Delta] = []
        num_open = generation.num_choices
        while num_open:
            new = await generation.take()
            if generation.disconnected:
                break
            for delta in new:
                if delta.finish_reason is not None:
                    num_open -= 1
                    if delta.error is not None:
                        raise generation.failure(delta)
            deltas += new
        return deltas

    async def _fold(self, deltas: list[Delta]) -> None:
        """Folds deltas and frees them, in portions so that other requests get their turns."""
        deltas.reverse()
        while deltas:
            if not self._generation.disconnected:
                self._reply.fold(deltas[: -FOLDED_AT_ONCE - 1 : -1])
            del deltas[-FOLDED_AT_ONCE:]
            if deltas:
                await asyncio.sleep(0)


@cache
def _stream_headers() -> tuple[tuple[bytes, bytes], ...]:
    """The headers of every stream, without ``connection``: the server sets that, and closes connections at shutdown."""
    return tuple(header for header in EventSourceResponse(_no_content()).raw_headers if header[0] != b"connection")


async def _no_content() -> AsyncIterator[bytes]:
    """An empty stream: ``EventSourceResponse`` requires one."""
    return
    yield b""
