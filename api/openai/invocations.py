"""POST /invocations, the only path that SageMaker calls: the body's fields select the endpoint."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message

from api.errors import RequestError
from api.generation.serving import Serving
from api.http.body import read_json
from api.openai.chat import create_chat_completion
from api.openai.completions import create_completion
from api.openai.embeddings import create_embedding
from api.openai.scoring import rerank, score


class Invocation(msgspec.Struct, kw_only=True):
    """A body for one of the generating or pooling endpoints, selected by the first of these fields that is present."""

    messages: msgspec.Raw | None = None
    """Chat completions, or embeddings if the server offers only those."""
    prompt: msgspec.Raw | None = None
    """Completions."""
    input: msgspec.Raw | None = None
    """Embeddings."""
    query: msgspec.Raw | None = None
    """Rankings."""


class _Target(NamedTuple):
    fields: tuple[str, ...]
    """A body with one of these fields is for this endpoint."""
    generates: bool
    handler: Callable[[Request], Awaitable[Response]]


_TARGETS = (
    _Target(("messages",), True, create_chat_completion),
    _Target(("prompt",), True, create_completion),
    _Target(("input", "messages"), False, create_embedding),
    _Target(("query",), False, rerank),
    _Target(("queries", "text_1", "data_1"), False, score),
)
DECODER = msgspec.json.Decoder(dict[str, msgspec.Raw])


async def invoke(request: Request) -> Response:
    """Forwards the body to its endpoint.

    Raises:
        RequestError: The body is for no offered endpoint, or the endpoint rejects it.
    """
    serving: Serving = request.app.state.serving
    fields = await read_json(request, DECODER, serving.config.max_body_size)
    offered = {True: serving.config.offers_generation, False: serving.config.offers_pooling}
    targets = [target for target in _TARGETS if offered[target.generates]]
    for target in targets:
        if any(name in fields for name in target.fields):
            return await target.handler(Request(request.scope, _Replay(request, msgspec.json.encode(fields))))
    names = ", ".join(dict.fromkeys(name for target in targets for name in target.fields))
    raise RequestError(f"the body needs one of these fields to select an endpoint: {names}", "body")


class _Replay:
    """Replays a body that has been read, then receives what follows."""

    def __init__(self, request: Request, body: bytes) -> None:
        self._request = request
        self._body: bytes | None = body

    async def __call__(self) -> Message:
        body, self._body = self._body, None
        if body is None:
            return await self._request.receive()
        return {"type": "http.request", "body": body, "more_body": False}
