"""The scheduler with several KV cache groups: the same tokens, blocks behind windows freed while requests run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_core.cache_shape import GroupShape
from engine_core.messages import FinishReason
from engine_core.snapshots import Snapshots
from executor.messages import RowError, i32
from tests.null.test_draft_tokens import proposer
from tests.null.test_scheduler import MAX_LEN, Engine, expected_output, make_request, prompts

FULL = GroupShape(num_blocks=64, block_size=4)
WINDOW = GroupShape(num_blocks=64, block_size=4, window=10)
NARROW = GroupShape(num_blocks=128, block_size=2, window=3)
SNAPSHOTS = Snapshots(4, every=16, every_of_output=8, margin=3, output_tokens=16)
STATES = GroupShape(num_blocks=64, block_size=4, window=2, snapshots=SNAPSHOTS)
"""States, few of which are kept."""

GROUPS = {
    "window": (WINDOW,),
    "full and window": (FULL, WINDOW),
    "window and full": (WINDOW, FULL),
    "two windows": (WINDOW, NARROW),
    "three": (NARROW, FULL, WINDOW),
    "states": (STATES,),
    "full and states": (FULL, STATES),
    "states and window": (STATES, FULL, WINDOW),
}


def num_used(engine: Engine) -> list[int]:
    """Blocks in use, by group."""
    return [manager.pool.num_blocks - manager.pool.num_free for manager in engine.scheduler.kv.managers]


def resized(groups: tuple[GroupShape, ...], num_tokens: int) -> tuple[GroupShape, ...]:
    """Groups with room for so many tokens, whatever their windows."""
    return tuple(replace(group, num_blocks=num_tokens // group.block_size) for group in groups)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("chunk", [3, 32])
@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("crowded", [True, False])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_tokens_do_not_depend_on_groups(
    groups: tuple[GroupShape, ...], depth: int, chunk: int, caching: bool, crowded: bool
) -> None:
    has_full = any(group.window is None for group in groups)
    num_tokens = 256 if not crowded else 80 if has_full else 48
    engine = Engine.create(
        depth=depth, groups=resized(groups, num_tokens), caching=caching, max_num_batched_tokens=chunk
    )
    inputs = prompts(8, 23)
    for index, prompt in enumerate(inputs):
        engine.scheduler.add_request(make_request(index, prompt, 40))
    engine.run()
    for index, prompt in enumerate(inputs):
        assert engine.outputs[index] == expected_output(prompt, 40)
    if crowded and has_full and chunk == 32:
        assert engine.scheduler.num_preemptions


@pytest.mark.parametrize("groups", [(WINDOW,), (FULL, WINDOW), (NARROW, WINDOW)])
def test_requests_that_outgrow_the_window_groups_are_preempted(groups: tuple[GroupShape, ...]) -> None:
    """Short prompts that all fit, and outputs of which the windows do not."""
    groups = tuple(GroupShape(16, 4, 10) if group == WINDOW else group for group in groups)
    engine = Engine.create(groups=groups, depth=3)
    inputs = prompts(12, 5)
    for index, prompt in enumerate(inputs):
        engine.scheduler.add_request(make_request(index, prompt, 40))
    engine.run()
    assert engine.scheduler.num_preemptions
    for index, prompt in enumerate(inputs):
        assert engine.outputs[index] == expected_output(prompt, 40)


def never_stops(length: int, max_tokens: int) -> list[int]:
    return next(p for p in prompts(300, length) if len(expected_output(p, max_tokens)) == max_tokens)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_sequence_of_many_windows_needs_few_blocks(depth: int) -> None:
    """In a window's group no more than what a token sees and what is on its way, however long the sequence is."""
    step = 8
    least = WINDOW.max_live_blocks(MAX_LEN, step)
    engine = Engine.create(
        depth=depth, groups=(GroupShape(least, 4, WINDOW.window),), max_num_batched_tokens=step, max_num_seqs=1
    )
    prompt = never_stops(30, 30)
    engine.scheduler.add_request(make_request(0, prompt, 30))
    most = 0
    while engine.turn():
        most = max(most, num_used(engine)[0])
        if len(engine.outputs.get(0, [])) > 1 and engine.scheduler.num_running:
            assert num_used(engine)[0] <= -(-(10 + depth) // 4) + 1
    assert engine.outputs[0] == expected_output(prompt, 30) and not engine.scheduler.num_preemptions
    assert most <= least < -(-60 // 4)


def test_a_requests_bytes_are_those_of_its_windows() -> None:
    """What is in use, counted in bytes: of a long sequence the windows' groups keep a constant part."""
    bytes_per_block = {None: 1000, 10: 3000}
    groups = (FULL, WINDOW, WINDOW)
    engine = Engine.create(groups=groups)
    prompt = never_stops(20, 40)
    engine.scheduler.add_request(make_request(0, prompt, 40))
    by_length: dict[int, int] = {}
    while engine.turn():
        if engine.scheduler.num_running:
            used = zip(groups, num_used(engine), strict=True)
            length = 20 + len(engine.outputs.get(0, []))
            by_length[length] = sum(bytes_per_block[group.window] * count for group, count in used)
    kept = by_length[59] - by_length[30]
    assert kept == 1000 * (-(-59 // 4) - -(-30 // 4)), "only the group without a window grows"
    assert by_length[59] <= 1000 * 15 + 2 * 3000 * 4 < (1000 + 2 * 3000) * 15


@pytest.mark.parametrize("step", [2, 512], ids=["decode", "prefill"])
def test_gemma_3_1b_at_32k_holds_little_more_than_it_needs(step: int) -> None:
    """Four of its 26 layers see all tokens, the others 512."""
    length, window = 32768, 512
    full, local = GroupShape(1024, 32), GroupShape(1024, 32, window)
    held = 32 * (4 * full.max_live_blocks(length, step) + 22 * local.max_live_blocks(length, step))
    assert 4 * length + 22 * (window - 1 + step) <= held <= 1.1 * (4 * length + 22 * (window - 1 + step))
    if step == 2:
        assert held <= 1.1 * (4 * length + 22 * window) < 0.2 * 26 * length


def test_a_hit_begins_behind_the_window() -> None:
    engine = Engine.create(groups=(FULL, WINDOW), max_num_batched_tokens=64)
    prompt = prompts(1, 45)[0]
    engine.scheduler.add_request(make_request(0, prompt, 3))
    engine.run()
    engine.scheduler.add_request(make_request(1, [*prompt[:44], 9, 10], 3))
    assert engine.plan()
    plan, _ = engine.in_flight[0]
    (new,) = plan.new_reqs
    assert new.num_computed_tokens == 44
    assert new.block_offsets == (0, 8), "token 44 sees 35 and what follows"
    assert [len(i32(column)) for column in new.block_ids] == [12, 4]
    engine.run()
    assert engine.cached == {0: 0, 1: 44}
    assert engine.outputs[1] == expected_output([*prompt[:44], 9, 10], 3)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("num_drafts", [0, 3])
@pytest.mark.parametrize("chunk", [5, 64])
def test_the_next_turn_computes_new_tokens(depth: int, num_drafts: int, chunk: int) -> None:
    """It goes on from the last state of the turn before, or from the end of its prompt if the answer is told
    otherwise."""
    engine = Engine.create(
        depth=depth,
        groups=(FULL, STATES),
        max_num_batched_tokens=chunk,
        max_draft_tokens=num_drafts,
        propose=proposer(3, num_drafts),
    )
    prompt = never_stops(29, 30)
    engine.scheduler.add_request(make_request(0, prompt, 30))
    engine.run()
    follow_up = [*prompt, *engine.outputs[0], 7, 8, 9]
    engine.scheduler.add_request(make_request(1, [*prompt, 5, 6], 4))
    engine.scheduler.add_request(make_request(2, follow_up, 4))
    engine.run()
    assert engine.cached == {0: 0, 1: 24, 2: 56}, "29 tokens less 3, and 58: at most 7 tokens of the turn are missing"
    assert engine.outputs[1] == expected_output([*prompt, 5, 6], 4)
    assert engine.outputs[2] == expected_output(follow_up, 4)


def test_an_output_keeps_its_last_state_and_evicts_no_others() -> None:
    """The states of a long output take turns in two blocks: those of other conversations stay."""
    engine = Engine.create(groups=(FULL, replace(STATES, num_blocks=12)), max_num_batched_tokens=64)
    first, second = never_stops(9, 3), never_stops(13, 40)
    engine.scheduler.add_request(make_request(0, first, 3))
    engine.run()
    engine.scheduler.add_request(make_request(1, second, 40))
    most = 0
    while engine.turn():
        most = max(most, num_used(engine)[1])
    assert most <= 4
    states = engine.scheduler.kv.managers[1].pool
    assert len(states._cached) <= 2 + 1 + 3 + 1, "two of the first, the end of a prompt, every 16 tokens, and the last"
    engine.scheduler.add_request(make_request(2, [*first, 3, 4], 3))
    engine.run()
    assert engine.cached[2] == 8


def test_prompts_that_start_together_share_all_groups() -> None:
    engine = Engine.create(groups=(WINDOW, FULL), max_num_batched_tokens=64)
    prompt = prompts(1, 33)[0]
    for index in range(3):
        engine.scheduler.add_request(make_request(index, prompt, 5))
    assert engine.plan()
    assert i32(engine.in_flight[0][0].num_scheduled_tokens).tolist() == [33, 1, 1]
    engine.run()
    assert engine.cached == {0: 0, 1: 32, 2: 32}
    assert all(engine.outputs[index] == expected_output(prompt, 5) for index in range(3))


def test_the_group_that_lacks_blocks_decides_who_runs() -> None:
    """There is room for many in the full group, and for the windows of two."""
    least = WINDOW.max_live_blocks(MAX_LEN, 32)
    engine = Engine.create(groups=(FULL, GroupShape(2 * least, 4, WINDOW.window)))
    inputs = prompts(8, 40)
    for index, prompt in enumerate(inputs):
        engine.scheduler.add_request(make_request(index, prompt, 20))
    running = []
    while engine.turn():
        running.append(engine.scheduler.num_running)
    assert 2 <= max(running) < 8
    for index, prompt in enumerate(inputs):
        assert engine.outputs[index] == expected_output(prompt, 20)


@pytest.mark.parametrize("num_turns", range(1, 24))
@pytest.mark.parametrize("groups", [(GroupShape(64, 4),), (WINDOW, FULL)])
def test_a_cache_that_outlives_workers_saves_all_but_the_steps_in_flight(
    groups: tuple[GroupShape, ...], num_turns: int
) -> None:
    engine = Engine.create(groups=groups, max_num_batched_tokens=8)
    inputs = prompts(3, 30)
    for index, prompt in enumerate(inputs):
        engine.scheduler.add_request(make_request(index, prompt, 20))
    for _ in range(num_turns):
        engine.turn()
    in_flight = sum(step.num_tokens for _, step in engine.in_flight)
    recomputed = engine.restart_with_cache()
    if len(groups) == 1:  # a step of a prompt frees what lies behind its window
        assert recomputed <= in_flight  # rows of ended requests need not be computed
    engine.run()
    for index, prompt in enumerate(inputs):
        assert engine.outputs[index] == expected_output(prompt, 20)


def test_waiting_requests_give_up_what_they_keep_if_another_needs_it() -> None:
    engine = Engine.create(num_blocks=16, block_size=4, max_num_batched_tokens=64)
    inputs = prompts(3, 15, seed=5)
    for index in range(3):
        engine.scheduler.add_request(make_request(index, inputs[index], 30))
    for _ in range(12):
        engine.turn()
    engine.restart_with_cache()
    assert engine.scheduler.kv.num_free < engine.scheduler.kv.num_blocks
    engine.scheduler.pool.forget_cache()
    assert engine.scheduler.kv.num_free == engine.scheduler.kv.num_blocks
    engine.run()
    for index in range(3):
        assert engine.outputs[index] == expected_output(inputs[index], 30)


@pytest.mark.parametrize("num_turns", range(1, 20, 2))
def test_a_restart_begins_with_empty_groups(num_turns: int) -> None:
    engine = Engine.create(groups=(WINDOW, FULL), max_num_batched_tokens=8)
    inputs = prompts(3, 30)
    for index, prompt in enumerate(inputs):
        engine.scheduler.add_request(make_request(index, prompt, 20))
    for _ in range(num_turns):
        engine.turn()
    engine.restart()
    engine.run()
    for index, prompt in enumerate(inputs):
        assert engine.outputs[index] == expected_output(prompt, 20)


def test_a_failed_row_leaves_nothing_behind_its_window() -> None:
    engine = Engine.create(groups=(FULL, WINDOW))
    prompt = prompts(1, 60)[0]
    engine.scheduler.add_request(make_request(0, prompt, 3))
    engine.turn()
    engine.turn()
    engine.retire()
    engine.retire((RowError(row=0, message="not a number"),))
    assert engine.reasons == {0: FinishReason.ERROR}
    assert not any(manager.pool._cached for manager in engine.scheduler.kv.managers)


def test_no_groups() -> None:
    engine = Engine.create(groups=(), max_num_batched_tokens=7)
    inputs = prompts(5, 20)
    for index, prompt in enumerate(inputs):
        engine.scheduler.add_request(make_request(index, prompt, pooling="MEAN"))
    engine.run()
    assert engine.pooled == {index: [*prompt, 20] for index, prompt in enumerate(inputs)}
    assert engine.scheduler.stats().kv_cache_usage == 0


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_random_arrivals_aborts_and_stops_leak_nothing(data: st.DataObject) -> None:
    """Whatever happens, every request that is not aborted gets the tokens that it gets alone."""
    draw = data.draw
    depth, budget = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    num_drafts, wrong_every = draw(st.sampled_from([0, 0, 1, 4])), draw(st.integers(0, 4))
    config: dict[str, Any] = {"max_num_batched_tokens": budget, "max_num_seqs": draw(st.integers(1, 6))}
    shapes = []
    for _ in range(draw(st.integers(1, 3))):
        size = draw(st.sampled_from([1, 2, 4]))
        shape = GroupShape(0, size, draw(st.sampled_from([None, 1, 2, 7, 16, 40])))
        if shape.window == 2 and draw(st.booleans()):
            every = draw(st.sampled_from([4, 8]))
            snapshots = Snapshots(4, every * draw(st.integers(1, 4)), every, draw(st.integers(1, 6)))
            shape = replace(shape, snapshots=replace(snapshots, output_tokens=depth * (1 + num_drafts)))
        least = shape.max_live_blocks(MAX_LEN, max(budget, depth * (1 + num_drafts)))
        shapes.append(replace(shape, num_blocks=least * draw(st.integers(1, 3)) + draw(st.integers(0, 5))))
    engine = Engine.create(
        depth=depth,
        groups=tuple(shapes),
        caching=draw(st.booleans()),
        scheduling_policy=draw(st.sampled_from(["fcfs", "priority"])),
        long_prefill_token_threshold=draw(st.sampled_from([0, 0, 3])),
        max_draft_tokens=num_drafts,
        propose=proposer(wrong_every, num_drafts),
        **config,
    )
    shared = prompts(1, 40, seed=3)[0]
    sent: dict[int, tuple[list[int], int]] = {}
    aborted: set[int] = set()
    for index in range(draw(st.integers(1, 12))):
        common = draw(st.integers(0, 40))
        prompt = shared[:common] + prompts(1, draw(st.integers(1, 60 - common)), seed=index)[0]
        sent[index] = prompt, draw(st.integers(1, 40))
        engine.scheduler.add_request(make_request(index, *sent[index], priority=draw(st.integers(0, 3))))
        for _ in range(draw(st.integers(0, 12))):
            engine.turn()
        match draw(st.integers(0, 9)):
            case 0 | 1:
                victim = draw(st.sampled_from(sorted(sent)))
                if engine.scheduler.abort_request(victim):
                    aborted.add(victim)
            case 2:
                engine.restart()
            case 4:
                engine.restart_with_cache()
            case 3:
                engine.scheduler.kv.reset_prefix_cache()
        engine.scheduler.check_integrity()
    engine.run()
    for index, (prompt, max_tokens) in sent.items():
        expected = expected_output(prompt, max_tokens)
        if index in aborted:
            expected = expected[: len(engine.outputs.get(index, []))]
        assert engine.outputs.get(index, []) == expected
