"""When a team of threads leaves one out, in times that the test makes up, and on which cores its threads begin."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from ops.cpu.build import FLAGS, SOURCES, find_compiler

SHIM = """
#include "cores.h"
#include "team_size.h"
octavo::TeamSize size;
extern "C" {
void begin() { size = octavo::TeamSize(); }
int next(int most, double now) { return size.next(most, now, 1); }
void saw(double now, double wall, double stolen, double asleep) { size.saw(now, wall, stolen, asleep); }
int take(int* cores, int count) {
    octavo::Cores places(count);
    for (int i = 0; i < count; ++i) cores[i] = places.take(i);
    return 0;
}
void saw_rest(double now, double wall) { size.saw_rest(now, wall); }
}
"""
TOGETHER, APART, PAUSE = 0.0011, 0.002, 0.0024
"""Seconds of a call by both threads, of one by a single thread, and between two calls."""


@dataclass
class Machine:
    """Two threads that run a short call again and again."""

    library: ctypes.CDLL
    now: float = 1000.0

    def call(self, stolen: float = 0.0) -> int:
        """Runs a call, of which another program steals some seconds from a thread. Returns the threads that ran it."""
        threads = self.library.next(2, ctypes.c_double(self.now))
        wall = TOGETHER + stolen if threads == 2 else APART
        self.now += wall
        if threads == 2:
            self.library.saw(*map(ctypes.c_double, (self.now, wall, stolen, stolen)))
        else:
            self.library.saw_rest(ctypes.c_double(self.now), ctypes.c_double(wall))
        self.now += PAUSE
        return int(threads)

    def calls(self, count: int, stolen: float = 0.0) -> list[int]:
        return [self.call(stolen) for _ in range(count)]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder: Path = tmp_path_factory.mktemp("team")
    (folder / "shim.cpp").write_text(SHIM)
    flags = [flag for flag in FLAGS if flag not in ("-O3", "-fvisibility=hidden")]
    command = [find_compiler(), *flags, f"-I{SOURCES}", "-shared", "-o", str(folder / "shim.so"), "shim.cpp"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "shim.so"))


@pytest.fixture
def machine(library: ctypes.CDLL) -> Machine:
    library.begin()
    return Machine(library)


def test_a_program_now_and_then_costs_no_thread(machine: Machine) -> None:
    for _ in range(50):
        machine.call(stolen=0.004)
        assert machine.calls(10) == [2] * 10


def test_a_program_that_stays_costs_one(machine: Machine) -> None:
    machine.calls(20)
    threads = machine.calls(3000, stolen=0.004)
    assert threads[:2] == [2, 2] and threads.count(2) < 20, "two calls show it, then few try again"
    rests = [len(rest) for rest in "".join(map(str, threads)).split("2") if rest]
    assert rests[0] < 15 and rests[-2] > 300, "each longer than the one before, up to a bound"


def test_a_thread_that_is_back_stays(machine: Machine) -> None:
    machine.calls(20)
    machine.calls(1000, stolen=0.004)
    threads = machine.calls(1000)
    assert threads[500:] == [2] * 500
    machine.calls(2, stolen=0.004)
    rest = machine.calls(1000)
    assert rest.count(1) < 20, "the next rest is short again"


def test_a_thread_stays_if_calls_take_longer_without_it(machine: Machine) -> None:
    threads = machine.calls(1000, stolen=0.0006)
    assert threads.count(1) < 20, "it was tried"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say which core a thread is on")
def test_threads_begin_on_cores_of_their_own(library: ctypes.CDLL) -> None:
    """All of them are this one, which begins where it was before unless it moves."""
    allowed = os.sched_getaffinity(0)
    cores = (ctypes.c_int * (len(allowed) + 1))()
    library.take(cores, len(cores))
    assert {*cores[: len(allowed)]} == allowed, "each moved to a free core"
    assert os.sched_getaffinity(0) == allowed, "and may go on anywhere"
    try:
        os.sched_setaffinity(0, {cores[0]})
        library.take(cores, 2)
        assert cores[0] == cores[1], "there is no other core"
    finally:
        os.sched_setaffinity(0, allowed)
