"""Rows of more than one token: whatever a worker proposes, requests get the tokens that they get without."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_core.cache_shape import GroupShape
from engine_core.messages import FinishReason, RepetitionDetection
from engine_core.restart import Suspicion
from engine_core.snapshots import Snapshots
from executor.messages import RowError, SchedulerOutput, TokenLogprobs, i32, u8
from tests.fake_device import next_token
from tests.null.core_harness import FakeExecutor, Harness, expected
from tests.null.core_harness import prompts as harness_prompts
from tests.null.test_scheduler import (
    MAX_LEN,
    STOP,
    VOCAB,
    Engine,
    expected_output,
    make_request,
    prompts,
)

MAX_DRAFTS = 4

Propose = Callable[[list[int]], list[int]]


def proposer(wrong_every: int = 0, count: int = MAX_DRAFTS) -> Propose:
    """Proposes what will come; one in ``wrong_every`` positions is wrong."""

    def propose(tokens: list[int]) -> list[int]:
        future = list(tokens)
        drafts = []
        for _ in range(count):
            token = next_token(future, VOCAB, STOP)
            future.append(token)
            is_wrong = wrong_every and len(future) % wrong_every == 0
            drafts.append((token + 1) % VOCAB if is_wrong else token)
        return drafts

    return propose


def garbage(tokens: list[int]) -> list[int]:
    """As many drafts as chance has it, all of them by chance."""
    rng = np.random.default_rng(len(tokens))
    drafts: list[int] = rng.integers(0, VOCAB, rng.integers(0, MAX_DRAFTS + 1)).tolist()
    return drafts


PROPOSERS = {"right": proposer(), "mixed": proposer(3), "wrong": proposer(1), "garbage": garbage, "one": proposer(5, 1)}


@pytest.mark.parametrize("name", PROPOSERS)
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("num_blocks", [20, 128])
@pytest.mark.parametrize("max_num_batched_tokens", [9, 64])
def test_tokens_do_not_depend_on_drafts(name: str, depth: int, num_blocks: int, max_num_batched_tokens: int) -> None:
    engine = Engine.create(
        depth=depth,
        num_blocks=num_blocks,
        max_num_batched_tokens=max_num_batched_tokens,
        max_draft_tokens=MAX_DRAFTS,
        propose=PROPOSERS[name],
    )
    inputs = prompts(12, 13)
    for index, prompt in enumerate(inputs):
        engine.scheduler.add_request(make_request(index, prompt, 30, min_tokens=index % 7))
    engine.run()
    for index, prompt in enumerate(inputs):
        assert engine.outputs[index] == expected_output(prompt, 30, index % 7)
    if name in ("right", "mixed") and max_num_batched_tokens == 64:
        # In a crowded cache drafts get what waiting requests leave.
        assert engine.device.num_accepted > (50 if num_blocks == 128 else 10)


def test_right_drafts_save_steps() -> None:
    def num_steps(max_draft_tokens: int) -> int:
        engine = Engine.create(depth=1, max_draft_tokens=max_draft_tokens, propose=proposer(count=max_draft_tokens))
        prompt = next(prompt for prompt in prompts(100) if len(expected_output(prompt, 41)) == 41)
        engine.scheduler.add_request(make_request(0, prompt, 41))
        engine.run()
        assert engine.outputs[0] == expected_output(prompt, 41)
        return engine.device.last_step

    assert num_steps(0) == 41
    assert num_steps(4) == 1 + 40 // 5


def test_counts_are_upper_bounds_that_results_lower() -> None:
    """With two plans in flight the second one is made as if all drafts of the first held."""
    engine = Engine.create(depth=2, max_draft_tokens=MAX_DRAFTS, propose=proposer(1))
    prompt = next(prompt for prompt in prompts(100, 10) if len(expected_output(prompt, 40)) == 40)
    engine.scheduler.add_request(make_request(0, prompt, 40))
    table = engine.scheduler.table
    engine.plan()
    engine.retire()  # the prompt; the first token is known
    slot = int(table.running[0])
    assert engine.plan() and engine.plan()
    assert [u8(plan.num_draft_tokens).tolist() for plan, _ in engine.in_flight] == [[4], [4]]
    counts = (table.num_known, table.num_planned, table.num_scheduled, table.num_open_drafts)
    assert [int(count[slot]) for count in counts] == [11, 21, 20, 8]
    engine.retire()  # no draft holds
    assert [int(count[slot]) for count in counts] == [12, 17, 16, 4]
    engine.retire()
    assert [int(count[slot]) for count in counts] == [13, 13, 12, 0]
    engine.run()
    assert engine.outputs[0] == expected_output(prompt, 40)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_plans_allow_drafts_only_while_workers_may_have_some(depth: int) -> None:
    right = proposer()

    def propose(tokens: list[int]) -> list[int]:
        return right(tokens) if 22 < len(tokens) < 34 else []

    engine = Engine.create(depth=depth, max_draft_tokens=MAX_DRAFTS, propose=propose)
    prompt = next(prompt for prompt in prompts(400, 4) if len(expected_output(prompt, 55)) == 55)
    engine.scheduler.add_request(make_request(0, prompt, 55))
    allowed: dict[int, bool] = {}
    while engine.turn():
        for plan, step in engine.in_flight:
            allowed.setdefault(int(step.begins[0]), any(plan.num_draft_tokens))
    assert engine.outputs[0] == expected_output(prompt, 55) and engine.device.num_accepted > 3
    assert allowed[4], "a new request may have some"
    assert not any(allowed[length] for length in allowed if 16 < length < 22 or length > 52)
    assert any(allowed[length] for length in allowed if 22 < length < 34)


def test_plans_allow_drafts_again_for_workers_that_launch_the_next_step_before_they_find_some() -> None:
    right = proposer()

    def propose(tokens: list[int]) -> list[int]:
        is_launched = engine.in_flight and not engine.in_flight[0][0].num_draft_tokens
        return right(tokens) if len(tokens) > 22 and not is_launched else []

    engine = Engine.create(depth=2, max_draft_tokens=MAX_DRAFTS, propose=propose)
    prompt = next(prompt for prompt in prompts(400, 4) if len(expected_output(prompt, 55)) == 55)
    engine.scheduler.add_request(make_request(0, prompt, 55))
    engine.run()
    assert engine.outputs[0] == expected_output(prompt, 55) and engine.device.num_accepted > 10


def test_no_draft_goes_beyond_the_length_that_a_request_may_have() -> None:
    engine = Engine.create(depth=3, max_draft_tokens=MAX_DRAFTS, propose=proposer(), num_blocks=256)
    inputs = [prompt for prompt in prompts(60, 10) if STOP not in expected_output(prompt, 20)[:20]][:8]
    for index, prompt in enumerate(inputs):
        engine.scheduler.add_request(make_request(index, prompt, 1 + 3 * index))
    long = prompts(1, MAX_LEN - 3)[0]
    engine.scheduler.add_request(make_request(99, long, 50))
    engine.run()
    for index, prompt in enumerate(inputs):
        assert engine.outputs[index] == expected_output(prompt, 1 + 3 * index)
        assert engine.reasons[index] == FinishReason.LENGTH
    assert engine.outputs[99] == expected_output(long, 50)


def test_drafts_take_nothing_from_others() -> None:
    """Neither blocks nor tokens of a step: whoever decodes or has a prompt comes first."""
    engine = Engine.create(num_blocks=16, depth=1, max_num_batched_tokens=9, max_draft_tokens=4, propose=proposer())
    for index, prompt in enumerate(prompts(3, 8)):
        engine.scheduler.add_request(make_request(index, prompt, 12))
    without = Engine.create(num_blocks=16, depth=1, max_num_batched_tokens=9)
    for index, prompt in enumerate(prompts(3, 8)):
        without.scheduler.add_request(make_request(index, prompt, 12))
    engine.run()
    without.run()
    assert engine.outputs == without.outputs
    assert engine.scheduler.num_preemptions <= without.scheduler.num_preemptions


def test_a_step_samples_no_more_tokens_than_there_is_room_for() -> None:
    engine = Engine.create(depth=1, max_draft_tokens=4, max_samples=7, propose=proposer(), num_blocks=128)
    inputs = [prompt for prompt in prompts(60, 6) if len(expected_output(prompt, 20)) == 20][:3]
    for index, prompt in enumerate(inputs):
        engine.scheduler.add_request(make_request(index, prompt, 20))
    allowed = set()
    while engine.turn():
        allowed |= {tuple(plan.num_draft_tokens) for plan, _ in engine.in_flight}
    assert (1, 1, 1) in allowed and max(len(each) + sum(each) for each in allowed) <= 7
    assert engine.outputs == {index: expected_output(prompt, 20) for index, prompt in enumerate(inputs)}


def test_drafts_leave_the_step_to_whoever_may_start() -> None:
    engine = Engine.create(depth=1, max_num_batched_tokens=12, max_draft_tokens=4, propose=proposer(), num_blocks=128)
    inputs = [prompt for prompt in prompts(60, 6) if len(expected_output(prompt, 40)) == 40][:3]
    for index, prompt in enumerate(inputs):
        engine.scheduler.add_request(make_request(index, prompt, 40))
    while len(engine.outputs) < 3:
        engine.turn()
    late = prompts(1, 9, seed=9)[0]
    engine.scheduler.add_request(make_request(9, late, 5))
    assert engine.plan()
    plan, _ = engine.in_flight[-1]
    assert [i32(new.token_ids).tolist() for new in plan.new_reqs] == [late]
    assert i32(plan.num_scheduled_tokens).tolist() == [1, 1, 1, 9]
    engine.run()
    assert engine.outputs[9] == expected_output(late, 5)


def test_drafts_leave_the_blocks_to_whoever_may_start() -> None:
    engine = Engine.create(depth=1, max_draft_tokens=4, propose=proposer(), num_blocks=16, block_size=4)
    prompt = next(prompt for prompt in prompts(60, 7) if len(expected_output(prompt, 30)) == 30)
    engine.scheduler.add_request(make_request(0, prompt, 30))
    while not engine.outputs:
        engine.turn()
    late = prompts(1, 56, seed=9)[0]  # needs all blocks that are left
    engine.scheduler.add_request(make_request(9, late, 5))
    assert engine.plan()
    assert [i32(new.token_ids).tolist() for new in engine.in_flight[-1][0].new_reqs] == [late]
    engine.run()
    assert engine.outputs[9] == expected_output(late, 5)


@pytest.mark.parametrize(("num_blocks", "allowed"), [(6, 4), (5, 0), (4, 0)])
def test_drafts_need_blocks_for_all_rows(num_blocks: int, allowed: int) -> None:
    """Each row's drafts need one more block. Drafts preempt nobody."""
    engine = Engine.create(depth=1, max_draft_tokens=4, propose=proposer(), num_blocks=num_blocks, block_size=4)
    inputs = [prompt for prompt in prompts(100, 7) if len(expected_output(prompt, 8)) == 8][:2]
    for index, prompt in enumerate(inputs):
        engine.scheduler.add_request(make_request(index, prompt, 8))
    engine.turn()
    engine.turn()
    assert engine.scheduler.num_running == 2 and len(engine.outputs) == 2
    assert engine.plan()
    assert u8(engine.in_flight[-1][0].num_draft_tokens).tolist() == [allowed, allowed]
    assert engine.scheduler.num_preemptions == 0
    engine.run()
    assert engine.outputs == {index: expected_output(prompt, 8) for index, prompt in enumerate(inputs)}


