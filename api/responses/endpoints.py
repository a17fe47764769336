"""POST /v1/responses, and the operations on stored responses."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from api.errors import EngineDeadError, RequestError
from api.generation.served_model import ServedModel
from api.generation.serving import Serving
from api.http.body import read_json, work_on
from api.http.errors import to_request_error
from api.http.stream import KEEP_ALIVE, TokenStream, WholeAnswer, look_at
from api.http.tenants import enter_queue
from api.openai.answer import ChatAnswer, prepare_answer
from api.openai.logprobs import spells_ids
from api.openai.protocol import ChatMessage
from api.params.sampling import SamplingParams
from api.responses.convert import output_messages, to_chat_request
from api.responses.errors import with_own_fields
from api.responses.protocol import (
    DeletedResponse,
    ReasoningConfig,
    ResponseObject,
    ResponsesRequest,
    TextConfig,
)
from api.responses.reply import ResponseReply
from api.responses.store import EventLog, ResponseStore, StoredResponse
from engine_core.launch import get_logger

logger = get_logger()

DECODER = msgspec.json.Decoder(ResponsesRequest)


async def create_response(request: Request) -> Response:
    """Answers a conversation."""
    serving: Serving = request.app.state.serving
    body = await read_json(request, DECODER, serving.config.max_body_size)
    model = await serving.choose_model(body.model, body)
    store: ResponseStore = request.app.state.responses
    is_stored = body.store is not False and store.is_enabled
    _check(body, is_stored=is_stored)
    tenant = enter_queue(request, model, body.safety_identifier or body.user)
    previous: list[ChatMessage] = []
    if body.previous_response_id is not None:
        previous = _previous(store, body.previous_response_id)
    with with_own_fields():
        chat = await model.host.apart(work_on(request), to_chat_request, body, previous)
        answer = await prepare_answer(
            model, chat, f"resp_{secrets.token_hex(16)}", tenant=tenant, work=work_on(request)
        )
    response = _new_response(model, body, answer, is_stored=is_stored)
    # Instructions come first, and are not stored.
    conversation = chat.messages[1:] if body.instructions else chat.messages
    making = _Making(model, store, body, answer, response, conversation)
    if body.background:
        look_at(request.scope, answer.generation)
        return await making.in_background()
    if body.stream:
        return TokenStream(answer.generation, making.reply, serving.config.sse_keep_alive_interval)
    return WholeAnswer(answer.generation, making.reply)


def _check(body: ResponsesRequest, *, is_stored: bool) -> None:
    for name, value in (("conversation", body.conversation), ("prompt", body.prompt)):
        if value is not None:
            raise RequestError(f"{name} is not supported by this server", name)
    if body.background and not is_stored:
        raise RequestError(
            "background requires store: true, and a server started with --max-stored-responses above 0", "background"
        )


def _previous(store: ResponseStore, response_id: str) -> list[ChatMessage]:
    stored = store.get(response_id, "previous_response_id")
    if stored.is_running:
        raise RequestError(f"response {response_id} is still in progress", "previous_response_id")
    return stored.conversation


def _new_response(model: ServedModel, body: ResponsesRequest, answer: ChatAnswer, *, is_stored: bool) -> ResponseObject:
    params = answer.generation.params
    assert isinstance(params, SamplingParams)  # there is no field for beam search
    return ResponseObject(
        id=answer.generation.request_id,
        created_at=int(time.time()),
        background=bool(body.background),
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata or {},
        model=model.name,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        reasoning=body.reasoning or ReasoningConfig(),
        store=is_stored,
        temperature=params.temperature,
        text=body.text or TextConfig(),
        tool_choice=body.tool_choice or "auto",
        tools=body.tools or [],
        top_logprobs=body.top_logprobs or 0,
        top_p=params.top_p,
        truncation=body.truncation or "disabled",
        user=body.user,
    )


class _Making:
    """A response being generated, and stored if requested."""

    def __init__(
        self,
        model: ServedModel,
        store: ResponseStore,
        body: ResponsesRequest,
        answer: ChatAnswer,
        response: ResponseObject,
        conversation: Sequence[ChatMessage],
    ) -> None:
        self._model = model
        self._responses = store
        self._answer = answer
        self._response = response
        self._conversation = conversation
        """The conversation up to this response."""
        self._stored: StoredResponse | None = None
        self._is_streamed = bool(body.stream)
        has_logprobs = "message.output_text.logprobs" in (body.include or ())
        self.reply = ResponseReply(
            model,
            response,
            answer,
            has_logprobs=has_logprobs,
            spells_ids=spells_ids(model.config, body),
            on_done=self._store if response.store else None,
        )

    def _store(self) -> None:
        """Stores the completed response."""
        conversation = [*self._conversation, *output_messages(self._response.output)]
        if self._stored is None:
            self._responses.add(StoredResponse(self._response, conversation))
        else:
            self._responses.update(self._stored, conversation)

    async def in_background(self) -> Response:
        """Starts the generation, and answers without waiting for it."""
        response = self._response
        response.status = "queued"
        self._stored = stored = StoredResponse(response, self._conversation)
        if self._is_streamed:
            stored.log = EventLog()
            stored.log.extend(self.reply.queued_events())
        self._responses.add(stored)
        try:
            await self._answer.generation.start(None)  # not quiet: clients may poll its progress
        except BaseException:
            self._answer.generation.close()
            self._responses.remove(response.id)
            raise
        stored.task = asyncio.create_task(self._generate(stored.log))
        stored.task.add_done_callback(self._on_end)
        if stored.log is not None:
            return _follow(stored.log, 0, self._model.config.sse_keep_alive_interval)
        return _json(response)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        """Called when the task ends in any way; a cancelled task may never have started."""
        self._answer.generation.close()
        assert self._stored is not None
        if self._stored.is_running:
            self.reply.cancel()
        if self._stored.log is not None:
            self._stored.log.close()

    async def _generate(self, log: EventLog | None) -> None:
        generation, reply = self._answer.generation, self.reply
        is_open = True
        try:
            while is_open:
                for delta in await generation.take():
                    if delta.error is not None:
                        raise generation.failure(delta)
                    events = reply.events(delta)
                    if log is not None:
                        log.extend(events)
                    is_open = is_open and delta.finish_reason is None
            last = reply.last_event()
        except Exception as error:
            if not isinstance(error, (RequestError, EngineDeadError)):
                logger.error("response %s failed", generation.request_id, exc_info=error)
            last = reply.error_event(to_request_error(error))
        if log is not None:
            log.extend([last])


def _json(body: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")


def _follow(log: EventLog, place: int, max_silence: float) -> Response:
    async def events() -> AsyncIterator[bytes]:
        async for data in log.follow(place, max_silence):
            yield data or KEEP_ALIVE

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


async def retrieve_response(request: Request) -> Response:
    """Returns a stored response, or streams its events."""
    serving: Serving = request.app.state.serving
    store: ResponseStore = request.app.state.responses
    stored = store.get(request.path_params["response_id"])
    if request.query_params.get("stream", "false") not in ("true", "1"):
        return _json(stored.response)
    if stored.log is None:
        raise RequestError("stream requires a response that was created with background and stream", "stream")
    after = request.query_params.get("starting_after", "-1")
    try:
        place = int(after) + 1
    except ValueError:
        raise RequestError("starting_after must be a sequence number", "starting_after") from None
    return _follow(stored.log, max(0, place), serving.config.sse_keep_alive_interval)


async def cancel_response(request: Request) -> Response:
    """Cancels a background response; a completed one is unchanged."""
    store: ResponseStore = request.app.state.responses
    stored = store.get(request.path_params["response_id"])
    if stored.task is None:
        raise RequestError("only background responses can be cancelled", "response_id")
    await _cancel(stored)
    return _json(stored.response)


async def delete_response(request: Request) -> Response:
    """Deletes a response; if in progress, it is aborted."""
    store: ResponseStore = request.app.state.responses
    stored = store.remove(request.path_params["response_id"])
    await _cancel(stored)
    return _json(DeletedResponse(id=stored.response.id))


async def _cancel(stored: StoredResponse) -> None:
    if stored.task is not None and not stored.task.done():
        stored.task.cancel()
        await asyncio.wait([stored.task])
