"""Errors of responses: OpenAI's envelope, with the types and field names of this endpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from api.errors import RequestError
from api.http.errors import ErrorResponse, ErrorShape, render

_KINDS = {400: "invalid_request_error", 404: "not_found_error", 429: "rate_limit_exceeded"}
_FIELDS = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
}


def render_response_error(error: RequestError) -> bytes:
    """The body of an error."""
    kind = _KINDS.get(error.status, error.kind)
    code = error.code if isinstance(error.code, str) else None
    return render(RequestError(error.message, error.param, status=error.status, kind=kind, code=code))


RESPONSES_ERRORS = ErrorShape(ErrorResponse, render_response_error)


@contextmanager
def with_own_fields() -> Iterator[None]:
    """Maps field names of chat completions in errors to those of responses."""
    try:
        yield
    except RequestError as error:
        error.param = _FIELDS.get(error.param or "", error.param)
        raise