def test_rejected_drafts_are_never_found_in_the_cache() -> None:
    """Blocks that are findable hold what their hashes say, at every moment."""
    engine = Engine.create(max_draft_tokens=MAX_DRAFTS, propose=proposer(3), block_size=2, num_blocks=200, depth=1)
    inputs = [prompt for prompt in prompts(60, 9) if len(expected_output(prompt, 20)) == 20][:4]
    num_looks = 0
    for index, prompt in enumerate(inputs):
        engine.scheduler.add_request(make_request(index, prompt, 20))
    while engine.turn():
        for index, prompt in enumerate(inputs):
            request = engine.scheduler.requests.get(index)
            if request is None or request.slot < 0 or engine.in_flight:
                continue
            num_looks += 1
            true = prompt + expected_output(prompt, 20)
            (table,) = request.block_tables
            for place in range(table.num_published):
                block = engine.device.groups[0].blocks[table.block_ids[place]]
                assert block.tolist() == true[2 * place : 2 * place + 2]
    assert num_looks > 10
    for index, prompt in enumerate(inputs):
        follow_up = prompt + engine.outputs[index]
        engine.scheduler.add_request(make_request(10 + index, follow_up, 5))
    engine.run()
    for index, prompt in enumerate(inputs):
        assert engine.outputs[10 + index] == expected_output(prompt + engine.outputs[index], 5)
        assert engine.cached[10 + index] == 28, "all but the last token, which was not computed"


