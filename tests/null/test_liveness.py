"""Who hangs, and who only has a slow machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest

from engine_core.step_times import (
    MIN_DEADLINE,
    NEW_WORKER_DEADLINE,
    NEW_WORKER_STEPS,
    SLOWER,
    UNKNOWN_DEADLINE,
    StepTimes,
)
from engine_core.worker_watch import LOAD_TIMEOUT, WorkerWatch
from executor.liveness import MAX_TICK, STOPPED_TIMEOUT, ProcessSample, ProcessWatch, sample_process


class Machine:
    """A clock and the processes that a test has."""

    def __init__(self) -> None:
        self.now = 0.0
        self.states: dict[int, str] = {}
        self.used: dict[int, float] = {}

    def clock(self) -> float:
        return self.now

    def sample(self, pid: int) -> ProcessSample | None:
        if pid not in self.states:
            return None
        return ProcessSample(self.states[pid], self.used.get(pid, 0.0))

    def watch(self, pid: int) -> ProcessWatch:
        return ProcessWatch(pid, self.clock, self.sample)

    def passes(self, seconds: float, used: float = 0.0) -> None:
        self.now += seconds
        for pid in self.states:
            self.used[pid] = self.used.get(pid, 0.0) + used


@pytest.mark.parametrize(
    ("state", "used", "waited"),
    [
        ("S", 0.0, 10.0),  # it sleeps although something is wanted of it
        ("R", 1.0, 10.0),  # an endless loop
        ("R", 0.3, 3.0),  # others have the processors
        ("D", 0.0, 0.0),  # a slow disk
        ("t", 0.0, 0.0),  # a debugger
        ("T", 0.0, 10.0),
    ],
)
def test_time_counts_as_far_as_a_process_could_have_used_it(state: str, used: float, waited: float) -> None:
    machine = Machine()
    machine.states[1] = state
    watch = machine.watch(1)
    for _ in range(10):
        machine.passes(1.0, used)
        watch.tick()
    assert watch.waited == pytest.approx(waited)
    assert watch.stopped == (10.0 if state == "T" else 0.0)
    watch.heard()
    assert watch.waited == 0.0


def test_a_watcher_that_stood_still_counts_one_tick() -> None:
    machine = Machine()
    machine.states[1] = "T"
    watch = machine.watch(1)
    machine.passes(60.0)
    watch.tick()
    assert watch.waited == watch.stopped == MAX_TICK
    machine.states[1] = "S"
    machine.passes(1.0)
    watch.tick()
    assert watch.stopped == 0.0


def test_a_process_that_is_gone_or_a_system_without_proc() -> None:
    machine = Machine()
    watch = machine.watch(1)
    machine.passes(1.0)
    watch.tick()
    assert watch.waited == 1.0 and watch.stopped == 0.0


def test_real_processes() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert child.stdin is not None
    try:
        deadline = time.monotonic() + 120
        os.kill(child.pid, signal.SIGSTOP)
        while (sample := sample_process(child.pid)) is not None and sample.state != "T":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert sample is not None
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
    assert sample_process(child.pid) is None
    own = sample_process(os.getpid())
    assert own is not None and own.state == "R" and own.processor_seconds > 0


# -- steps ----------------------------------------------------------------------------------------------------


def test_predictions_are_bounds_by_what_was_seen() -> None:
    times = StepTimes()
    assert times.predict(1, 1) is None
    times.add(1, 100, 0.02)
    assert times.predict(1, 50) == 0.02
    assert times.predict(512, 512 * 256) == pytest.approx(0.02 * 512 * 2.56)
    times.add(512, 512 * 256, 1.0)
    assert times.predict(512, 512 * 256) == 1.0
    assert times.predict(512, 512 * 512) == pytest.approx(2.0)
    assert times.predict(1, 100) == 0.02


def test_one_step_that_took_long_says_little() -> None:
    times = StepTimes()
    for _ in range(10):
        times.add(4, 400, 0.1)
    times.add(4, 400, 60.0)  # the machine slept
    assert times.predict(4, 400) == pytest.approx(0.19)
    for _ in range(10):
        times.add(4, 400, 0.1)
    assert times.predict(4, 400) == pytest.approx(0.1, rel=0.01)
    for _ in range(60):
        times.add(4, 400, 1.0)  # and now it is slower for good
    assert times.predict(4, 400) == pytest.approx(1.0, rel=0.1)


def test_deadlines() -> None:
    times = StepTimes()
    assert times.deadline(1, 1, 0) == UNKNOWN_DEADLINE
    times.add(1, 100, 0.02)
    assert times.deadline(1, 100, 0) == NEW_WORKER_DEADLINE
    assert times.deadline(1, 100, NEW_WORKER_STEPS) == MIN_DEADLINE
    times.add(512, 100_000, 4.0)
    assert times.deadline(512, 100_000, NEW_WORKER_STEPS) == SLOWER * 4.0


@dataclass
class Step:
    step_id: int
    num_tokens: int = 1
    num_attended: int = 100
    num_steps: int = 1


def watcher(machine: Machine, *pids: int) -> WorkerWatch:
    watch = WorkerWatch(machine.clock, machine.watch)
    for pid in pids:
        machine.states[pid] = "S"
    watch.started(pids)
    return watch


def seconds_until_hung(
    machine: Machine, watch: WorkerWatch, *steps: Step, is_loading: bool = False, used: float = 0.0
) -> tuple[float, str]:
    begin = machine.now
    for _ in range(2000):
        machine.passes(1.0, used)
        problem = watch.hung(steps, is_loading=is_loading)
        if problem is not None:
            assert problem.was_stopped == ("has been stopped" in problem.reason)
            return machine.now - begin, problem.reason
    return float("inf"), ""


def test_a_step_that_does_not_end() -> None:
    machine = Machine()
    watch = watcher(machine, 11, 12)
    for number in range(1, 5):
        watch.heard(0, number, 0.02)
        watch.step_done(Step(number))
    watch.heard(0, 6)
    watch.heard(1, 4)
    seconds, problem = seconds_until_hung(machine, watch, Step(5), Step(6))
    assert seconds == MIN_DEADLINE and "worker 1 (pid 12)" in problem and "10 s" in problem


def test_a_step_takes_as_long_as_its_slowest_stage() -> None:
    machine = Machine()
    watch = watcher(machine, 11, 12)
    for number in range(1, 5):
        watch.heard(0, number, 8.0)
        watch.heard(1, number, 0.02)
        watch.step_done(Step(number))
    watch.heard(1, 3, 99.0)  # late: the step is done
    assert watch.times.predict(Step(5).num_tokens, Step(5).num_attended) == pytest.approx(8.0)
    assert seconds_until_hung(machine, watch, Step(5))[0] == 80.0


def test_steps_in_a_row_take_as_long_as_one_after_another() -> None:
    machine = Machine()
    watch = watcher(machine, 11)
    for number in range(1, 5):
        watch.heard(0, number, 1.5)
        watch.step_done(Step(number, 32, 3200))
    assert seconds_until_hung(machine, watch, Step(5, 16, 1600, num_steps=16))[0] == 240.0
    watch.heard(0, 5, 16.0)
    watch.step_done(Step(5, 16, 1600, num_steps=16))
    assert watch.times.predict(1, 100) == 1.0


def test_a_worker_that_answers_in_time_is_left_alone() -> None:
    machine = Machine()
    watch = watcher(machine, 11)
    for number in range(1, 100):
        machine.passes(8.0)
        assert watch.hung([Step(number)], is_loading=False) is None
        watch.heard(0, number, 0.02)
        watch.step_done(Step(number))
    for _ in range(100):  # nothing is wanted of it
        machine.passes(1.0)
        assert watch.hung([], is_loading=False) is None


def test_a_worker_that_is_stopped_is_found_whatever_it_does() -> None:
    for steps, is_loading in (((Step(1),), False), ((), False), ((), True)):
        machine = Machine()
        watch = watcher(machine, 11)
        machine.states[11] = "T"
        seconds, problem = seconds_until_hung(machine, watch, *steps, is_loading=is_loading)
        assert seconds == STOPPED_TIMEOUT and "has been stopped" in problem


def test_loading_takes_as_long_as_something_is_done() -> None:
    machine = Machine()
    watch = watcher(machine, 11)
    assert seconds_until_hung(machine, watch, is_loading=True, used=0.01)[0] == float("inf")
    machine.states[11] = "D"
    assert seconds_until_hung(machine, watch, is_loading=True)[0] == float("inf")
    machine.states[11] = "S"
    seconds, problem = seconds_until_hung(machine, watch, is_loading=True)
    assert seconds == LOAD_TIMEOUT and "while it loaded" in problem


def test_workers_may_wait_for_one_that_loads_slowly() -> None:
    machine = Machine()
    watch = watcher(machine, 11, 12)
    for _ in range(2 * int(LOAD_TIMEOUT)):
        machine.passes(1.0)
        watch.heard(1)
        assert watch.hung((), is_loading=True) is None
    assert "while it loaded" in seconds_until_hung(machine, watch, is_loading=True)[1]


def test_an_executor_without_processes_is_not_watched() -> None:
    machine = Machine()
    watch = watcher(machine)
    watch.heard(0, 1)
    assert watch.interval is None
    assert seconds_until_hung(machine, watch, Step(1)) == (float("inf"), "")
