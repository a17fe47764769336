"""What a request may cost: bounds that are checked before the work, and that honest clients do not meet.

One event loop serves all streams, so nothing on it may take as long as a client likes. What a client sends is either
small by a bound that is named here and in the error, or worked off elsewhere, or in pieces with turns of the loop
between them.
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
"""Weight of the JSON of a body, about the number of its values: decoding it takes some 30 ms, in one piece."""
MAX_MESSAGES = 16384
"""Messages or items of a conversation."""
MAX_TOOLS = 1024
MAX_TEXT_CHARS = 4 << 20
"""Characters of a text that is tokenised although it need not fit the model."""
MAX_OFFSET_CHARS = 1 << 20
"""Characters of a text whose tokens are found in it, although it need not fit the model; freeing them takes long."""
TURN = 1 << 15
"""Token ids, or steps that cost as little, that are worked off before others get their turn."""

PIECE = 1 << 16
"""Bytes of JSON that are weighed at a time."""
_VALUE, _KEY, _CONTAINER, _STRING = 1.0, 2.0, 4.0, 1.0
_ESCAPE, _SPACE = 0.25, 1 / 16
_EXPONENT, _DIGIT, _TEXT = 128.0, 0.5, 1 / 128
"""Weights, by the time and memory that decoding takes: 1 is an integer in a list."""
_NUMBER = 16
"""Characters of a number that are not weighed."""
_WHITE = b" \t\r\n"


class JsonMeter:
    """Weighs JSON while it comes in: what it will cost to decode is known before it is decoded.

    Text counts little, however long; structure, escapes, long numbers and white space count. Strings are told from the
    rest up to the first error of syntax, where decoding stops as well.
    """

    def __init__(self, max_weight: float = MAX_JSON_VALUES) -> None:
        """Begins.

        Args:
            max_weight: Most that is accepted.
        """
        self._plain_weight = 0.0
        self._num_exponents = 0
        self._max_weight = max_weight
        self._in_string = False
        self._tail = b""
        """A backslash whose character has not come yet."""

    @property
    def weight(self) -> float:
        """Of all that came so far."""
        return self._plain_weight + _EXPONENT * max(0, self._num_exponents)

    def feed(self, chunk: bytes) -> None:
        """Takes the next bytes, of any number.

        Raises:
            RequestError: 413: it is more than is accepted.
        """
        for begin in range(0, len(chunk), PIECE):
            self._weigh(chunk[begin : begin + PIECE])
            if self.weight > self._max_weight:
                raise RequestError(
                    f"the body has more JSON than the {int(self._max_weight)} values that one request may have; "
                    "send several smaller requests",
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
            # What is left of backslashes begins other escapes.
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
    """Refuses more of something than one request may bring.

    Raises:
        RequestError: It names the field.
    """
    if number > most:
        raise RequestError(f"{field} may hold at most {most} {what}, got {number}", field)


class Turns:
    """Counts what a task does on the event loop, and gives others their turn when it is enough."""

    def __init__(self, budget: int = TURN) -> None:
        """Begins a turn of so many token ids, or of steps that cost as little."""
        self._budget = self._left = budget

    async def spend(self, cost: int) -> None:
        """Takes note of work that was done."""
        self._left -= cost
        if self._left <= 0:
            self._left = self._budget
            await asyncio.sleep(0)


def release_memory() -> None:
    """Gives memory that was freed back to the system, where the C library can; the interpreter's lock is released."""
    if _LIBC is not None:
        _LIBC.malloc_trim(0)


def pieces(items: Sequence[T], size: int = TURN) -> Iterator[Sequence[T]]:
    """A sequence in pieces of at most ``size``."""
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]
