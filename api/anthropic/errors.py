"""Errors in Anthropic's format: ``{"type": "error", "error": {"type", "message"}}``."""

from __future__ import annotations

import msgspec

from api.anthropic.protocol import AnthropicError, AnthropicErrorResponse
from api.errors import RequestError
from api.http.errors import ErrorShape, shortened

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_body(error: RequestError) -> AnthropicErrorResponse:
    """The error in Anthropic's format."""
    kind = _KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return AnthropicErrorResponse(error=AnthropicError(type=kind, message=shortened(error.message)))


def render(error: RequestError) -> bytes:
    """The body of an error."""
    return msgspec.json.encode(error_body(error))


ANTHROPIC_ERRORS = ErrorShape(AnthropicErrorResponse, render)
