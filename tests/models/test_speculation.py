"""Drafts of the next tokens over a real model: right, wrong or both, the tokens and log probabilities are the same."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import msgspec
import numpy as np
import pytest

from engine_core.messages import ResolvedParams, f32
from executor.base import ModelError
from executor.config import ModelConfig, SpeculativeConfig
from executor.decode_steps import DecodeSteps, OneRow
from executor.device.base import Device
from executor.device.cpu import CpuDevice
from executor.messages import ForcedDrafts, InitKVCache, SchedulerOutput, WorkerReady
from executor.model_runner import ModelRunner
from executor.request_states import RequestStates
from executor.speculative.step_costs import StepCosts
from tests import tiny
from tests.late_device import LateDevice
from tests.models.harness import random_tokens
from tests.models.test_late_device import BLOCK_SIZE, MAX_LEN, MAX_SEQS, REQUESTS, Engine, answers, op_set

__all__ = ["op_set"]

DEVICES: dict[str, Any] = {
    "kernels": CpuDevice,
    "late": lambda: LateDevice(by_itself=False),
}


def scripts(folder: Path, outputs: dict[int, list[int]], count: int, wrong_every: int) -> SpeculativeConfig:
    """A proposer that knows what requests will generate, and is wrong now and then."""
    path = folder / "scripts.json"
    prompts = {index: prompt for index, (prompt, _) in enumerate(REQUESTS)}
    path.write_text(json.dumps([{"prompt": prompts[index], "output": output} for index, output in outputs.items()]))
    return SpeculativeConfig(method="scripted", num_speculative_tokens=count, script=str(path), wrong_every=wrong_every)


SETUPS: list[tuple[dict[str, Any], int, int]] = [
    ({"max_num_batched_tokens": 24}, 4, 3),
    ({"num_blocks": 6}, 4, 3),
    ({}, 7, 0),
    ({"max_in_flight_steps": 1}, 3, 1),
    ({"max_in_flight_steps": 3, "num_blocks": 6, "eager": True}, 1, 5),
    ({"max_num_batched_tokens": 7}, 5, 4),
    ({"windows": True}, 4, 3),
    ({"num_blocks": 6, "kv_cache_dtype": "int8"}, 4, 3),
    ({"max_num_batched_tokens": 24, "windows": True, "kv_cache_dtype": "fp8"}, 4, 3),
    ({"family": "qwen3_next", "max_num_batched_tokens": 24}, 6, 4),
    ({"family": "qwen3_next", "num_blocks": 6, "max_in_flight_steps": 3, "eager": True}, 3, 3),
    ({"family": "falcon_h1", "num_blocks": 6}, 5, 3),
]
"""Of the engine; drafts of a row; one in how many is wrong."""


@pytest.fixture(autouse=True)
def many_snapshots(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that drafts come to several places where a state is kept."""
    monkeypatch.setattr(RequestStates, "tokens_of_drafts", BLOCK_SIZE)


