"""From deltas to bytes on the wire: the path that every generated token takes.

Be careful with additions to ``TokenStream``: what happens per token here happens thousands of times a second. An event
carries what one step brought for one choice, which is one token; events that are ready together go out in one write.
The constant parts of an event are encoded once per choice, and between two tokens there is one wait.

``sse_starlette`` gives the response its headers and formats the events that are rare. Its own loop is not used: with
four tasks per response and a cancel scope per event, a token takes the process half as long again, or more.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import msgspec
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.admission import Turns
from api.engine.channel import Delta
from api.engine.request_state import RequestState
from api.errors import KINDS, EngineDeadError, RequestError
from api.generation.beam_search import BeamSearchParams
from api.generation.fanout import choose_best
from api.generation.resolved import ResolvedRequest
from api.generation.serving import Serving
from api.generation.usage import PromptTokensDetails, Usage
from api.http.errors import render, to_request_error
from api.http.load_header import LOAD_HEADER, load_header
from api.http.tracing import trace_headers
from api.params.sampling import SamplingParams
from engine_core.launch import get_logger

logger = get_logger()

FOLDED_AT_ONCE = 256
"""Deltas of an answer in one piece that are folded in one go: some milliseconds."""
ENCODED_AT_ONCE = 1 << 19
"""Bytes of such an answer that are written down in one go."""
PART_COST = 256
"""What each part of it costs beside its bytes, in bytes."""
CHOSEN_STEPS = 16
"""Steps that it takes to look at a delta when the best completions are chosen."""
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


class WholeReply(Protocol):
    """Gives the outputs of requests the form of an endpoint."""

    def fold(self, deltas: Sequence[Delta]) -> None:
        """Takes the next deltas of an answer that is not streamed; several times, so that each takes a moment only."""

    def whole(self) -> Iterator[bytes]:
        """The body of that answer, in parts that each take a moment only. What was folded is gone afterwards."""


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


class EngineWork(ABC):
    """The engine requests behind one HTTP request. Whatever ends it, it leaves nothing running."""

    def __init__(
        self,
        serving: Serving,
        request_id: str,
        prompts: Sequence[Sequence[int]],
        num_choices: int,
        stream_interval: int = 1,
    ) -> None:
        """Prepares. Nothing runs before ``start``.

        ``stream_interval`` is how many tokens of a choice a delta brings, but for its first and its last one.
        """
        self.request_id = request_id
        self.prompts = prompts
        self.num_choices = num_choices
        self.headers: dict[str, str] = {}
        """More headers of the answer."""
        self._trace_headers: Mapping[str, str] | None = None
        self.disconnected = False
        """The client is gone, and with it the requests."""
        self.states: list[RequestState] = []
        self._serving = serving
        self._channel = serving.client.open_channel(stream_interval)
        self._watcher: asyncio.Task[None] | None = None

    async def start(self, receive: Receive | None, *, quiet: bool = False) -> None:
        """Starts the requests, and a watch over the connection.

        Args:
            receive: Of the HTTP request, whose body was read; None: nobody waits for the answer.
            quiet: ``take`` need only return at the end of choices.

        Raises:
            RequestError: They cannot be served as they are.
            EngineDeadError: The engine was given up.
        """
        self._channel.quiet = quiet
        await self.submit()
        if self._trace_headers is not None:
            for state in self.states:
                state.trace_headers = self._trace_headers
        if receive is not None:
            self._watcher = asyncio.create_task(self._watch(receive))

    def look_at(self, scope: Scope) -> None:
        """Takes from the HTTP request, before ``start``, what traces want to know of it."""
        if self._serving.metrics.on_trace is not None:
            self._trace_headers = trace_headers(scope)

    def load_header(self, scope: Scope) -> dict[str, str]:
        """How busy the server is, as a header of the answer to a request that asks for it."""
        load = load_header(scope, self._serving.metrics.scheduler_stats)
        return {} if load is None else {LOAD_HEADER: load}

    @abstractmethod
    async def submit(self) -> None:
        """Starts the requests, whose deltas come through the channel."""

    def drop(self) -> None:
        """Ends what is unfinished."""
        self._serving.client.abort(self.states)

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.disconnected = True
        self.drop()
        self._channel.wake()

    async def take(self) -> list[Delta]:
        """Waits for deltas; none come after ``wake`` and when the client is gone."""
        return await self._channel.take()

    async def choose(self, deltas: list[Delta]) -> list[Delta]:
        """The deltas of the choices that are returned."""
        return deltas

    async def build(self, reply: WholeReply) -> bytes:
        """The body of an answer that is not streamed, whose deltas were folded."""
        turns = Turns(ENCODED_AT_ONCE)
        parts = []
        for part in reply.whole():
            parts.append(part)
            await turns.spend(PART_COST + len(part))
        return b"".join(parts)

    def wake(self) -> None:
        """Lets ``take`` return."""
        self._channel.wake()

    def close(self) -> None:
        """Drops what is unfinished, and forgets the requests: thousands of them are not freed in one go."""
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None  # which would be a circle, see ``api/server/middleware.py``
        self.drop()
        self.states = []

    def failure(self, delta: Delta) -> RequestError | EngineDeadError:
        """The error that a delta's ``error`` amounts to."""
        message = delta.error or ""
        if delta.error_param is not None:
            return RequestError(message, delta.error_param or None)
        if self._serving.client.dead is not None:
            return self._serving.client.dead
        # The engine tried already, and more than once if that could help.
        return RequestError(message, status=500, kind=KINDS[500], headers={"x-should-retry": "false"})


