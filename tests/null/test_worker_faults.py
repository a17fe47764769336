"""Workers die and hang: requests go on, and the one that is to blame is found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_core.config import EngineConfig
from engine_core.flight_record import FlightRecord
from engine_core.last_work import LastWork, read_flight_record
from engine_core.messages import (
    AbortRequests,
    EngineCoreOutputs,
    EngineDead,
    EngineReady,
    FinishReason,
    GrammarSpec,
    Ping,
    Suspicion,
    WorkersLost,
    WorkersRestarted,
    i32,
)
from engine_core.restart import ISOLATE_DEATHS, MAX_DEATHS
from engine_core.structured.compiler import GrammarCompiler
from engine_core.worker_watch import Hang, WorkerWatch
from executor.base import WorkerDiedError
from executor.messages import (
    EXIT_MODEL,
    FromWorker,
    KVCacheReady,
    SchedulerOutput,
    WorkerFailed,
)
from tests.null.core_harness import (
    PROMPT,
    VOCAB,
    FakeExecutor,
    Harness,
    expected,
    make_request,
    prompts,
    worker_ready,
)

# -- faults ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exit_code", [1, EXIT_MODEL])
def test_a_worker_that_cannot_load_is_fatal(exit_code: int) -> None:
    harness = Harness()
    harness.executor.inbox.clear()
    harness.executor.inbox.append([WorkerFailed(0, "no such weights", exit_code)])
    harness.run()
    (dead,) = harness.messages(EngineDead)
    assert dead.message == "no such weights" and dead.exit_code == harness.core.exit_code == exit_code


def test_after_a_fatal_failure_nothing_is_submitted() -> None:
    harness = Harness()
    harness.add(0)
    harness.turns(5)
    harness.executor.inbox.append([WorkerFailed(0, "the model is gone", EXIT_MODEL)])
    harness.executor.hung_up = True
    harness.core.step()
    assert harness.core.exit_code == EXIT_MODEL


@pytest.mark.parametrize("moment", [0, 1])
@pytest.mark.parametrize("num_deaths", [1, 3])
def test_a_worker_that_dies_while_it_loads_is_started_again(moment: int, num_deaths: int) -> None:
    harness = Harness()
    harness.add(0)
    for _ in range(num_deaths):
        harness.turns(moment)
        harness.executor.inbox.clear()
        harness.executor.inbox.append(WorkerDiedError("worker 0 ended with exit code -9"))
        harness.core.step()
    harness.run_to_the_end()
    assert harness.executor.lives == 1 + num_deaths
    # To the api the model was loaded once, and took longer.
    assert len(harness.messages(EngineReady)) == 1 and not harness.messages(WorkersRestarted)
    assert harness.outputs[0] == expected()


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("moment", range(3, 16))
@pytest.mark.parametrize("way", ["died", "failed", "hung up"])
def test_requests_survive_their_workers(depth: int, moment: int, way: str) -> None:
    harness = Harness(depth=depth)
    for index, prompt in enumerate(prompts(7)):
        harness.add(index, prompt)
    harness.turns(moment)
    if way == "died":
        harness.executor.inbox.append(WorkerDiedError("worker 0 ended with exit code -9"))
    elif way == "failed":
        harness.executor.inbox.append([WorkerFailed(0, "out of memory")])
    else:
        harness.executor.hung_up = True
    harness.run_to_the_end()
    assert harness.executor.lives == 2
    (restarted,) = harness.messages(WorkersRestarted)
    assert restarted.worker_pids == (2,) and restarted.reason
    assert harness.outputs == {index: expected(prompt) for index, prompt in enumerate(prompts(7))}


def test_what_dead_workers_still_sent_is_not_taken_for_the_word_of_new_ones() -> None:
    harness = Harness()
    harness.add(0)
    harness.executor.computes = False
    harness.run()
    stale: list[FromWorker] = [
        WorkerFailed(0, "out of memory"),
        harness.executor.compute_one(),
        worker_ready(),
        KVCacheReady(0),
    ]
    harness.executor.inbox.append(stale)
    harness.executor.computes = True
    harness.run_to_the_end()
    assert harness.executor.lives == 2 and harness.outputs[0] == expected()


def test_workers_may_die_again_while_they_come_back() -> None:
    harness = Harness()
    harness.add(0)
    harness.turns(6)
    for _ in range(3):
        harness.executor.inbox.append(WorkerDiedError("worker 0 ended with exit code -9"))
        harness.core.step()
        harness.executor.inbox.clear()
        harness.executor.inbox.append([worker_ready()])
        harness.turns(1)
        harness.executor.inbox.clear()
    harness.executor.inbox.append([KVCacheReady(0)])
    harness.run_to_the_end()
    assert len(harness.messages(WorkersRestarted)) == 1 and harness.outputs[0] == expected()


def test_too_many_deaths_are_fatal() -> None:
    harness = Harness(max_worker_restarts=2)
    harness.add(0)
    harness.executor.dies_of = lambda plan: True
    harness.run()
    (dead,) = harness.messages(EngineDead)
    assert "gave up after 2 restarts" in dead.message and harness.core.exit_code == 1


POISON = [VOCAB - 1] * 5


def kills_at(executor: FakeExecutor, num_tokens: int) -> Callable[[SchedulerOutput], bool]:
    """Workers die of the poison when so many of its tokens are computed. Before the step is executed."""

    def dies(plan: SchedulerOutput) -> bool:
        slots = {slot: (content.tokens, content.num_computed) for slot, content in executor.device.slots.items()}
        slots |= {new.slot: (i32(new.token_ids).tolist(), new.num_computed_tokens) for new in plan.new_reqs}
        for slot, count in zip(i32(plan.slots).tolist(), i32(plan.num_scheduled_tokens).tolist(), strict=True):
            tokens, num_computed = slots[slot]
            if tokens[: len(POISON)] == POISON and num_computed + count >= num_tokens:
                return True
        return False

    return dies


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("place", [1, 5, 6, 8, 14])
@pytest.mark.parametrize("moment", [0, 4, 9])
def test_a_request_that_kills_workers_is_ended_and_others_are_not(depth: int, place: int, moment: int) -> None:
    harness = Harness(depth=depth, max_num_seqs=6)
    victims = prompts(8)
    for index, prompt in enumerate(victims):
        harness.add(index, prompt)
    harness.turns(moment)
    harness.executor.dies_of = kills_at(harness.executor, place)
    harness.add(9, POISON, max_tokens=30)
    harness.run_to_the_end()
    assert harness.executor.lives == 1 + MAX_DEATHS
    assert harness.reasons.pop(9) == FinishReason.ERROR and "failed repeatedly" in str(harness.errors[9])
    assert harness.outputs.pop(9) == expected(POISON, 30)[: max(0, place - len(POISON))]
    assert harness.outputs == {index: expected(prompt) for index, prompt in enumerate(victims)}
    (culprit,) = (
        output.index
        for message in harness.messages(EngineCoreOutputs)
        for output in message.outputs
        if output.is_culprit
    )
    assert culprit == 9


@pytest.mark.parametrize("from_api", [True, False])
def test_a_trial_that_may_convict_comes_when_the_workers_have_lived_a_while(from_api: bool) -> None:
    harness = Harness()
    harness.core.probation = 3600.0
    harness.add(0)
    harness.turns(5)
    suspicion = Suspicion(MAX_DEATHS - 1, 0, 5)
    if from_api:
        harness.inbox.append(make_request(1, POISON, 4, suspicion=suspicion))
        harness.run()
    else:
        harness.executor.dies_of = kills_at(harness.executor, 5)
        harness.add(1, POISON, max_tokens=4)
        harness.run()
        harness.executor.dies_of = lambda plan: False
    assert not harness.outputs.get(1) and 1 not in harness.reasons
    harness.core.probation = 0.0
    harness.inbox.append(Ping(1))
    harness.run_to_the_end()
    assert harness.outputs == {0: expected(), 1: expected(POISON, 4)}
    assert harness.executor.lives == (1 if from_api else MAX_DEATHS)


def test_two_requests_that_kill_workers_are_both_found() -> None:
    harness = Harness()
    harness.add(0)
    harness.turns(5)
    harness.executor.dies_of = kills_at(harness.executor, 5)
    harness.add(8, POISON)
    harness.add(9, [*POISON, 8])
    harness.run_to_the_end()
    assert harness.reasons[8] == harness.reasons[9] == FinishReason.ERROR and harness.outputs[0] == expected()
    assert harness.executor.lives <= 2 * MAX_DEATHS


@pytest.mark.parametrize("num_requests", [1, 3])
def test_unrelated_deaths_never_add_up(num_requests: int) -> None:
    """Twenty of them during one long generation end nothing."""
    harness = Harness(max_num_seqs=num_requests)
    inputs = [PROMPT, *prompts(num_requests)[1:]]
    for index, prompt in enumerate(inputs):
        harness.add(index, prompt, max_tokens=50)
    harness.turns(6)
    for _ in range(20):
        known = len(harness.outputs[0])
        while len(harness.outputs[0]) < known + 2:
            harness.core.step()
        harness.executor.inbox.append(WorkerDiedError("worker 0 ended with exit code -9"))
        harness.core.step()
    harness.run_to_the_end()
    assert harness.executor.lives == 21
    assert harness.outputs == {index: expected(prompt, 50) for index, prompt in enumerate(inputs)}


def test_deaths_while_what_was_known_is_computed_again_point_at_nobody() -> None:
    """A request with a long past is hit again and again before it gets on: each time elsewhere than at first."""
    harness = Harness(depth=1)
    harness.add(0, PROMPT, max_tokens=50)
    while len(harness.outputs.get(0, [])) < 40:
        harness.core.step()
    for number in range(4):
        harness.executor.inbox.append(WorkerDiedError("worker 0 ended with exit code -9"))
        harness.core.step()
        while not harness.core.in_flight or int(harness.core.in_flight[0].ends[0]) <= 16 * number:
            harness.core.step()
    harness.run_to_the_end()
    assert harness.executor.lives == 5 and harness.outputs[0] == expected(PROMPT, 50)


def test_suspects_run_alone_and_those_that_got_past_keep_their_place() -> None:
    harness = Harness(depth=2)
    inputs = prompts(3)
    for index, prompt in enumerate(inputs):
        harness.inbox.append(make_request(index, prompt, 8, suspicion=Suspicion(ISOLATE_DEATHS, 0, len(prompt))))
    harness.add(3)
    harness.run_to_the_end()
    assert harness.outputs == {3: expected()} | {index: expected(prompt, 8) for index, prompt in enumerate(inputs)}
    # Each of them was computed once, those under suspicion first.
    assert harness.executor.told == [*inputs, PROMPT]


def test_suspects_from_the_api_may_be_refused_or_dropped() -> None:
    harness = Harness()
    suspicion = Suspicion(ISOLATE_DEATHS, -1, 0)
    harness.inbox.append(make_request(0, [], suspicion=suspicion))
    for index in (1, 2, 3):
        harness.inbox.append(make_request(index, suspicion=suspicion))
    harness.inbox.append(AbortRequests((2,)))
    harness.run_to_the_end()
    assert harness.reasons[0] == FinishReason.ERROR
    assert {index: tokens for index, tokens in harness.outputs.items() if tokens} == {1: expected(), 3: expected()}


def test_suspects_find_room_in_a_full_cache() -> None:
    """Those that got past wait with what they have, unless the next one needs it."""
    harness = Harness(num_blocks=16, max_num_seqs=2)
    inputs = [prompt * 4 for prompt in prompts(4)]
    for index, prompt in enumerate(inputs):
        prompt = inputs[index] = prompt[:40]
        suspicion = Suspicion(ISOLATE_DEATHS, 0, len(prompt))
        harness.inbox.append(make_request(index, prompt, 10, suspicion=suspicion))
    harness.run_to_the_end()
    assert harness.outputs == {index: expected(prompt, 10) for index, prompt in enumerate(inputs)}


# -- workers that hang ----------------------------------------------------------------------------------------


class FakeWatch(WorkerWatch):
    """Says what a test wants."""

    def __init__(self) -> None:
        super().__init__()
        self.problem: Hang | None = None

    def hung(self, steps: Sequence[Any], *, is_loading: bool) -> Hang | None:
        problem, self.problem = self.problem, None
        return problem


@pytest.mark.parametrize("is_loading", [False, True])
def test_a_worker_that_hangs_is_replaced(is_loading: bool) -> None:
    harness = Harness()
    harness.core._watch = watch = FakeWatch()
    harness.add(0)
    if is_loading:
        harness.executor.inbox.clear()
    else:
        harness.turns(6)
        harness.executor.computes = False
    harness.run()
    reason = "worker 0 has not finished a step within 10 s"
    watch.problem = Hang(reason, was_stopped=False)
    harness.executor.computes = True
    harness.inbox.append(Ping(1))
    harness.core.step()
    lost = harness.messages(WorkersLost)
    assert [each.reason for each in lost] == ([] if is_loading else [reason])
    # An engine that takes the request over must know that it may be to blame.
    assert [{index: known.num_deaths for index, known in each.suspicions.items()} for each in lost] == (
        [] if is_loading else [{0: 1}]
    )
    harness.run_to_the_end()
    assert harness.executor.lives == 2 and harness.outputs[0] == expected()


def test_aborts_while_workers_come_back() -> None:
    harness = Harness()
    for index, prompt in enumerate(prompts(7)):
        harness.add(index, prompt, 30)
    harness.turns(8)
    assert harness.stats.num_running_reqs and harness.stats.kv_cache_usage
    harness.executor.loads_by_itself = False
    harness.executor.inbox.append(WorkerDiedError("worker 0 ended with exit code -9"))
    harness.core.step()
    assert harness.stats.num_running_reqs == 0 and harness.stats.num_waiting_reqs == 7 - len(harness.reasons)
    harness.inbox.append(AbortRequests(tuple(range(7))))
    harness.run()
    # No step will tell: the gauges must not stay where they were.
    stats = harness.stats
    assert (stats.num_running_reqs, stats.num_waiting_reqs, stats.kv_cache_usage) == (0, 0, 0)
    harness.executor.inbox += [[worker_ready()], [KVCacheReady(0)]]
    harness.run_to_the_end()


def test_aborts_of_what_is_unknown_or_done() -> None:
    harness = Harness()
    harness.add(0, max_tokens=2)
    harness.inbox.append(AbortRequests((5, -1, 2**63)))
    harness.run_to_the_end()
    harness.inbox.append(AbortRequests((0, 0)))
    harness.run_to_the_end()
    assert harness.outputs == {0: expected(max_tokens=2)}


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_order_of_requests_aborts_and_deaths(data: st.DataObject) -> None:
    draw = data.draw
    harness = Harness(depth=draw(st.integers(1, 3)), max_num_seqs=draw(st.integers(1, 4)), max_worker_restarts=100)
    aborted: set[int] = set()
    inputs = prompts(8)
    crashes = 0
    for index, prompt in enumerate(inputs):
        harness.add(index, prompt)
        for _ in range(draw(st.integers(0, 6))):
            if not harness.inbox and not harness.executor.has_news:
                break
            harness.core.step()
        event = draw(st.sampled_from(["", "", "abort", "death", "stale death"]))
        if event == "abort":
            aborted.add(draw(st.integers(0, index)))
            harness.inbox.append(AbortRequests(tuple(aborted)))
        elif event and crashes < MAX_DEATHS - 1:
            crashes += 1
            failure: list[FromWorker] = [WorkerFailed(0, "out of memory")] if harness.core._announced else []
            if event == "stale death" and failure and harness.executor.plans:
                failure.append(harness.executor.compute_one())
            harness.executor.inbox.append(failure or WorkerDiedError("worker 0 ended with exit code -9"))
    harness.run_to_the_end()
    for index, prompt in enumerate(inputs):
        got = harness.outputs.get(index, [])
        assert got == expected(prompt)[: len(got) if index in aborted else None]


def test_looking_at_the_books_does_not_keep_requests_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness()
    harness.run()
    scheduler = harness.core._scheduler
    assert scheduler is not None
    harness.core.config = EngineConfig()  # not after every step
    monkeypatch.setattr(scheduler, "check_integrity", lambda: pytest.fail("it is not time yet"))
    for index in range(3):
        harness.add(index, max_tokens=3)
        harness.run()
    assert len(harness.outputs) == 3


def test_a_worker_that_was_stopped_points_at_nobody() -> None:
    harness = Harness()
    harness.core._watch = watch = FakeWatch()
    harness.add(0, max_tokens=30)
    for _ in range(MAX_DEATHS + 1):
        harness.turns(6)
        watch.problem = Hang("worker 0 has been stopped for 10 s", was_stopped=True)
        harness.core.step()
        assert all(request.suspicion is None for request in harness.core._scheduler.requests.values())  # type: ignore[union-attr]
    harness.run_to_the_end()
    assert harness.executor.lives == MAX_DEATHS + 2 and harness.outputs[0] == expected(max_tokens=30)


@pytest.mark.parametrize("depth", [1, 2])
def test_the_record_of_a_core_names_what_is_in_flight_and_nothing_else(tmp_path: Path, depth: int) -> None:
    path = str(tmp_path / "record")
    harness = Harness(depth=depth)
    harness.core._record = FlightRecord(path)
    assert read_flight_record(path) == LastWork()
    harness.add(3, max_tokens=30)
    while not harness.core.in_flight:
        harness.core.step()
    assert read_flight_record(path).suspects == {3: (0, 5)}
    for _ in range(9):
        harness.core.step()
    (first, last) = read_flight_record(path).suspects[3]
    steps = harness.core.in_flight
    assert first <= steps[0].ends[0] - 1 and last == steps[-1].ends[0]
    harness.executor.inbox.append(WorkerDiedError("worker 0 ended with exit code -9"))
    harness.core.step()
    assert not harness.core.in_flight and read_flight_record(path) == LastWork()
    harness.run_to_the_end()
    assert read_flight_record(path) == LastWork()


def test_others_go_on_when_a_suspect_is_refused_during_its_trial() -> None:
    harness = Harness()
    harness.run()
    harness.add(1, grammar=GrammarSpec("regex", "a"), suspicion=Suspicion(ISOLATE_DEATHS, -1, 0))
    harness.add(2)
    harness.core.step()
    assert not harness.reasons, "it waits for its grammar"
    harness.inbox.append(Ping(1))
    harness.core.step()
    assert harness.reasons == {1: FinishReason.ERROR}
    harness.run_to_the_end()
    assert harness.outputs[2] == expected()


def test_a_request_whose_grammar_cannot_be_started_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(GrammarCompiler, "start", start)
    harness = Harness()
    harness.run()
    harness.add(1, grammar=GrammarSpec("regex", "a"))
    harness.add(2)
    harness.run_to_the_end()
    assert "can't start new thread" in str(harness.errors[1]) and harness.outputs[2] == expected()


def test_no_grammar_is_compiled_beside_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """A core that dies meanwhile would have two suspects, and convict neither."""
    harness = Harness()
    harness.run()
    compiled_beside: list[bool] = []
    monkeypatch.setattr(GrammarCompiler, "start", lambda *_: compiled_beside.append(harness.core._admission.isolates))
    harness.add(1, suspicion=Suspicion(ISOLATE_DEATHS, -1, 0))
    harness.add(2, grammar=GrammarSpec("regex", "a"))
    harness.add(3, grammar=GrammarSpec("regex", "b"))
    harness.inbox.append(AbortRequests((3,)))
    harness.run()
    assert harness.outputs[1] == expected()
    assert compiled_beside == [False]