@pytest.mark.parametrize(
    ("device", "setup", "count", "wrong_every"),
    [(device, *setup) for device in DEVICES for setup in (SETUPS if device == "kernels" else SETUPS[:1])],
    ids=str,
)
def test_drafts_change_nothing(
    device: str,
    setup: dict[str, Any],
    count: int,
    wrong_every: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    new: Any = DEVICES[device]
    expected = answers(Engine(new(), monkeypatch, **setup))
    speculative = scripts(tmp_path, expected[0], count, wrong_every)
    engine = Engine(new(), monkeypatch, speculative=speculative, **setup)
    found = answers(engine)
    if device == "kernels":
        assert found == expected, "bit for bit"
    else:  # products of torch depend a little on how many rows there are
        assert found[0] == expected[0]
        for index, entries in expected[1].items():
            for mine, theirs in zip(found[1][index], entries, strict=True):
                assert (mine[0], mine[1][:4]) == (theirs[0], theirs[1][:4])
                assert float(f32(mine[2])[0]) == pytest.approx(float(f32(theirs[2])[0]), abs=1e-4)
    assert (engine.num_accepted > 0) == (wrong_every != 1)
    assert (engine.scheduler.num_preemptions > 0) == ("num_blocks" in setup)


PROPOSERS: dict[str, SpeculativeConfig] = {
    "suffix": SpeculativeConfig(method="suffix", num_speculative_tokens=6, max_cached_requests=100),
    "suffix, fixed": SpeculativeConfig(
        method="suffix", num_speculative_tokens=8, max_cached_requests=100, is_adaptive=False, min_token_prob=0.0
    ),
    "ngram": SpeculativeConfig(
        method="ngram", num_speculative_tokens=3, prompt_lookup_min=1, prompt_lookup_max=2, is_adaptive=False
    ),
}


def draft_model(family: str = "llama", **fields: Any) -> SpeculativeConfig:
    model = ModelConfig(model=str(tiny.checkpoint(family)), dtype="float32")
    return SpeculativeConfig(
        **{"method": "draft_model", "num_speculative_tokens": 4, "draft": model, "min_token_prob": 0.0, **fields}
    )


@pytest.mark.parametrize(
    ("family", "setup"),
    [
        ("llama", {}),
        ("qwen2", {"num_blocks": 8, "max_in_flight_steps": 3}),
        ("llama", {"num_blocks": 7, "max_num_batched_tokens": 24}),
        ("llama", {"windows": True, "max_num_batched_tokens": 17}),
    ],
    ids=str,
)
def test_a_draft_model_changes_nothing(family: str, setup: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = answers(Engine(CpuDevice(), monkeypatch, **setup))
    engine = Engine(CpuDevice(), monkeypatch, speculative=draft_model(family, is_adaptive=False), **setup)
    assert answers(engine) == expected, "bit for bit"
    engine.scheduler.check_integrity()
    assert (engine.scheduler.num_preemptions > 0) == ("num_blocks" in setup)
    if family == "llama" and "windows" not in setup:
        assert engine.num_accepted > 40, "greedy requests get their own tokens"


@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
def test_a_draft_model_draws_with_the_numbers_of_the_request(
    method: Literal["greedy", "probabilistic"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that drafts for itself is always right if it draws, whatever the filters; its likeliest token is not."""
    config = draft_model(is_adaptive=False, draft_sample_method=method)
    engine = Engine(CpuDevice(), monkeypatch, speculative=config, max_num_batched_tokens=24)
    params = ResolvedParams(max_tokens=20)
    cases: list[dict[str, Any]] = [{}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.02}, {"temperature": 0.0}]
    for index, fields in enumerate(cases):
        own = msgspec.structs.replace(params, seed=index, **fields)
        engine.add(index, random_tokens(11 * index + 1, index), own)
    engine.run()
    num_drafts = engine.scheduler.drafts.num_draft_tokens
    assert num_drafts > 40 and (engine.num_accepted == num_drafts) == (method == "probabilistic")


def test_a_draft_model_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = ModelConfig(model=str(tiny.checkpoint("llama", vocab_size=320)), dtype="float32")
    with pytest.raises(ModelError, match=r"has a vocabulary of 320 tokens, and .* one of \d+; choose a draft model"):
        Engine(CpuDevice(), monkeypatch, speculative=draft_model(draft=other))
    with pytest.raises(ModelError, match="keep a state, from which its own drafts cannot be taken away"):
        Engine(CpuDevice(), monkeypatch, speculative=draft_model("qwen3_5"))


def test_a_draft_model_knows_prompts_from_the_prefix_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that drafts for itself is always right, whatever part of the prompt it did not compute."""
    config = draft_model(is_adaptive=False)
    engine = Engine(CpuDevice(), monkeypatch, speculative=config, max_num_batched_tokens=24)
    params = ResolvedParams(temperature=0.0, max_tokens=21)
    prompt = random_tokens(70, 3)
    for index in range(3):
        engine.add(index, prompt + [index] * (index > 1), params)
    engine.run()
    assert engine.num_accepted == engine.scheduler.drafts.num_draft_tokens > 40, "all drafts hold"
    engine.add(9, prompt + engine.outputs[0][:15], ResolvedParams(temperature=0.0, max_tokens=16))
    steps = 0
    while engine.launch():
        engine.retire()
        steps += 1
    assert engine.scheduler.kv.num_hit_tokens >= 64
    assert engine.scheduler.drafts.num_draft_tokens == engine.num_accepted and steps <= 6


@pytest.mark.parametrize(
    ("proposer", "setup"),
    [
        ("suffix", {}),
        ("suffix, fixed", {"num_blocks": 6, "max_in_flight_steps": 3}),
        ("suffix, fixed", {"windows": True, "max_num_batched_tokens": 24}),
        ("suffix, fixed", {"family": "lfm2"}),
        ("suffix, fixed", {"family": "qwen3_next"}),
        ("ngram", {"max_num_batched_tokens": 17}),
    ],
    ids=str,
)
def test_what_was_said_before_may_be_proposed(
    proposer: str, setup: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All requests twice: the second time, drafts come from the first answers."""

    def all_answers(engine: Engine) -> Any:
        engine.logprobs.clear()
        engine.add(50, random_tokens(9), ResolvedParams(seed=3, allowed_token_ids=(40, 41), logprobs=1, max_tokens=40))
        return answers(engine)

    expected = all_answers(Engine(CpuDevice(), monkeypatch, **setup))
    engine = Engine(CpuDevice(), monkeypatch, speculative=PROPOSERS[proposer], **setup)
    for _ in range(2):
        assert all_answers(engine) == expected, "bit for bit"
        engine.scheduler.check_integrity()
    assert (engine.scheduler.num_preemptions > 0) == ("num_blocks" in setup)
    if proposer != "suffix":
        assert engine.num_accepted > 0
    assert engine.scheduler.drafts.num_accepted_tokens == engine.num_accepted


def test_a_device_with_late_results_waits_only_where_drafts_are_likely(monkeypatch: pytest.MonkeyPatch) -> None:
    late = LateDevice(by_itself=False)
    speculative = PROPOSERS["suffix"]
    engine = Engine(late, monkeypatch, speculative=speculative)
    plain = ResolvedParams(seed=5, max_tokens=40)
    engine.add(0, random_tokens(10), plain)
    engine.run()
    assert late.channel is not None and late.channel.most_in_flight == 2, "nothing occurs twice"
    engine = Engine(late, monkeypatch, speculative=speculative)
    engine.add(0, random_tokens(10) * 3, ResolvedParams(seed=5, max_tokens=3))
    engine.launch()
    engine.launch()
    assert late.channel is not None and late.channel.num_in_flight == 1
    engine.run()
    off = Engine(late, monkeypatch, speculative=speculative)
    off.add(0, random_tokens(10) * 3, ResolvedParams(seed=5, max_tokens=3, num_speculative_tokens=0))
    off.launch()
    off.launch()
    assert late.channel.num_in_flight == 2
    off.run()
    assert off.outputs == engine.outputs


def test_a_step_waits_for_those_that_verify_drafts_of_a_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the plan has none for it, and the proposer found none for long."""
    prompt = random_tokens(10)
    forced_at: list[int] = []

    def output(*places: int) -> list[int]:
        """What comes if wrong drafts are forced after these output tokens."""
        engine = Engine(LateDevice(by_itself=False), monkeypatch, speculative=PROPOSERS["suffix"])
        monkeypatch.setattr(engine.scheduler, "_expects_drafts", lambda slots: True)  # as with a grammar
        tokens, handle = engine.outputs, engine.worker.handle

        def force(plan: SchedulerOutput) -> bool:
            if any(plan.num_draft_tokens) and 0 in tokens and len(tokens[0]) in {*places} - {*forced_at}:
                forced_at.append(len(tokens[0]))
                drafts = np.array([expected[len(tokens[0])], 1, 2, 3], np.int32)
                forced = ForcedDrafts(0, len(prompt) + len(tokens[0]), drafts.tobytes())
                plan = msgspec.structs.replace(plan, forced_drafts=(forced,))
            return handle(plan)

        monkeypatch.setattr(engine.worker, "handle", force)
        engine.add(0, prompt, ResolvedParams(seed=5, max_tokens=40))
        engine.run()
        assert (engine.scheduler.drafts.num_draft_tokens > 0) == bool(places)
        return engine.outputs[0]

    expected: list[int] = []
    expected += output()
    assert output(15, 25) == expected and forced_at == [15, 25]


def test_steps_go_on_from_the_last_one_while_drafts_are_allowed_but_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    advanced: list[int] = []
    advance = DecodeSteps.advance

    def noted(self: DecodeSteps) -> None:
        advanced.append(len(engine.plans))
        advance(self)

    monkeypatch.setattr(DecodeSteps, "advance", noted)
    outputs = []
    for speculative in (None, PROPOSERS["suffix"]):
        engine = Engine(CpuDevice(), monkeypatch, speculative=speculative, num_scheduler_steps=1)
        advanced.clear()
        engine.add(0, random_tokens(10), ResolvedParams(seed=5, max_tokens=9))
        engine.run()
        outputs.append(engine.outputs[0])
        assert len(advanced) >= 5 and (sum(allows for _, allows in engine.plans) >= 5) == (speculative is not None)
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("setup", [{}, {"windows": True}], ids=str)
def test_requests_that_run_alone_share_the_tensors_of_their_steps(
    setup: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled: list[int] = []
    fill = OneRow.fill

    def noted(self: OneRow, slot: int, states: Any) -> None:
        filled.append(len(self.columns["input_ids"]))
        fill(self, slot, states)

    def one_by_one(engine: Engine) -> tuple[dict[int, Any], ...]:
        engine.add(9, random_tokens(5), ResolvedParams(temperature=0.0, max_tokens=99))
        engine.launch()  # another slot has other blocks from now on
        for index in (1, 2, 6):
            engine.add(index, *REQUESTS[index])
            engine.scheduler.abort_request(9)
            engine.run()
        return engine.outputs, engine.logprobs

    monkeypatch.setattr(OneRow, "fill", noted)
    setup |= {"num_scheduler_steps": 1}  # times decide nothing, neither here nor of drafts
    expected = one_by_one(Engine(CpuDevice(), monkeypatch, **setup))
    speculative = msgspec.structs.replace(scripts(tmp_path, expected[0], 4, 3), is_adaptive=False)
    assert one_by_one(Engine(CpuDevice(), monkeypatch, speculative=speculative, **setup)) == expected, "bit for bit"
    assert len(filled) > 10 and {1, 5} <= {*filled}


def test_right_drafts_save_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def steps(device: Device, **options: Any) -> tuple[int, list[int]]:
        engine = Engine(device, monkeypatch, max_in_flight_steps=1, **options)
        engine.add(0, REQUESTS[0][0], ResolvedParams(temperature=0.0, max_tokens=31))
        count = 0
        while engine.launch():
            engine.retire()
            count += 1
        return count, engine.outputs[0]

    count, output = steps(CpuDevice())
    assert count == 31
    assert steps(CpuDevice(), speculative=scripts(tmp_path, {0: output}, 5, 0)) == (1 + 5, output)


def test_more_rows_than_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step samples more tokens than there are slots; other requests of the batch have no drafts."""
    expected = answers(Engine(CpuDevice(), monkeypatch))
    some = {index: expected[0][index] for index in (0, 1, 2)}
    engine = Engine(CpuDevice(), monkeypatch, speculative=scripts(tmp_path, some, 8, 0))
    for index, (prompt, params) in enumerate(REQUESTS[:4]):
        engine.add(index, prompt, params)
    engine.add(99, random_tokens(5), ResolvedParams(temperature=0.0, max_tokens=4))
    most = 0
    while engine.launch() or engine.in_flight:
        while engine.launch():
            pass
        most = max(most, *(len(result.sampled_token_ids) // 4 for result in engine.results))
        engine.retire()
    assert most > 5
    for index in range(4):
        assert engine.outputs[index] == expected[0][index]


@pytest.mark.parametrize("device", DEVICES)
def test_outputs_can_be_forced(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of the engine takes forced tokens for sampled ones, also where results come late."""
    path = tmp_path / "scripts.json"
    prompts = [random_tokens(9, 1), random_tokens(12, 2), random_tokens(9, 3)]
    outputs = [random_tokens(20, 4), random_tokens(20, 5)]
    path.write_text(json.dumps([{"prompt": p, "output": o} for p, o in zip(prompts, outputs, strict=False)]))
    params = ResolvedParams(temperature=0.0, repetition_penalty=1.1, max_tokens=20)
    found = []
    for speculative in (None, PROPOSERS["suffix, fixed"]):
        engine = Engine(DEVICES[device](), monkeypatch, forced_outputs=str(path), speculative=speculative)
        for index, prompt in enumerate([*prompts, prompts[0]]):
            engine.add(index, prompt, params)
        engine.run()
        found.append(engine.outputs)
    assert found[0] == found[1]
    assert [found[0][index] for index in (0, 1, 3)] == [*outputs, outputs[0]]
    assert found[0][2] not in outputs and len(found[0][2]) == 20


def run_with_restarts(engine: Engine, num_blocks: int) -> tuple[dict[int, Any], ...]:
    """The answers if workers are lost twice in the meantime."""
    for index, (prompt, params) in enumerate(REQUESTS):
        engine.add(index, prompt, params)
    for _ in range(2):
        for _ in range(9):
            while engine.launch():
                pass
            engine.retire()
        engine.in_flight.clear()
        for result in engine.results:
            engine.answers.remove(result)
        (ready,) = (answer for answer in engine.answers if isinstance(answer, WorkerReady))
        engine.worker.handle(InitKVCache((num_blocks,) * len(ready.kv_cache_groups), MAX_LEN))
        engine.scheduler.restart()
    engine.run()
    engine.scheduler.check_integrity()
    return engine.outputs, engine.logprobs, engine.vectors


@pytest.mark.parametrize(
    ("proposer", "family"),
    [
        *((name, "llama") for name in ("garbage", "oracle", "suffix", "ngram", "draft_model")),
        ("oracle", "qwen3_next"),
    ],
)
def test_chunks_preemptions_and_restarts_change_nothing(
    proposer: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup: dict[str, Any] = {"num_blocks": 7, "max_num_batched_tokens": 24, "family": family}
    expected = answers(Engine(CpuDevice(), monkeypatch, **setup))
    speculative = {
        "garbage": lambda: scripts(tmp_path, expected[0], 4, 1),
        "oracle": lambda: scripts(tmp_path, expected[0], 4, 0),
        "suffix": lambda: PROPOSERS["suffix, fixed"],
        "ngram": lambda: PROPOSERS["ngram"],
        "draft_model": lambda: draft_model(is_adaptive=False),
    }[proposer]()
    engine = Engine(CpuDevice(), monkeypatch, speculative=speculative, **setup)
    assert run_with_restarts(engine, setup["num_blocks"]) == expected, "bit for bit"
    assert engine.scheduler.num_preemptions > 0
    assert engine.scheduler.drafts.num_draft_tokens > 0 or proposer in ("suffix", "ngram")


def test_late_results_have_drafts_once_a_text_repeats_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is new, plans allow no drafts, and steps are launched before the last results are there."""
    monkeypatch.setattr(StepCosts, "add", lambda *args: None)  # times decide nothing
    path = tmp_path / "scripts.json"
    prompt, passage = random_tokens(9, 1), list(range(20, 44))
    output = passage * 4
    path.write_text(json.dumps([{"prompt": prompt, "output": output}]))
    device = LateDevice(by_itself=False)
    engine = Engine(device, monkeypatch, forced_outputs=str(path), speculative=PROPOSERS["suffix"])
    engine.add(0, prompt, ResolvedParams(temperature=0.0, max_tokens=len(output)))
    engine.run()
    assert engine.outputs[0] == output
    assert device.channel is not None and device.channel.most_in_flight == 2
    assert engine.num_accepted > len(passage)


def test_drafts_do_not_stand_for_tokens_that_are_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan of several steps was made before the core knew of drafts, and comes after the worker has found them."""
    prompt = random_tokens(3, 3)
    params = ResolvedParams(seed=3, allowed_token_ids=tuple(range(20, 60)), max_tokens=80)
    single = Engine(CpuDevice(), monkeypatch)
    single.add(0, prompt, params)
    single.run()
    late, speculative = LateDevice(by_itself=False), msgspec.structs.replace(PROPOSERS["ngram"], prompt_lookup_min=2)
    engine = Engine(late, monkeypatch, speculative=speculative, num_scheduler_steps=4)
    engine.add(0, prompt, params)
    plans: list[Any] = []
    handle, engine.worker.handle = engine.worker.handle, plans.append  # type: ignore[assignment,method-assign]
    while engine.launch() or engine.in_flight:
        engine.launch()
        for plan in plans:
            handle(plan)
        plans.clear()
        engine.launch()
        while len(engine.results) < len(engine.in_flight) - len(plans):
            assert late.channel is not None
            late.channel.let_come()
            engine.worker.take_results()
        while engine.results:
            engine.retire()
            engine.launch()
    assert engine.outputs == single.outputs


def test_a_stage_waits_for_the_tokens_before_a_plan_without_drafts() -> None:
    """All stages propose drafts after the same tokens, so that they verify the same ones."""

    def waits(max_drafts: int, lacks_tokens: bool, drafts: bytes = b"") -> bool:
        stage = SimpleNamespace(is_last=False, lacks_tokens=lambda plan, states: lacks_tokens)
        speculation = SimpleNamespace(max_drafts=max_drafts, is_expected=lambda slots: True)
        states = RequestStates(1, 9, [])
        runner: Any = SimpleNamespace(stage=stage, speculation=speculation, states=states, late=None)
        plan: Any = SimpleNamespace(num_draft_tokens=drafts, forced_drafts=(), slots=bytes(4))
        return ModelRunner.must_wait_for_drafts(runner, plan)

    assert waits(3, True) and not waits(3, False), "nothing to wait for"
    assert waits(3, True, b"\x03") and not waits(0, True), "nobody proposes drafts"


def test_nobody_need_ask_for_drafts_where_they_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    speculative = SpeculativeConfig(method="suffix", num_speculative_tokens=16, is_default=True)
    late = LateDevice(by_itself=False)
    for device, family, drafts in (
        (CpuDevice(), "llama", True),
        (CpuDevice(), "falcon_h1", False),
        (late, "llama", False),
    ):
        engine = Engine(device, monkeypatch, speculative=speculative, family=family)
        (ready,) = (answer for answer in engine.answers if isinstance(answer, WorkerReady))
        runner = engine.worker.runner
        assert ready.verifies_drafts == (runner.speculation.max_drafts > 0) == drafts
        assert runner.max_samples == (64 if drafts else MAX_SEQS), "logits take little memory"


def test_states_leave_out_drafts_on_cpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    late = LateDevice(by_itself=False)
    steps = SimpleNamespace(graphs=object(), fileno=lambda: None)
    monkeypatch.setattr(late, "steps", lambda: steps)
    with pytest.raises(ModelError, match="keep a state, which leaves out rejected drafts on CPUs alone so far"):
        Engine(late, monkeypatch, family="qwen3_5", speculative=PROPOSERS["suffix"])
