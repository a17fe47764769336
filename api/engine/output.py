"""From tokens to text: the only loop over a step's outputs.

Streaming or not, chat or completion, server or offline: everything a request gets passes through ``process``. What it
costs per token is the budget of the whole front end.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

import msgspec
import numpy as np
import numpy.typing as npt

from api.engine.metrics import EngineMetrics
from api.engine.queue_bound import QueueBound
from api.model.tokenizer import Tokenizer
from api.text.detokenizer import IncrementalDetokenizer
from api.text.stop_search import StopSearch
from engine_core.launch import get_logger
from engine_core.messages import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
    Suspicion,
    TokenLogprobs,
    i32,
    i64,
    to_array,
    u8,
)

logger = get_logger()

FINISH_REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.ABORT: "abort",
    FinishReason.ERROR: "error",
    FinishReason.REPETITION: "repetition",
}


class Delta(msgspec.Struct, gc=False):
    """What a step brought for one completion."""

    choice: int
    """Which completion of the channel."""
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    error_param: str | None = None
    """The error is the client's fault: the field that is to blame."""


MAX_TAKEN = 256
"""Deltas that a consumer takes in one go: after a pause, as when a reader was slow, there may be any number."""


class Channel:
    """Where the deltas of one or more completions wait for their one consumer.

    Attributes:
        quiet: Wake the consumer at the end of completions only: it does not care before.
    """

    __slots__ = ("_is_behind", "_items", "_loop", "_waiter", "quiet")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.quiet = False
        self._is_behind = False
        self._loop = loop
        self._items: list[Delta] = []
        self._waiter: asyncio.Future[None] | None = None

    def push(self, delta: Delta) -> None:
        self._items.append(delta)
        if self._waiter is not None and (not self.quiet or delta.finish_reason is not None):
            self.wake()

    def wake(self) -> None:
        """Lets the consumer go on if it waits, even if there is nothing."""
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)

    async def take(self) -> list[Delta]:
        """Waits until there is something, then returns it in order; nothing after ``wake``.

        More than ``MAX_TAKEN`` are left for the next time, before which others have their turn.
        """
        if not self._items:
            self._waiter = self._loop.create_future()
            await self._waiter
        elif self._is_behind:
            await asyncio.sleep(0)
        items, self._items = self._items, []
        self._is_behind = len(items) > MAX_TAKEN
        if self._is_behind:
            self._items = items[MAX_TAKEN:]
            del items[MAX_TAKEN:]
        return items


class PacedChannel(Channel):
    """A channel whose deltas hold several tokens of a choice, but for the first and the last one."""

    __slots__ = ("_begun", "_held", "_interval")

    def __init__(self, loop: asyncio.AbstractEventLoop, interval: int) -> None:
        """Opens it.

        Args:
            loop: Of the consumer.
            interval: Tokens that a delta holds.
        """
        super().__init__(loop)
        self._interval = interval
        self._begun: set[int] = set()
        self._held: dict[int, Delta] = {}

    def push(self, delta: Delta) -> None:
        choice = delta.choice
        held = self._held.pop(choice, None)
        if held is not None:
            delta = _joined(held, delta)
        if choice not in self._begun:
            self._begun.add(choice)
        elif delta.finish_reason is None and len(delta.token_ids) < self._interval:
            self._held[choice] = delta
            return
        super().push(delta)


def _joined(first: Delta, second: Delta) -> Delta:
    """Two deltas of a choice as one."""
    return Delta(
        first.choice,
        first.text + second.text,
        first.token_ids + second.token_ids,
        first.logprobs + second.logprobs,
        first.prompt_logprobs + second.prompt_logprobs,
        second.finish_reason,
        second.stop_reason,
        second.error,
        second.error_param,
    )


