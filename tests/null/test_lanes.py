"""Plans of a pipeline: different requests in plans that follow each other, and the same tokens."""

from __future__ import annotations

from typing import Any

import pytest

from engine_core.config import EngineConfig, ExecutorConfig, ParallelConfig, SchedulerConfig
from executor.messages import i32
from tests.null.test_scheduler import Engine, expected_output, make_request, prompts


def long_outputs(count: int) -> list[list[int]]:
    """Prompts whose requests get 20 tokens."""
    return [prompt for prompt in prompts(100, 9) if len(expected_output(prompt, 20)) == 20][:count]


@pytest.mark.parametrize("num_requests", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("num_stages", [2, 3])
@pytest.mark.parametrize("max_draft_tokens", [0, 2])
def test_plans_in_a_row_have_different_requests(num_requests: int, num_stages: int, max_draft_tokens: int) -> None:
    engine = Engine.create(num_stages=num_stages, depth=num_stages + 1, max_draft_tokens=max_draft_tokens)
    inputs = long_outputs(num_requests)
    for index, prompt in enumerate(inputs):
        engine.scheduler.add_request(make_request(index, prompt, 20))
    plans: list[set[int]] = []
    while engine.scheduler.has_unfinished:
        if len(engine.in_flight) == engine.depth or not engine.plan():
            engine.retire()
            continue
        own = set(i32(engine.in_flight[-1][0].slots).tolist())
        if len(engine.scheduler.table.running) == num_requests:
            plans.append(own)
    assert engine.outputs == {index: expected_output(prompt, 20) for index, prompt in enumerate(inputs)}
    if num_requests >= num_stages:  # lanes have formed after the first plans
        plans = plans[2 * num_stages : -2 * num_stages]
        assert max(map(len, plans)) == -(-num_requests // num_stages)
        for at in range(len(plans) - num_stages + 1):
            assert sorted(slot for plan in plans[at : at + num_stages] for slot in plan) == list(range(num_requests))


def test_lanes_stay_equal_as_requests_leave() -> None:
    engine = Engine.create(num_stages=2, depth=3)
    inputs = long_outputs(8)
    for index, prompt in enumerate(inputs):
        engine.scheduler.add_request(make_request(index, prompt, 20))
    for _ in range(12):
        engine.turn()
    for index in (0, 1, 2, 3):
        engine.scheduler.abort_request(index)
    for _ in range(8):
        engine.turn()
    assert [len(i32(plan.slots)) for plan, _ in engine.in_flight][-2:] == [2, 2]
    engine.run()
    for index in (4, 5, 6, 7):
        assert engine.outputs[index] == expected_output(inputs[index], 20)


@pytest.mark.parametrize("chunk", [3, 32])
@pytest.mark.parametrize("num_blocks", [20, 64])
def test_tokens_do_not_depend_on_lanes(chunk: int, num_blocks: int) -> None:
    engine = Engine.create(num_stages=2, depth=3, num_blocks=num_blocks, max_num_batched_tokens=chunk)
    inputs = prompts(12, 13)
    for index, prompt in enumerate(inputs):
        engine.scheduler.add_request(make_request(index, prompt, 20))
        engine.turn()
    engine.run()
    for index, prompt in enumerate(inputs):
        assert engine.outputs[index] == expected_output(prompt, 20)


def test_what_follows_from_the_number_of_stages() -> None:
    def settled(num_stages: int, **fields: Any) -> tuple[int, int | None]:
        parallel = ParallelConfig(pipeline_parallel_size=num_stages)
        config = EngineConfig(scheduler=SchedulerConfig(**fields), executor=ExecutorConfig(parallel=parallel))
        scheduler = config.settled().scheduler
        return scheduler.max_in_flight_steps, scheduler.max_num_batched_tokens

    assert settled(1) == (2, None)
    assert settled(3) == (4, 256)
    assert settled(2, max_in_flight_steps=6, max_num_batched_tokens=100) == (6, 100)
    assert settled(2, enable_chunked_prefill=False) == (3, None)
