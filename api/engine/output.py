"""From tokens to text: the only loop over a step's outputs.

Streaming or not, chat or completion, server or offline: everything a request gets passes through ``process``. What it
costs per token is the budget of the whole front end.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from api.engine.channel import Delta
from api.engine.metrics import EngineMetrics
from api.engine.queue_bound import QueueBound
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