def test_stale_rows_with_drafts_are_dropped() -> None:
    engine = Engine.create(depth=3, max_draft_tokens=MAX_DRAFTS, propose=proposer(4))
    first, second, third = prompts(3, 11, seed=5)
    engine.scheduler.add_request(make_request(0, first, 30))
    engine.scheduler.add_request(make_request(1, second, 30))
    for _ in range(5):
        engine.turn()
    while len(engine.in_flight) < 3:
        assert engine.plan()
    engine.scheduler.abort_request(0)
    engine.scheduler.add_request(make_request(2, third, 30))  # the same slot
    known = len(engine.outputs.get(0, []))
    engine.run()
    assert len(engine.outputs.get(0, [])) == known
    assert engine.outputs[1] == expected_output(second, 30)
    assert engine.outputs[2] == expected_output(third, 30)


def test_a_row_that_fails_keeps_the_tokens_before() -> None:
    engine = Engine.create(depth=1, max_draft_tokens=MAX_DRAFTS, propose=proposer())
    prompt = next(prompt for prompt in prompts(100, 10) if len(expected_output(prompt, 40)) == 40)
    engine.scheduler.add_request(make_request(0, prompt, 40))
    engine.plan()
    engine.retire()
    engine.plan()
    engine.retire((RowError(0, "broken", position=4),))
    assert engine.outputs[0] == expected_output(prompt, 5), "one token, and four of five"
    assert engine.reasons[0] == FinishReason.ERROR
    engine.run()


