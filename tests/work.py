"""How much something does, counted instead of timed: the same on any machine under any load."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


class TooMuchWorkError(AssertionError):
    """More calls than allowed."""


def count_calls(function: Callable[[], Any], most: int = sys.maxsize) -> int:
    """Calls of functions, Python's and C's, that this thread makes while ``function`` runs.

    Raises:
        TooMuchWorkError: There are more than ``most``; the rest was not done.
    """
    count = 0

    def note(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        if event in ("call", "c_call"):
            count += 1
            if count > most:
                sys.setprofile(None)
                raise TooMuchWorkError(f"more than {most} calls")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(before)
    return count