class OutputOptions(msgspec.Struct, frozen=True):
    """What is done with a request's tokens in this process."""

    stop: tuple[str, ...] = ()
    stop_regex: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    kept_special_ids: frozenset[int] = frozenset()
    """Special tokens that stay in the text although others are left out."""
    detokenize: bool = True
    min_tokens: int = 0
    """Stop strings do not count before this many tokens."""
    is_part: bool = False
    """It is a part of a client's request, which is not counted as a request of its own."""


class Siblings:
    """The completions of one prompt that a client asked for together."""

    __slots__ = ("_longest", "_num_left")

    def __init__(self, count: int) -> None:
        self._num_left = count
        self._longest = 0

    def end(self, num_tokens: int) -> int | None:
        """One of them is over. Returns the tokens of the longest one once all are."""
        self._num_left -= 1
        self._longest = max(self._longest, num_tokens)
        return None if self._num_left else self._longest


class RequestState:
    """One engine request as the api knows it: its journal, and the state of its text."""

    __slots__ = (
        "arrival_time",
        "channel",
        "choice",
        "detokenizer",
        "finished",
        "first_token_time",
        "hides_stop_token",
        "index",
        "is_part",
        "last_token_time",
        "message",
        "min_tokens",
        "num_cached_tokens",
        "num_prompt_tokens",
        "output_token_ids",
        "pooling_output",
        "scheduled_time",
        "siblings",
        "stop_search",
        "trace_headers",
        "suspected_at",
        "suspicion",
        "tokenizer",
    )

    def __init__(
        self,
        message: EngineCoreRequest,
        options: OutputOptions,
        tokenizer: Tokenizer | None,
        channel: Channel,
        choice: int,
    ) -> None:
        self.index = message.index
        self.message = message
        """What the engine was told: with ``output_token_ids`` the request's journal."""
        self.output_token_ids = array("i", message.resumed_output_token_ids)
        self.channel = channel
        self.choice = choice
        self.num_prompt_tokens = len(message.prompt_token_ids) // 4
        self.num_cached_tokens = 0
        self.suspicion: Suspicion | None = None
        """Deaths of engine cores that point at it."""
        self.suspected_at = 0
        """Output tokens at the last of them."""
        self.pooling_output: npt.NDArray[np.float32] | None = None
        """The result of a request that generates nothing."""
        self.finished = False
        self.arrival_time = message.arrival_time
        self.siblings: Siblings | None = None
        """Those that a client asked for together with it, itself included."""
        self.trace_headers: Mapping[str, str] | None = None
        """The client's headers that say which trace it is part of, where there are traces."""
        self.scheduled_time: float | None = None
        self.first_token_time: float | None = None
        self.last_token_time = 0.0
        self.min_tokens = options.min_tokens
        self.is_part = options.is_part
        self.hides_stop_token = not options.include_stop_str_in_output
        """The token that ends the output is no part of the text."""
        self.tokenizer = tokenizer
        self.detokenizer: IncrementalDetokenizer | None = None
        self.stop_search: StopSearch | None = None
        if options.detokenize and tokenizer is not None:
            self.detokenizer = IncrementalDetokenizer(
                tokenizer,
                i32(message.prompt_token_ids)[-64:].tolist(),
                options.skip_special_tokens,
                options.spaces_between_special_tokens,
                options.kept_special_ids,
            )
            if options.stop or options.stop_regex:
                self.stop_search = StopSearch(options.stop, options.stop_regex, options.include_stop_str_in_output)

    def append_text(self, tokens: Sequence[int], num_tokens: int) -> tuple[str, str | None, int]:
        """Decodes tokens and searches their text for what ends the output.

        Args:
            tokens: They follow those that were decoded before.
            num_tokens: Length of the output without them.

        Returns:
            The text that is final; the stop string or pattern that ends it, if there is one; and how many of the tokens
            there are up to the one that completes it.
        """
        detokenizer, search = self.detokenizer, self.stop_search
        if detokenizer is None:
            return "", None, len(tokens)
        if search is None:
            return detokenizer.extend(tokens), None, len(tokens)
        assert self.tokenizer is not None
        parts: list[str] = []
        matched: str | None = None
        num_read = 0
        for num_read, token in enumerate(tokens, 1):
            hidden = self.tokenizer.added_tokens.get(token, "") if token in detokenizer.skipped else ""
            part, matched = search.feed(detokenizer.append(token), hidden, num_tokens + num_read >= self.min_tokens)
            parts.append(part)
            if matched is not None:
                break
        return "".join(parts), matched, num_read

    def finish_text(self) -> tuple[str, str | None]:
        """Text that was held back, and the stop that ends it, if there is one; nothing may follow."""
        text = "" if self.detokenizer is None else self.detokenizer.finish()
        if self.stop_search is None:
            return text, None
        text, matched = self.stop_search.feed(text, armed=len(self.output_token_ids) >= self.min_tokens)
        return text if matched is not None else text + self.stop_search.finish(), matched


