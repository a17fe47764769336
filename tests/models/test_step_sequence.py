"""Plans of several steps on a real worker: the same tokens and log probabilities, in fewer messages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from executor.config import SpeculativeConfig
from executor.device.cpu import CpuDevice
from executor.forward import UploadedForward
from executor.messages import ModelRunnerOutput, ResolvedParams, RowError, SchedulerOutput, TokenLogprobs, i32
from executor.step_sequence import Answers, steps_of
from tests.late_device import LateDevice
from tests.models.harness import random_tokens
from tests.models.test_late_device import REQUESTS, Engine, ReferenceCpu, op_set
from tests.models.test_speculation import draft_model, scripts

__all__ = ["op_set"]


ROUNDS = [(0, 1, 2, 4), (3, 5, 6, 8)]
"""Requests that run at a time: so many that none waits while others decode."""


def answers(engine: Engine, rounds: Sequence[Sequence[int]] = ROUNDS) -> tuple[dict[int, Any], ...]:
    for indices in rounds:
        for index in indices:
            engine.add(index, *REQUESTS[index])
        engine.run()
    engine.scheduler.check_integrity()
    return engine.outputs, engine.logprobs, engine.vectors


SETUPS: list[dict[str, Any]] = [
    {},
    {"num_blocks": 7, "eager": True},
    {"windows": True, "max_in_flight_steps": 3},
    {"family": "qwen3_next"},
    {"family": "lfm2", "max_in_flight_steps": 1},
]


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_tokens_are_those_of_single_steps(setup: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(UploadedForward, "_may_go_on", lambda *args: False)  # each step has inputs of its own
        single = Engine(CpuDevice(), monkeypatch, num_scheduler_steps=1, **setup)
        expected = answers(single)
    engine = Engine(CpuDevice(), monkeypatch, num_scheduler_steps=5, **setup)
    assert answers(engine) == expected, "bit for bit"
    assert len(engine.plans) < 0.75 * len(single.plans)
    assert (engine.scheduler.num_preemptions > 0) == ("num_blocks" in setup)


@pytest.mark.parametrize(
    ("wrong_every", "setup"),
    [(0, {}), (3, {"num_blocks": 7}), (1, {"windows": True, "max_in_flight_steps": 3}), (-1, {}), (4, {"late": True})],
    ids=str,
)
def test_drafts_are_verified_in_each_step(
    wrong_every: int, setup: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """-1: those of a draft model."""
    is_late = setup.pop("late", False)

    def engine(num_steps: int, speculative: SpeculativeConfig | None = None) -> Engine:
        device = LateDevice(by_itself=False) if is_late else CpuDevice()
        return Engine(device, monkeypatch, num_scheduler_steps=num_steps, speculative=speculative, **setup)

    expected = answers(engine(1))
    config = draft_model() if wrong_every < 0 else scripts(tmp_path, expected[0], 4, wrong_every)
    config = msgspec.structs.replace(config, is_adaptive=False)  # numbers of plans must not depend on time
    single, several = engine(1, config), engine(3, config)
    assert answers(single)[0] == answers(several)[0] == expected[0]
    if not is_late:  # products of torch depend a little on how many rows there are
        assert several.logprobs == expected[1] and several.vectors == expected[2], "bit for bit"
    assert (3, True) in several.plans
    if "num_blocks" not in setup:  # a plan of several steps takes more blocks, so that more requests are preempted
        assert len(several.plans) < len(single.plans)
    assert (several.num_accepted > 0) == (wrong_every != 1)


def test_tokens_of_a_device_with_late_results(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = [(0, 1), (2, 6)]  # others wait for those that look at their tokens
    expected = answers(Engine(ReferenceCpu(), monkeypatch, num_scheduler_steps=1), rounds)
    late = LateDevice(by_itself=False)
    assert answers(Engine(late, monkeypatch, num_scheduler_steps=5), rounds) == expected
    assert late.channel is not None and late.channel.most_in_flight > 2, "steps of a plan are launched ahead, too"


def test_a_plan_is_applied_once() -> None:
    plan = SchedulerOutput(
        7, b"slots", b"counts", b"sampled", finished_slots=b"gone", block_updates=(b"blocks",), num_steps=3
    )
    first, *others = steps_of(plan)
    assert first == plan
    left = SchedulerOutput(7, b"slots", b"counts", b"sampled")
    assert others == [msgspec.structs.replace(left, num_steps=2), left]
    assert steps_of(left) == (left,)


def result(tokens: list[int], accepted: bytes = b"", **fields: Any) -> ModelRunnerOutput:
    ids = np.array(tokens, np.int32).tobytes()
    return ModelRunnerOutput(7, sampled_token_ids=ids, num_accepted=accepted, forward_ms=1.5, **fields)


def joined(*parts: ModelRunnerOutput) -> ModelRunnerOutput:
    answers = Answers()
    *firsts, last = [answers.add(part, left) for part, left in zip(parts, range(len(parts), 0, -1), strict=True)]
    assert firsts == [None] * len(firsts) and last is not None
    return last


def test_results_are_joined_row_by_row() -> None:
    assert joined(result([1, 2])) == result([1, 2])
    found = joined(result([1, 2, 3]), result([4, 5, 6]))
    assert i32(found.sampled_token_ids).tolist() == [1, 4, 2, 5, 3, 6]
    assert (found.num_accepted, found.num_verified, found.forward_ms) == (b"", b"", 3.0)
    parts = (
        result([1, 2, 3, 4], b"\2\0", num_verified=b"\3\0", logprobs=(entry(0, 0), entry(0, 2), entry(1, 0))),
        result([5, 6], row_errors=(error(1, 0),), logprobs=(entry(0, 0),)),
        result([7, 8, 9], b"\0\1", num_verified=b"\0\2", row_errors=(error(1, 1),), draft_token_ids=b"next"),
    )
    found = joined(*parts)
    assert i32(found.sampled_token_ids).tolist() == [1, 2, 3, 5, 7, 4, 6, 8, 9]
    assert (found.num_accepted, found.num_verified) == (b"\2\0\0\0\0\1", b"\3\0\0\0\0\2")
    assert found.logprobs == (entry(0, 0), entry(0, 2), entry(1, 0), entry(0, 3))
    assert found.row_errors == (error(1, 1),), "the first one"
    assert found.draft_token_ids == b"next"


def entry(row: int, position: int) -> TokenLogprobs:
    return TokenLogprobs(row, position, b"", b"", 1)


def error(row: int, position: int) -> RowError:
    return RowError(row, "broken", position=position)


def test_prompts_that_come_in_between_begin_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def outputs(num_steps: int) -> dict[int, list[int]]:
        engine = Engine(CpuDevice(), monkeypatch, num_scheduler_steps=num_steps, max_num_batched_tokens=16)
        engine.add(0, random_tokens(9, 1), ResolvedParams(temperature=0.0, max_tokens=40))
        for index in range(1, 4):
            while len(engine.outputs[0]) < 8 * index:
                engine.launch()
                engine.retire()
            engine.add(
                index, random_tokens(40, index), ResolvedParams(seed=index, max_tokens=20, frequency_penalty=0.5)
            )
        engine.run()
        return engine.outputs

    assert outputs(1) == outputs(4)
