"""Endpoints that say what a test of the pages wants."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from api.server.web_routes import WebPages

MODEL = "demo"
HOSTILE = "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script>"


def card(name: str = MODEL, **more: Any) -> dict[str, Any]:
    """A model, as /v1/models describes it."""
    return {"id": name, "max_model_len": 4096, "parent": None, **more}


class Script:
    """Endpoints that say what a test wants, beside the pages, in a thread."""

    def __init__(self) -> None:
        self.deltas: list[dict[str, Any]] = []
        self.then_waits = False
        self._may_end = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.num_left = 0
        """Answers whose clients went before the end."""
        self.status = 200
        self.models: list[dict[str, Any]] = [card()]
        self.metrics = ""
        self.requests: list[dict[str, Any]] = []
        listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        pages = [Route(row.path, row.handler, methods=[row.method]) for row in WebPages().operations()]
        routes = [
            *pages,
            Route("/v1/models", self._list_models),
            Route("/metrics", self._show_metrics),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
        ]
        app = Starlette(routes=[Mount("/behind/a/proxy", routes=routes), *routes])
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()
        deadline = time.monotonic() + 60
        while not self._server.started:
            assert time.monotonic() < deadline, "the server does not start"
            time.sleep(0.01)

    def reset(self) -> None:
        """Goes back to one model and one answer."""
        self.says("Hello ", "**world**.")
        self.models, self.metrics = [card()], ""
        self.requests.clear()

    def says(self, *texts: str, then_waits: bool = False) -> None:
        """The next answers, in pieces; with ``then_waits`` they end after ``go_on``."""
        self.deltas = [{"content": text} for text in texts]
        self.then_waits, self.status = then_waits, 200

    def go_on(self) -> None:
        """Lets the answers that wait end."""
        assert self._loop is not None, "nothing was asked yet"
        waited_for, self._may_end = self._may_end, asyncio.Event()
        self._loop.call_soon_threadsafe(waited_for.set)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()

    async def _list_models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": self.models})

    async def _show_metrics(self, request: Request) -> Response:
        return Response(self.metrics, media_type="text/plain")

    async def _chat(self, request: Request) -> Response:
        self.requests.append(await request.json())
        if self.status != 200:
            error = {"message": f"no <b>{HOSTILE}</b>", "type": "x", "param": None, "code": self.status}
            return JSONResponse({"error": error}, self.status)
        return StreamingResponse(self._events(), media_type="text/event-stream")

    async def _events(self) -> AsyncIterator[str]:
        then_waits, may_end = self.then_waits, self._may_end
        self._loop = asyncio.get_running_loop()
        yield self._event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        for delta in self.deltas:
            if "error" in delta:
                yield self._event(delta)
                return
            yield self._event({"choices": [{"index": 0, "delta": delta}]})
        try:
            if then_waits:
                await may_end.wait()
        except asyncio.CancelledError:
            self.num_left += 1
            raise
        reason = "tool_calls" if any("tool_calls" in delta for delta in self.deltas) else "stop"
        yield self._event({"choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": reason}]})
        usage = {"prompt_tokens": 7, "completion_tokens": len(self.deltas) + 1, "total_tokens": 9}
        yield self._event({"choices": [], "usage": usage})
        yield "data: [DONE]\n\n"

    def _event(self, value: Any) -> str:
        return f": comment\r\ndata: {json.dumps(value)}\r\n\r\n"
