"""Processes that share the tests of a run (``tests/turns.py``)."""

from __future__ import annotations

import fcntl
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.turns import Turns


@pytest.fixture
def processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Turns]]:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    turns = [Turns("run") for _ in range(4)]
    yield turns
    for each in turns:
        each.close()
    assert not list(tmp_path.iterdir())


def enter(turns: Turns, *, alone: bool, entered: list[bool]) -> threading.Thread:
    def run() -> None:
        with turns.take(alone=alone):
            entered.append(alone)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def wait_until_one_is_at_the_gate(turns: Turns) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            fcntl.flock(turns._files[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        fcntl.flock(turns._files[0], fcntl.LOCK_UN)
    raise AssertionError("nobody waits")


def test_who_is_alone_waits_for_the_others_and_goes_before_those_that_come_later(processes: list[Turns]) -> None:
    first, second, third, fourth = processes
    entered: list[bool] = []
    with first.take(alone=False):
        with second.take(alone=False):
            pass
        threads = [enter(third, alone=True, entered=entered)]
        wait_until_one_is_at_the_gate(second)
        threads.append(enter(fourth, alone=False, entered=entered))
        assert not entered
    for thread in threads:
        thread.join()
    assert entered == [True, False]


def test_a_process_that_has_the_run_to_itself_waits_for_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    turns = Turns(None)
    with turns.take(alone=True), turns.take(alone=False):
        assert not list(tmp_path.iterdir())
    turns.close()
