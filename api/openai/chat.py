"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import Iterable

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from api.errors import RequestError
from api.openai.body import read_json
from api.openai.logprobs import TokenSpelling, chat_logprobs, prompt_logprobs
from api.openai.prompts import adds_generation_prompt, prompt_token_ids, render_messages, text_of
from api.openai.protocol import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatDelta,
    ChatLogprobs,
    PromptLogprobs,
    Usage,
)
from api.openai.refusals import refuse_chat
from api.openai.sampling import answer_id, check_stream_fields, sampling_params, stream_interval, wants_usage
from api.openai.stream import MARK, Generation, TokenStream, WholeAnswer, event, split_at_mark
from api.output import Delta
from api.serving import Serving

DECODER = msgspec.json.Decoder(ChatCompletionRequest)


async def create_chat_completion(request: Request) -> Response:
    """Answers a conversation."""
    serving: Serving = request.app.state.serving
    body = await read_json(request, DECODER, serving.config.max_body_size)
    serving.check_model(body.model)
    refuse_chat(body)
    check_stream_fields(body)
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", "top_logprobs")
    max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    params = sampling_params(
        body,
        serving.defaults,
        max_tokens=max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
    )
    text = await render_messages(serving, body, body.messages)
    prompt = await prompt_token_ids(serving, body, text, add_special_tokens=False, max_tokens=max_tokens)
    generation = Generation(
        serving,
        answer_id("chatcmpl", request, body.request_id),
        [prompt],
        params,
        priority=body.priority or 0,
        cache_salt=body.cache_salt or "",
        stream_interval=stream_interval(serving.config, body),
    )
    reply = ChatReply(serving, body, generation)
    if body.stream:
        return TokenStream(generation, reply, serving.config.sse_keep_alive_interval)
    return WholeAnswer(generation, reply)


