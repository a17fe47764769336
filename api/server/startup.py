"""Answers requests while the model loads: probes report progress, all other requests get 503."""

from __future__ import annotations

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from api.errors import KINDS, RequestError
from api.http.errors import error_response
from api.http.server_send import SERVER_SEND
from engine_core.messages import LoadProgress

PROBES = frozenset({"/health", "/ping", "/readyz", "/startupz"})
"""Paths answered with 503 and one line of text while the model loads; ``/livez`` is answered with 200."""


class StartupApp:
    """An ASGI application that forwards requests to the real one as soon as that exists.

    Attributes:
        app: The real application; None while the model loads.
    """

    def __init__(self, prefix: str = "") -> None:
        """Prepares.

        Args:
            prefix: Path prefix under which a proxy exposes this server. Requests may arrive with or without it.
        """
        self._prefix = prefix
        self.app: ASGIApp | None = None
        self._progress: LoadProgress | None = None

    def update(self, progress: LoadProgress) -> None:
        """Takes a progress report of a worker."""
        self._progress = progress

    @property
    def status(self) -> str:
        """The loading progress as text."""
        progress = self._progress
        if progress is None:
            return "starting"
        return f"loading {progress.stage}: {100 * progress.done // max(1, progress.total)} %"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
        elif self.app is not None:
            scope[SERVER_SEND] = send
            await self.app(scope, receive, send)
        else:
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(self._prefix)
        if path == "/livez" or path in PROBES:
            status = 200 if path == "/livez" else 503
            await PlainTextResponse(self.status, status, {"Cache-Control": "no-store"})(scope, receive, send)
            return
        error = RequestError(
            f"The model is not ready yet ({self.status}); try again soon.", status=503, kind=KINDS[503]
        )
        await error_response(error, scope)(scope, receive, send)


async def _live(receive: Receive, send: Send) -> None:
    """Acknowledges the ASGI lifespan events; there is nothing to do."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
