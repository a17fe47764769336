"""Helper processes: what exceeds a limit ends, says which, and harms no other call."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from functools import partial
from pathlib import Path

import pytest

from executor.helper import Helper, HelperError, HelperLimits, JobError

ROOT = Path(__file__).resolve().parents[2]
NAMES = (
    *("echo", "remember", "recall", "pid", "refuse", "fail", "spin", "sleep", "wait"),
    *("allocate", "keep_allocating", "answer", "recurse", "die", "die_once"),
)
JOBS = {name: f"tests.helper_jobs:{name}" for name in NAMES}
LIMITS = HelperLimits(
    cpu_seconds=0.5, deadline=20, memory_bytes=64 << 20, stack_bytes=1 << 20, max_output_bytes=1 << 20
)


@pytest.fixture
def helper() -> Iterator[Helper]:
    helper = Helper("octavo test helper", JOBS, LIMITS)
    yield helper
    helper.close()
    assert not helper.pids


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except OSError:
        return False
    return state != b"Z"


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 120
    while is_alive(pid):
        assert time.monotonic() < deadline, "the process lives on"
        time.sleep(0.01)


def test_nothing_runs_before_the_first_call(helper: Helper) -> None:
    assert helper.pids == []
    assert helper.call("echo", b"a" * 1_000_000) == b"a" * 1_000_000
    (pid,) = helper.pids
    assert helper.call("pid", b"") == str(pid).encode(), "one process serves many calls"


@pytest.mark.parametrize(
    ("job", "data", "limit"),
    [
        ("spin", b"", "CPU time"),
        ("allocate", b"3000000000", "memory"),
        ("keep_allocating", b"", "memory"),
        ("recurse", b"", "stack"),
        ("answer", b"2000000", "output"),
        ("fail", b"x", "crash"),
        ("die", b"SIGABRT", "crash"),
        ("die", b"SIGSEGV", "stack"),
    ],
)
def test_a_limit_ends_its_call_only(helper: Helper, job: str, data: bytes, limit: str) -> None:
    assert helper.call("echo", b"before") == b"before"
    with pytest.raises(HelperError) as caught:
        helper.call(job, data)
    assert caught.value.limit == limit and caught.value.is_fault_of_data
    assert helper.call("echo", b"after") == b"after"
    assert len(helper.pids) == 1


def test_wall_time_ends_a_call_that_takes_no_cpu_time(helper: Helper) -> None:
    limits = HelperLimits(deadline=0.3)
    with pytest.raises(HelperError, match=r"more than 0\.3 s") as caught:
        helper.submit("sleep", b"60", limits=limits).result()
    assert caught.value.limit == "time"
    assert helper.call("sleep", b"0") == b"slept"


def test_what_a_job_refuses_is_told_and_costs_no_process(helper: Helper) -> None:
    pid = helper.call("pid", b"")
    with pytest.raises(JobError, match="^is wrong: indeed$"):
        helper.call("refuse", b"indeed")
    assert helper.call("pid", b"") == pid
    assert helper.call("allocate", b"1000") == b"1000"


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV", "SIGABRT"])
def test_a_call_survives_the_death_of_its_process(helper: Helper, tmp_path: Path, name: str) -> None:
    assert helper.call("die_once", f"{tmp_path}/{name}|{name}".encode()) == b"alive"


def test_a_call_survives_a_process_that_is_stopped(helper: Helper) -> None:
    limits = HelperLimits(deadline=1)
    pid = int(helper.call("pid", b""))
    os.kill(pid, signal.SIGSTOP)
    assert helper.submit("echo", b"x", limits=limits).result() == b"x"
    assert helper.pids != [pid] and not is_alive(pid)


def test_a_process_that_is_killed_between_calls_is_replaced(helper: Helper) -> None:
    pid = int(helper.call("pid", b""))
    os.kill(pid, signal.SIGKILL)
    wait_for_end(pid)
    assert int(helper.call("pid", b"")) != pid


def test_every_process_is_prepared(helper: Helper) -> None:
    helper.prepare("remember", b"vocabulary" * 100_000)
    assert helper.call("recall", b"") == b"vocabulary" * 100_000
    with pytest.raises(HelperError):
        helper.call("die", b"SIGKILL")
    assert helper.call("recall", b"") == b"vocabulary" * 100_000


def test_memory_that_a_call_left_behind_is_given_back(helper: Helper) -> None:
    helper.prepare("remember", b"")
    pid = helper.call("pid", b"")
    limits = HelperLimits(memory_bytes=256 << 20)
    helper.submit("remember", b"x" * (60 << 20), limits=limits).result()
    assert helper.call("pid", b"") != pid


def test_callers_take_turns(helper: Helper) -> None:
    """One whose calls run into limits waits behind those whose calls do not."""
    done: list[str] = []

    def note(kind: str, _: Future[bytes]) -> None:
        done.append(kind)

    hostile = [helper.submit("spin", b"", owner="hostile") for _ in range(3)]
    ordinary = [helper.submit("echo", b"", owner=f"user {number}") for number in range(20)]
    for number, future in enumerate((*hostile, *ordinary)):
        future.add_done_callback(partial(note, "hostile" if number < 3 else "ordinary"))
    assert [future.result() for future in ordinary] == [b""] * 20
    assert done.count("hostile") <= 1
    assert all(isinstance(future.exception(), HelperError) for future in hostile)


def test_who_was_away_is_owed_nothing(helper: Helper, tmp_path: Path) -> None:
    """Neither what others used meanwhile, nor what they used when nobody else was there."""
    helper.submit("sleep", b"0.3", owner="early").result()
    helper.call("echo", b"", owner="early")
    late = [helper.submit("wait", str(tmp_path / "go").encode(), owner="late")]
    late += [helper.submit("sleep", b"0.05", owner="late") for _ in range(4)]
    early = helper.submit("echo", b"", owner="early")
    (tmp_path / "go").touch()
    is_early_first: list[bool] = []
    late[-1].add_done_callback(lambda _: is_early_first.append(early.done()))
    early.result()
    late[-1].result()
    assert is_early_first == [True]


def test_the_queue_is_bounded_in_calls_bytes_and_time(tmp_path: Path) -> None:
    helper = Helper("octavo test helper", JOBS, LIMITS, max_waiting=3, max_waiting_bytes=1000)
    try:
        first = helper.submit("wait", str(tmp_path / "go").encode())
        while not first.running():
            time.sleep(0.001)
        helper.submit("echo", b"x" * 900)
        with pytest.raises(HelperError, match="try again later") as caught:
            helper.submit("echo", b"x" * 200)
        assert caught.value.limit == "queue" and not caught.value.is_fault_of_data
        dropped = helper.submit("die", b"SIGKILL")
        late = helper.submit("echo", b"", patience=0.0)
        with pytest.raises(HelperError):
            helper.submit("echo", b"")
        assert dropped.cancel()
        (tmp_path / "go").touch()
        with pytest.raises(HelperError, match="it waited for more than"):
            late.result()
        with pytest.raises(CancelledError):
            dropped.result()
    finally:
        helper.close()


def test_two_processes_do_not_wait_for_each_other() -> None:
    helper = Helper("octavo test helper", JOBS, LIMITS, num_processes=2)
    try:
        slow = helper.submit("sleep", b"15")
        assert helper.call("echo", b"quick") == b"quick"
        assert not slow.done() and len(helper.pids) == 2
    finally:
        helper.close()
    with pytest.raises(HelperError, match="shut down"):
        slow.result()
    with pytest.raises(HelperError, match="shut down"):
        helper.submit("echo", b"")


async def test_an_event_loop_goes_on_meanwhile(helper: Helper, tmp_path: Path) -> None:
    running = asyncio.wrap_future(helper.submit("wait", str(tmp_path / "go").encode()))
    for _ in range(10):
        await asyncio.sleep(0)
    (tmp_path / "go").touch()
    assert await running == b"waited"


def test_it_does_not_outlive_its_parent() -> None:
    code = (
        "from executor.helper import Helper; import tests.null.test_helper as t\n"
        "helper = Helper('octavo test helper', t.JOBS, t.HelperLimits(cpu_seconds=60, deadline=60))\n"
        "print(helper.call('pid', b'').decode(), flush=True)\n"
        "helper.call('spin', b'')"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    with contextlib.closing(parent.stdout or open(os.devnull, "rb")) as output:
        pid = int(output.readline())
    parent.kill()
    parent.wait()
    wait_for_end(pid)


def test_a_job_that_cannot_be_loaded_is_no_fault_of_its_data() -> None:
    helper = Helper("octavo test helper", {"missing": "tests.helper_jobs:nothing"}, LIMITS)
    try:
        with pytest.raises(HelperError) as caught:
            helper.call("missing", b"")
        assert caught.value.limit == "crash"
    finally:
        helper.close()