def test_log_probabilities_come_with_their_tokens() -> None:
    engine = Engine.create(depth=1, max_draft_tokens=MAX_DRAFTS, propose=proposer())
    prompt = next(prompt for prompt in prompts(400, 10) if STOP in expected_output(prompt, 5)[2:4])
    engine.scheduler.add_request(make_request(0, prompt, 40, logprobs=0))
    execute = engine.device.execute

    def with_logprobs(plan):  # type: ignore[no-untyped-def]
        result = execute(plan)
        entries = tuple(TokenLogprobs(0, place, b"", b"", place + 1) for place in range(1 + u8(result.num_accepted)[0]))
        return msgspec.structs.replace(result, logprobs=entries)

    engine.device.execute = with_logprobs  # type: ignore[method-assign]
    update = engine.scheduler.update_from_output
    told: list[tuple[int, tuple[TokenLogprobs, ...]]] = []

    def watched(step, result):  # type: ignore[no-untyped-def]
        outputs = update(step, result)
        told.extend((len(output.new_token_ids), output.new_logprobs) for output in outputs.outputs)
        return outputs

    engine.scheduler.update_from_output = watched  # type: ignore[method-assign]
    engine.run()
    assert engine.outputs[0] == expected_output(prompt, 40)
    assert [count for count, _ in told] == [1, len(engine.outputs[0]) - 1]
    assert all([entry.position for entry in entries] == list(range(count)) for count, entries in told)


