"""Plans of several decode steps: when they are made, and that requests get the tokens that they get without."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_core.cache_shape import GroupShape
from engine_core.config import SchedulerConfig
from engine_core.draft_allowance import DraftAllowance
from engine_core.in_flight import InFlight
from engine_core.messages import FinishReason
from engine_core.restart import Suspicion
from engine_core.step_tokens import StepTokens
from engine_core.steps_per_plan import StepsPerPlan
from executor.messages import ModelRunnerOutput, RowError, SchedulerOutput, i32, u8
from tests.null.core_harness import Harness, expected
from tests.null.core_harness import prompts as harness_prompts
from tests.null.test_draft_tokens import proposer
from tests.null.test_kv_groups import GROUPS, resized
from tests.null.test_scheduler import MAX_LEN, STOP, Engine, expected_output, make_request, prompts


def goes_on(length: int, max_tokens: int, count: int = 1) -> list[list[int]]:
    """Prompts whose outputs do not end by themselves."""
    found = (p for p in prompts(1000, length) if len(expected_output(p, max_tokens)) == max_tokens)
    return list(itertools.islice(found, count))


def steps_of_plans(engine: Engine) -> list[int]:
    """Runs all requests. Returns the number of steps of each plan."""
    numbers: dict[int, int] = {}
    while engine.turn():
        numbers |= {plan.step_id: plan.num_steps for plan, _ in engine.in_flight}
    return list(numbers.values())


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_rows_that_decode_get_several_steps_up_to_the_limit_of_one(depth: int) -> None:
    engine = Engine.create(depth=depth, num_scheduler_steps=4)
    long, short = goes_on(10, 15, 2)
    engine.scheduler.add_request(make_request(0, long, 15))
    engine.scheduler.add_request(make_request(1, short, 7))
    assert steps_of_plans(engine) == [1, 4, 2, 4, 4]
    assert engine.outputs == {0: expected_output(long, 15), 1: expected_output(short, 7)}


def test_the_context_limit_is_a_limit() -> None:
    engine = Engine.create(num_scheduler_steps=4)
    (prompt,) = goes_on(MAX_LEN - 7, 7)
    engine.scheduler.add_request(make_request(0, prompt, 100))
    assert steps_of_plans(engine) == [1, 1, 4, 2], "the prompt takes two"
    assert engine.outputs[0] == expected_output(prompt, 100) and engine.reasons[0] == FinishReason.LENGTH


def test_a_request_that_comes_begins_with_the_next_plan() -> None:
    engine = Engine.create(num_scheduler_steps=4)
    first, second = goes_on(10, 20, 2)
    engine.scheduler.add_request(make_request(0, first, 20))
    while len(engine.outputs.get(0, [])) < 5:
        engine.turn()
    engine.scheduler.add_request(make_request(1, second, 20))
    while len(engine.in_flight) == 2:
        engine.turn()
    assert engine.plan()
    plan = engine.in_flight[-1][0]
    assert (len(plan.new_reqs), plan.num_steps) == (1, 1)
    assert max(steps_of_plans(engine)) == 4, "later plans have several again"
    assert engine.outputs == {0: expected_output(first, 20), 1: expected_output(second, 20)}


def test_what_comes_after_the_end_is_dropped() -> None:
    engine = Engine.create(num_scheduler_steps=8)
    prompt = next(p for p in prompts(400, 10) if STOP in expected_output(p, 12)[3:6])
    engine.scheduler.add_request(make_request(0, prompt, 30))
    engine.scheduler.add_request(make_request(1, prompt + [9], 30, min_tokens=20))
    engine.run()
    assert engine.outputs == {0: expected_output(prompt, 30), 1: expected_output(prompt + [9], 30, 20)}
    assert engine.reasons[0] == FinishReason.STOP


def test_a_row_that_fails_keeps_the_tokens_before() -> None:
    engine = Engine.create(depth=1, num_scheduler_steps=4)
    failing, other = goes_on(10, 20, 2)
    engine.scheduler.add_request(make_request(0, other, 20))
    engine.scheduler.add_request(make_request(1, failing, 20))
    engine.plan()
    engine.retire()
    engine.plan()
    engine.retire((RowError(1, "broken", position=2),))
    assert engine.outputs[1] == expected_output(failing, 3) and engine.reasons[1] == FinishReason.ERROR
    assert engine.outputs[0] == expected_output(other, 5)
    engine.run()


@pytest.mark.parametrize("why", ["grammar", "suspect", "stages"])
def test_one_step_where_something_is_decided_between_two(why: str) -> None:
    more: dict[str, Any] = {"num_stages": 2, "depth": 3} if why == "stages" else {}
    engine = Engine.create(num_scheduler_steps=4, **more)
    (prompt,) = goes_on(10, 10)
    request = make_request(0, prompt, 10)
    if why == "suspect":
        request.suspicion = Suspicion(first=18, last=19, num_deaths=1)
    engine.scheduler.add_request(request)
    engine.plan()
    engine.retire()
    slot = int(engine.scheduler.table.running[0])
    engine.scheduler.table.has_grammar[slot] = why == "grammar"
    engine.plan()
    assert engine.in_flight[-1][0].num_steps == 1
    if why != "grammar":
        engine.run()
        assert engine.outputs[0] == expected_output(prompt, 10)


def test_each_step_verifies_drafts() -> None:
    """Counts are as if all drafts of all steps held, until the result comes."""
    engine = Engine.create(num_scheduler_steps=3, max_draft_tokens=2, propose=proposer(wrong_every=2, count=2))
    (prompt,) = goes_on(10, 40)
    engine.scheduler.add_request(make_request(0, prompt, 40))
    table = engine.scheduler.table
    engine.plan()
    engine.retire()
    slot = int(table.running[0])
    assert engine.plan() and engine.plan()
    plans = [plan for plan, _ in engine.in_flight]
    assert [(plan.num_steps, u8(plan.num_draft_tokens).tolist()) for plan in plans] == [(3, [2]), (3, [2])]
    assert [i32(plan.num_scheduled_tokens).tolist() for plan in plans] == [[3], [3]]
    counts = (table.num_known, table.num_planned, table.num_scheduled, table.num_open_drafts)
    assert [int(count[slot]) for count in counts] == [11, 29, 28, 12]
    engine.retire()
    num_new = int(table.num_known[slot]) - 11
    assert 3 < num_new < 9, "some drafts held, and some did not"
    assert [int(count[slot]) for count in counts] == [11 + num_new, 20 + num_new, 19 + num_new, 6]
    engine.run()
    assert engine.outputs[0] == expected_output(prompt, 40)


def test_drafts_are_told_of_the_steps_that_the_output_comes_from() -> None:
    rows = np.zeros(2, np.int64)
    step = a_plan(2, num_steps=3)
    step.sampled = rows == 0
    result = ModelRunnerOutput(
        1,
        sampled_token_ids=np.arange(2 * 3 + 4, dtype=np.int32).tobytes(),
        num_accepted=bytes([2, 0, 0, 1, 1, 0]),
        num_verified=bytes([2, 1, 4, 1, 3, 0]),
    )
    new = StepTokens(step, result, step.sampled)
    assert new.counts.tolist() == [6, 4] and new.of(1) == [6, 7, 8, 9]
    drafts = new.drafts_of(np.array([0, 1]))
    assert drafts is not None and [each.tolist() for each in drafts] == [[9, 2], [3, 1]]
    assert [new.drafts_within(0, count) for count in range(1, 7)] == [(2, 0), (2, 1), (2, 2), (6, 2), (9, 2), (9, 3)]
    assert [new.drafts_within(1, count) for count in range(1, 5)] == [(1, 0), (2, 0), (2, 1), (2, 1)]


def test_steps_take_no_blocks_that_others_would_have_to_give_up() -> None:
    engine = Engine.create(num_scheduler_steps=8, num_blocks=16, block_size=4, max_num_batched_tokens=64)
    inputs = goes_on(12, 19, 2)
    for index, prompt in enumerate(inputs):
        engine.scheduler.add_request(make_request(index, prompt, 19))
    numbers = steps_of_plans(engine)
    assert max(numbers) == 8 and not engine.scheduler.num_preemptions
    assert engine.outputs == {index: expected_output(prompt, 19) for index, prompt in enumerate(inputs)}


@pytest.mark.parametrize("num_turns", range(2, 14, 3))
@pytest.mark.parametrize("groups", [(GroupShape(64, 4),), (GroupShape(64, 4), GroupShape(64, 4, 10))])
def test_workers_that_die_in_the_middle_of_a_plan(groups: tuple[GroupShape, ...], num_turns: int) -> None:
    engine = Engine.create(groups=groups, num_scheduler_steps=6)
    inputs = goes_on(9, 30, 3)
    for index, prompt in enumerate(inputs):
        engine.scheduler.add_request(make_request(index, prompt, 30))
    for _ in range(num_turns):
        engine.turn()
    engine.restart_with_cache()
    for _ in range(5):
        engine.turn()
    engine.restart()
    engine.run()
    assert engine.outputs == {index: expected_output(prompt, 30) for index, prompt in enumerate(inputs)}


POISON = [33, 34, 35, 36, 37]


@pytest.mark.parametrize("position", [5, 8, 13])
def test_a_request_that_kills_workers_is_found(position: int) -> None:
    assert len(expected(POISON, 20)) == 20
    harness = Harness(max_num_seqs=6, num_scheduler_steps=4)
    victims = harness_prompts(8)
    for index, prompt in enumerate(victims):
        harness.add(index, prompt)
    harness.turns(4)
    executor = harness.executor

    def dies(plan: SchedulerOutput) -> bool:
        begins = {slot: (row.tokens, row.num_computed) for slot, row in executor.device.slots.items()}
        begins |= {new.slot: (i32(new.token_ids).tolist(), new.num_computed_tokens) for new in plan.new_reqs}
        counts = i32(plan.num_scheduled_tokens) * plan.num_steps
        return any(
            begins[slot][0][: len(POISON)] == POISON and begins[slot][1] <= position < begins[slot][1] + count
            for slot, count in zip(i32(plan.slots).tolist(), counts.tolist(), strict=True)
        )

    executor.dies_of = dies
    harness.add(9, POISON, max_tokens=20)
    harness.run_to_the_end()
    assert harness.reasons.pop(9) == FinishReason.ERROR and "failed repeatedly" in str(harness.errors[9])
    output = harness.outputs.pop(9, [])
    assert output == expected(POISON, 20)[: len(output)]
    assert harness.outputs == {index: expected(prompt) for index, prompt in enumerate(victims)}


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_whatever_happens_tokens_are_those_of_single_steps(data: st.DataObject) -> None:
    draw = data.draw
    engine = Engine.create(
        depth=draw(st.integers(1, 3)),
        groups=resized(draw(st.sampled_from(list(GROUPS.values()))), draw(st.sampled_from([72, 160]))),
        caching=draw(st.booleans()),
        max_num_seqs=draw(st.integers(1, 5)),
        max_num_batched_tokens=draw(st.integers(4, 60)),
        num_scheduler_steps=draw(st.integers(2, 16)),
    )
    sent: dict[int, tuple[list[int], int, int]] = {}
    aborted: set[int] = set()
    for index in range(draw(st.integers(1, 7))):
        prompt = prompts(1, draw(st.integers(1, 25)), seed=index)[0]
        sent[index] = prompt, draw(st.integers(1, 35)), draw(st.sampled_from([0, 0, 9]))
        max_tokens, min_tokens = sent[index][1:]
        engine.scheduler.add_request(make_request(index, prompt, max_tokens, min_tokens=min(min_tokens, max_tokens)))
        for _ in range(draw(st.integers(0, 9))):
            engine.turn()
        event = draw(st.sampled_from(["", "", "abort", "lose", "lose all"]))
        victim = draw(st.sampled_from(sorted(sent)))
        if event == "abort" and engine.scheduler.abort_request(victim):
            aborted.add(victim)
        elif event == "lose":
            engine.restart_with_cache()
        elif event == "lose all":
            engine.restart()
    engine.run()
    for index, (prompt, max_tokens, min_tokens) in sent.items():
        expected = expected_output(prompt, max_tokens, min(min_tokens, max_tokens))
        found = engine.outputs.get(index, [])
        assert found == (expected[: len(found)] if index in aborted else expected)


def chooser(late: bool = False, stages: int = 1, **config: Any) -> StepsPerPlan:
    return StepsPerPlan(SchedulerConfig(**config), num_stages=stages, has_late_results=late)


def a_plan(num_rows: int, num_steps: int = 1, num_tokens: int | None = None) -> InFlight:
    rows = np.zeros(num_rows, np.int64)
    return InFlight(
        step_id=1,
        slots=rows.astype(np.int32),
        epochs=rows,
        indices=rows,
        counts=rows,
        begins=rows,
        ends=rows,
        sampled=rows > 0,
        allowances=None,
        grammar_rows=rows[:0],
        num_tokens=num_rows * num_steps if num_tokens is None else num_tokens,
        num_attended=1,
        schedule_us=1.0,
        num_steps=num_steps,
    )


def test_as_many_steps_as_fit_into_a_plan() -> None:
    steps = chooser()
    assert steps.choose(1) == 1, "nothing is known yet"
    steps.note(a_plan(1), 10.0)
    steps.note(a_plan(1, num_tokens=40), 900.0)
    assert steps.choose(1) == 3, "prompts do not count"
    assert steps.choose(2) == 1, "two rows may take longer"
    steps.note(a_plan(3, num_steps=4), 72.0)
    assert (steps.choose(2), steps.choose(3), steps.choose(1)) == (1, 1, 3)
    steps.note(a_plan(1), 1000.0)
    assert steps.choose(1) == 3, "one that was disturbed does not count for much"
    for _ in range(100):
        steps.note(a_plan(1), 18.0)
    assert steps.choose(1) == 1
    for _ in range(20):
        steps.note(a_plan(1), 0.1)
    assert steps.choose(1) == 16


def test_a_given_number_does_not_depend_on_times() -> None:
    steps = chooser(num_scheduler_steps=3)
    steps.note(a_plan(1), 100.0)
    assert steps.choose(1) == steps.choose(200) == 3
    assert chooser(num_scheduler_steps=1).choose(1) == 1
    assert chooser(num_scheduler_steps=16, max_in_flight_steps=8).choose(1) == 4, "no more tokens in flight than known"
    assert chooser(num_scheduler_steps=16, max_num_batched_tokens=12).choose(1) == 6
    assert chooser(num_scheduler_steps=16, max_num_batched_tokens=1).choose(1) == 1


def test_plans_allow_as_many_drafts_as_rows_need() -> None:
    allowance = DraftAllowance(16, retries=False)

    def note(*num_verified: int) -> int:
        step = a_plan(1, num_steps=2)
        step.allowances = np.array([allowance.of(2) * 2])
        allowance.note(step, ModelRunnerOutput(1, num_verified=bytes(num_verified)))
        return allowance.of(2)

    assert note(16, 0) == 16
    assert allowance.usual == 4
    assert [note() for _ in range(7)] == [12, 9, 6, 5, 3, 3, 3]
    assert allowance.usual == 3
    assert allowance.of(1) == 16 and allowance.is_expected, "steps alone need no room behind them"
    assert [note(0, 2), note(4, 1), note(8, 8), note(7, 0), note(7, 7)] == [4, 8, 16, 14, 14]
    allowance.note(a_plan(1, num_steps=2), ModelRunnerOutput(2))
    assert allowance.of(2) == 14, "a plan that allowed none says nothing"
    step = a_plan(1, num_steps=2)
    step.allowances = np.array([28])
    allowance.note(step, ModelRunnerOutput(2, num_verified=bytes(2), num_draft_tokens=bytes([13])))
    assert allowance.of(2) == 13, "the worker has found more than it was allowed to verify"
    allowance.note(step, ModelRunnerOutput(2, num_verified=bytes(2), num_draft_tokens=bytes([14])))
    assert allowance.in_rows(2, np.array([0, 28, 30, 32, 100])).tolist() == [14, 14, 15, 16, 16]
    for _ in range(8):
        note()
    assert not allowance.is_expected
    allowance.restart()
    assert allowance.is_expected and allowance.of(2) == 16


def test_requests_like_those_that_had_no_drafts_wait_for_fewer() -> None:
    def num_expected(allowance: DraftAllowance) -> int:
        """Results without drafts before none are expected, once another request has started."""
        allowance.restart()
        for number in range(20):
            if not allowance.is_expected:
                return number
            allowance.note(a_plan(1), ModelRunnerOutput(1))
        raise AssertionError

    allowance = DraftAllowance(16, retries=False)
    assert [num_expected(allowance) for _ in range(9)] == [8, 4, 4, 2, 2, 2, 2, 1, 1]
    allowance.note(a_plan(1), ModelRunnerOutput(2, num_draft_tokens=bytes([3])))
    assert num_expected(allowance) == 8, "as soon as there are some, more may follow"
    late = DraftAllowance(16, retries=True)
    assert [num_expected(late) for _ in range(3)] == [8, 8, 8], "that worker would keep none"


def test_steps_that_overlap_need_no_company() -> None:
    for steps in (chooser(late=True), chooser(stages=2)):
        steps.note(a_plan(1), 1.0)
        assert steps.choose(1) == 1
    assert chooser(late=True, num_scheduler_steps=3).choose(1) == 3
    assert chooser(stages=2, num_scheduler_steps=3).choose(1) == 1
