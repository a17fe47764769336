"""The OpenAPI document, built from the route table and the types of request and response bodies."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeAlias

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from api.config import ServerConfig
from api.http.errors import OPENAI_ERRORS, ErrorShape
from api.openai.protocol import ChatTool
from api.server.openapi_fields import describe_fields
from api.version import VERSION

ERRORS = {
    400: "The request is invalid.",
    401: "Missing or invalid API key.",
    403: "The Host name is not allowed; see --allowed-hosts.",
    404: "Unknown model.",
    408: "The body arrived too slowly.",
    409: "Not at this time: the engine is falling asleep, waking up or restarting.",
    413: "The body is too large.",
    422: "The request crashed the engine and is rejected for a while.",
    429: "Too many requests are waiting.",
    500: "Server error.",
    503: "The server is busy or shutting down.",
}
_WITH_BODY_ONLY = (400, 408, 413, 422)
_REF = "#/components/schemas/{name}"
_KEY = "apiKey"
Schemas: TypeAlias = dict[Any, dict[str, Any]]
"""JSON schemas by type."""


@dataclass(frozen=True)
class Operation:
    """A row of the route table."""

    method: str
    path: str
    handler: Callable[[Request], Awaitable[Response]]
    summary: str
    request: type[msgspec.Struct] | None = None
    """Type of the JSON body."""
    example: Mapping[str, Any] | None = None
    """An example body, for types that do not show which fields belong together."""
    response: type[msgspec.Struct] | None = None
    """Type of the answer's JSON body."""
    chunk: Any = None
    """Type of the stream events, a struct or a union of structs; None if the answer cannot be streamed."""
    media_type: str | None = None
    """Content type of an answer that is not JSON."""
    errors: ErrorShape = OPENAI_ERRORS
    task: Literal["generate", "pool"] | None = None
    """Task that the server must be configured for; None: any."""
    is_wanted: Callable[[ServerConfig], bool] = lambda config: True
    """Whether the server's options enable the route."""
    queues: bool = False
    """Whether requests wait for the engine, and so are rejected while too many others wait."""
    is_open: bool = False
    """Whether the route needs no key and is also served while the server drains."""
    is_admin: bool = False
    """Whether it changes the server, and so needs a key of ``--admin-api-key``."""
    query: type[msgspec.Struct] | None = None
    """Type of the query's parameters, each optional; None: there are none."""


class Document:
    """GET /openapi.json."""

    def __init__(self, operations: Iterable[Operation], *, has_keys: bool, root_path: str = "") -> None:
        self._body = msgspec.json.encode(build(operations, has_keys=has_keys, root_path=root_path))

    async def show(self, request: Request) -> Response:
        return Response(self._body, media_type="application/json")


def build(operations: Iterable[Operation], *, has_keys: bool, root_path: str = "") -> dict[str, Any]:
    """The document as plain JSON values."""
    table = list(operations)
    types = {
        kind: None
        for operation in table
        for kind in (operation.request, operation.response, operation.chunk, operation.errors.body)
        if kind is not None
    }
    types[ChatTool] = None  # request schemas refer to it, though their tools are plain dictionaries
    by_type, components = _schemas(tuple(types))
    paths: dict[str, dict[str, Any]] = {}
    for operation in table:
        path = operation.path.replace(":path}", "}")
        is_guarded = operation.is_admin or (has_keys and not operation.is_open)
        paths.setdefault(path, {})[operation.method.lower()] = _describe(operation, by_type, is_guarded=is_guarded)
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "Octavo", "version": VERSION, "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "components": {"schemas": components},
    }
    if root_path:
        document["servers"] = [{"url": root_path}]
    if has_keys or any(operation.is_admin for operation in table):
        document["components"]["securitySchemes"] = {_KEY: {"type": "http", "scheme": "bearer"}}
    return document


@cache  # takes longer than all the rest of an application
def _schemas(types: tuple[Any, ...]) -> tuple[Schemas, dict[str, Any]]:
    """The schemas of some types, and those that they refer to by name. Not to be changed."""
    schemas, components = msgspec.json.schema_components(types, ref_template=_REF)
    describe_fields(components)
    return dict(zip(types, schemas, strict=True)), components


def _describe(operation: Operation, schemas: Schemas, *, is_guarded: bool) -> dict[str, Any]:
    described: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": operation.handler.__name__,
        "responses": _responses(operation, schemas, is_guarded=is_guarded),
    }
    if operation.request is not None:
        content: dict[str, dict[str, Any]] = {"application/json": {"schema": schemas[operation.request]}}
        if operation.example is not None:
            content["application/json"]["example"] = operation.example
        described["requestBody"] = {"required": True, "content": content}
    names = [part.strip("{}").partition(":")[0] for part in operation.path.split("/") if part.startswith("{")]
    if names:
        described["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if operation.query is not None:
        described["parameters"] = [
            {"name": name, "in": "query", "schema": schema}
            for name, schema in msgspec.json.schema(operation.query)["$defs"][operation.query.__name__][
                "properties"
            ].items()
        ]
    if is_guarded:
        described["security"] = [{_KEY: []}]
    return described


def _responses(operation: Operation, schemas: Schemas, *, is_guarded: bool) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if operation.response is not None:
        content["application/json"] = {"schema": schemas[operation.response]}
    if operation.chunk is not None:
        # OpenAPI 3.1 cannot describe stream events: a ``schema`` would describe the whole body.
        content["text/event-stream"] = {"x-event-schema": schemas[operation.chunk]}
    if operation.media_type is not None:
        content[operation.media_type] = {"schema": {"type": "string"}}
    good: dict[str, Any] = {"description": "Success."}
    if content:
        good["content"] = content
    responses: dict[str, Any] = {"200": good}
    error = {"application/json": {"schema": schemas[operation.errors.body]}}
    for status, description in ERRORS.items():
        if status in _WITH_BODY_ONLY and operation.request is None and (status != 400 or operation.query is None):
            continue
        if status == 409 and (not operation.is_admin or operation.request is not None):
            continue
        if status == 404 and operation.request is None and "{" not in operation.path:
            continue
        if status == 429 and not operation.queues:
            continue
        if status == 401 and not is_guarded:
            continue
        if status == 503 and operation.is_open:
            responses["503"] = {"description": description}
            continue
        responses[str(status)] = {"description": description, "content": error}
    return responses
