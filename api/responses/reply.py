"""A response being built: streamed, whole or in the background."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import msgspec

from api.engine.channel import Delta
from api.errors import RequestError
from api.generation.served_model import ServedModel
from api.http.stream import KEEP_ALIVE
from api.openai.answer import ChatAnswer
from api.openai.logprobs import TokenSpelling, chat_logprobs
from api.openai.protocol import ChatLogprob
from api.parsers import Content, Event, merge
from api.responses.protocol import (
    IncompleteDetails,
    InputTokensDetails,
    OutputTokensDetails,
    ResponseCompleted,
    ResponseCreated,
    ResponseError,
    ResponseFailed,
    ResponseIncomplete,
    ResponseInProgress,
    ResponseObject,
    ResponseQueued,
    ResponseUsage,
)
from api.responses.writer import ResponseWriter


class ResponseReply:
    """Turns the outputs of a generation into a response."""

    keep_alive = KEEP_ALIVE

    def __init__(
        self,
        model: ServedModel,
        response: ResponseObject,
        answer: ChatAnswer,
        *,
        has_logprobs: bool = False,
        spells_ids: bool = False,
        on_done: Callable[[], None] | None = None,
    ) -> None:
        """Prepares.

        Args:
            model: For the spelling of tokens.
            response: The response to fill.
            answer: The answer to fill it with.
            has_logprobs: Include log probabilities.
            spells_ids: Show token ids in log probabilities.
            on_done: Called when the response is complete, or has failed.
        """
        self.response = response
        self._answer = answer
        self._writer = ResponseWriter(response)
        self._spelling = TokenSpelling(model.tokenizer, as_ids=spells_ids)
        self._has_logprobs = has_logprobs
        self._on_done = on_done
        self._has_begun = False
        self._events: list[Event] = []
        """Events of an answer that is not streamed; used with its last delta."""
        self._last: Delta | None = None
        self._logprobs: list[ChatLogprob] = []
        """Log probabilities of tokens whose text is still held back."""

    def _write(self, delta: Delta, events: Sequence[Event]) -> None:
        """Writes what a delta completes; text gets the log probabilities of all tokens since the last text."""
        if self._has_logprobs:
            self._logprobs += chat_logprobs(delta.logprobs, self._spelling)
        for each in events:
            logprobs: list[ChatLogprob] = []
            if isinstance(each, Content):
                logprobs, self._logprobs = self._logprobs, logprobs
            self._writer.write(each, logprobs)
        if events:  # the rest belongs to reasoning or calls
            self._logprobs = []

    def _finish(self, delta: Delta) -> None:
        response = self.response
        ending = self._answer.ending(delta)
        is_cut = ending.reason == "length"
        self._writer.close("incomplete" if is_cut else "completed")
        response.status = "incomplete" if is_cut else "completed"
        if is_cut:
            response.incomplete_details = IncompleteDetails(
                reason="context_length_exceeded" if ending.is_context_full else "max_output_tokens"
            )
        else:
            response.completed_at = int(time.time())
        self.measure()

    def measure(self) -> None:
        """Sets the token usage of the response."""
        usage = self._answer.generation.usage()
        self.response.usage = ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=usage.prompt_tokens_details.cached_tokens),
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputTokensDetails(reasoning_tokens=self._answer.num_reasoning_tokens),
            total_tokens=usage.total_tokens,
        )

    def _done(self) -> None:
        if self._on_done is not None:
            self._on_done()

    # -- a stream --------------------------------------------------------------------------------------------

    def queued_events(self) -> list[bytes]:
        """The first events of a background response."""
        response = self.response
        self._writer.emit(lambda number: ResponseCreated(response=response, sequence_number=number))
        self._writer.emit(lambda number: ResponseQueued(response=response, sequence_number=number))
        return self._writer.take()

    def events(self, delta: Delta) -> list[bytes]:
        """The events of a delta."""
        writer, response = self._writer, self.response
        if not self._has_begun:
            self._has_begun = True
            is_new = response.status != "queued"
            response.status = "in_progress"
            if is_new:
                writer.emit(lambda number: ResponseCreated(response=response, sequence_number=number))
            writer.emit(lambda number: ResponseInProgress(response=response, sequence_number=number))
        self._write(delta, self._answer.events(delta))
        if delta.finish_reason is not None:
            self._finish(delta)
        return writer.take()

    def event(self, delta: Delta) -> bytes:
        return b"".join(self.events(delta))

    def last_event(self) -> bytes:
        response = self.response
        kind = ResponseIncomplete if response.status == "incomplete" else ResponseCompleted
        self._writer.emit(lambda number: kind(response=response, sequence_number=number))
        self._done()
        return b"".join(self._writer.take())

    def error_event(self, error: RequestError) -> bytes:
        response = self.response
        self._writer.close("incomplete")
        response.status = "failed"
        response.error = ResponseError(
            code="server_error" if error.status >= 500 else "invalid_prompt", message=error.message
        )
        self.measure()
        self._writer.emit(lambda number: ResponseFailed(response=response, sequence_number=number))
        self._done()
        return b"".join(self._writer.take())

    def cancel(self) -> None:
        """Ends the response with what it has. There is no event for this."""
        self._writer.close("incomplete")
        self._writer.take()
        self.response.status = "cancelled"
        self.measure()
        self._done()

    # -- one answer ------------------------------------------------------------------------------------------

    def fold(self, deltas: Sequence[Delta]) -> None:
        for delta in deltas:
            self._last = delta
            new = self._answer.events(delta)
            if self._has_logprobs:
                self._write(delta, new)
            else:
                self._events += new

    def whole(self) -> Iterator[bytes]:
        for each in merge(self._events):
            self._writer.write(each)
        assert self._last is not None
        self._finish(self._last)
        self._writer.take()
        self._done()
        yield msgspec.json.encode(self.response)
