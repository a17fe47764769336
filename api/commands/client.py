"""A small blocking client for OpenAI-compatible servers, over TCP, TLS or a Unix socket."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

DEFAULT_URL = "http://127.0.0.1:8000"
CONNECT_TIMEOUT = 10.0
"""Seconds to connect, and for responses that are not streamed. Streams have no timeout: the server may be loading or
restarting its engine, and the user can press Ctrl-C."""


class ServerError(Exception):
    """A server is unreachable, rejected a request or dropped the connection; the message is for the user."""

    def __init__(self, message: str, code: str | None = None) -> None:
        """Args:
        message: For the user.
        code: The ``code`` of an OpenAI error, if it is a name.
        """
        super().__init__(message)
        self.code = code

    @property
    def is_context_full(self) -> bool:
        """Whether the conversation is too long for the model. Other servers say so only in the message."""
        return self.code == "context_length_exceeded" or "context length" in str(self)


class NoServerError(ServerError):
    """No API server listens at the address."""


class NotReadyError(ServerError):
    """The server is still loading its model, or shutting down (status 503)."""


class LostConnectionError(ServerError):
    """The connection closed before the answer was complete."""


@dataclass(frozen=True)
class ServedModel:
    """One entry of ``/v1/models``."""

    name: str
    root: str
    """What the server loaded, if reported: a hub id or a path."""
    max_model_len: int | None
    """Maximum context in tokens, if reported."""


class Client:
    """A client for one server. Every request uses a new connection."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        """Does not connect yet.

        Args:
            url: Such as ``http://127.0.0.1:8000``, with or without ``/v1``, or ``unix:PATH`` for a Unix socket.
            api_key: Sent as a bearer token.

        Raises:
            ServerError: The URL is invalid.
        """
        self.url = url if "//" in url or url.startswith("unix:") else f"http://{url}"
        self._socket_path = self.url.removeprefix("unix:") if self.url.startswith("unix:") else None
        parts = urlsplit("http://localhost" if self._socket_path else self.url)
        try:
            self._host, self._port = parts.hostname or "", parts.port
        except ValueError:
            self._host = ""
        if parts.scheme not in ("http", "https") or not self._host:
            raise ServerError(f"--url {url}: expected a URL such as {DEFAULT_URL} or unix:/path/to/socket")
        self._is_tls = parts.scheme == "https"
        path = parts.path.rstrip("/")
        self._path = path if path.endswith("/v1") else f"{path}/v1"
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def models(self) -> list[ServedModel]:
        """The server's models, at least one.

        Raises:
            NoServerError: Nothing listens there, or it is not an API server.
            NotReadyError: The server is still loading.
            ServerError: The request was refused.
        """
        connection = self._connect()
        try:
            response = self._request(connection, "GET", f"{self._path}/models", None)
            if response.status in (404, 405):
                raise NoServerError(f"the server at {self.url} is not OpenAI-compatible")
            _check(response)
            return _read_models(response.read())
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
            raise NoServerError(f"the server at {self.url} is not OpenAI-compatible") from error
        finally:
            connection.close()

    def startup(self) -> str:
        """The startup progress that a server reports; empty if none."""
        try:
            connection = self._connect()
        except NoServerError:
            return ""
        try:
            response = self._request(connection, "GET", f"{self._path.removesuffix('/v1')}/startupz", None)
            is_text = response.getheader("Content-Type", "").startswith("text/plain")
            return response.read(200).decode("utf-8", "replace") if response.status == 503 and is_text else ""
        except (OSError, http.client.HTTPException):
            return ""
        finally:
            connection.close()

    def stream(self, path: str, body: dict[str, Any]) -> Generator[dict[str, Any]]:
        """Sends a request and yields the events of its stream. Closing the iterator aborts the request.

        Args:
            path: Below ``/v1``, such as ``/chat/completions``.
            body: The request; ``stream`` is added.

        Raises:
            NoServerError: Nothing listens there.
            LostConnectionError: The stream was cut off.
            ServerError: The server rejected the request, or reported an error in the stream.
        """
        connection = self._connect()
        try:
            connection.sock.settimeout(None)
            response = self._request(connection, "POST", self._path + path, {**body, "stream": True})
            with contextlib.closing(response):  # it keeps a connection that the server is to close
                _check(response)
                yield from _events(response)
        except (OSError, http.client.HTTPException) as error:
            raise LostConnectionError(f"the connection to the server was lost ({_reason(error)})") from error
        finally:
            connection.close()

    def _connect(self) -> http.client.HTTPConnection:
        if self._socket_path is not None:
            connection: http.client.HTTPConnection = _UnixConnection(self._socket_path)
        else:
            kind = http.client.HTTPSConnection if self._is_tls else http.client.HTTPConnection
            connection = kind(self._host, self._port, timeout=CONNECT_TIMEOUT)
        try:
            connection.connect()
        except OSError as error:
            raise NoServerError(f"no server at {self.url}: {_reason(error)}") from error
        return connection

    def _request(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: dict[str, Any] | None
    ) -> http.client.HTTPResponse:
        data = None if body is None else json.dumps(body).encode()
        connection.request(method, path, data, self._headers)
        return connection.getresponse()


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=CONNECT_TIMEOUT)
        self._socket_path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._socket_path)


def _read_models(content: bytes) -> list[ServedModel]:
    models = []
    for entry in json.loads(content)["data"]:
        length = entry.get("max_model_len")
        root = entry.get("root")
        models.append(
            ServedModel(str(entry["id"]), str(root or entry["id"]), length if isinstance(length, int) else None)
        )
    if not models:
        raise ValueError("no models")
    return models


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The events of an event stream, up to ``[DONE]``."""
    for line in response:
        field, _, value = line.strip().partition(b":")
        if field != b"data":
            continue  # a comment that keeps the connection alive, or the end of an event
        value = value.strip()
        if value == b"[DONE]":
            return
        try:
            event = json.loads(value)
        except ValueError:
            raise ServerError("the server sent an event that is not JSON") from None
        if not isinstance(event, dict):
            raise ServerError("the server sent an event that is not a JSON object")
        if event.get("error"):
            raise ServerError(_message(event) or "the server reported an error without a message", _code(event))
        yield event
    raise LostConnectionError("the connection to the server was lost")


def _check(response: http.client.HTTPResponse) -> None:
    if response.status >= 300:
        try:
            body = json.loads(response.read(1 << 16))
        except (ValueError, RecursionError):
            body = None
        hint = "; give the server's key with --api-key" if response.status == 401 else ""
        kind = NotReadyError if response.status == 503 else ServerError
        raise kind(f"{_message(body) or response.reason} (status {response.status}{hint})", _code(body))


def _message(body: Any) -> str | None:
    """The message of an OpenAI error, on one line."""
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return " ".join(message.split()) if isinstance(message, str) else None


def _code(body: Any) -> str | None:
    error = body.get("error") if isinstance(body, dict) else None
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, str) else None


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
