"""Several ranks: one answers with results, of the others the engine core hears that they live."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from engine_core.messages import FinishReason, Suspicion, WorkersLost
from engine_core.restart import MAX_DEATHS
from engine_core.worker_watch import Hang, WorkerWatch
from executor.base import WorkerDiedError
from executor.config import ParallelConfig
from executor.messages import LoadProgress, WorkerFailed
from executor.parallel import ParallelState, places
from tests.null.core_harness import Harness, expected, prompts
from tests.null.test_liveness import Machine, Step, watcher
from tests.null.test_worker_faults import POISON, kills_at


def test_places_of_ranks() -> None:
    assert places(ParallelConfig()) == [ParallelState()]
    stages = places(ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=2))
    assert [(place.rank, place.pp_rank, place.tp_rank) for place in stages] == [
        (0, 0, 0),
        (1, 0, 1),
        (2, 1, 0),
        (3, 1, 1),
    ]
    assert {(place.tp_size, place.pp_size) for place in stages} == {(2, 2)}
    assert [place.is_output_rank for place in stages] == [False, False, True, False]
    first, second = places(ParallelConfig(num_mirrors=2))
    assert first == ParallelState() and second == ParallelState(rank=1, is_output_rank=False, local_rank=1)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_results_of_one_rank_are_enough(depth: int, num_ranks: int) -> None:
    harness = Harness(depth=depth, num_ranks=num_ranks)
    for index, prompt in enumerate(prompts(7)):
        harness.add(index, prompt)
    harness.run_to_the_end()
    assert harness.outputs == {index: expected(prompt) for index, prompt in enumerate(prompts(7))}
    assert not harness.core._lagging
    assert [progress.rank for progress in harness.messages(LoadProgress)] == [0]


@pytest.mark.parametrize("moment", range(5, 12))
@pytest.mark.parametrize("rank", [0, 1])
def test_requests_survive_the_death_of_either_rank(moment: int, rank: int) -> None:
    harness = Harness(num_ranks=2)
    for index, prompt in enumerate(prompts(7)):
        harness.add(index, prompt)
    harness.turns(moment)
    if moment % 2:
        harness.executor.inbox.append(WorkerDiedError(f"worker {rank} ended with exit code -9"))
    else:
        harness.executor.inbox.append([WorkerFailed(rank, "out of memory")])
    harness.run_to_the_end()
    assert harness.executor.lives == 2
    assert harness.outputs == {index: expected(prompt) for index, prompt in enumerate(prompts(7))}


@pytest.mark.parametrize("depth", [1, 2])
def test_a_request_that_kills_a_rank_after_the_results_are_there_is_found(depth: int) -> None:
    harness = Harness(depth=depth, num_ranks=2)
    for index, prompt in enumerate(prompts(4)):
        harness.add(index, prompt)
    harness.turns(4)
    harness.executor.others_die_of = kills_at(harness.executor, 8)
    harness.add(9, POISON, max_tokens=30)
    harness.run_to_the_end()
    assert harness.executor.lives == 1 + MAX_DEATHS
    assert harness.reasons.pop(9) == FinishReason.ERROR
    # The first time the output rank had answered, and that token was sent.
    tokens = harness.outputs.pop(9)
    assert tokens == expected(POISON, 30)[: len(tokens)] and 8 - len(POISON) <= len(tokens) < 8
    assert harness.outputs == {index: expected(prompt) for index, prompt in enumerate(prompts(4))}


def test_a_trial_waits_for_the_ranks_that_lag() -> None:
    """A request on trial is not blamed for what another rank still computes of an earlier step."""
    harness = Harness(num_ranks=2)
    harness.add(0, prompts(1)[0], max_tokens=1)
    harness.executor.others_die_of = lambda plan: True
    harness.executor.others_answer = False
    harness.run()
    assert harness.outputs == {0: expected(prompts(1)[0], 1)} and harness.core._lagging
    harness.add(9, suspicion=Suspicion(MAX_DEATHS - 1, 0, 10))
    harness.run()
    harness.executor.others_die_of = lambda plan: False
    harness.executor.others_answer = True
    harness.run_to_the_end()
    assert harness.executor.lives == 2
    assert harness.errors[9] is None and harness.outputs[9] == expected()


class RecordingWatch(WorkerWatch):
    """Notes which steps are looked after, and says what a test wants."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []
        self.problem: Hang | None = None

    def hung(self, steps: Sequence[Any], *, is_loading: bool) -> Hang | None:
        self.steps = [step.step_id for step in steps]
        problem, self.problem = self.problem, None
        return problem


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_rank_that_only_lags_holds_up_planning_and_is_looked_after(depth: int) -> None:
    harness = Harness(depth=depth, num_ranks=2)
    harness.core._watch = watch = RecordingWatch()
    watch.started(harness.executor.worker_pids())
    harness.executor.others_answer = False
    for index, prompt in enumerate(prompts(3)):
        harness.add(index, prompt)
    harness.run()
    # The output rank has answered all that it was given, and gets no more than may be in flight.
    assert not harness.core.in_flight and watch.steps == list(range(1, depth + 1))
    assert harness.core._events(None)[1] is not None
    watch.problem = Hang("worker 0 has not finished a step within 10 s", was_stopped=False)
    harness.executor.others_answer = True
    harness.core.step()
    assert [lost.reason for lost in harness.messages(WorkersLost)] == ["worker 0 has not finished a step within 10 s"]
    harness.run_to_the_end()
    assert harness.outputs == {index: expected(prompt) for index, prompt in enumerate(prompts(3))}


def test_all_ranks_answer_a_step() -> None:
    watch = watcher(Machine(), 11, 12)
    assert not watch.all_answered(1)
    watch.heard(0, 2)
    watch.heard(1, 1)
    assert watch.all_answered(1) and not watch.all_answered(2)
    watch.step_done(Step(1))
    watch.started([13, 14])
    assert not watch.all_answered(1), "new workers have answered nothing"
    assert watcher(Machine()).all_answered(5)  # nobody is watched
