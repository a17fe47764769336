"""What stands between the socket and the endpoints: request scope, keys, draining."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Iterable, Mapping

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import RequestError
from api.openai.errors import KINDS, error_response
from api.traffic import CLIENT_GONE, NO_HANDLER, Traffic
from engine_core.launch import get_logger

logger = get_logger()

_LABEL = re.compile(rb"[!-~]{1,128}")
"""What is taken as X-Request-Id: it becomes part of ids and log lines."""


def header_values(scope: Scope, name: bytes) -> list[bytes]:
    return [value for key, value in scope["headers"] if key == name]


class RequestScope:
    """Gives each request an id, counts it, and answers what nobody else caught.

    An exception after the answer began goes on to the server, which cuts the connection.
    """

    def __init__(
        self,
        app: ASGIApp,
        traffic: Traffic,
        handler_names: Mapping[object, str],
        *,
        echo_ids: bool = False,
        log_requests: bool = False,
    ) -> None:
        """Prepares.

        Args:
            app: What is wrapped.
            traffic: Where requests are counted.
            handler_names: Label of each endpoint function.
            echo_ids: Send the id back as X-Request-Id.
            log_requests: A line for each request.
        """
        self._app = app
        self._traffic = traffic
        self._handler_names = handler_names
        self._echo_ids = echo_ids
        self._log_requests = log_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def send_counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._echo_ids:
                    message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        begin = time.monotonic()
        self._traffic.begin()
        try:
            await self._app(scope, receive, send_counted)
        except ClientDisconnect:
            pass  # nobody is left to be answered
        except Exception as error:
            logger.exception("request %s failed", request_id)
            if status:
                raise
            await error_response(error, scope)(scope, receive, send_counted)
        finally:
            seconds = time.monotonic() - begin
            handler = self._handler_names.get(scope.get("endpoint"), NO_HANDLER)
            self._traffic.end(handler, scope["method"], status or CLIENT_GONE, seconds)
            if self._log_requests:
                logger.info("%s %s %d %.3fs %s", scope["method"], handler, status or CLIENT_GONE, seconds, request_id)


def _request_id(scope: Scope) -> str:
    values = header_values(scope, b"x-request-id")
    if len(values) == 1 and _LABEL.fullmatch(values[0]):
        return values[0].decode("ascii")
    return secrets.token_hex(16)


class Guard:
    """Stands before an endpoint: only clients with a key come in, and none while the server drains."""

    def __init__(self, app: ASGIApp, traffic: Traffic, keys: Iterable[str]) -> None:
        self._app = app
        self._traffic = traffic
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._digests and not self._has_key(scope):
            raise RequestError(
                "a valid API key is needed: Authorization: Bearer KEY, or x-api-key: KEY", status=401, kind=KINDS[401]
            )
        if self._traffic.is_draining:
            raise RequestError(
                "The server is shutting down.", status=503, kind=KINDS[503], headers={"Connection": "close"}
            )
        await self._app(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        values = header_values(scope, b"authorization")
        scheme, _, key = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
        is_bearer = self._is_key(key.strip()) and scheme.lower() == b"bearer"
        values = header_values(scope, b"x-api-key")
        return self._is_key(values[0].strip() if len(values) == 1 else b"") or is_bearer

    def _is_key(self, key: bytes) -> bool:
        given = hashlib.sha256(key).digest()
        # All keys are compared, each in constant time: how long it takes tells nothing.
        matches = [hmac.compare_digest(digest, given) for digest in self._digests]
        return any(matches) and bool(key)