class ChatReply:
    """The outputs of a chat completion, as chunks or folded into one answer."""

    def __init__(self, serving: Serving, request: ChatCompletionRequest, generation: Generation) -> None:
        self._generation = generation
        last = request.messages[-1]
        self._role = serving.config.response_role if adds_generation_prompt(request) else last.role
        self._echo = text_of(last) if request.echo and last.role == self._role else ""
        self._has_logprobs = bool(request.logprobs or request.logprob_token_ids)
        self._has_prompt_logprobs = request.prompt_logprobs is not None
        self._has_token_ids = bool(request.return_token_ids)
        self._ends_with_usage, self._has_usage = wants_usage(request, always=serving.config.enable_force_include_usage)
        self._is_plain = not (self._has_logprobs or self._has_token_ids or self._has_usage)
        self._spelling = TokenSpelling(serving.tokenizer, as_ids=bool(request.return_tokens_as_token_ids))
        self._num_output_tokens = 0
        self._prompt_logprobs: PromptLogprobs | UnsetType = UNSET
        self._constants: dict[int, tuple[bytes, bytes]] = {}
        """By choice that has begun: what stands before and after the text of a plain chunk."""
        self._chunk = ChatCompletionChunk(
            id=generation.request_id,
            created=int(time.time()),
            model=serving.model_name,
            choices=[],
            system_fingerprint=serving.system_fingerprint,
            usage=None if self._ends_with_usage else UNSET,
        )
        self._encoder = msgspec.json.Encoder()

    # -- both forms ------------------------------------------------------------------------------------------

    def _begin(self, index: int) -> list[ChatChunkChoice]:
        """What comes before the first token of a choice."""
        pieces = [ChatChunkChoice(index=index, delta=ChatDelta(role=self._role, content=""))]
        if self._echo:
            pieces.append(ChatChunkChoice(index=index, delta=ChatDelta(content=self._echo)))
        return pieces

    def _piece(self, delta: Delta) -> ChatChunkChoice:
        self._num_output_tokens += len(delta.token_ids)
        piece = ChatChunkChoice(index=delta.choice, delta=ChatDelta(content=delta.text))
        if self._has_logprobs:
            piece.logprobs = ChatLogprobs(content=chat_logprobs(delta.logprobs, self._spelling))
        if self._has_token_ids:
            piece.token_ids = list(delta.token_ids)
        if delta.finish_reason is not None:
            piece.finish_reason = delta.finish_reason
            piece.stop_reason = delta.stop_reason
        return piece

    # -- a stream --------------------------------------------------------------------------------------------

    def event(self, delta: Delta) -> bytes:
        constants = self._constants.get(delta.choice)
        if constants is None:
            return self._first_events(delta)
        if self._is_plain and delta.finish_reason is None:
            return constants[0] + self._encoder.encode(delta.text) + constants[1]
        return self._encode(self._piece(delta))

    def _first_events(self, delta: Delta) -> bytes:
        beginning = self._begin(delta.choice)
        if self._has_token_ids and not self._constants:
            self._chunk.prompt_token_ids = list(self._generation.prompts[0])
        data = self._encode(beginning[0])
        self._chunk.prompt_token_ids = UNSET
        marked = ChatChunkChoice(index=delta.choice, delta=ChatDelta(content=MARK))
        self._constants[delta.choice] = split_at_mark(self._encode_chunk(marked))
        return data + b"".join(map(self._encode, (*beginning[1:], self._piece(delta))))

    def _encode(self, piece: ChatChunkChoice) -> bytes:
        return event(self._encode_chunk(piece))

    def _encode_chunk(self, piece: ChatChunkChoice) -> bytes:
        chunk = self._chunk
        chunk.choices = [piece]
        if self._has_usage:
            chunk.usage = self._generation.usage(self._num_output_tokens)
        return self._encoder.encode(chunk)

    def last_event(self) -> bytes:
        if not self._ends_with_usage:
            return b""
        self._chunk.choices = []
        self._chunk.usage = self._generation.usage()
        return event(self._encoder.encode(self._chunk))

    # -- one answer ------------------------------------------------------------------------------------------

    def whole(self, deltas: Iterable[Delta]) -> bytes:
        choices: dict[int, _Fold] = {}
        prompt = self._generation.prompts[0]
        for delta in deltas:
            fold = choices.get(delta.choice)
            if fold is None:
                fold = choices[delta.choice] = _Fold()
                if self._has_prompt_logprobs and len(choices) == 1:
                    self._prompt_logprobs = prompt_logprobs(len(prompt), delta.prompt_logprobs, self._spelling)
                for piece in self._begin(delta.choice):
                    fold.add(piece)
            fold.add(self._piece(delta))
        usage: Usage = self._generation.usage()
        return self._encoder.encode(
            ChatCompletionResponse(
                id=self._chunk.id,
                created=self._chunk.created,
                model=self._chunk.model,
                choices=[choices[index].choice(index) for index in sorted(choices)],
                usage=usage,
                system_fingerprint=self._chunk.system_fingerprint,
                prompt_token_ids=list(prompt) if self._has_token_ids else UNSET,
                prompt_logprobs=self._prompt_logprobs,
            )
        )


class _Fold:
    """The pieces of one choice, put together."""

    def __init__(self) -> None:
        self._role = ""
        self._texts: list[str] = []
        self._logprobs: ChatLogprobs | None = None
        self._token_ids: list[int] = []
        self._last: ChatChunkChoice | None = None

    def add(self, piece: ChatChunkChoice) -> None:
        if isinstance(piece.delta.role, str):
            self._role = piece.delta.role
        if isinstance(piece.delta.content, str):
            self._texts.append(piece.delta.content)
        if piece.logprobs is not None:
            if self._logprobs is None:
                self._logprobs = piece.logprobs
            else:
                self._logprobs.content += piece.logprobs.content
        if isinstance(piece.token_ids, list):
            self._token_ids += piece.token_ids
        self._last = piece

    def choice(self, index: int) -> ChatChoice:
        assert self._last is not None
        stop_reason = self._last.stop_reason
        return ChatChoice(
            index=index,
            message=AssistantMessage(role=self._role, content="".join(self._texts)),
            logprobs=self._logprobs,
            finish_reason=self._last.finish_reason,
            stop_reason=None if stop_reason is UNSET else stop_reason,
            token_ids=UNSET if self._last.token_ids is UNSET else self._token_ids,
        )
