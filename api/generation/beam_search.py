"""Beam search on top of an engine without support for it.

A beam is extended by an engine request for one token, which starts with the beam's tokens as its output so far and
reports the most likely next tokens. The prefix cache avoids most of the work. Search and scores are vLLM's: the score
of a sequence is its cumulative log probability divided by its length, including the prompt, to the power of the length
penalty; all beams continue until ``max_tokens``, or until no running beam can still become one of the best.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from api.engine.channel import Channel
from api.engine.metrics import EngineMetrics, FinishedRequest
from api.engine.pool import Engines
from api.engine.queue_bound import NOBODY, Tenant
from api.engine.request_state import OutputOptions, RequestState
from api.engine.submission import Submission
from api.errors import EngineDeadError, RequestError
from api.generation.served_model import ServedModel
from api.params.sampling import SamplingParams, resolve_params
from engine_core.messages import ResolvedParams, TokenLogprobs, f32, i32

MAX_BEAM_WIDTH = 256


class BeamSearchParams(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Parameters of a beam search. Names and defaults are vLLM's.

    Attributes:
        beam_width: Number of sequences that are kept at each length, and that are returned.
        max_tokens: Maximum tokens of the output. None: as many as fit in the context.
        ignore_eos: Treat EOS tokens like any other token.
        temperature: Not used: scores are computed from the model's own log probabilities.
        length_penalty: Above 0, longer sequences score better; below 0, shorter ones.
        include_stop_str_in_output: Keep the end token in the output.
        stop_token_ids: Tokens that end a beam, in addition to the model's EOS tokens.
        logprobs: Report log probabilities of this many most likely tokens at each position; -1: of all.
    """

    beam_width: int
    max_tokens: int | None
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False
    stop_token_ids: list[int] | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.beam_width <= MAX_BEAM_WIDTH:
            raise RequestError(f"the beam width (n) must be between 1 and {MAX_BEAM_WIDTH}, got {self.beam_width}", "n")
        if not abs(self.length_penalty) <= 100:  # false for NaN as well
            raise RequestError(
                f"length_penalty must be between -100 and 100, got {self.length_penalty}", "length_penalty"
            )
        self.as_sampling()

    @property
    def n(self) -> int:
        return self.beam_width

    @property
    def num_completions(self) -> int:
        return self.beam_width

    def as_sampling(self) -> SamplingParams:
        """The parameters that also exist in ``SamplingParams``.

        Raises:
            RequestError: A field is out of range.
        """
        return SamplingParams(
            temperature=0,
            max_tokens=self.max_tokens,
            logprobs=self.logprobs,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
        )


@dataclass
class Beam:
    """A sequence of the search."""

    token_ids: list[int] = field(default_factory=list)
    """Output tokens, without the prompt."""
    cum_logprob: float = 0.0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """One entry per output token, if requested."""
    finish_reason: str = "length"
    stop_reason: int | None = None
    score: float = 0.0


class BeamSearchError(Exception):
    """The engine failed on one of the requests of a search."""


