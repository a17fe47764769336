"""POST /sleep, /wake_up and /reload_weights, GET /is_sleeping: memory for others while nobody asks, and new weights.

They exist with ``--admin-api-key``. While the server sleeps, requests that run wait, and new ones get status 503.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from api.errors import CallError, RequestError
from api.generation.serving import Serving

Q = TypeVar("Q", bound=msgspec.Struct)

_running: set[asyncio.Task[None]] = set()
"""Calls that are not done; the event loop itself does not keep them alive."""


class SleepQuery(msgspec.Struct, forbid_unknown_fields=True):
    level: Annotated[
        Literal[1, 2], Meta(description="1: free the KV cache. 2: free the weights, too, by ending the workers.")
    ] = 1
    keep_kv: Annotated[bool, Meta(description="Keep the KV cache, so that requests need not be computed again.")] = (
        False
    )


class WakeUpQuery(msgspec.Struct, forbid_unknown_fields=True):
    tags: Annotated[
        Literal["weights", "kv_cache"] | None,
        Meta(description="Accepted as vLLM does; everything wakes up at once."),
    ] = None


class SleepState(msgspec.Struct, kw_only=True):
    is_sleeping: bool


async def sleep(request: Request) -> Response:
    """Frees memory. Returns once that is done; steps that are being computed end first."""
    query = _query(request, SleepQuery)
    serving: Serving = request.app.state.serving
    for model in serving.models:
        await _done(model.client.sleeper.sleep(query.level, keeps_kv=query.keep_kv))
    return _state(serving)


async def wake_up(request: Request) -> Response:
    """Ends sleep. Returns once requests run again; after level 2, with the weights that are on disk by then."""
    _query(request, WakeUpQuery)
    serving: Serving = request.app.state.serving
    for model in serving.models:
        await _done(model.client.sleeper.wake_up())
    return _state(serving)


async def reload_weights(request: Request) -> Response:
    """Loads the weights again from the model's files. Requests that run end first; new ones wait."""
    serving: Serving = request.app.state.serving
    for model in serving.models:
        await _done(model.client.sleeper.reload_weights())
    return _state(serving)


async def is_sleeping(request: Request) -> Response:
    """Whether the server sleeps."""
    return _state(request.app.state.serving)


def _state(serving: Serving) -> Response:
    state = SleepState(is_sleeping=serving.is_sleeping)
    return Response(msgspec.json.encode(state), media_type="application/json")


async def _done(call: Coroutine[Any, Any, None]) -> None:
    """Waits for a call, which goes on if the client disconnects: engines and api must agree on who sleeps, and engines
    on their weights.

    Raises:
        RequestError: 409: not at this time.
    """
    task = asyncio.create_task(call)
    _running.add(task)
    task.add_done_callback(_running.discard)
    try:
        await asyncio.shield(task)
    except CallError as error:
        raise RequestError(str(error), status=409, kind="ConflictError") from error


def _query(request: Request, kind: type[Q]) -> Q:
    """The query's parameters; of several with one name, the last.

    Raises:
        RequestError: One of them is unknown or has no such value.
    """
    try:
        return msgspec.convert(dict(request.query_params), kind, strict=False)
    except msgspec.ValidationError as error:
        fields = ", ".join(kind.__struct_fields__)
        raise RequestError(f"query parameters ({fields}): {error}") from error
