"""Ids of tool calls."""

from __future__ import annotations

import secrets
import string

_ALPHANUMERIC = string.ascii_letters + string.digits


def new_id() -> str:
    """An id in OpenAI's format."""
    return f"call_{secrets.token_hex(12)}"


def new_short_id() -> str:
    """An id of nine letters and digits, the only format that Mistral's chat templates accept in a conversation."""
    return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))
