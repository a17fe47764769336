"""Ids of tool calls."""

from __future__ import annotations

import secrets
import string

_ALPHANUMERIC = string.ascii_letters + string.digits


def new_id() -> str:
    """An id as OpenAI's are."""
    return f"call_{secrets.token_hex(12)}"


def new_short_id() -> str:
    """Nine letters and digits: chat templates of Mistral accept no others when a call comes back in a conversation."""
    return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))
