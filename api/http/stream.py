"""From deltas to bytes on the wire: the path that every generated token takes.

Be careful with additions to ``TokenStream``: what happens per token here happens thousands of times a second. An event
carries what one step brought for one choice, which is one token; events that are ready together go out in one write.
The constant parts of an event are encoded once per choice, and between two tokens there is one wait.

``sse_starlette`` gives the response its headers and formats the events that are rare. Its own loop is not used: with
four tasks per response and a cancel scope per event, a token takes the process half as long again, or more.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Generator, Iterable
from typing import Any, Protocol

import msgspec
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.engine.channel import Delta
from api.errors import EngineDeadError, RequestError
from api.generation.generation import EngineWork, Generation, WholeReply
from api.http.errors import render, to_request_error
from api.http.load_header import LOAD_HEADER, load_header
from api.http.tracing import trace_headers
from engine_core.launch import get_logger

logger = get_logger()

FOLDED_AT_ONCE = 256
"""Deltas of an answer in one piece that are folded in one go: some milliseconds."""
DONE = ServerSentEvent("[DONE]", sep="\n").encode()
KEEP_ALIVE = ServerSentEvent(comment="keep-alive", sep="\n").encode()
MARK = "\0"
"""Stands for the text while the constant parts of an event are encoded."""

_MARK_JSON = msgspec.json.encode(MARK)
_NO_CHOICES = b'"choices":[]'


def event(data: bytes) -> bytes:
    """One server-sent event of a JSON value, which has no line breaks."""
    return b"data: " + data + b"\n\n"


def typed_event(name: str, data: bytes) -> bytes:
    """The same with a name."""
    return b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"


def split_at_mark(whole: bytes) -> tuple[bytes, bytes]:
    """The constant parts of an event whose text is ``MARK``."""
    before, _, after = whole.partition(_MARK_JSON)
    return before, after


def around_choices(whole: bytes) -> tuple[bytes, bytes]:
    """The parts of an answer before and after its choices, of which it has none yet."""
    before, _, after = whole.partition(_NO_CHOICES)  # in a string its quotation marks would be escaped
    return before + _NO_CHOICES[:-1], _NO_CHOICES[-1:] + after


def joined(lists: Iterable[bytes]) -> msgspec.Raw:
    """Lists that were encoded one by one, without their brackets, as one."""
    return msgspec.Raw(b"[" + b",".join(filter(None, lists)) + b"]")


def error_event(error: RequestError) -> bytes:
    """How a stream of completions ends that fails: without ``DONE``, which says that an answer is whole."""
    return event(render(error))


class Reply(WholeReply, Protocol):
    """The same for endpoints that can stream."""

    @property
    def keep_alive(self) -> bytes:
        """What is sent in a long silence."""

    def event(self, delta: Delta) -> bytes:
        """One or more server-sent events, or none if the delta settles nothing."""

    def last_event(self) -> bytes:
        """What follows the last delta."""

    def error_event(self, error: RequestError) -> bytes:
        """What follows the last delta of a generation that fails."""


class Disconnect:
    """Awaited, it returns when the client of an HTTP request whose body was read is gone."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive

    def __await__(self) -> Generator[Any, None, None]:
        return self._wait().__await__()

    async def _wait(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass


def _look_at(scope: Scope, work: EngineWork) -> None:
    """Takes from an HTTP request what traces want to know of it."""
    if work.metrics.on_trace is not None:
        work.trace_headers = trace_headers(scope)


class TokenStream(EventSourceResponse):
    """An answer as server-sent events, one per token.

    The head goes out with the first event or keep-alive comment: a request that fails before that gets a proper
    status.
    """

    def __init__(self, generation: Generation, reply: Reply, keep_alive_interval: float) -> None:
        super().__init__(_no_content(), ping=keep_alive_interval, sep="\n")
        del self.headers["connection"]  # the server knows better, when it is about to stop
        self.headers.update(generation.headers)
        self._generation = generation
        self._reply = reply
        self._last_write = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        generation = self._generation
        try:
            _look_at(scope, generation)
            await generation.start(Disconnect(receive))
            self._last_write = self._loop.time()
            if self.ping_interval > 0:
                self._timer = self._loop.call_later(self.ping_interval, self._watch_silence)
            await self._stream(send)
        finally:
            if self._timer is not None:
                self._timer.cancel()
            generation.close()

    def _watch_silence(self) -> None:
        now = self._loop.time()
        due = self._last_write + self.ping_interval
        if due <= now:
            self._generation.wake()
            due = now + self.ping_interval
        self._timer = self._loop.call_at(due, self._watch_silence)

    async def _stream(self, send: Send) -> None:
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
                await self._end_with_error(error, send)
                return
            if not data and num_open:
                continue  # what came may still turn out to be markup
            if not is_started:
                is_started = True
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            self._last_write = time()
            await send({"type": "http.response.body", "body": data, "more_body": bool(num_open)})

    def _events(self, deltas: list[Delta]) -> tuple[bytes, int]:
        """The events of several deltas, or of one that ends a choice, and how many choices ended."""
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
        """Tells the client what happened; the status is long gone."""
        if not isinstance(error, (RequestError, EngineDeadError)):
            logger.error("request %s failed", self._generation.request_id, exc_info=error)
        data = self._reply.error_event(to_request_error(error))
        await send({"type": "http.response.body", "body": data, "more_body": False})


class WholeAnswer(Response):
    """An answer in one piece, of the same deltas as a stream."""

    media_type = "application/json"

    def __init__(self, generation: EngineWork, reply: WholeReply) -> None:
        super().__init__()
        self._generation = generation
        self._reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        generation = self._generation
        try:
            _look_at(scope, generation)
            await generation.start(Disconnect(receive), quiet=True)
            await self._fold(await generation.choose(await self._collect()))
            if generation.disconnected:
                return
            self.body = await generation.build(self._reply)
            load = load_header(scope, generation.metrics.scheduler_stats)
            self.init_headers(generation.headers if load is None else {**generation.headers, LOAD_HEADER: load})
            await super().__call__(scope, receive, send)
        finally:
            generation.close()

    async def _collect(self) -> list[Delta]:
        """All deltas of all choices; fewer if the client goes."""
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
        """Folds deltas and empties their list: neither is done in one go, so that others have their turns."""
        deltas.reverse()
        while deltas:
            if not self._generation.disconnected:
                self._reply.fold(deltas[: -FOLDED_AT_ONCE - 1 : -1])
            del deltas[-FOLDED_AT_ONCE:]
            if deltas:
                await asyncio.sleep(0)


async def _no_content() -> AsyncIterator[bytes]:
    """What the base class would stream."""
    return
    yield b""
