"""What an engine core is working on, written where it outlives the core.

A file that one process writes and another reads once the writer is dead. Cheap enough to be kept up to date: a few
numbers when a request comes, and a few array operations for each step.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from engine_core.scheduler import InFlight

SIZE = 1 << 16
"""Bytes. What finds no room is left out."""
_HEADER = 3
"""int64: the request that is being taken in or 0, the number of rows computed, of requests compiled."""
_COLUMNS = 3
"""int64 of a row: the request, and the positions of it that are computed: the first, and one more than the last."""


@dataclass(frozen=True)
class LastWork:
    """What a core was doing when it ended. Requests are known by their indices."""

    adding: int = 0
    """Was just being taken in; 0: none."""
    computing: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Were in steps whose results were not there, and which positions of each: first, and one more than the last."""
    compiling: frozenset[int] = field(default_factory=frozenset)
    """Their grammars were being compiled."""

    @property
    def suspects(self) -> dict[int, tuple[int, int]]:
        """Any of them may have ended the core, while these positions of it were computed."""
        before = (-1, 0)
        if self.adding:
            return {self.adding: before}
        return dict.fromkeys(self.compiling, before) | self.computing


class FlightRecord:
    """The writer's side."""

    def __init__(self, path: str) -> None:
        """Creates the file."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.ftruncate(descriptor, SIZE)
            self._map = mmap.mmap(descriptor, SIZE)
        finally:
            os.close(descriptor)
        self._words = np.frombuffer(self._map, np.int64)

    def adding(self, index: int) -> None:
        """A request is about to be taken in; 0: that is over."""
        self._words[0] = index

    def computing(self, steps: Collection[InFlight]) -> None:
        """These steps are in flight. What is being compiled has to be said again."""
        num_rows = sum(len(step.indices) for step in steps)
        if _HEADER + num_rows * _COLUMNS > len(self._words):
            return
        begin = _HEADER
        for step in steps:
            end = begin + len(step.indices) * _COLUMNS
            rows = self._words[begin:end].reshape(-1, _COLUMNS)
            rows[:, 0] = step.indices
            rows[:, 1] = step.ends - step.counts
            rows[:, 2] = step.ends
            begin = end
        self._words[1] = num_rows

    def compiling(self, indices: Collection[int]) -> None:
        """The grammars of these requests are being compiled."""
        kept = list(indices)[: len(self._words) // 4]
        self._words[len(self._words) - len(kept) :] = kept
        self._words[2] = len(kept)


def read_flight_record(path: str) -> LastWork:
    """What a dead core left; nothing if it did not get as far as that."""
    try:
        with open(path, "rb") as file:
            words = np.frombuffer(file.read(SIZE), np.int64)
    except OSError:
        return LastWork()
    if len(words) < _HEADER:
        return LastWork()
    adding, num_rows, num_compiling = words[:_HEADER].tolist()
    computing: dict[int, tuple[int, int]] = {}
    for index, first, last in words[_HEADER : _HEADER + num_rows * _COLUMNS].reshape(-1, _COLUMNS).tolist():
        computing[index] = computing.get(index, (first, last))[0], last
    return LastWork(
        adding=adding,
        computing=computing,
        compiling=frozenset(words[len(words) - num_compiling :].tolist()),
    )