class BeamSearch:
    """The search over the continuations of one prompt."""

    def __init__(
        self,
        model: ServedModel,
        request_id: str,
        prompt: Sequence[int],
        params: BeamSearchParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
        tenant: Tenant = NOBODY,
        data_parallel_rank: int | None = None,
    ) -> None:
        """Validates the request; nothing runs before ``start``.

        Raises:
            RequestError: The prompt is too long, or a parameter is invalid for the model.
        """
        model.check_token_ids(prompt)
        model.check_priority(priority)
        self.num_cached_tokens = 0
        """Prompt tokens that came from the prefix cache when the search began."""
        self._adapter = model.adapter
        self._client: Engines = model.client
        self._request_id = request_id
        self._prompt = prompt
        self._params = params
        self._priority = priority
        self._cache_salt = cache_salt
        self._tenant = tenant
        self._data_parallel_rank = data_parallel_rank
        limits = model.limits
        if params.beam_width > limits.vocab_size:
            raise RequestError(f"the beam width must be at most {limits.vocab_size}, the size of the vocabulary", "n")
        resolved = resolve_params(params.as_sampling(), len(prompt), limits, None)
        self._max_tokens = resolved.max_tokens
        self._ends = np.array(resolved.all_stop_token_ids, np.int32)
        self._num_reported = resolved.logprobs
        self._num_candidates = min(2 * params.beam_width, limits.vocab_size)
        count = self._num_candidates if resolved.logprobs is None else max(self._num_candidates, resolved.logprobs)
        # The search needs these itself; --max-logprobs limits only what clients request.
        self._step_params = ResolvedParams(
            temperature=0.0,
            logprobs=-1 if resolved.logprobs == -1 or count >= limits.vocab_size else count,
        )
        self._channel: Channel = model.client.open_channel()
        self._states: list[RequestState] = []
        self._completed: list[Beam] = []
        self._metrics: EngineMetrics = model.metrics
        self._arrival_time = time.monotonic()
        self._first: RequestState | None = None
        """The first request of the search, once it has finished."""
        self._num_generated = 0
        """Tokens that the engine has generated for the search."""

    def start(self) -> None:
        """Sends the first request.

        Raises:
            EngineDeadError: The engine died and is not restarted.
            RequestError: Too many requests are waiting.
        """
        is_extra = self._client.check_queue(self._tenant, 1, len(self._prompt))
        self._submit([Beam()], is_extra=is_extra)

    async def run(self) -> list[Beam]:
        """Runs the search.

        Returns:
            ``beam_width`` sequences, best first.

        Raises:
            BeamSearchError: The engine failed.
            EngineDeadError: The engine died and is not restarted.
        """
        best: list[Beam] = []
        reason = "abort"
        try:
            best = await self._search()
            reason = best[0].finish_reason
        except (BeamSearchError, EngineDeadError):
            reason = "error"
            raise
        finally:
            self.abort()
            self._count(reason, best)
        return best

    async def _search(self) -> list[Beam]:
        beams = [Beam()]
        for length in range(1, self._max_tokens + 1):
            if length > 1:
                self._submit(beams)
            beams = self._extend(beams, await self._results(len(beams)))
            if not beams or self._is_decided(beams):
                break
        best = self._best(self._completed + beams)
        if len(best) < self._params.beam_width:
            raise BeamSearchError(f"the model can generate only {len(best)} different sequences")
        return best

    def _count(self, reason: str, best: Sequence[Beam]) -> None:
        """Counts the search as one request in the metrics; its parts are not counted."""
        first = self._first
        request = FinishedRequest(
            reason,
            self._arrival_time,
            None if first is None else first.scheduled_time,
            None if first is None else first.first_token_time,
            len(self._prompt),
            self.num_cached_tokens,
            self._num_generated,
        )
        self._metrics.on_search(request, max((len(beam.token_ids) for beam in best), default=0))

    def abort(self) -> None:
        """Aborts the running requests."""
        self._client.abort(self._states)
        self._states = []

    def _submit(self, beams: list[Beam], *, is_extra: bool = False) -> None:
        self._states = []
        for choice, beam in enumerate(beams):
            self._states.append(
                self._client.submit(
                    self._channel,
                    choice,
                    Submission(
                        params=msgspec.structs.replace(self._step_params, max_tokens=len(beam.token_ids) + 1),
                        options=OutputOptions(detokenize=False, is_part=True),
                        priority=self._priority,
                        cache_salt=self._cache_salt,
                        tenant=self._tenant,
                        is_extra=is_extra,
                        lora_request=self._adapter,
                        data_parallel_rank=self._data_parallel_rank,
                    ),
                    request_id=f"{self._request_id}-beam-{choice}",
                    prompt_token_ids=self._prompt,
                    output_token_ids=beam.token_ids,
                )
            )

    async def _results(self, count: int) -> list[TokenLogprobs]:
        """Waits for the log probabilities of the next token of each beam."""
        results: dict[int, TokenLogprobs] = {}
        while len(results) < count:
            for delta in await self._channel.take():
                if delta.error is not None or not delta.logprobs:
                    if self._client.dead is not None:
                        raise self._client.dead
                    raise BeamSearchError(delta.error or "the engine returned no log probabilities")
                results[delta.choice] = delta.logprobs[-1]
        self._num_generated += count
        if self._first is None:
            self._first = self._states[0]
            self.num_cached_tokens = min(self._states[0].num_cached_tokens, len(self._prompt))
        return [results[choice] for choice in range(count)]

    def _extend(self, beams: list[Beam], results: list[TokenLogprobs]) -> list[Beam]:
        """Extends beams by one token and returns the most likely ones; stores those that end."""
        # Column 0 is the token that the engine sampled, the others are the most likely ones in order.
        columns = slice(1, 1 + self._num_candidates)
        ids = np.stack([i32(entry.token_ids)[columns] for entry in results])
        gains = np.stack([f32(entry.logprobs)[columns] for entry in results]).astype(np.float64)
        totals = gains + np.array([beam.cum_logprob for beam in beams])[:, None]
        ends = np.isin(ids, self._ends)
        for row, column in np.argwhere(ends).tolist():
            beam = self._longer(beams[row], results[row], column, float(totals[row, column]))
            self._end(beam)
        totals[ends] = -np.inf
        longer: list[Beam] = []
        for index in np.argsort(-totals, axis=None, kind="stable").tolist():
            row, column = divmod(index, totals.shape[1])
            if len(longer) == self._params.beam_width or totals[row, column] == -np.inf:
                break
            longer.append(self._longer(beams[row], results[row], column, float(totals[row, column])))
        return longer

    def _longer(self, beam: Beam, entry: TokenLogprobs, column: int, total: float) -> Beam:
        """Extends a beam by one of its next tokens."""
        ids, values = i32(entry.token_ids)[1:], f32(entry.logprobs)[1:]
        longer = Beam([*beam.token_ids, int(ids[column])], total, beam.logprobs)
        longer.score = total / (len(self._prompt) + len(longer.token_ids)) ** self._params.length_penalty
        count = self._num_reported
        if count is not None:
            shown = slice(None if count < 0 else count)
            described = TokenLogprobs(
                row=0,
                position=0,
                token_ids=np.concatenate((ids[column : column + 1], ids[shown])).tobytes(),
                logprobs=np.concatenate((values[column : column + 1], values[shown])).tobytes(),
                rank=column + 1,
            )
            longer.logprobs = [*beam.logprobs, described]
        return longer

    def _end(self, beam: Beam) -> None:
        """Stores a finished sequence if it is one of the best. Its end token does not count towards its length."""
        beam.finish_reason, beam.stop_reason = "stop", beam.token_ids[-1]
        length = len(self._prompt) + len(beam.token_ids) - 1
        beam.score = beam.cum_logprob / length**self._params.length_penalty
        if not self._params.include_stop_str_in_output:
            beam.token_ids.pop()
            beam.logprobs = beam.logprobs[:-1]
        self._completed = self._best([*self._completed, beam])

    def _best(self, beams: list[Beam]) -> list[Beam]:
        """The best ``beam_width`` sequences; ties keep the earlier one."""
        return sorted(beams, key=lambda beam: -beam.score)[: self._params.beam_width]

    def _is_decided(self, beams: list[Beam]) -> bool:
        """Whether no running beam can still become one of the best, since log probabilities only decrease its total."""
        if len(self._completed) < self._params.beam_width:
            return False
        penalty = self._params.length_penalty
        # The length that gives the highest score: the maximum if length is rewarded, else the current one.
        num_tokens = self._max_tokens if penalty > 0 else len(beams[0].token_ids)
        bound: float = beams[0].cum_logprob / (len(self._prompt) + num_tokens) ** penalty
        return bound <= self._completed[-1].score


async def gather(searches: Sequence[BeamSearch]) -> list[list[Beam]]:
    """Runs searches concurrently; if one fails, all are cancelled."""
    tasks = [asyncio.create_task(search.run()) for search in searches]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


__all__ = ["MAX_BEAM_WIDTH", "Beam", "BeamSearch", "BeamSearchError", "BeamSearchParams", "gather"]
