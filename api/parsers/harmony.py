"""The messages of gpt-oss (OpenAI, Harmony response format): a turn is several, each with a channel.

``<|start|>assistant<|channel|>analysis<|message|>...<|end|>``: a message has a header and a body. ``analysis`` is
reasoning; ``final``, and ``commentary`` without a recipient, are for the user. A call is a message to its tool:
``<|channel|>commentary to=functions.f <|constrain|>json<|message|>{...}<|call|>``; the recipient may also follow the
role. The prompt ends with ``<|start|>assistant``.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

START: Final = "<|start|>"
CHANNEL: Final = "<|channel|>"
MESSAGE: Final = "<|message|>"
CONSTRAIN: Final = "<|constrain|>"
CALL: Final = "<|call|>"
ENDS: Final = ("<|end|>", "<|return|>", CALL)
"""Of messages. The server usually takes the last two for ends of the text and omits them."""
MARKS: Final = (START, CHANNEL, MESSAGE, CONSTRAIN, *ENDS)

MAX_HEADER: Final = 512
"""Characters. Longer headers are malformed, since a header is held back until it ends."""

_CHANNEL: Final = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT: Final = re.compile(r"\bto=([^\s<]+)")


class Header(msgspec.Struct, frozen=True):
    """What a message's header says."""

    channel: str
    """Empty: none."""
    recipient: str
    """The tool that is called; empty: none."""

    @classmethod
    def of(cls, text: str) -> Header:
        """Parses everything before the body."""
        channel, recipient = _CHANNEL.search(text), _RECIPIENT.search(text)
        return cls(channel[1] if channel else "", recipient[1] if recipient else "")

    @property
    def function(self) -> str:
        """The name of the tool that is called."""
        return self.recipient.removeprefix("functions.")

    @property
    def is_reasoning(self) -> bool:
        return self.channel == "analysis" and not self.recipient
