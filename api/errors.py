"""Errors that several modules of the front end raise."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

KINDS = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    413: "Request Entity Too Large",
    422: "UnprocessableEntityError",
    429: "RateLimitError",
    431: "Request Header Fields Too Large",
    500: "InternalServerError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
    505: "HTTP Version Not Supported",
}
"""The default ``type`` of an error by HTTP status."""


class ModelFileError(Exception):
    """A model file is missing, damaged or unsupported.

    Attributes:
        path: The file.
        detail: What is wrong with it, naming the field or the tensor.
    """

    def __init__(self, path: str | Path, detail: str) -> None:
        self.path = str(path)
        self.detail = " ".join(detail.split())
        super().__init__(f"{self.path}: {self.detail}")


class RequestError(ValueError):
    """An invalid request. The message names the field and says how to fix it.

    Attributes:
        message: For the client.
        param: The field at fault, if any.
        status: HTTP status.
        kind: The ``type`` of the error body.
        code: The ``code`` of the error body; the status unless clients expect a name.
        headers: Additional response headers.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        kind: str = "BadRequestError",
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.message = message
        self.param = param
        self.status = status
        self.kind = kind
        self.code: int | str = status if code is None else code
        self.headers = dict(headers or {})
        super().__init__(message)


class ContextLengthError(RequestError):
    """A prompt, alone or with the requested output, is longer than the model's context.

    Clients that shorten conversations automatically look for OpenAI's ``code``.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, "input_tokens", code="context_length_exceeded")


def asleep() -> RequestError:
    """The answer to requests while the engine sleeps."""
    return RequestError("the server sleeps until somebody wakes it up", status=503, kind=KINDS[503])


class CallError(Exception):
    """The engine refuses a control message; the message says why."""


class EngineDeadError(Exception):
    """The engine is dead for good; the message says why.

    Attributes:
        exit_code: Exit code for this process. 78: the model or its configuration is at fault.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        self.exit_code = exit_code
        super().__init__(message)
