"""Deaths are counted where they tell something, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine_core.flight_record import FlightRecord
from engine_core.in_flight import InFlight
from engine_core.last_work import COLUMNS, SIZE, LastWork, read_flight_record
from engine_core.restart import MAX_RESTARTS, RESTART_WINDOW, STABLE_TIME, RestartBudget, Suspicion, suspect


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_deaths_without_progress_end_it(clock: Clock) -> None:
    budget = RestartBudget(clock=clock)
    assert [budget.spend("died") for _ in range(MAX_RESTARTS + 1)] == [True] * MAX_RESTARTS + [False]


def test_progress_forgives_everything(clock: Clock) -> None:
    budget = RestartBudget(2, clock)
    for _ in range(100):
        assert budget.spend("died") and budget.spend("died")
        budget.progress()


def test_causes_are_counted_apart(clock: Clock) -> None:
    budget = RestartBudget(1, clock)
    assert budget.spend("died") and budget.spend("hung") and budget.spend("loading")
    assert not budget.spend("hung")


def test_service_is_progress_and_loading_is_over_with_it(clock: Clock) -> None:
    budget = RestartBudget(1, clock)
    for _ in range(3):
        assert budget.spend("loading")
        budget.serves()
    for _ in range(3):
        budget.serves()
        clock.now += STABLE_TIME
        assert budget.spend("died")
    budget.serves()
    clock.now += STABLE_TIME / 2
    assert not budget.spend("died")


def test_deaths_are_forgotten_in_time(clock: Clock) -> None:
    budget = RestartBudget(1, clock)
    for _ in range(3):
        assert budget.spend("died")
        clock.now += RESTART_WINDOW


def test_a_culprit_explains_deaths_unless_nothing_ever_worked(clock: Clock) -> None:
    budget = RestartBudget(1, clock)
    assert budget.spend("died")
    budget.explained()
    assert not budget.spend("died")
    budget.progress()
    for _ in range(3):
        assert budget.spend("died")
        budget.explained()


def test_suspicion_grows_at_one_place_only() -> None:
    suspicion = suspect(None, 10, 12)
    assert suspicion == Suspicion(1, 10, 12)
    suspicion = suspect(suspicion, 0, 11)
    assert suspicion == Suspicion(2, 10, 11)
    assert suspect(suspicion, 11, 13) == Suspicion(1, 11, 13)
    assert suspect(suspicion, 0, 10) == Suspicion(1, 0, 10)
    assert suspect(suspect(None, -1, 0), -1, 0) == Suspicion(2, -1, 0)


def step(number: int, rows: dict[int, tuple[int, int]]) -> InFlight:
    indices = np.array(list(rows), np.int64)
    ends = np.array([end for _, end in rows.values()], np.int64)
    counts = np.array([end - begin for begin, end in rows.values()], np.int64)
    empty = np.empty(0, np.int64)
    slots = np.arange(len(rows), dtype=np.int32)
    sampled = np.ones(len(rows), np.bool_)
    return InFlight(
        step_id=number,
        slots=slots,
        epochs=empty,
        indices=indices,
        counts=counts,
        begins=ends - counts,
        ends=ends,
        sampled=sampled,
        allowances=None,
        grammar_rows=empty,
        num_tokens=int(counts.sum()),
        num_attended=1,
        schedule_us=0.0,
    )


def test_a_record_tells_what_was_worked_on(tmp_path: Path) -> None:
    path = str(tmp_path / "record")
    assert read_flight_record(path) == LastWork()
    record = FlightRecord(path)
    assert read_flight_record(path) == LastWork()
    record.compiling([9, 8])
    record.computing([step(1, {5: (0, 16), 6: (3, 4)}), step(2, {5: (16, 20), 7: (0, 2)})])
    expected = LastWork(0, {5: (0, 20), 6: (3, 4), 7: (0, 2)}, frozenset({8, 9}))
    assert read_flight_record(path) == expected
    assert expected.suspects == {5: (0, 20), 6: (3, 4), 7: (0, 2), 8: (-1, 0), 9: (-1, 0)}
    record.adding(2**40)
    assert read_flight_record(path).suspects == {2**40: (-1, 0)}
    record.adding(0)
    record.also_compiling(10)
    assert read_flight_record(path).compiling == {8, 9, 10}
    record.computing([step(3, {7: (2, 3)})])
    record.compiling([])
    assert read_flight_record(path) == LastWork(0, {7: (2, 3)})


def test_a_record_that_is_full_or_damaged(tmp_path: Path) -> None:
    path = tmp_path / "record"
    record = FlightRecord(str(path))
    record.computing([step(1, dict.fromkeys(range(1, SIZE), (0, 1)))])
    record.compiling(range(1, SIZE))
    assert not read_flight_record(str(path)).computing
    record.compiling([7])
    most_rows = SIZE // (COLUMNS * 8)  # more never fit
    for num_rows in range(0, most_rows + 97, 97):
        record.computing([step(1, dict.fromkeys(range(1, num_rows + 1), (0, 1)))])
        assert read_flight_record(str(path)).compiling == {7}, "rows leave it its place"
    path.write_bytes(b"")
    assert read_flight_record(str(path)) == LastWork()
