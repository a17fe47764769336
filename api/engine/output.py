"""Converts the engine's output tokens to text: the only loop over a step's outputs.

Streaming or not, chat or completion, server or offline: all output of all requests passes through ``process``. Its cost
per token limits the throughput of the front end.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Protocol

from api.engine.channel import Delta
from api.engine.metrics import EngineMetrics
from api.engine.request_state import RequestState
from engine_core.launch import get_logger
from engine_core.messages import (
    EngineCoreOutput,
    EngineCoreOutputs,
    FinishReason,
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


def _token_rows(outputs: EngineCoreOutputs) -> Iterator[tuple[int, ...]]:
    """The tokens of each row."""
    tokens = i32(outputs.token_ids).tolist()
    if not outputs.num_tokens:
        return zip(tokens, strict=True)
    rest = iter(tokens)
    return (tuple(islice(rest, count)) for count in u8(outputs.num_tokens).tolist())


class Queue(Protocol):
    """Is told of requests that wait."""

    def begin(self, index: int) -> None:
        """A request got its first output."""

    def leave(self, index: int) -> None:
        """A request has ended."""


class OutputProcessor:
    """Owns the table of requests and detokenizes their output."""

    def __init__(self, metrics: EngineMetrics, queue: Queue) -> None:
        """Creates an empty table. ``queue`` is notified when a request first gets output or ends without any."""
        self.states: dict[int, RequestState] = {}
        self._metrics = metrics
        self._queue = queue

    def add(self, state: RequestState) -> None:
        self.states[state.index] = state

    def remove(self, index: int) -> RequestState | None:
        """Removes a request; any further output for it is dropped."""
        state = self.states.pop(index, None)
        if state is not None:
            state.finished = True
            self._queue.leave(index)
        return state

    def release(self, state: RequestState) -> None:
        """Removes a request that goes on elsewhere."""
        del self.states[state.index]

    def abort(self, state: RequestState) -> bool:
        """Removes a request whose client is gone. Returns False if it had already finished."""
        if self.remove(state.index) is None:
            return False
        self._metrics.on_finished(state, FINISH_REASONS[FinishReason.ABORT])
        return True

    def process(self, outputs: EngineCoreOutputs) -> list[int]:
        """Passes each row of a step to the consumer of its request.

        Returns:
            Indices of requests that ended here, such as by a stop string, but still run in the engine.
        """
        states = self.states
        now = outputs.timestamp
        aborts: list[int] = []
        latencies: list[float] = []
        num_tokens = 0
        if outputs.num_draft_tokens:
            self._note_drafts(outputs)
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
            if count == 1:
                known.append(tokens[0])
                latencies.append(now - state.last_token_time)
            else:
                known.extend(tokens)
                latencies += [(now - state.last_token_time) / count] * count
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

    def _note_drafts(self, outputs: EngineCoreOutputs) -> None:
        """Counts the drafts of each row."""
        drafts = u8(outputs.num_draft_tokens).tolist(), u8(outputs.num_accepted_tokens).tolist()
        for index, verified, accepted in zip(i64(outputs.indices).tolist(), *drafts, strict=True):
            if verified and index in self.states:
                self.states[index].note_drafts(verified, accepted)

    def _process_special(self, state: RequestState, output: EngineCoreOutput, now: float, aborts: list[int]) -> int:
        """Handles a row with more than plain tokens. Returns the number of new tokens."""
        known = state.output_token_ids
        skip = len(known) - output.first_output_index
        if skip < 0:
            self._lost(state, output.first_output_index, aborts)
            return 0
        tokens = output.new_token_ids[skip:]
        if output.num_draft_tokens:
            state.note_drafts(output.num_draft_tokens, output.num_accepted_tokens)
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
            return 0  # all its tokens were already known
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
        """Detokenizes new tokens, checks stop strings, and sends the delta; ends the request if it is done.

        Returns:
            How many of the tokens are part of the output, which excludes those after a completed stop string.
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
        """Ends a request whose tokens are missing, which must not happen, instead of sending text with a gap."""
        aborts.append(state.index)
        self.fail(state, f"tokens {len(state.output_token_ids)} to {output_index - 1} of the output were lost")

    def _broken(self, state: RequestState, error: Exception, aborts: list[int]) -> None:
        """Ends a request whose output could not be processed, so that the other requests of the step are unaffected."""
        logger.error("request %s: output processing failed", state.message.request_id, exc_info=error)
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
