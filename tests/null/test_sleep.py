"""Sleep: nothing is computed, memory is free, and requests go on where they were."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from engine_core.messages import Shutdown, SleepRequest, UtilityOutput, WakeUpRequest, WorkersRestarted
from executor.base import WorkerDiedError
from executor.messages import WorkerFailed
from tests.null.core_harness import GROUPS, Harness, expected, prompts


def answers(harness: Harness) -> dict[int, str | None]:
    return {message.call_id: message.error for message in harness.messages(UtilityOutput)}


def busy(**options: Any) -> Harness:
    """An engine with four requests under way."""
    harness = Harness(**options)
    for index, prompt in enumerate(prompts(4)):
        harness.add(index, prompt, 20)
    harness.turns(7)
    return harness


def check_outputs(harness: Harness) -> None:
    harness.run_to_the_end()
    for index, prompt in enumerate(prompts(4)):
        assert harness.outputs[index] == expected(prompt, 20)


@pytest.mark.parametrize("keeps_kv", [False, True])
@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("kept_bytes", [0, 100])
def test_requests_wait_while_the_engine_sleeps_and_then_go_on(level: int, keeps_kv: bool, kept_bytes: int) -> None:
    harness = Harness()
    harness.executor.kept_bytes, harness.executor.fingerprint = kept_bytes, "same" if kept_bytes else ""
    for index, prompt in enumerate(prompts(3)):
        harness.add(index, prompt, 20)
    harness.turns(7)
    harness.inbox.append(SleepRequest(1, level, keeps_kv))
    harness.run()
    assert answers(harness) == {1: None}
    assert harness.executor.is_up == (level == 1) and not harness.core.in_flight
    before = dict(harness.outputs)
    harness.add(3, prompts(4)[3], 20)
    harness.run()
    assert harness.outputs == before
    harness.inbox.append(WakeUpRequest(2))
    check_outputs(harness)
    assert answers(harness) == {1: None, 2: None}
    assert not harness.messages(WorkersRestarted)
    assert harness.executor.lives == level


def test_sleep_may_wait_for_those_who_run() -> None:
    harness = busy(max_num_seqs=2)
    harness.inbox.append(SleepRequest(1, 2, finishes=True))
    harness.run()
    assert answers(harness) == {1: None} and not harness.executor.is_up
    assert {0, 1} <= set(harness.reasons) and 3 not in harness.reasons
    harness.inbox.append(WakeUpRequest(2))
    check_outputs(harness)


def test_deeper_sleep_and_calls_that_change_nothing() -> None:
    harness = busy()
    harness.inbox.append(WakeUpRequest(1))
    harness.inbox.append(SleepRequest(2, 1))
    harness.inbox.append(SleepRequest(3, 1))
    harness.run()
    assert answers(harness) == {1: None, 2: None, 3: "the engine is falling asleep already"}
    harness.inbox += [SleepRequest(4, 1), SleepRequest(5, 2)]
    harness.run()
    assert not harness.executor.is_up
    harness.inbox += [SleepRequest(6, 1), WakeUpRequest(7), SleepRequest(8), WakeUpRequest(9)]
    check_outputs(harness)
    told = answers(harness)
    assert [told[call] for call in (4, 5, 6, 7, 9)] == [None] * 5 and "waking up" in str(told[8])


def test_workers_that_cannot_be_loaded_again_leave_the_engine_asleep() -> None:
    harness = busy()
    harness.inbox.append(SleepRequest(1, 2))
    harness.run()
    harness.executor.loads_by_itself = False
    harness.executor.inbox.append([WorkerFailed(0, "no such weights", 78)])
    harness.inbox.append(WakeUpRequest(2))
    harness.run()
    assert answers(harness) == {1: None, 2: "no such weights"} and harness.core.exit_code is None
    harness.executor.loads_by_itself = True
    harness.inbox.append(WakeUpRequest(3))
    check_outputs(harness)


def test_weights_of_other_shapes_leave_the_engine_asleep() -> None:
    harness = busy()
    harness.inbox.append(SleepRequest(1, 2))
    harness.run()
    groups, harness.executor.groups = harness.executor.groups, (replace(GROUPS[0], block_size=8),)
    harness.inbox.append(WakeUpRequest(2))
    harness.run()
    assert "other shapes" in str(answers(harness)[2]) and not harness.executor.is_up
    harness.executor.groups = groups
    harness.inbox.append(WakeUpRequest(3))
    check_outputs(harness)


@pytest.mark.parametrize("level", [1, 2])
def test_a_worker_that_dies_around_sleep_is_replaced(level: int) -> None:
    harness = busy()
    harness.inbox.append(SleepRequest(1, level))
    harness.run()
    if level == 1:
        harness.executor.inbox.append(WorkerDiedError("worker 0 ended with exit code -9"))
        harness.run()
        assert harness.executor.lives == 2
    harness.inbox.append(WakeUpRequest(2))
    if level == 2:
        harness.turns(1)
        harness.executor.inbox.clear()
        harness.executor.inbox.append(WorkerDiedError("worker 0 ended with exit code -9"))
    check_outputs(harness)
    assert answers(harness) == {1: None, 2: None}


def test_what_is_kept_is_forgotten_if_the_weights_are_others() -> None:
    harness = busy()
    harness.executor.kept_bytes, harness.executor.fingerprint = 100, "old"
    harness.core._restart_workers(WorkerDiedError("killed"))
    harness.turns(6)
    harness.inbox.append(SleepRequest(1, 2, keeps_kv=True))
    harness.run()
    scheduler = harness.core._scheduler
    assert scheduler is not None and any(request.num_kept_tokens for request in scheduler.waiting)
    harness.executor.fingerprint = "new"
    harness.inbox.append(WakeUpRequest(2))
    harness.turns(4)
    assert not any(request.num_kept_tokens for request in scheduler.waiting)
    check_outputs(harness)


@pytest.mark.parametrize(
    ("death", "keeps_cache"),
    [
        (WorkerDiedError("killed", -9), True),
        (WorkerDiedError("crashed", -11), False),
        (WorkerDiedError("machine 1 is gone", loses_memory=True), False),
    ],
)
def test_the_api_is_told_whether_the_cache_outlived_the_workers(death: WorkerDiedError, keeps_cache: bool) -> None:
    harness = busy()
    harness.executor.kept_bytes, harness.executor.fingerprint = 100, "same"
    for error in (WorkerDiedError("killed", -9), death, WorkerDiedError("killed", -9)):  # the first ones kept nothing
        harness.core._restart_workers(error)
        harness.turns(6)
    check_outputs(harness)
    assert [each.keeps_cache for each in harness.messages(WorkersRestarted)] == [False, keeps_cache, True]


def test_a_sleeping_engine_ends_when_it_is_told_to() -> None:
    harness = busy()
    harness.inbox.append(SleepRequest(1, 2))
    harness.run()
    harness.inbox.append(Shutdown(drain=True))
    harness.turns(1)
    assert harness.core.exit_code == 0
