"""Fixtures of the tests of endpoints."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.fakes import FakeServer

Post = Callable[..., Any]


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


class LoopClock:
    """The clock of the running event loop, which a test moves on: timers that have become due then go off.

    It also runs by itself, so let spans be far longer than a test takes.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._ahead = 0.0
        loop = asyncio.get_running_loop()
        real = loop.time
        monkeypatch.setattr(loop, "time", lambda: real() + self._ahead)

    def advance(self, seconds: float) -> None:
        self._ahead += seconds


@pytest.fixture
async def clock(monkeypatch: pytest.MonkeyPatch) -> LoopClock:
    return LoopClock(monkeypatch)


class Api:
    """A client of one application."""

    def __init__(self, server: FakeServer) -> None:
        self.server = server
        self._client = httpx.AsyncClient(transport=httpx.ASGITransport(app=server.app), base_url="http://localhost")

    async def get(self, path: str, **kwargs: Any) -> httpx.Response:
        return await self._client.get(path, **kwargs)

    async def post(self, path: str, body: Any = None, **kwargs: Any) -> httpx.Response:
        return await self._client.post(path, json=body, **kwargs)

    async def raw(
        self, path: str, content: bytes, content_type: str | None = "application/json", **kwargs: Any
    ) -> httpx.Response:
        headers = {} if content_type is None else {"content-type": content_type}
        return await self._client.post(path, content=content, headers=headers, **kwargs)

    async def ok(self, path: str, body: Any) -> Any:
        """The answer, which must be a good one."""
        response = await self.post(path, body)
        assert response.status_code == 200, response.text
        return response.json()

    async def chat(self, content: str = "hi", **fields: Any) -> Any:
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 8, **fields}
        return await self.ok("/v1/chat/completions", body)

    async def complete(self, prompt: Any = "hello", **fields: Any) -> Any:
        return await self.ok("/v1/completions", {"prompt": prompt, "max_tokens": 8, **fields})

    async def stream(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The events of a stream but the last, which must be [DONE]."""
        response = await self.post(path, {**body, "stream": True})
        assert response.status_code == 200, response.text
        return events(response.text)

    async def error(self, path: str, body: Any, status: int = 400) -> Any:
        """The error object of a request that must fail."""
        response = await self.post(path, body)
        return error_of(response, status)


def events(text: str) -> list[Any]:
    """What a text/event-stream says, which must end as it should."""
    lines = [line for line in text.split("\n\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[len("data: ") :]) for line in lines[:-1]]


def error_of(response: httpx.Response, status: int) -> Any:
    """The error object of an answer, whose shape is checked."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    is_too_long = "maximum context length" in error["message"] and error["param"] == "input_tokens"
    assert error["code"] == ("context_length_exceeded" if is_too_long else status)
    assert error["message"] and len(error["message"]) < 1100
    return error


@pytest.fixture
def api(server: FakeServer) -> Api:
    return Api(server)