def test_a_suspect_verifies_no_drafts() -> None:
    """The next death must say which position it was."""
    engine = Engine.create(max_draft_tokens=MAX_DRAFTS, propose=proposer())
    prompt = next(prompt for prompt in prompts(100, 10) if len(expected_output(prompt, 40)) == 40)
    request = make_request(0, prompt, 40)
    request.suspicion = Suspicion(1, 20, 22)
    engine.scheduler.add_request(request)
    while request.suspicion is not None:
        engine.turn()
        assert all(not any(plan.num_draft_tokens) for plan, _ in engine.in_flight)
    engine.run()
    assert engine.outputs[0] == expected_output(prompt, 40)
    assert engine.device.num_accepted > 0


def test_loops_end_an_output_in_the_middle_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests import fake_device

    rule = lambda tokens, vocab, stop: sum(tokens[-3:]) % 4 + 10  # noqa: E731
    monkeypatch.setattr(fake_device, "next_token", rule)
    monkeypatch.setitem(globals(), "next_token", rule)
    wanted = RepetitionDetection(max_pattern_size=6, min_pattern_size=2, min_count=3)
    results = []
    for max_draft_tokens in (0, 3):
        engine = Engine.create(
            max_draft_tokens=max_draft_tokens, propose=proposer(count=max_draft_tokens), num_blocks=20
        )
        for index in range(8):
            prompt = [8 + index, 9 + index * index % 5, 10]
            engine.scheduler.add_request(make_request(index, prompt, 40, repetition_detection=wanted))
        engine.run()
        results.append((engine.outputs, engine.reasons))
    assert results[0] == results[1]
    assert FinishReason.REPETITION in results[1][1].values()


def computes(executor: FakeExecutor, position: int) -> Callable[[SchedulerOutput], bool]:
    """Whether a step computes a position of the poison, as a draft or not."""

    def found(plan: SchedulerOutput) -> bool:
        slots = {slot: (row.tokens, row.drafts, row.num_computed) for slot, row in executor.device.slots.items()}
        slots |= {new.slot: (i32(new.token_ids).tolist(), [], new.num_computed_tokens) for new in plan.new_reqs}
        counts = i32(plan.num_scheduled_tokens).tolist()
        for slot, count, allowed in zip(i32(plan.slots).tolist(), counts, list(plan.num_draft_tokens), strict=True):
            tokens, drafts, num_computed = slots[slot]
            end = num_computed + count - allowed + min(len(drafts), allowed)
            if tokens[: len(POISON)] == POISON and num_computed <= position < end:
                return True
        return False

    return found


POISON = [33, 34, 35, 36, 37]


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("position", [2, 5, 7, 12])
@pytest.mark.parametrize("name", ["right", "mixed", "garbage"])
def test_a_request_that_kills_workers_is_found_among_drafts(depth: int, position: int, name: str) -> None:
    """Deaths point at the positions that were perhaps computed, and what did not hold blames nobody for long."""
    assert len(expected(POISON, 20)) == 20
    harness = Harness(depth=depth, max_num_seqs=6, max_draft_tokens=MAX_DRAFTS, propose=PROPOSERS[name])
    victims = harness_prompts(8)
    for index, prompt in enumerate(victims):
        harness.add(index, prompt)
    harness.turns(4)
    harness.executor.dies_of = computes(harness.executor, position)
    harness.add(9, POISON, max_tokens=20)
    harness.run_to_the_end()
    assert harness.reasons.pop(9) == FinishReason.ERROR and "failed repeatedly" in str(harness.errors[9])
    output = harness.outputs.pop(9, [])
    assert output == expected(POISON, 20)[: len(output)]
    assert harness.outputs == {index: expected(prompt) for index, prompt in enumerate(victims)}


