"""The engine requests behind one request of a client, from HTTP or a batch file."""

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
from api.generation.usage import CompletionTokensDetails, PromptTokensDetails, Usage
from api.params.sampling import SamplingParams

ENCODED_AT_ONCE = 1 << 19
"""Bytes of a non-streamed response that are encoded before yielding to other tasks."""
PART_COST = 256
"""Fixed cost of each part of such a response, in bytes."""
CHOSEN_STEPS = 16
"""Steps per delta when the best completions are chosen."""


class WholeReply(Protocol):
    """Builds the non-streamed response of an endpoint."""

    def fold(self, deltas: Sequence[Delta]) -> None:
        """Adds the next deltas. Called several times, so that each call is short."""

    def whole(self) -> Iterator[bytes]:
        """Yields the body of the response in parts that each take little time. Consumes the folded deltas."""


class EngineWork(ABC):
    """The engine requests behind one client request. However it ends, it leaves none of them running."""

    def __init__(
        self,
        model: ServedModel,
        request_id: str,
        prompts: Sequence[Sequence[int]],
        num_choices: int,
        stream_interval: int = 1,
    ) -> None:
        """Opens a channel; nothing runs before ``start``.

        ``stream_interval`` is the number of tokens of a choice per delta, except its first and last delta.
        """
        self.request_id = request_id
        self.prompts = prompts
        self.num_choices = num_choices
        self.headers: dict[str, str] = {}
        """Additional headers of the response."""
        self.trace_headers: Mapping[str, str] | None = None
        """Trace context of the requests; set it before ``start``."""
        self.data_parallel_rank: int | None = None
        """The engine that must run the requests; set it before ``start``. None: the best one."""
        self.disconnected = False
        """The client has disconnected, and the requests were aborted."""
        self.states: list[RequestState] = []
        self._model = model
        self._channel = model.client.open_channel(stream_interval)
        self._watcher: asyncio.Task[None] | None = None

    @property
    def metrics(self) -> EngineMetrics:
        """Metrics of the engine that runs the requests."""
        return self._model.metrics

    async def start(self, gone: Awaitable[object] | None, *, quiet: bool = False) -> None:
        """Starts the requests, and aborts them when the client disconnects.

        Args:
            gone: Returns when the client has disconnected; None: there is no client to watch. It is awaited only after
                the requests have started.
            quiet: ``take`` need return only when choices end.

        Raises:
            RequestError: The requests are invalid.
            EngineDeadError: The engine died and is not restarted.
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
        """Starts the requests; their deltas go to the channel."""

    def drop(self) -> None:
        """Aborts unfinished requests."""
        self._model.client.abort(self.states)

    async def _watch(self, gone: Awaitable[object]) -> None:
        await gone
        self.disconnected = True
        self.drop()
        self._channel.wake()

    def take(self) -> Awaitable[list[Delta]]:
        """Waits for deltas; empty after ``wake`` and after the client has disconnected."""
        return self._channel.take()  # no coroutine of its own: one is created per token

    async def choose(self, deltas: list[Delta]) -> list[Delta]:
        """The deltas of the choices that are returned."""
        return deltas

    async def build(self, reply: WholeReply) -> bytes:
        """Builds the body of a non-streamed response from its folded deltas."""
        turns = Turns(ENCODED_AT_ONCE)
        parts = []
        for part in reply.whole():
            parts.append(part)
            await turns.spend(PART_COST + len(part))
        return b"".join(parts)

    def wake(self) -> None:
        """Makes ``take`` return."""
        self._channel.wake()

    def close(self) -> None:
        """Aborts unfinished requests and drops references to all: freeing thousands at once would take long."""
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None  # would be a reference cycle, see ``api/server/middleware.py``
        self.drop()
        self.states = []

    def failure(self, delta: Delta) -> RequestError | EngineDeadError:
        """Converts a delta's ``error`` to an exception."""
        message = delta.error or ""
        if delta.error_param is not None:
            return RequestError(message, delta.error_param or None)
        if self._model.client.dead is not None:
            return self._model.client.dead
        # The engine has already retried if that could help.
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
        """Opens a channel; nothing runs before ``start``.

        Args:
            model: The model to run.
            request_id: Id of the response.
            prompts: Token ids.
            params: The requested parameters, with the server's defaults.
            request: What all completions share; None: a subclass overrides ``submit``.
            stream_interval: Tokens of a choice per delta.
        """
        super().__init__(model, request_id, prompts, len(prompts) * params.num_completions, stream_interval)
        self.params = params
        self._request = request

    async def submit(self) -> None:
        """Starts the requests."""
        assert self._request is not None
        await self._model.submit(
            self._channel,
            self.request_id,
            self.prompts,
            self._request,
            self.states,
            data_parallel_rank=self.data_parallel_rank,
        )

    async def choose(self, deltas: list[Delta]) -> list[Delta]:
        """The deltas of the choices that are returned: all, or the best ones."""
        n, best_of = self.params.n, self.params.num_completions
        if n == best_of:
            return deltas
        return await self._model.host.apart(CHOSEN_STEPS * len(deltas), choose_best, deltas, n, best_of)

    def usage(self, num_output_tokens: int | None = None) -> Usage:
        """Token usage of all choices.

        Args:
            num_output_tokens: Generated tokens to report; None: all of them.
        """
        states = self.states
        if num_output_tokens is None:
            num_output_tokens = sum(len(state.output_token_ids) for state in states)
        usage = self.count_usage(
            num_output_tokens, sum(state.num_cached_tokens for state in states[:: self.params.num_completions])
        )
        num_drafts = sum(state.num_draft_tokens for state in states)
        if num_drafts:
            accepted = sum(state.num_accepted_tokens for state in states)
            usage.completion_tokens_details = CompletionTokensDetails(
                accepted_prediction_tokens=accepted, rejected_prediction_tokens=num_drafts - accepted
            )
        return usage

    def count_usage(self, num_output_tokens: int, num_cached_tokens: int) -> Usage:
        """Token usage with the given counts."""
        num_prompt_tokens = sum(map(len, self.prompts))
        return Usage(
            prompt_tokens=num_prompt_tokens,
            completion_tokens=num_output_tokens,
            total_tokens=num_prompt_tokens + num_output_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=num_cached_tokens),
        )