class Generation(EngineWork):
    """Completions of prompts."""

    def __init__(
        self,
        serving: Serving,
        request_id: str,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | BeamSearchParams,
        request: ResolvedRequest | None,
        *,
        stream_interval: int = 1,
    ) -> None:
        """Prepares.

        Args:
            serving: Where it runs.
            request_id: Becomes the answer's id.
            prompts: Token ids.
            params: How the tokens are chosen: what was asked for, with the server's defaults.
            request: What all completions share; None: a subclass knows.
            stream_interval: Tokens that a delta brings.
        """
        super().__init__(serving, request_id, prompts, len(prompts) * params.num_completions, stream_interval)
        self.params = params
        self._request = request

    async def submit(self) -> None:
        """Starts the requests."""
        assert self._request is not None
        await self._serving.submit(self._channel, self.request_id, self.prompts, self._request, self.states)

    async def choose(self, deltas: list[Delta]) -> list[Delta]:
        """The deltas of the choices that are returned: all, or the best ones."""
        n, best_of = self.params.n, self.params.num_completions
        if n == best_of:
            return deltas
        return await self._serving.apart(CHOSEN_STEPS * len(deltas), choose_best, deltas, n, best_of)

    def usage(self, num_output_tokens: int | None = None) -> Usage:
        """Tokens of all choices.

        Args:
            num_output_tokens: Generated tokens, if it is not all that there are.
        """
        states = self.states
        if num_output_tokens is None:
            num_output_tokens = sum(len(state.output_token_ids) for state in states)
        return self.count_usage(
            num_output_tokens, sum(state.num_cached_tokens for state in states[:: self.params.num_completions])
        )

    def count_usage(self, num_output_tokens: int, num_cached_tokens: int) -> Usage:
        """The report of so many tokens."""
        num_prompt_tokens = sum(map(len, self.prompts))
        return Usage(
            prompt_tokens=num_prompt_tokens,
            completion_tokens=num_output_tokens,
            total_tokens=num_prompt_tokens + num_output_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=num_cached_tokens),
        )


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
            generation.look_at(scope)
            await generation.start(receive)
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
            generation.look_at(scope)
            await generation.start(receive, quiet=True)
            await self._fold(await generation.choose(await self._collect()))
            if generation.disconnected:
                return
            self.body = await generation.build(self._reply)
            self.init_headers({**generation.headers, **generation.load_header(scope)})
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
