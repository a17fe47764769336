"""The engine requests behind one request of a client, whatever brought it: HTTP, or a batch of lines."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from typing import Protocol

from api.admission import Turns
from api.engine.channel import Delta
from api.engine.metrics import EngineMetrics
from api.engine.request_state import RequestState
from api.errors import KINDS, EngineDeadError, RequestError
from api.generation.beam_search import BeamSearchParams
from api.generation.fanout import choose_best
from api.generation.resolved import ResolvedRequest
from api.generation.served_model import ServedModel
from api.generation.usage import PromptTokensDetails, Usage
from api.params.sampling import SamplingParams

ENCODED_AT_ONCE = 1 << 19
"""Bytes of an answer in one piece that are written down in one go."""
PART_COST = 256
"""What each part of it costs beside its bytes, in bytes."""
CHOSEN_STEPS = 16
"""Steps that it takes to look at a delta when the best completions are chosen."""


class WholeReply(Protocol):
    """Gives the outputs of requests the form of an endpoint."""

    def fold(self, deltas: Sequence[Delta]) -> None:
        """Takes the next deltas of an answer that is not streamed; several times, so that each takes a moment only."""

    def whole(self) -> Iterator[bytes]:
        """The body of that answer, in parts that each take a moment only. What was folded is gone afterwards."""


class EngineWork(ABC):
    """The engine requests behind one HTTP request. Whatever ends it, it leaves nothing running."""

    def __init__(
        self,
        model: ServedModel,
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
        self.trace_headers: Mapping[str, str] | None = None
        """Set before ``start``: which trace the requests belong to."""
        self.disconnected = False
        """The client is gone, and with it the requests."""
        self.states: list[RequestState] = []
        self._model = model
        self._channel = model.client.open_channel(stream_interval)
        self._watcher: asyncio.Task[None] | None = None

    @property
    def metrics(self) -> EngineMetrics:
        """Of the engine that runs them."""
        return self._model.metrics

    async def start(self, gone: Awaitable[object] | None, *, quiet: bool = False) -> None:
        """Starts the requests, and waits for the client to go.

        Args:
            gone: Returns when the client is gone; None: nobody waits for the answer. It is awaited once the requests
                run, or never.
            quiet: ``take`` need only return at the end of choices.

        Raises:
            RequestError: They cannot be served as they are.
            EngineDeadError: The engine was given up.
        """
        self._channel.quiet = quiet
        await self.submit()
        if self.trace_headers is not None:
            for state in self.states:
                state.trace_headers = self.trace_headers
        if gone is not None:
            self._watcher = asyncio.create_task(self._watch(gone))

    @abstractmethod
    async def submit(self) -> None:
        """Starts the requests, whose deltas come through the channel."""

    def drop(self) -> None:
        """Ends what is unfinished."""
        self._model.client.abort(self.states)

    async def _watch(self, gone: Awaitable[object]) -> None:
        await gone
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
        if self._model.client.dead is not None:
            return self._model.client.dead
        # The engine tried already, and more than once if that could help.
        return RequestError(message, status=500, kind=KINDS[500], headers={"x-should-retry": "false"})


class Generation(EngineWork):
    """Completions of prompts."""

    def __init__(
        self,
        model: ServedModel,
        request_id: str,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | BeamSearchParams,
        request: ResolvedRequest | None,
        *,
        stream_interval: int = 1,
    ) -> None:
        """Prepares.

        Args:
            model: Where it runs.
            request_id: Becomes the answer's id.
            prompts: Token ids.
            params: How the tokens are chosen: what was asked for, with the server's defaults.
            request: What all completions share; None: a subclass knows.
            stream_interval: Tokens that a delta brings.
        """
        super().__init__(model, request_id, prompts, len(prompts) * params.num_completions, stream_interval)
        self.params = params
        self._request = request

    async def submit(self) -> None:
        """Starts the requests."""
        assert self._request is not None
        await self._model.submit(self._channel, self.request_id, self.prompts, self._request, self.states)

    async def choose(self, deltas: list[Delta]) -> list[Delta]:
        """The deltas of the choices that are returned: all, or the best ones."""
        n, best_of = self.params.n, self.params.num_completions
        if n == best_of:
            return deltas
        return await self._model.host.apart(CHOSEN_STEPS * len(deltas), choose_best, deltas, n, best_of)

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
