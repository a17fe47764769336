"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import msgspec
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from api.engine.channel import Delta
from api.generation.served_model import ServedModel
from api.generation.serving import Serving
from api.generation.usage import CompletionTokensDetails, Usage
from api.http.body import read_json, work_on
from api.http.stream import (
    DONE,
    KEEP_ALIVE,
    MARK,
    TokenStream,
    WholeAnswer,
    around_choices,
    error_event,
    event,
    joined,
    split_at_mark,
)
from api.http.tenants import enter_queue
from api.openai.answer import ChatAnswer, prepare_answer
from api.openai.logprobs import TokenSpelling, chat_logprobs, prompt_logprobs, spells_ids
from api.openai.prompts import adds_generation_prompt, text_of
from api.openai.protocol import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatDelta,
    ChatLogprobs,
    ChatToolCall,
    FunctionCall,
    FunctionDelta,
    PromptLogprobs,
    ToolCallDelta,
)
from api.openai.sampling import answer_id, wants_usage
from api.parsers import Content, Event, Reasoning, ToolCallArguments, ToolCallStart

DECODER = msgspec.json.Decoder(ChatCompletionRequest)


async def create_chat_completion(request: Request) -> Response:
    """Answers a conversation."""
    serving: Serving = request.app.state.serving
    body = await read_json(request, DECODER, serving.config.max_body_size)
    model = await serving.choose_model(body.model, body)
    count = 1 if body.use_beam_search else body.n or 1
    tenant = enter_queue(request, model, body.safety_identifier or body.user, count)
    answer = await prepare_answer(
        model, body, answer_id("chatcmpl", request, body.request_id), tenant=tenant, work=work_on(request)
    )
    reply = ChatReply(model, body, answer)
    if body.stream:
        return TokenStream(answer.generation, reply, serving.config.sse_keep_alive_interval)
    return WholeAnswer(answer.generation, reply)


