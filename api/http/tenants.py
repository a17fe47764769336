"""Who a request is for: its API key and the user whom it names, told apart without being known.

Tenants take turns in the engine and have shares of its queue. A tenant is a pair of short hashes, with a secret of this
process, so that neither keys nor names of users leave it.
"""

from __future__ import annotations

import hashlib
import secrets

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from api.engine.queue_bound import Tenant
from api.generation.served_model import ServedModel
from api.generation.serving import Serving

MAX_USER_CHARS = 1024
"""Of a user's name, what counts."""
_SECRET = secrets.token_bytes(16)


def short_name(text: str) -> str:
    """A short name for a key or a user; the empty text is its own."""
    if not text:
        return ""
    data = text[:MAX_USER_CHARS].encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, key=_SECRET, digest_size=8).hexdigest()


def enter_queue(request: Request, model: ServedModel, user: str | None, count: int = 1) -> Tenant:
    """Who a request is for; it is refused here if the queue has no room, before anything is done for it.

    Args:
        request: A guard has looked at its key.
        model: Whose queue it is.
        user: Whom it names.
        count: Engine requests that it will become.

    Raises:
        RequestError: 429.
    """
    tenant = (key_name(request.scope), short_name(user or ""))
    model.client.check_queue(tenant, count)
    return tenant


def key_name(scope: Scope) -> str:
    """The short name of the key that a request came with; empty if there are none."""
    name: str = scope["state"].get("key_name", "")
    return name


class QueueGate:
    """Stands before an endpoint whose requests queue: refuses them unread as long as there is no room for their key."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        serving: Serving = scope["app"].state.serving
        serving.check_key(key_name(scope))
        await self._app(scope, receive, send)
