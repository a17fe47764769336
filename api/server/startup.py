"""What answers while the model loads: probes tell how far it is, everything else is told to come back."""

from __future__ import annotations

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from api.errors import KINDS, RequestError
from api.http.errors import error_response
from engine_core.messages import LoadProgress

PROBES = frozenset({"/health", "/ping", "/readyz", "/startupz"})
"""Answered 503 in one line while the model loads; ``/livez`` is answered 200."""


class StartupApp:
    """Stands where the application will be.

    Attributes:
        app: The application, once there is one; from then on it gets every request.
    """

    def __init__(self, prefix: str = "") -> None:
        """Waits for the application.

        Args:
            prefix: Path under which a proxy shows this server; requests may come with it or without.
        """
        self._prefix = prefix
        self.app: ASGIApp | None = None
        self._progress: LoadProgress | None = None

    def update(self, progress: LoadProgress) -> None:
        """Takes what a worker says."""
        self._progress = progress

    @property
    def status(self) -> str:
        """How far it is, for people."""
        progress = self._progress
        if progress is None:
            return "starting"
        return f"loading {progress.stage}: {100 * progress.done // max(1, progress.total)} %"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
        elif self.app is not None:
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
    """The server's own start and end: there is nothing to be done."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