class ChatReply:
    """The outputs of a chat completion, as chunks or one whole answer."""

    keep_alive = KEEP_ALIVE
    error_event = staticmethod(error_event)

    def __init__(self, model: ServedModel, request: ChatCompletionRequest, answer: ChatAnswer) -> None:
        self._answer = answer
        self._generation = generation = answer.generation
        last = request.messages[-1]
        self._role = model.config.response_role if adds_generation_prompt(request) else last.role
        self._echo = text_of(last) if request.echo and last.role == self._role else ""
        self._has_logprobs = bool(request.logprobs or request.logprob_token_ids)
        self._lists_sampled = bool(request.logprob_token_ids)
        self._has_prompt_logprobs = request.prompt_logprobs is not None
        self._has_token_ids = bool(request.return_token_ids)
        self._ends_with_usage, self._has_usage = wants_usage(request, always=model.config.enable_force_include_usage)
        self._is_bare = not (self._has_logprobs or self._has_token_ids or self._has_usage)
        """Chunks have no log probabilities, token ids or usage."""
        self._is_content = answer.text_format.is_plain
        """All text is content."""
        self._is_plain = self._is_bare and self._is_content
        self._spelling = TokenSpelling(model.tokenizer, as_ids=spells_ids(model.config, request))
        self._num_output_tokens = 0
        self._prompt_token_ids = list(generation.prompts[0]) if self._has_token_ids else UNSET
        self._prompt_text = answer.prompt_text if request.return_prompt_text else UNSET
        self._prompt_logprobs: PromptLogprobs | None = None
        self._folds: dict[int, _Fold] = {}
        """By choice, for a whole answer."""
        self._constants: dict[int, tuple[bytes, bytes]] = {}
        """For each started choice, the JSON before and after the text of a plain chunk."""
        self._chunk = ChatCompletionChunk(
            id=generation.request_id,
            created=int(time.time()),
            model=model.name,
            choices=[],
            system_fingerprint=model.system_fingerprint,
            usage=None if self._ends_with_usage else UNSET,
        )
        self._encoder = msgspec.json.Encoder()

    # -- both forms ------------------------------------------------------------------------------------------

    def _begin(self, index: int) -> list[ChatChunkChoice]:
        """The chunks before the first token of a choice."""
        pieces = [ChatChunkChoice(index=index, delta=ChatDelta(role=self._role, content=""))]
        if self._echo:
            pieces.append(ChatChunkChoice(index=index, delta=ChatDelta(content=self._echo)))
        return pieces

    def _pieces(self, delta: Delta) -> list[ChatChunkChoice]:
        """One chunk per part of the text; none if the text is held back and there is nothing else."""
        self._num_output_tokens += len(delta.token_ids)
        if self._is_content:
            changes = [ChatDelta(content=delta.text)]
        else:
            changes = [change for each in self._answer.events(delta) if (change := _change(each)) is not None]
            if not changes and (delta.finish_reason is not None or not self._is_bare):
                changes = [ChatDelta(content="")]
        pieces = [ChatChunkChoice(index=delta.choice, delta=change) for change in changes]
        if self._has_logprobs:
            pieces[0].logprobs = ChatLogprobs(
                content=chat_logprobs(delta.logprobs, self._spelling, lists_sampled=self._lists_sampled)
            )
        if self._has_token_ids:
            pieces[0].token_ids = list(delta.token_ids)
        if delta.finish_reason is not None:
            pieces[-1].finish_reason = self._answer.finish_reason(delta)
            pieces[-1].stop_reason = delta.stop_reason
        return pieces

    def _usage(self, num_output_tokens: int | None = None) -> Usage:
        usage = self._generation.usage(num_output_tokens)
        if self._answer.text_format.reasoning is not None:
            details = usage.completion_tokens_details or CompletionTokensDetails()
            details.reasoning_tokens = self._answer.num_reasoning_tokens
            usage.completion_tokens_details = details
        return usage

    # -- a stream --------------------------------------------------------------------------------------------

    def event(self, delta: Delta) -> bytes:
        constants = self._constants.get(delta.choice)
        if constants is None:
            return self._first_events(delta)
        if self._is_plain and delta.finish_reason is None:
            return constants[0] + self._encoder.encode(delta.text) + constants[1]
        return b"".join(map(self._encode, self._pieces(delta)))

    def _first_events(self, delta: Delta) -> bytes:
        beginning = self._begin(delta.choice)
        chunk = self._chunk
        if not self._constants:
            chunk.prompt_token_ids, chunk.prompt_text = self._prompt_token_ids, self._prompt_text
            chunk.prompt_token_offsets = self._answer.prompt_token_offsets
        data = self._encode(beginning[0])
        chunk.prompt_token_ids = chunk.prompt_text = chunk.prompt_token_offsets = UNSET
        marked = ChatChunkChoice(index=delta.choice, delta=ChatDelta(content=MARK))
        self._constants[delta.choice] = split_at_mark(self._encode(marked))
        return data + b"".join(map(self._encode, (*beginning[1:], *self._pieces(delta))))

    def _encode(self, piece: ChatChunkChoice) -> bytes:
        return event(self._encode_chunk(piece))

    def _encode_chunk(self, piece: ChatChunkChoice) -> bytes:
        chunk = self._chunk
        chunk.choices = [piece]
        if self._has_usage:
            chunk.usage = self._usage(self._num_output_tokens)
        return self._encoder.encode(chunk)

    def last_event(self) -> bytes:
        if not self._ends_with_usage:
            return DONE
        self._chunk.choices = []
        self._chunk.usage = self._usage()
        return event(self._encoder.encode(self._chunk)) + DONE

    # -- one answer ------------------------------------------------------------------------------------------

    def fold(self, deltas: Sequence[Delta]) -> None:
        choices = self._folds
        prompt = self._generation.prompts[0]
        for delta in deltas:
            fold = choices.get(delta.choice)
            if fold is None:
                fold = choices[delta.choice] = _Fold()
                if self._has_prompt_logprobs and len(choices) == 1:
                    self._prompt_logprobs = prompt_logprobs(len(prompt), delta.prompt_logprobs, self._spelling)
                for piece in self._begin(delta.choice):
                    fold.add(piece)
            for piece in self._pieces(delta):
                fold.add(piece)

    def whole(self) -> Iterator[bytes]:
        answer = ChatCompletionResponse(
            id=self._chunk.id,
            created=self._chunk.created,
            model=self._chunk.model,
            choices=[],
            usage=self._usage(),
            system_fingerprint=self._chunk.system_fingerprint,
            prompt_token_ids=self._prompt_token_ids or None,
            prompt_token_offsets=self._answer.prompt_token_offsets,
            prompt_text=self._prompt_text,
            prompt_logprobs=self._prompt_logprobs,
        )
        before, after = around_choices(self._encoder.encode(answer))
        yield before
        for number, index in enumerate(sorted(self._folds)):
            yield (b"," if number else b"") + self._encoder.encode(self._folds.pop(index).choice(index))
        yield after


