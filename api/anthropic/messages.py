"""POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Iterator, Sequence

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from api.anthropic.convert import to_chat_request
from api.anthropic.errors import error_body
from api.anthropic.protocol import (
    BlockDelta,
    ContentBlockDelta,
    ContentBlockStart,
    ContentBlockStop,
    ConversationRequest,
    InputJsonDelta,
    Message,
    MessageDelta,
    MessageOutputDetails,
    MessagesRequest,
    MessageStart,
    MessageStop,
    MessageTokensCount,
    MessageUsage,
    OutputBlock,
    Ping,
    SignatureDelta,
    StopDetails,
    StopReason,
    StreamEvent,
    TextBlock,
    TextDelta,
    ThinkingBlock,
    ThinkingDelta,
    ToolUseBlock,
)
from api.engine.channel import Delta
from api.engine.queue_bound import NOBODY
from api.errors import RequestError
from api.generation.served_model import ServedModel
from api.generation.serving import Serving
from api.http.body import read_json, work_on
from api.http.stream import MARK, TokenStream, WholeAnswer, split_at_mark, typed_event
from api.http.tenants import enter_queue
from api.openai.answer import ChatAnswer, prepare_answer
from api.openai.images import place_images, read_images
from api.openai.prompts import render_messages
from api.parsers import Content, Event, Reasoning, ToolCallArguments, ToolCallEnd, ToolCallStart

MESSAGES_DECODER = msgspec.json.Decoder(MessagesRequest)
COUNT_DECODER = msgspec.json.Decoder(ConversationRequest)


async def create_message(request: Request) -> Response:
    """Answers a conversation."""
    serving: Serving = request.app.state.serving
    body = await read_json(request, MESSAGES_DECODER, serving.config.max_body_size)
    model = await serving.choose_model(body.model, body)
    tenant = enter_queue(request, model, None if body.metadata is None else body.metadata.user_id)
    chat = await model.host.apart(work_on(request), to_chat_request, body)
    if model.config.reasoning_parser is None:
        chat.thinking_token_budget = None  # without reasoning, no budget is exceeded
    answer = await prepare_answer(
        model, chat, f"msg_{secrets.token_hex(12)}", tenant=tenant, work=work_on(request), fits_max_tokens=True
    )
    reply = MessagesReply(model, body, answer)
    if body.stream:
        return TokenStream(answer.generation, reply, serving.config.sse_keep_alive_interval)
    return WholeAnswer(answer.generation, reply)


async def count_tokens(request: Request) -> Response:
    """The number of tokens in a conversation's prompt, which may exceed the context."""
    serving: Serving = request.app.state.serving
    body = await read_json(request, COUNT_DECODER, serving.config.max_body_size)
    model = serving.find_model(body.model)
    chat = await model.host.apart(work_on(request), to_chat_request, body)
    chat, pictures = await read_images(model, chat, NOBODY)
    text = await render_messages(model, chat, chat.messages, chat.tools)
    tokens = await model.tokenize(text, add_special_tokens=False, any_length=True)
    tokens, _ = place_images(model, tokens, pictures)
    answer = MessageTokensCount(input_tokens=len(tokens))
    return Response(msgspec.json.encode(answer), media_type="application/json")


def _event(body: StreamEvent) -> bytes:
    tag = type(body).__struct_config__.tag
    assert isinstance(tag, str)
    return typed_event(tag, msgspec.json.encode(body))


