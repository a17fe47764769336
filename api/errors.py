"""Errors of the front end that several of its files raise."""

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
"""The ``type`` of an error that brings none of its own."""


class ModelFileError(Exception):
    """A file of the model is missing, damaged or of a kind that is not supported.

    Attributes:
        path: The file.
        detail: What is wrong with it, naming the field or the tensor.
    """

    def __init__(self, path: str | Path, detail: str) -> None:
        self.path = str(path)
        self.detail = " ".join(detail.split())
        super().__init__(f"{self.path}: {self.detail}")


class RequestError(ValueError):
    """A request that cannot be served as it is. The message names the field and says what would do.

    Attributes:
        message: For the client.
        param: The field at fault, if it is one.
        status: HTTP status.
        kind: The ``type`` of the error body.
        code: The ``code`` of the error body; the status unless clients know a word for it.
        headers: More headers of the answer.
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
    """A prompt, or a prompt and the output that was asked for, is longer than the model's context.

    Clients that shorten a conversation by themselves look for this ``code``, which is OpenAI's.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, "input_tokens", code="context_length_exceeded")


class EngineDeadError(Exception):
    """The engine cannot serve, now or ever again; the message says why.

    Attributes:
        exit_code: What this process should exit with. 78: the model or its configuration is at fault.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        self.exit_code = exit_code
        super().__init__(message)