def _change(event: Event) -> ChatDelta | None:
    """The change of the message that an event makes; None if it makes none."""
    if isinstance(event, Content):
        return ChatDelta(content=event.text)
    if isinstance(event, Reasoning):
        return ChatDelta(reasoning=event.text)
    if isinstance(event, ToolCallStart):
        call = ToolCallDelta(
            index=event.index, id=event.id, type="function", function=FunctionDelta(name=event.name, arguments="")
        )
        return ChatDelta(tool_calls=[call])
    if isinstance(event, ToolCallArguments):
        return ChatDelta(tool_calls=[ToolCallDelta(index=event.index, function=FunctionDelta(arguments=event.text))])
    return None


class _Fold:
    """Accumulates the pieces of one choice."""

    def __init__(self) -> None:
        self._role = ""
        self._texts: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[tuple[ToolCallDelta, list[str]]] = []
        """Each call's start, and the pieces of its arguments."""
        self._logprobs: list[bytes] | None = None
        """Encoded pieces, instead of thousands of objects."""
        self._token_ids: list[int] = []
        self._last: ChatChunkChoice | None = None

    def add(self, piece: ChatChunkChoice) -> None:
        if isinstance(piece.delta.role, str):
            self._role = piece.delta.role
        if isinstance(piece.delta.content, str):
            self._texts.append(piece.delta.content)
        if isinstance(piece.delta.reasoning, str):
            self._reasoning.append(piece.delta.reasoning)
        for call in piece.delta.tool_calls or ():
            if call.index == len(self._calls):
                self._calls.append((call, []))
            self._calls[call.index][1].append(call.function.arguments)
        if piece.logprobs is not None:
            if self._logprobs is None:
                self._logprobs = []
            self._logprobs.append(msgspec.json.encode(piece.logprobs.content)[1:-1])
        if isinstance(piece.token_ids, list):
            self._token_ids += piece.token_ids
        self._last = piece

    def choice(self, index: int) -> ChatChoice:
        assert self._last is not None
        stop_reason = self._last.stop_reason
        logprobs = None if self._logprobs is None else ChatLogprobs(content=cast("Any", joined(self._logprobs)))
        return ChatChoice(
            index=index,
            message=self._message(),
            logprobs=logprobs,
            finish_reason=self._last.finish_reason,
            stop_reason=None if stop_reason is UNSET else stop_reason,
            token_ids=None if self._last.token_ids is UNSET else self._token_ids,
        )

    def _message(self) -> AssistantMessage:
        content = "".join(self._texts)
        message = AssistantMessage(role=self._role, content=content)
        if self._reasoning:
            message.reasoning = "".join(self._reasoning)
        if self._calls:
            message.tool_calls = [_whole_call(call, pieces) for call, pieces in self._calls]
        if not content and (self._reasoning or self._calls):
            message.content = None
        return message


def _whole_call(call: ToolCallDelta, pieces: list[str]) -> ChatToolCall:
    assert isinstance(call.id, str) and isinstance(call.function.name, str)
    return ChatToolCall(id=call.id, function=FunctionCall(name=call.function.name, arguments="".join(pieces)))
