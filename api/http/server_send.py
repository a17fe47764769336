"""The HTTP server's own ways to send, for parts of answers that need not pass through the middleware.

Middleware acts on the heads of answers alone, so the parts of a started stream, thousands a second, bypass it.
"""

from __future__ import annotations

from typing import Protocol

SERVER_SEND = "octavo.send"
"""Key of the scope: the server's ``send``."""
PART_WRITER = "octavo.writer"
"""Key of the scope: a ``PartWriter``, if the server has one."""


class PartWriter(Protocol):
    """Writes parts of a started answer without a message and a coroutine for each."""

    @property
    def is_ready(self) -> bool:
        """Whether a part can be written now. If not, ``SERVER_SEND`` waits until it can, or finds out why it cannot."""

    def write(self, data: bytes) -> None:
        """Writes a part that is not empty and not the last. Called only if ``is_ready``."""