def test_workers_that_die_by_chance_cost_no_token() -> None:
    rng = np.random.default_rng(3)
    for depth in (1, 2, 3):
        harness = Harness(depth=depth, max_num_seqs=6, max_draft_tokens=MAX_DRAFTS, propose=proposer(4))
        victims = harness_prompts(10)
        for index, prompt in enumerate(victims):
            harness.add(index, prompt)
        deaths = set(rng.integers(2, 30, 3).tolist())
        steps = iter(range(1 << 20))
        harness.executor.dies_of = lambda plan, deaths=deaths, steps=steps: next(steps) in deaths  # type: ignore[misc]
        harness.run_to_the_end()
        assert harness.executor.lives > 1
        assert harness.outputs == {index: expected(prompt) for index, prompt in enumerate(victims)}


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_random_drafts_arrivals_aborts_and_restarts_leak_nothing(data: st.DataObject) -> None:
    draw = data.draw
    block_size = draw(st.sampled_from([1, 2, 4]))
    num_blocks = draw(st.integers(-(-MAX_LEN // block_size), 3 * -(-MAX_LEN // block_size)))
    windows = draw(st.sampled_from([(None,), (None,), (5,), (None, 7), (3, None, 16), (None, 2), (2,)]))
    snapshots = Snapshots(block_size, every=16, every_of_output=8, margin=3) if 2 in windows else None
    engine = Engine.create(
        depth=draw(st.integers(1, 3)),
        groups=tuple(
            GroupShape(num_blocks, block_size, window, snapshots if window == 2 else None) for window in windows
        ),
        caching=draw(st.booleans()),
        max_num_seqs=draw(st.integers(1, 6)),
        max_num_batched_tokens=draw(st.integers(1, 40)),
        scheduling_policy=draw(st.sampled_from(["fcfs", "priority"])),
        max_draft_tokens=MAX_DRAFTS,
        num_scheduler_steps=draw(st.sampled_from([1, 3])),
        propose=PROPOSERS[draw(st.sampled_from(sorted(PROPOSERS)))],
    )
    shared = prompts(1, 20, seed=3)[0]
    sent: dict[int, tuple[list[int], int, int, bool]] = {}
    aborted: set[int] = set()
    for index in range(draw(st.integers(1, 10))):
        prompt = shared[: draw(st.integers(0, 20))] + prompts(1, draw(st.integers(1, 25)), seed=index)[0]
        max_tokens, min_tokens = draw(st.integers(1, 30)), draw(st.sampled_from([0, 0, 5]))
        asks = draw(st.integers(0, 3)) == 0
        sent[index] = prompt, max_tokens, min(min_tokens, max_tokens), asks
        request = make_request(
            index,
            prompt,
            max_tokens,
            min_tokens=sent[index][2],
            priority=draw(st.integers(0, 3)),
            prompt_logprobs=0 if asks else None,
            stop_token_ids=tuple(range(40, 50)) if draw(st.integers(0, 9)) == 0 else (),
        )
        if request.params.stop_token_ids:
            del sent[index]  # many stop tokens: it ends somewhere
        engine.scheduler.add_request(request)
        for _ in range(draw(st.integers(0, 8))):
            engine.turn()
        if draw(st.integers(0, 3)) == 0 and sent:
            victim = draw(st.sampled_from(sorted(sent)))
            if engine.scheduler.abort_request(victim):
                aborted.add(victim)
        if draw(st.integers(0, 9)) == 0:
            engine.restart()
        engine.scheduler.check_integrity()
    engine.run()
    for index, (prompt, max_tokens, min_tokens, asks) in sent.items():
        expected = expected_output(prompt, max_tokens, min_tokens)
        if index in aborted:
            assert engine.outputs.get(index, []) == expected[: len(engine.outputs.get(index, []))]
        else:
            assert engine.outputs[index] == expected
            assert not asks or sorted(set(engine.prompt_positions[index])) == list(range(1, len(prompt)))
