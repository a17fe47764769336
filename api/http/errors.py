"""Error responses: ``{"error": {"message", "type", "param", "code"}}``, or another ``ErrorShape`` of the endpoint."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import NamedTuple

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from api.errors import KINDS, EngineDeadError, RequestError

MAX_MESSAGE_CHARS = 1000
"""Messages may quote client input, so they are truncated."""

HEADERS: Mapping[int, Mapping[str, str]] = {
    401: {"WWW-Authenticate": "Bearer"},
    501: {"x-should-retry": "false"},
    503: {"Retry-After": "1"},
}

ENGINE_DEAD = "The engine is dead and the server is shutting down."
INTERNAL = "Internal server error: the server failed to process the request."

_PLACE = re.compile(r" - at (?:`key` in )?`(\$[^`]*)`$")


class ErrorInfo(msgspec.Struct, kw_only=True):
    message: str
    type: str
    param: str | None
    """The field at fault."""
    code: int | str
    """The HTTP status, or ``context_length_exceeded``."""


class ErrorResponse(msgspec.Struct, kw_only=True):
    error: ErrorInfo


def malformed(message: str, param: str | None = None) -> RequestError:
    """The error for a body that does not match the endpoint's type."""
    return RequestError(message, param, kind="Bad Request")


def decode_error(error: Exception) -> RequestError:
    """The error for a body that cannot be decoded. It does not quote the body."""
    if isinstance(error, RecursionError):
        return malformed("the body is nested too deeply", "body")
    if isinstance(error, UnicodeDecodeError):
        return malformed("the body contains text that is not valid UTF-8", "body")
    text = str(error)
    if not isinstance(error, msgspec.ValidationError):
        return malformed(f"the body is not valid JSON: {text}", "body")
    match = _PLACE.search(text)
    param = "body"
    if match is not None:
        text, param = text[: match.start()], "body" + match[1][1:]
    if text.startswith("Invalid"):
        text = "Invalid value"  # the rest is the value
    return malformed(f"1 validation error:\n  {param}: {text.replace('`', '')}", param)


def to_request_error(error: BaseException) -> RequestError:
    """Converts any exception to a RequestError; unexpected ones reveal nothing."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, EngineDeadError):
        return RequestError(ENGINE_DEAD, status=503, kind=KINDS[503])
    if isinstance(error, HTTPException):
        kind = KINDS.get(error.status_code, HTTPStatus(error.status_code).phrase)
        return RequestError(error.detail, status=error.status_code, kind=kind, headers=error.headers)
    return RequestError(INTERNAL, status=500, kind=KINDS[500])


def shortened(message: str) -> str:
    """A message, truncated if too long."""
    return message if len(message) <= MAX_MESSAGE_CHARS else message[:MAX_MESSAGE_CHARS] + "..."


def render(error: RequestError) -> bytes:
    """The body of an error."""
    info = ErrorInfo(message=shortened(error.message), type=error.kind, param=error.param, code=error.code)
    return msgspec.json.encode(ErrorResponse(error=info))


class ErrorShape(NamedTuple):
    """The error format of an endpoint."""

    body: type[msgspec.Struct]
    render: Callable[[RequestError], bytes]


OPENAI_ERRORS = ErrorShape(ErrorResponse, render)


class WithErrorShape:
    """Wraps an endpoint whose clients expect another error format."""

    def __init__(self, app: ASGIApp, shape: ErrorShape) -> None:
        self._app = app
        self._shape = shape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["error_shape"] = self._shape
        await self._app(scope, receive, send)


def error_response(error: BaseException, scope: Scope) -> Response:
    """The response to a request that failed before anything was sent."""
    shape: ErrorShape = scope.get("state", {}).get("error_shape", OPENAI_ERRORS)
    request_error = to_request_error(error)
    headers = {**HEADERS.get(request_error.status, {}), **request_error.headers}
    return Response(shape.render(request_error), request_error.status, headers, "application/json")


REFUSED_PATHS = {
    "/v1/audio/": "models that hear or speak are not served",
    "/v1/images/": "models that make images are not served; those that see take images in messages",
}
"""Beginnings of paths that clients know from elsewhere, and why they lead nowhere."""


async def handle_exception(request: Request, error: Exception) -> Response:
    """``error_response`` with Starlette's signature."""
    path = request.url.path.removeprefix(request.scope.get("root_path", ""))
    reason = next((reason for start, reason in REFUSED_PATHS.items() if path.startswith(start)), None)
    if isinstance(error, HTTPException) and error.status_code == 404 and reason is not None:
        error = HTTPException(404, f"{path[:100]} is not supported: {reason}")
    return error_response(error, request.scope)


ExceptionHandler = Callable[[Request, Exception], Awaitable[Response]]
EXCEPTION_HANDLERS: dict[type[Exception], ExceptionHandler] = dict.fromkeys(
    (RequestError, EngineDeadError, HTTPException), handle_exception
)
"""All other exceptions are logged and answered by ``RequestScope``."""
