"""What the engine promises, on a GPU: a request gets the same tokens and log probabilities, whatever runs beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine_core.messages import ResolvedParams
from executor.device.base import Device
from executor.model_runner import ModelRunner
from executor.static_forward import StaticForward
from ops.triton.launch import scratch
from tests.gpu.conftest import has_gpu
from tests.models.harness import random_tokens
from tests.models.test_late_device import Engine, ReferenceCpu

SCALE = 8 if has_gpu() else 1
"""Interpreted steps take as long as thousands on a card."""
NUM_TOKENS = 3 * SCALE
REQUESTS: list[tuple[list[int], ResolvedParams]] = [
    (random_tokens(7 * SCALE, 1), ResolvedParams(temperature=0.0, max_tokens=NUM_TOKENS)),
    (random_tokens(3 * SCALE, 2), ResolvedParams(seed=2, top_p=0.9, top_k=40, logprobs=3, max_tokens=NUM_TOKENS)),
    (random_tokens(5 * SCALE, 3), ResolvedParams(seed=3, repetition_penalty=1.3, max_tokens=NUM_TOKENS)),
]
ON_A_CARD = pytest.mark.skipif(not has_gpu(), reason="the interpreter is slow; see tests/models/test_fake_cuda.py")
Answers = tuple[dict[int, list[int]], dict[int, Any]]


def answers(engine: Engine, chosen: tuple[int, ...] = (0, 1, 2), resumed: int = 0) -> Answers:
    """Tokens and log probabilities of some requests.

    Args:
        engine: Runs them together.
        chosen: Their indices.
        resumed: Tokens of each output that are known from an earlier life.
    """
    for index in chosen:
        prompt, params = REQUESTS[index]
        engine.add(index, prompt, params, resumed=found[0][0][index][:resumed] if resumed else [])
    engine.run()
    return engine.outputs, engine.logprobs


found: list[Answers] = []


@pytest.fixture
def expected(device: Device, monkeypatch: pytest.MonkeyPatch) -> Answers:
    """What the device answers if all run together, with graphs. Computed once."""
    if not found:
        found.append(answers(Engine(device, monkeypatch)))
    return found[0]


def test_tokens_are_those_of_the_references(device: Device, expected: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    assert answers(Engine(ReferenceCpu(), monkeypatch))[0] == expected[0]


@pytest.mark.parametrize(
    "setup",
    [{"eager": True}, {"max_num_batched_tokens": 6}, pytest.param({"num_blocks": 4}, marks=ON_A_CARD)],
    ids=["eager", "chunked", "preempted"],
)
def test_bits_are_the_same_in_any_run(
    setup: dict[str, Any], device: Device, expected: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(device, monkeypatch, **setup)
    assert answers(engine) == expected
    assert (engine.scheduler.num_preemptions > 0) == ("num_blocks" in setup)


def test_a_request_alone_has_the_same_bits(device: Device, expected: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, logprobs = answers(Engine(device, monkeypatch), (1,))
    assert outputs[1] == expected[0][1] and logprobs[1] == expected[1][1]


def test_a_request_goes_on_after_a_restart(device: Device, expected: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, _ = answers(Engine(device, monkeypatch), resumed=2)
    assert {index: expected[0][index][:2] + tokens for index, tokens in outputs.items()} == expected[0]


@pytest.mark.skipif(not has_gpu(), reason="the fake device refuses reads by itself")
def test_nothing_waits_between_plan_and_launch(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, finish = ModelRunner.begin, ModelRunner.finish

    def guarded(function: Any) -> Any:
        def run(*args: Any) -> Any:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return function(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return run

    engine = Engine(device, monkeypatch)
    monkeypatch.setattr(ModelRunner, "begin", guarded(begin))
    monkeypatch.setattr(ModelRunner, "finish", guarded(finish))
    answers(engine)


def test_a_decode_step_is_four_calls(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    if has_gpu():
        pytest.skip("the fake device counts")
    scratch.clear()
    engine = Engine(device, monkeypatch)
    graphs = engine.device.channel.fake_graphs  # type: ignore[attr-defined]
    ready = {each.constants["IS_SPLIT"] for each in graphs.compiled if each.name == "attention_kernel"}
    assert ready == {True, False}, "prompts compile nothing"
    engine.add(0, random_tokens(5, 1), ResolvedParams(temperature=0.7, top_p=0.9, max_tokens=9))
    steps = []
    assert engine.launch()
    for _ in range(3):
        engine.retire()
        engine.device.channel.calls.clear()  # type: ignore[attr-defined]
        assert engine.launch()
        steps.append(dict(engine.device.channel.calls))  # type: ignore[attr-defined]
    # The first decode step tells the sampler of its rows; then the device counts on by itself.
    assert all(calls["graph"] == 1 and sum(calls.values()) <= 5 for calls in steps), steps
    assert all(sum(calls.values()) == 4 for calls in steps[1:]), steps
    runner = engine.worker.runner
    fixed, _ = StaticForward.memory(runner._setup())
    assert 0 < scratch.num_bytes(runner.device.torch_device) < fixed  # what kernels share was planned for
