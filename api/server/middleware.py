"""Middleware between socket and endpoints: request scope, keys, draining."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import random
import re
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
"""Body size in bytes above which memory is returned to the system."""

_LABEL = re.compile(rb"[!-~]{1,128}")
"""Accepted values of X-Request-Id, which becomes part of ids and log lines."""

_IDS = random.Random()  # seeded by the system; ids are unique, not secret


def header_values(scope: Scope, name: bytes) -> list[bytes]:
    return [value for key, value in scope["headers"] if key == name]


class RequestScope:
    """Gives each request an id, counts it, and handles uncaught exceptions.

    An exception after the answer has started propagates to the server, which closes the connection.
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
            app: The wrapped application.
            traffic: Counts requests.
            handler_names: Labels of endpoint functions.
            echo_ids: Return the id as X-Request-Id.
            log_requests: Log a line per request.
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
            pass  # nobody is left to answer
        except Exception as error:
            logger.exception("request %s failed", request_id)
            if status:
                raise
            await error_response(error, scope)(scope, receive, send_counted)
        finally:
            seconds = time.monotonic() - begin
            handler = self._handler_names.get(scope.get("endpoint"), NO_HANDLER)
            self._traffic.end(handler, scope["method"], status or CLIENT_GONE, seconds)
            if self._log_requests:  # the loop writes the answer at the end of this turn, and this line in the next
                asyncio.get_running_loop().call_soon(
                    logger.info,
                    "%s %s %d %.3fs %s",
                    scope["method"],
                    handler,
                    status or CLIENT_GONE,
                    seconds,
                    request_id,
                )


def _request_id(scope: Scope) -> str:
    values = header_values(scope, b"x-request-id")
    if len(values) == 1 and _LABEL.fullmatch(values[0]):
        return values[0].decode("ascii")
    return f"{_IDS.getrandbits(128):032x}"


class AllowedHosts:
    """Accepts only requests for a known name of this server.

    A page whose own name resolves to a loopback address (DNS rebinding) has the server's origin to the browser, which
    lets it read every answer. Its name in ``Host`` gives it away. IP addresses pass, and so do requests without the
    header, which browsers always send.
    """

    def __init__(self, app: ASGIApp, names: Iterable[str]) -> None:
        """``names`` are the allowed names, without ports."""
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
            f"the host name {name!r} in the Host header is not allowed; to allow it, start the server with "
            f"--allowed-hosts {name} (or '*' for any name)",
            status=403,
            kind=KINDS[403],
        )


def _host_name(host: str) -> str:
    """A host name without port, brackets and the trailing dot."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    name, _, port = host.rpartition(":")
    if not name or not port.isdecimal() or ":" in name:
        name = host.removesuffix(":")
    return name.removesuffix(".").lower()


def allowed_hosts(config: ServerConfig) -> list[str] | None:
    """The host names that a server answers to; None: any.

    The default is any name, except for a server without keys that listens only on the loopback interface: it answers
    to its local names.
    """
    is_private = not config.api_key and config.uds is None and _is_loopback(config.host)
    if "*" in config.allowed_hosts or not (is_private or config.allowed_hosts):
        return None
    return ["localhost", "host.docker.internal", config.host, *config.allowed_hosts]


def _is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address to listen on."""
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
    """Serves every path under a prefix as well, for proxies that do not strip it."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self._app = app
        self._prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["root_path"] = self._prefix  # routes match without the prefix
        await self._app(scope, receive, send)


class Guard:
    """Guards an endpoint: only clients with a key may enter, and none while the server drains."""

    def __init__(self, app: ASGIApp, traffic: Traffic, keys: Iterable[str], *, drains: bool = True) -> None:
        """Without ``drains``, clients with a key may also enter while the server drains."""
        self._app = app
        self._traffic = traffic
        self._drains = drains
        self._digests = {hashlib.sha256(key.encode()).digest(): short_name(key) for key in keys}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._digests:
            name = self._find_key(scope)
            if name is None:
                raise RequestError(
                    "missing or invalid API key; send Authorization: Bearer KEY or x-api-key: KEY",
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
        """The short name of a request's key; None without a valid one."""
        values = header_values(scope, b"authorization")
        scheme, _, key = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
        bearer = self._name_of(key.strip()) if scheme.lower() == b"bearer" else None
        values = header_values(scope, b"x-api-key")
        return self._name_of(values[0].strip() if len(values) == 1 else b"") or bearer

    def _name_of(self, key: bytes) -> str | None:
        given = hashlib.sha256(key).digest()
        # Compares all keys, each in constant time, so that timing reveals nothing.
        matches = [name for digest, name in self._digests.items() if hmac.compare_digest(digest, given)]
        return matches[0] if matches and key else None


class WhileConnected:
    """Stops all work on a request whose client has disconnected.

    Listens for the disconnect from the end of the body on. An answer that waits for it is notified; before there is
    one, the request's task is cancelled.
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
                # The decoded body is many times as large, and the C library would keep the memory.
                asyncio.get_running_loop().run_in_executor(None, release_memory)


class _Connection:
    """The receiving side of a request, watched for disconnects from the end of its body on."""

    def __init__(self, receive: Receive) -> None:
        self.is_lost = False
        """Whether the request's task was cancelled because the client has disconnected."""
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
        # A task keeps the frames in which it was cancelled. Without a reference from them to the task there is no
        # cycle, and no work for the garbage collector, which stops the whole server while it runs.
        self._watcher = self._task = None
