"""How much something does, counted instead of timed: the same on any machine under any load."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


class TooMuchWorkError(AssertionError):
    """More calls than allowed."""


def _run(function: Callable[[], Any], note: Callable[[FrameType, str, object], None]) -> None:
    """Runs a function with a profiler, and restores the previous one."""
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(before)


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

    _run(function, note)
    return count


def count_characters(function: Callable[[], Any]) -> int:
    """Characters that functions get while ``function`` runs: texts as arguments of Python's, or as the object of a
    method of ``str``. Of a text with a position ``pos``, those from there on; of a text that the same function gets
    several times in a row, only those of the first call, and one for each further call.

    Unlike the number of calls, this shows that a growing text is searched or copied with each piece that it gets.
    """
    count = 0
    last: dict[object, str] = {}

    def add(key: object, text: str, begin: int) -> None:
        nonlocal count
        count += 1 if last.get(key) is text else max(1, len(text) - begin)
        last[key] = text

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            names, values = frame.f_code.co_varnames[: frame.f_code.co_argcount], frame.f_locals
            for name in names:
                if type(text := values[name]) is str:
                    add((frame.f_code, name), text, values["pos"] if "pos" in names else 0)
        elif event == "c_call" and type(text := getattr(argument, "__self__", None)) is str:
            add(getattr(argument, "__name__", ""), text, 0)

    _run(function, note)
    return count
