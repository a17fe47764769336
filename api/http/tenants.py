"""The tenant of a request: its API key and user, as pseudonyms.

Tenants take turns in the engine and have shares of its queue. A tenant is a pair of short hashes, keyed with a secret
of this process, so that neither keys nor user names leave it.
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
"""Significant characters of a user's name."""
_SECRET = secrets.token_bytes(16)


def short_name(text: str) -> str:
    """A short name for a key or a user; an empty one stays empty."""
    if not text:
        return ""
    data = text[:MAX_USER_CHARS].encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, key=_SECRET, digest_size=8).hexdigest()


def enter_queue(request: Request, model: ServedModel, user: str | None, count: int = 1) -> Tenant:
    """The tenant of a request, which is rejected here, before any work, if the queue is full.

    Args:
        request: The request; a guard has checked its key.
        model: The model with the queue.
        user: The user named in the request.
        count: Number of engine requests that it will become.

    Raises:
        RequestError: 429: the queue is full.
    """
    tenant = (key_name(request.scope), short_name(user or ""))
    model.client.check_queue(tenant, count)
    return tenant


def key_name(scope: Scope) -> str:
    """The short name of a request's key; empty if the server has no keys."""
    name: str = scope["state"].get("key_name", "")
    return name


class QueueGate:
    """Guards an endpoint whose requests queue: rejects them unread while the queue has no room for their key."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        serving: Serving = scope["app"].state.serving
        serving.check_key(key_name(scope))
        await self._app(scope, receive, send)
