"""Turns of the processes that share the tests of one run (pytest-xdist): a test that is marked ``alone`` runs while no
other does, as it needs all cores or counts on answers in time."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_RUN = os.environ.pop("PYTEST_XDIST_TESTRUNUID", None)
"""Identifies the run in all of its processes. Taken away, since a run of pytest inside a test has turns of its own."""


class Turns:
    """The turns of this process; without effect where it has the run to itself."""

    def __init__(self, run: str | None = _RUN) -> None:
        folder = Path(tempfile.gettempdir())
        self._paths = [folder / f"octavo-tests-{run}-{name}" for name in ("gate", "room")] if run else []
        self._files = [path.open("w") for path in self._paths]  # not inherited by children

    @contextmanager
    def take(self, *, alone: bool) -> Iterator[None]:
        """Waits for a turn. All pass the gate, so nobody enters the room while a test waits to have it alone."""
        if not self._files:
            yield
            return
        gate, room = self._files
        fcntl.flock(gate, fcntl.LOCK_EX)
        try:
            fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        finally:
            fcntl.flock(gate, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(room, fcntl.LOCK_UN)

    def close(self) -> None:
        for file, path in zip(self._files, self._paths, strict=True):
            file.close()
            with suppress(FileNotFoundError):  # another process ended first
                path.unlink()
        self._files, self._paths = [], []
