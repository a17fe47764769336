"""What stands between the socket and the endpoints: request scope, keys, draining."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import re
import secrets
import socket
import time
from collections.abc import Iterable, Mapping

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.admission import release_memory
from api.config import ServerConfig
from api.errors import KINDS, RequestError
from api.http.errors import error_response
from api.http.tenants import short_name
from api.http.traffic import CLIENT_GONE, NO_HANDLER, Traffic
from engine_core.launch import get_logger

logger = get_logger()

LARGE_BODY = 1 << 20
"""Bytes of a body after which memory is given back to the system."""

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


class AllowedHosts:
    """Answers only requests for a name that is known to mean this server.

    A page whose own name is made to resolve to a loopback address (DNS rebinding) is no stranger to the browser, which
    lets it read every answer. Its name in ``Host`` gives it away. Addresses are no names, so they pass; so does a
    request without the header, which no browser sends.
    """

    def __init__(self, app: ASGIApp, names: Iterable[str]) -> None:
        """Prepares. ``names`` are those that are allowed, without ports."""
        self._app = app
        self._names = frozenset(map(_host_name, names))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            for value in header_values(scope, b"host"):
                if not self._is_allowed(value.decode("latin-1")):
                    await error_response(self._refusal(value.decode("latin-1")), scope)(scope, receive, send)
                    return
        await self._app(scope, receive, send)

    def _is_allowed(self, host: str) -> bool:
        name = _host_name(host)
        if name in self._names or name.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    @staticmethod
    def _refusal(host: str) -> RequestError:
        name = _host_name(host)[:128]
        return RequestError(
            f"this server does not answer to the name {name!r} in the request's Host header; if it should, start it "
            f"with --allowed-hosts {name} (or with '*' for any name)",
            status=403,
            kind=KINDS[403],
        )


def _host_name(host: str) -> str:
    """The name in a Host header, or on the command line: without port, brackets and the dot of the root."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    name, _, port = host.rpartition(":")
    if not name or not port.isdecimal() or ":" in name:
        name = host.removesuffix(":")
    return name.removesuffix(".").lower()


def allowed_hosts(config: ServerConfig) -> list[str] | None:
    """The names to which a server answers; None: any.

    By default that is any, unless everybody who reaches it may use it and that should be this machine alone.
    """
    is_private = not config.api_key and config.uds is None and _is_loopback(config.host)
    if "*" in config.allowed_hosts or not (is_private or config.allowed_hosts):
        return None
    return ["localhost", "host.docker.internal", config.host, *config.allowed_hosts]


def _is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address to listen on."""
    if not host:
        return False  # all addresses
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return all(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found)


class UnderPrefix:
    """Serves every path also under a prefix, for proxies that do not take it off."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self._app = app
        self._prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["root_path"] = self._prefix  # routes match without it
        await self._app(scope, receive, send)


class Guard:
    """Stands before an endpoint: only clients with a key come in, and none while the server drains."""

    def __init__(self, app: ASGIApp, traffic: Traffic, keys: Iterable[str], *, drains: bool = True) -> None:
        """Prepares. Without ``drains`` it lets clients with a key in while the server drains."""
        self._app = app
        self._traffic = traffic
        self._drains = drains
        self._digests = {hashlib.sha256(key.encode()).digest(): short_name(key) for key in keys}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._digests:
            name = self._find_key(scope)
            if name is None:
                raise RequestError(
                    "a valid API key is needed: Authorization: Bearer KEY, or x-api-key: KEY",
                    status=401,
                    kind=KINDS[401],
                )
            scope["state"]["key_name"] = name
        if self._drains and self._traffic.is_draining:
            raise RequestError(
                "The server is shutting down.", status=503, kind=KINDS[503], headers={"Connection": "close"}
            )
        await self._app(scope, receive, send)

    def _find_key(self, scope: Scope) -> str | None:
        """The short name of the key that a request has; None if it has no valid one."""
        values = header_values(scope, b"authorization")
        scheme, _, key = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
        bearer = self._name_of(key.strip()) if scheme.lower() == b"bearer" else None
        values = header_values(scope, b"x-api-key")
        return self._name_of(values[0].strip() if len(values) == 1 else b"") or bearer

    def _name_of(self, key: bytes) -> str | None:
        given = hashlib.sha256(key).digest()
        # All keys are compared, each in constant time: how long it takes tells nothing.
        matches = [name for digest, name in self._digests.items() if hmac.compare_digest(digest, given)]
        return matches[0] if matches and key else None


class WhileConnected:
    """Ends the work on a request whose client is gone, whatever it is at.

    From the end of the body on somebody listens for the end of the connection. An answer that waits for it is told;
    before there is one, the request's task is cancelled.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection = _Connection(receive)
        try:
            await self._app(scope, connection.receive, send)
        except asyncio.CancelledError:
            if not connection.is_lost:
                raise
            raise ClientDisconnect from None
        finally:
            connection.close()
            if connection.size > LARGE_BODY:
                # What was made of it is many times as large, and the C library would keep it.
                asyncio.get_running_loop().run_in_executor(None, release_memory)


class _Connection:
    """The receiving side of a request, watched from the end of its body on."""

    def __init__(self, receive: Receive) -> None:
        self.is_lost = False
        """The client is gone, and the request's task was cancelled for that."""
        self.size = 0
        """Bytes of the body so far."""
        self._receive = receive
        self._task: asyncio.Task[object] | None = asyncio.current_task()
        self._watcher: asyncio.Task[Message] | None = None
        self._num_waiting = 0

    async def receive(self) -> Message:
        if self._watcher is None:
            message = await self._receive()
            self.size += len(message.get("body", b""))
            if message["type"] == "http.request" and not message.get("more_body", False):
                self._watcher = asyncio.create_task(self._watch())
            return message
        self._num_waiting += 1
        try:
            return await asyncio.shield(self._watcher)
        finally:
            self._num_waiting -= 1

    async def _watch(self) -> Message:
        while (message := await self._receive())["type"] != "http.disconnect":
            pass
        if not self._num_waiting:
            self.is_lost = True
            assert self._task is not None
            self._task.cancel()
        return message

    def close(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
        # A task keeps the frames in which it was cancelled. Without a way back from them to the task nothing goes round
        # in a circle, and nothing is left for the garbage collector, which stops the whole server while it runs.
        self._watcher = self._task = None