def _signature(thinking: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for piece in thinking:
        digest.update(piece.encode())
    return digest.hexdigest()


class MessagesReply:
    """The outputs of a generation, as Anthropic stream events or as one message."""

    keep_alive = _event(Ping())

    def __init__(self, model: ServedModel, request: MessagesRequest, answer: ChatAnswer) -> None:
        self._answer = answer
        self._has_begun = False
        self._index = -1
        """Index of the latest block; -1 before the first."""
        self._kind: type[Event] | None = None
        """Event type of the open block's content; None if no block is open."""
        self._around = (b"", b"")
        """The encoded event before and after the text of the open block's deltas."""
        self._thinking: list[str] = []
        self._pieces: list[str] = []
        """Pieces of the open block's text, for a message that is not streamed."""
        self._message = Message(id=answer.generation.request_id, model=model.name, content=[], usage=self._usage(0))
        self._encoder = msgspec.json.Encoder()

    def _usage(self, num_output_tokens: int | None = None) -> MessageUsage:
        usage = self._answer.generation.usage(num_output_tokens)
        cached = usage.prompt_tokens_details.cached_tokens
        result = MessageUsage(
            input_tokens=usage.prompt_tokens - cached,
            cache_read_input_tokens=cached,
            output_tokens=usage.completion_tokens,
        )
        if self._answer.text_format.reasoning is not None:
            result.output_tokens_details = MessageOutputDetails(thinking_tokens=self._answer.num_reasoning_tokens)
        return result

    def _stop(self, delta: Delta) -> StopDetails:
        ending = self._answer.ending(delta)
        reason: StopReason = "end_turn"
        if ending.reason == "length":
            reason = "model_context_window_exceeded" if ending.is_context_full else "max_tokens"
        elif ending.reason == "tool_calls":
            reason = "tool_use"
        elif ending.stop_string is not None:
            reason = "stop_sequence"
        return StopDetails(stop_reason=reason, stop_sequence=ending.stop_string)

    # -- a stream --------------------------------------------------------------------------------------------

    def event(self, delta: Delta) -> bytes:
        parts = [] if self._has_begun else [self._begin()]
        for each in self._answer.events(delta):
            self._write(each, parts)
        if delta.finish_reason is not None:
            self._close(parts)
            parts.append(_event(MessageDelta(delta=self._stop(delta), usage=self._usage())))
        return b"".join(parts)

    def _begin(self) -> bytes:
        self._has_begun = True
        self._message.usage = self._usage(0)  # the number of cached tokens is known by now
        return _event(MessageStart(message=self._message)) + self.keep_alive

    def _write(self, event: Event, parts: list[bytes]) -> None:
        match event:
            case Content(text):
                if self._kind is not Content:
                    self._open(Content, TextBlock(text=""), TextDelta(text=MARK), parts)
                parts.append(self._delta(text))
            case Reasoning(text):
                if self._kind is not Reasoning:
                    self._open(Reasoning, ThinkingBlock(thinking=""), ThinkingDelta(thinking=MARK), parts)
                self._thinking.append(text)
                parts.append(self._delta(text))
            case ToolCallStart(_, id, name):
                block = ToolUseBlock(id=id, name=name, input={})
                self._open(ToolCallArguments, block, InputJsonDelta(partial_json=MARK), parts)
            case ToolCallArguments(_, text):
                parts.append(self._delta(text))
            case ToolCallEnd():
                self._close(parts)

    def _open(self, kind: type[Event], block: OutputBlock, marked: BlockDelta, parts: list[bytes]) -> None:
        self._close(parts)
        self._kind = kind
        self._index += 1
        parts.append(_event(ContentBlockStart(index=self._index, content_block=block)))
        self._around = split_at_mark(_event(ContentBlockDelta(index=self._index, delta=marked)))

    def _delta(self, text: str) -> bytes:
        return self._around[0] + self._encoder.encode(text) + self._around[1]

    def _close(self, parts: list[bytes]) -> None:
        if self._kind is None:
            return
        if self._kind is Reasoning:
            signature = SignatureDelta(signature=_signature(self._thinking))
            parts.append(_event(ContentBlockDelta(index=self._index, delta=signature)))
            self._thinking.clear()
        parts.append(_event(ContentBlockStop(index=self._index)))
        self._kind = None

    def last_event(self) -> bytes:
        return _event(MessageStop())

    def error_event(self, error: RequestError) -> bytes:
        return _event(error_body(error))

    # -- one answer ------------------------------------------------------------------------------------------

    def fold(self, deltas: Sequence[Delta]) -> None:
        message, pieces = self._message, self._pieces
        self._answer.use_whole_calls()
        for delta in deltas:
            for each in self._answer.events(delta):
                if isinstance(each, (Content, Reasoning)) and type(each) is not self._kind:
                    self._end_block(pieces)
                    is_text = isinstance(each, Content)
                    message.content.append(TextBlock(text="") if is_text else ThinkingBlock(thinking=""))
                    self._kind = type(each)
                if isinstance(each, (Content, Reasoning, ToolCallArguments)):
                    pieces.append(each.text)
                elif isinstance(each, ToolCallStart):
                    self._end_block(pieces)
                    message.content.append(ToolUseBlock(id=each.id, name=each.name, input={}))
                    self._kind = ToolCallArguments
            if delta.finish_reason is not None:
                self._end_block(pieces)
                stop = self._stop(delta)
                message.stop_reason, message.stop_sequence = stop.stop_reason, stop.stop_sequence

    def whole(self) -> Iterator[bytes]:
        self._message.usage = self._usage()
        yield self._encoder.encode(self._message)

    def _end_block(self, pieces: list[str]) -> None:
        if self._kind is None:
            return
        block, text = self._message.content[-1], "".join(pieces)
        pieces.clear()
        self._kind = None
        if isinstance(block, TextBlock):
            block.text = text
        elif isinstance(block, ThinkingBlock):
            block.thinking, block.signature = text, _signature([text])
        else:
            try:
                block.input = msgspec.json.decode(text)
            except (msgspec.DecodeError, RecursionError):  # such as lone surrogates, which UTF-8 cannot encode
                self._message.content[-1] = TextBlock(text=text)
