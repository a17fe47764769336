"""A record of an engine core's current work that outlives the core.

A file that the core writes and another process reads after the core's death (``last_work.py``). It is cheap to keep up
to date: a few numbers per request and a few array operations per step.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from engine_core.last_work import COLUMNS, HEADER, MAX_COMPILING, SIZE

if TYPE_CHECKING:
    from engine_core.in_flight import InFlight


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
        """Records the request being accepted; 0: done."""
        self._words[0] = index

    def computing(self, steps: Collection[InFlight]) -> None:
        """Records the steps in flight."""
        num_rows = sum(len(step.indices) for step in steps)
        if HEADER + num_rows * COLUMNS > len(self._words) - MAX_COMPILING:
            self._words[1] = 0
            return
        begin = HEADER
        for step in steps:
            end = begin + len(step.indices) * COLUMNS
            rows = self._words[begin:end].reshape(-1, COLUMNS)
            rows[:, 0] = step.indices
            rows[:, 1] = step.begins
            rows[:, 2] = step.ends
            begin = end
        self._words[1] = num_rows

    def compiling(self, indices: Collection[int]) -> None:
        """Records the requests whose grammars are being compiled."""
        kept = list(indices)[MAX_COMPILING - 1 :: -1]
        self._words[len(self._words) - len(kept) :] = kept
        self._words[2] = len(kept)

    def also_compiling(self, index: int) -> None:
        """Adds a request whose grammar is about to be compiled."""
        count = int(self._words[2])
        if count < MAX_COMPILING:
            self._words[len(self._words) - count - 1] = index
            self._words[2] = count + 1