def _token_rows(outputs: EngineCoreOutputs) -> Iterator[tuple[int, ...]]:
    """The tokens of each row of the columns."""
    tokens = i32(outputs.token_ids).tolist()
    if not outputs.num_tokens:
        return zip(tokens, strict=True)
    rest = iter(tokens)
    return (tuple(islice(rest, count)) for count in u8(outputs.num_tokens).tolist())


class OutputProcessor:
    """Owns the table of requests and the text of each."""

    def __init__(self, metrics: EngineMetrics, queue: QueueBound) -> None:
        """Prepares. ``queue`` is told when requests have their first output or end without one."""
        self.states: dict[int, RequestState] = {}
        self._metrics = metrics
        self._queue = queue

    def add(self, state: RequestState) -> None:
        self.states[state.index] = state

    def remove(self, index: int) -> RequestState | None:
        """Forgets a request; what still comes for it is dropped."""
        state = self.states.pop(index, None)
        if state is not None:
            state.finished = True
            self._queue.leave(index)
        return state

    def abort(self, state: RequestState) -> bool:
        """Forgets a request that nobody waits for any more. False: it was finished already."""
        if self.remove(state.index) is None:
            return False
        self._metrics.on_finished(state, FINISH_REASONS[FinishReason.ABORT])
        return True

    def process(self, outputs: EngineCoreOutputs) -> list[int]:
        """Hands each row of a step to the consumer of its request.

        Returns:
            Requests that ended here, by a stop string, and still run in the engine.
        """
        states = self.states
        now = outputs.timestamp
        aborts: list[int] = []
        latencies: list[float] = []
        num_tokens = 0
        for index, output_index, tokens in zip(
            i64(outputs.indices).tolist(), i32(outputs.output_indices).tolist(), _token_rows(outputs), strict=True
        ):
            state = states.get(index)
            if state is None:
                continue
            known = state.output_token_ids
            if output_index != len(known):
                if output_index > len(known):
                    self._lost(state, output_index, aborts)
                    continue
                tokens = tokens[len(known) - output_index :]
                if not tokens:
                    continue
            count = len(tokens)
            known.extend(tokens)
            latency = now - state.last_token_time
            if count == 1:
                latencies.append(latency)
            else:
                latencies += [latency / count] * count
            state.last_token_time = now
            detokenizer = state.detokenizer
            try:
                if state.stop_search is not None:
                    count = self._emit(state, tokens, (), None, aborts)
                elif detokenizer is None:
                    state.channel.push(Delta(state.choice, "", tokens))
                else:
                    text = detokenizer.append(tokens[0]) if count == 1 else detokenizer.extend(tokens)
                    state.channel.push(Delta(state.choice, text, tokens))
            except Exception as error:
                self._broken(state, error, aborts)
            num_tokens += count
        for output in outputs.outputs:
            state = states.get(output.index)
            if state is None:
                continue
            try:
                num_tokens += self._process_special(state, output, now, aborts)
            except Exception as error:
                self._broken(state, error, aborts)
        self._metrics.on_step(outputs.scheduler_stats, num_tokens, latencies)
        return aborts

    def _process_special(self, state: RequestState, output: EngineCoreOutput, now: float, aborts: list[int]) -> int:
        """A row that has more to say than its tokens. Returns the number of new tokens."""
        known = state.output_token_ids
        skip = len(known) - output.first_output_index
        if skip < 0:
            self._lost(state, output.first_output_index, aborts)
            return 0
        tokens = output.new_token_ids[skip:]
        if output.scheduled_time is not None and state.scheduled_time is None:
            self._queue.begin(state.index)
            state.scheduled_time = output.scheduled_time
            state.num_cached_tokens = output.num_cached_tokens or 0
        if tokens:
            if state.first_token_time is None:
                state.first_token_time = now
                self._metrics.on_first_token(state, now)
            else:
                for _ in tokens:
                    self._metrics.on_latency((now - state.last_token_time) / len(tokens))
            state.last_token_time = now
        elif output.finish_reason is None:
            return 0  # all of it was known already
        if output.pooling_output is not None:
            state.pooling_output = to_array(output.pooling_output)
            self._metrics.on_pooled(state, now)
        known.extend(tokens)
        return self._emit(state, tokens, output.new_logprobs[skip:], output, aborts)

    def _emit(
        self,
        state: RequestState,
        tokens: tuple[int, ...],
        logprobs: tuple[TokenLogprobs, ...],
        output: EngineCoreOutput | None,
        aborts: list[int],
    ) -> int:
        """Looks for stop strings, ends what is done, and hands over what is new.

        Returns:
            How many of the tokens are part of the output: not those behind the one that completes a stop string.
        """
        finish = output.finish_reason if output is not None else None
        shown = tokens
        if output is not None and output.ends_with_stop_token and state.hides_stop_token:
            shown = tokens[:-1]
        text, matched, num_read = state.append_text(shown, len(state.output_token_ids) - len(tokens))
        if matched is not None and num_read < len(tokens):
            del state.output_token_ids[num_read - len(tokens) :]
            tokens, logprobs = tokens[:num_read], logprobs[:num_read]
        reason = None
        stop_reason: int | str | None = None
        if finish is not None:
            assert output is not None
            reason, stop_reason = FINISH_REASONS[FinishReason(finish)], output.stop_reason
            if matched is None:
                rest, matched = state.finish_text()
                text += rest
        if matched is not None:
            if finish is None:
                aborts.append(state.index)
            reason, stop_reason = "stop", matched
        delta = Delta(
            state.choice,
            text,
            tokens,
            logprobs,
            output.prompt_logprobs if output is not None else (),
            reason,
            stop_reason,
            output.error if output is not None else None,
            output.error_param if output is not None else None,
        )
        if reason is not None:
            self.remove(state.index)
            self._metrics.on_finished(state, reason)
        state.channel.push(delta)
        return len(tokens)

    def _lost(self, state: RequestState, output_index: int, aborts: list[int]) -> None:
        """Tokens are missing, which must not happen: end the request rather than pass on a text with a hole."""
        aborts.append(state.index)
        self.fail(state, f"tokens {len(state.output_token_ids)} to {output_index - 1} of the output were lost")

    def _broken(self, state: RequestState, error: Exception, aborts: list[int]) -> None:
        """A token of one request could not be handled; the others of the step must get theirs."""
        logger.error("request %s: its output could not be handled", state.message.request_id, exc_info=error)
        aborts.append(state.index)
        self.fail(state, f"internal error: {error}")

    def fail(self, state: RequestState, message: str) -> None:
        """Ends a request with an error."""
        if self.remove(state.index) is not None:
            self._metrics.on_finished(state, "error")
            state.channel.push(Delta(state.choice, finish_reason="error", error=message))

    def fail_all(self, message: str) -> None:
        for state in list(self.states.values()):
            self.fail(state, message)
