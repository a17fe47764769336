"""GET /health, /ping, /livez, /readyz, /startupz, /version, /load and /metrics."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from api.engine.metrics import CONTENT_TYPE
from api.generation.serving import Serving
from api.http.traffic import Traffic
from api.version import VERSION


class LoadResponse(msgspec.Struct, kw_only=True):
    server_load: int
    """Number of unfinished completions, running or waiting."""


class VersionResponse(msgspec.Struct, kw_only=True):
    version: str


async def health(request: Request) -> Response:
    """200 while requests are accepted, 503 when the engine is dead or the server is shutting down."""
    serving: Serving = request.app.state.serving
    traffic: Traffic = request.app.state.traffic
    if serving.is_dead or traffic.is_draining:
        return Response(status_code=503)
    return Response(status_code=200)


async def ping(request: Request) -> Response:
    """Alias of /health."""
    return await health(request)


async def livez(request: Request) -> Response:
    """200 while this process works, including engine restarts and draining; 503 when the engine is permanently dead."""
    serving: Serving = request.app.state.serving
    return _probe("the engine is dead" if serving.is_dead else "")


async def readyz(request: Request) -> Response:
    """200 while new requests run immediately; 503 during an engine restart or shutdown, or when the engine is dead."""
    serving: Serving = request.app.state.serving
    traffic: Traffic = request.app.state.traffic
    if serving.is_dead:
        return _probe("the engine is dead")
    if traffic.is_draining:
        return _probe("the server is shutting down")
    if serving.is_sleeping:
        return _probe("the server sleeps")
    return _probe("" if serving.is_ready else "the engine is restarting")


async def startupz(request: Request) -> Response:
    """200 once the model is loaded."""
    return _probe("")


def _probe(problem: str) -> Response:
    return PlainTextResponse(problem or "ok", 503 if problem else 200, {"Cache-Control": "no-store"})


async def version(request: Request) -> Response:
    """The server's version."""
    return Response(msgspec.json.encode(VersionResponse(version=VERSION)), media_type="application/json")


async def load(request: Request) -> Response:
    """The number of unfinished completions, running or waiting."""
    serving: Serving = request.app.state.serving
    answer = LoadResponse(server_load=serving.num_unfinished)
    return Response(msgspec.json.encode(answer), media_type="application/json")


async def metrics(request: Request) -> Response:
    """All metrics, in Prometheus text format."""
    serving: Serving = request.app.state.serving
    return Response(serving.default_model.metrics.render(), headers={"Content-Type": CONTENT_TYPE})
