"""Limits on the cost of a request, checked before any work, and far above what honest clients need.

One event loop serves all streams, so clients must not control how long anything on it takes. What a client sends is
either limited in size (the limits are here, and errors name them), processed elsewhere, or processed in pieces that
yield to the loop.
"""

from __future__ import annotations

import asyncio
import ctypes
import ctypes.util
import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

from api.errors import RequestError

T = TypeVar("T")
_LIBC = ctypes.CDLL("libc.so.6") if sys.platform == "linux" and ctypes.util.find_library("c") == "libc.so.6" else None

MAX_JSON_VALUES = 1 << 19
"""Weight of a body's JSON, roughly its number of values: decoding takes about 30 ms without a break."""
MAX_MESSAGES = 16384
"""Messages or items in a conversation."""
MAX_TOOLS = 1024
MAX_TEXT_CHARS = 4 << 20
"""Characters in a text that is tokenised even if it does not fit the model."""
MAX_OFFSET_CHARS = 1 << 20
"""Characters in a text with token offsets, even if it does not fit the model; freeing offsets is slow."""
TURN = 1 << 15
"""Token ids, or equally cheap steps, to process before yielding to other tasks."""

PIECE = 1 << 16
"""Bytes of JSON to weigh at a time."""
_VALUE, _KEY, _CONTAINER, _STRING = 1.0, 2.0, 4.0, 1.0
_ESCAPE, _SPACE = 0.25, 1 / 16
_EXPONENT, _DIGIT, _TEXT = 128.0, 0.5, 1 / 128
"""Weights by decoding time and memory; 1 is an integer in a list."""
_NUMBER = 16
"""Characters of a number that are free."""
_WHITE = b" \t\r\n"


class JsonMeter:
    """Weighs JSON as it arrives, so that its decoding cost is known before it is decoded.

    Text is cheap, however long; structure, escapes, long numbers and white space are not. Strings are recognised up to
    the first syntax error, where decoding stops as well.
    """

    def __init__(self, max_weight: float = MAX_JSON_VALUES) -> None:
        """Args:
        max_weight: Maximum accepted weight.
        """
        self._plain_weight = 0.0
        self._num_exponents = 0
        self._max_weight = max_weight
        self._in_string = False
        self._tail = b""
        """A trailing backslash whose escaped character has not arrived yet."""

    @property
    def weight(self) -> float:
        """Weight of everything so far."""
        return self._plain_weight + _EXPONENT * max(0, self._num_exponents)

    def feed(self, chunk: bytes) -> None:
        """Feeds the next chunk, of any size.

        Raises:
            RequestError: 413: the weight exceeds the maximum.
        """
        for begin in range(0, len(chunk), PIECE):
            self._weigh(chunk[begin : begin + PIECE])
            if self.weight > self._max_weight:
                raise RequestError(
                    f"the JSON body exceeds the limit of {int(self._max_weight)} values per request; "
                    "split it into smaller requests",
                    "body",
                    status=413,
                    kind="Request Entity Too Large",
                )

    def _weigh(self, piece: bytes) -> None:
        data = self._tail + piece
        num_slashes = len(data) - len(data.rstrip(b"\\"))
        self._tail = b"\\" if num_slashes % 2 else b""
        if num_slashes % 2:
            data = data[:-1]
        if b"\\" in data:
            size = len(data)
            data = data.replace(b"\\\\", b"")
            data = data.replace(b'\\"', b"")
            # The remaining backslashes begin other escapes.
            self._plain_weight += _ESCAPE * ((size - len(data)) / 2 + data.count(b"\\"))
        parts = data.split(b'"')
        outside = b"".join(parts[self._in_string :: 2])
        num_quotes = len(parts) - 1
        self._in_string ^= num_quotes % 2 == 1
        self._plain_weight += _STRING * num_quotes / 2 + _TEXT * (len(data) - len(outside))
        if not outside:
            return
        num_white = len(outside) - len(outside.translate(None, _WHITE))
        num_items, num_keys = outside.count(b","), outside.count(b":")
        num_containers = outside.count(b"[") + outside.count(b"{")
        self._plain_weight += _VALUE * num_items + _KEY * num_keys + _CONTAINER * num_containers + _SPACE * num_white
        num_long = len(outside) - num_white - _NUMBER * (1 + num_items + num_keys + num_containers)
        self._plain_weight += _DIGIT * max(0, num_long)
        # Apart from exponents, true and false have an e each.
        num_letters = outside.count(b"e") + outside.count(b"E")
        self._num_exponents += num_letters - outside.count(b"t") - outside.count(b"f")


def check_number(number: int, most: int, field: str, what: str) -> None:
    """Checks a count against its limit.

    Raises:
        RequestError: The count exceeds the limit; the error names the field.
    """
    if number > most:
        raise RequestError(f"{field} may contain at most {most} {what}, got {number}", field)


class Turns:
    """Counts a task's work on the event loop and yields to others when the budget is spent."""

    def __init__(self, budget: int = TURN) -> None:
        """Starts with a budget in token ids, or equally cheap steps."""
        self._budget = self._left = budget

    async def spend(self, cost: int) -> None:
        """Records work; yields if the budget is spent."""
        self._left -= cost
        if self._left <= 0:
            self._left = self._budget
            await asyncio.sleep(0)


def release_memory() -> None:
    """Returns freed memory to the system, where the C library supports it; releases the GIL."""
    if _LIBC is not None:
        _LIBC.malloc_trim(0)


def pieces(items: Sequence[T], size: int = TURN) -> Iterator[Sequence[T]]:
    """Splits a sequence into pieces of at most ``size``."""
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]
