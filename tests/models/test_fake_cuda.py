"""Steps on a GPU without hardware: whatever the batch, the tokens are those of a CPU."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ops
from engine_core.messages import ResolvedParams, ResolvedPoolingParams
from executor.adapter_files import adapter_hash
from executor.config import DeviceConfig, LoRAConfig, ModelConfig, SpeculativeConfig
from executor.device.steps import RECENT_TOKENS
from executor.messages import InitKVCache, LoadAdapter, LoRARequest, NewRequest, SchedulerOutput, WorkerReady
from tests import tiny
from tests.late_device import on_device
from tests.lora import write_adapter
from tests.models.harness import random_tokens
from tests.models.test_late_device import MAX_LEN, Engine, ReferenceCpu, answers
from tests.ops.cpu import randn

pytest.importorskip("triton", reason="Triton is not installed")

from executor.graph_sizes import GraphSizes
from executor.static_forward import StaticForward
from ops.triton import launch
from tests.fake_cuda import FakeCuda


@pytest.fixture
def fake() -> Iterator[FakeCuda]:
    """A GPU whose ops are the references."""
    before = ops.op_set("cpu")
    device = FakeCuda(by_itself=False, kernels="reference")
    yield device
    device.close()
    ops.use("cpu", before)


@pytest.mark.parametrize("setup", [{}, {"eager": True}, {"num_blocks": 9}, {"windows": True}], ids=str)
def test_tokens_are_those_of_a_cpu(setup: dict[str, Any], fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = answers(Engine(ReferenceCpu(), monkeypatch, **setup))
    engine = Engine(fake, monkeypatch, **setup)
    outputs, logprobs, vectors = answers(engine)
    assert outputs == expected[0]
    assert logprobs.keys() == expected[1].keys() and vectors.keys() == expected[2].keys()
    assert isinstance(engine.worker.runner.forward, StaticForward) == ("eager" not in setup)
    assert fake.channel.num_in_flight == 0
    assert (engine.scheduler.num_preemptions > 0) == ("num_blocks" in setup)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_encoders(family: str, fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = []
    requests = [(40, "MEAN"), (7, "CLS"), (50, "ALL"), (40, "CLS"), (9, "MEAN"), (20, "CLS")]
    for device in (ReferenceCpu(), fake):
        engine = Engine(device, monkeypatch, family=family, enable_chunked_prefill=False)
        for index, (length, pooling) in enumerate(requests):
            pair = ResolvedPoolingParams(pooling_type=pooling, second_segment=5 * (index % 2))
            engine.add(index, random_tokens(length, index), pair)
        engine.run()
        vectors.append(engine.vectors)
    assert isinstance(engine.worker.runner.forward, StaticForward)
    assert fake.channel.calls["graph"] > 0
    assert len(vectors[0]) == len(requests) and vectors[0].keys() == vectors[1].keys()
    for expected, found in zip(vectors[0].values(), vectors[1].values(), strict=True):
        np.testing.assert_allclose(
            np.frombuffer(found.data, np.float32), np.frombuffer(expected.data, np.float32), 1e-5, 1e-6
        )


def test_a_second_model_drafts(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that drafts for itself is mostly right. Beyond its length there are none, so steps go on from the last
    ones."""
    prompts = [random_tokens(20, 1), random_tokens(9, 2)]
    model = ModelConfig(model=str(tiny.checkpoint("llama")), dtype="float32", max_model_len=24)
    config = SpeculativeConfig(
        method="draft_model", num_speculative_tokens=3, draft=model, min_token_prob=0.0, is_adaptive=False
    )

    def run(engine: Engine) -> dict[int, list[int]]:
        for index, prompt in enumerate(prompts):
            engine.add(index, prompt, ResolvedParams(temperature=0.0, max_tokens=50))
        engine.run()
        return engine.outputs

    expected = run(Engine(ReferenceCpu(), monkeypatch))
    engine = Engine(fake, monkeypatch, speculative=config)
    assert run(engine) == expected
    assert engine.num_accepted > 2


def steps_with_adapters(engine: Engine, base: Path) -> list[bytes]:
    """The tokens of steps of which some are graphs; an adapter of a higher rank comes between them."""
    found: list[bytes] = []

    def load(number: int, rank: int) -> None:
        path = write_adapter(base, rank=rank, seed=number)
        engine.worker.handle(LoadAdapter(number, LoRARequest(str(number), number, str(path), adapter_hash(path))))

    def step(counts: list[int], new: Sequence[int] = ()) -> None:
        params = ResolvedParams(temperature=0.0, max_tokens=9)
        requests = [
            NewRequest(
                slot=slot,
                token_ids=np.array(random_tokens(3, slot), np.int32).tobytes(),
                num_prompt_tokens=3,
                num_computed_tokens=0,
                block_ids=(np.array([slot], np.int32).tobytes(),),
                params=params,
                lora_id=slot,
            )
            for slot in new
        ]
        slots, columns = np.arange(len(counts), dtype=np.int32).tobytes(), np.array(counts, np.int32).tobytes()
        plan = SchedulerOutput(len(found) + 1, slots, columns, b"\1" * len(counts), new_reqs=tuple(requests))
        engine.worker.handle(plan)
        if isinstance(engine.device, FakeCuda):
            engine.device.channel.let_come()
            engine.worker.take_results()
        (result,) = engine.results
        engine.answers.remove(result)
        found.append(result.sampled_token_ids)

    load(1, rank=4)
    step([3, 3], new=(0, 1))
    for _ in range(2):
        step([1, 1])
    load(2, rank=20)
    step([1, 1, 3], new=(2,))
    step([1, 1, 1])
    return found


def test_rows_with_adapters_are_in_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With Triton's kernels, interpreted: there is no other way to adapters on a GPU."""
    before = ops.op_set("cpu")
    base = tiny.checkpoint("llama", num_hidden_layers=1)
    lora = LoRAConfig(enable_lora=True, max_loras=2, max_lora_rank=20)
    expected = steps_with_adapters(Engine(ReferenceCpu(), monkeypatch, folder=base, lora=lora), base)
    device = FakeCuda(by_itself=False)
    try:
        engine = Engine(device, monkeypatch, folder=base, lora=lora)
        captured = device.channel.fake_graphs.num_captured
        assert steps_with_adapters(engine, base) == expected
        assert device.channel.calls["graph"] == 3 and device.channel.fake_graphs.num_captured == captured + 2
    finally:
        device.close()
        ops.use("cpu", before)


@pytest.mark.parametrize("is_recorded", [False, True])
def test_launches_between_shared_memory_wait_their_turn(is_recorded: bool) -> None:
    """The second product of experts has no tensor of a step: it reads and writes what kernels share."""
    before = ops.op_set("cpu")
    x, routed = randn(3, 32), torch.tensor([[0.5, 0, 2], [0, 1, 0.25], [0.75, 0.5, 0]])
    first, second = ([randn(rows, 32, seed=rows + index) for index in range(3)] for rows in (64, 32))
    weights = ops.ExpertWeights(tuple(first), tuple(second), None, None, "silu", 2)
    expected = ops.experts.reference(x, routed, weights)
    launch.scratch.clear()  # so it has no results of another test
    device = FakeCuda(by_itself=False)
    try:
        device.initialize(DeviceConfig(num_threads=1), 0)
        channel = device.steps()
        with ExitStack() as stack:
            launches = stack.enter_context(launch.recorded()) if is_recorded else []
            out = ops.experts(on_device(x), on_device(routed), weights)
        for each in launches:
            launch.submit(each)
        pending = channel.download([out])
        assert not pending.is_ready()
        (found,) = pending.collect()
    finally:
        device.close()
        ops.use("cpu", before)
    np.testing.assert_allclose(found, expected, 1e-5, 1e-5)


def test_a_step_is_one_upload_and_one_graph(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(fake, monkeypatch)
    captured = fake.channel.fake_graphs.num_captured
    assert captured == len(GraphSizes(5, 64, 5).warm) > 0
    runner = engine.worker.runner
    for index in range(3):
        engine.add(index, random_tokens(20, index), ResolvedParams(max_tokens=20))
    seen = []
    for _ in range(8):
        planned = engine.scheduler.schedule()
        assert planned is not None
        plan, step = planned
        engine.in_flight.append(step)
        fake.channel.calls.clear()
        started = runner.begin(plan)
        seen.append(dict(fake.channel.calls))
        engine.worker._outputs.append(runner.finish(started))
        engine.retire()
    assert seen[0]["launch"] > 10  # the first step of its size
    assert seen[1:] == [{"upload": 1, "graph": 1}] * 7
    assert fake.channel.fake_graphs.num_captured == captured + 1


def test_more_new_blocks_than_a_step_has_room_for(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [random_tokens(200, index) for index in range(3)]
    monkeypatch.setattr("executor.graph_sizes.UPDATES", 0)

    def run(engine: Engine) -> dict[int, list[int]]:
        for index, prompt in enumerate(prompts):
            engine.add(index, prompt, ResolvedParams(temperature=0.0, max_tokens=4))
        engine.run()
        return engine.outputs

    expected = run(Engine(ReferenceCpu(), monkeypatch))
    assert run(Engine(fake, monkeypatch)) == expected


def test_a_request_goes_on_long_after_another_has_left(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(engine: Engine) -> dict[int, list[int]]:
        for index, max_tokens in enumerate((4, 2 * RECENT_TOKENS + 8)):  # places of tokens occur again
            engine.add(index, random_tokens(9, index), ResolvedParams(temperature=0.0, max_tokens=max_tokens))
        engine.run()
        return engine.outputs

    expected = run(Engine(ReferenceCpu(), monkeypatch))
    assert run(Engine(fake, monkeypatch)) == expected


def random_requests(rng: random.Random) -> list[tuple[list[int], ResolvedParams]]:
    """Long and short ones, most of which ask for nothing but filters, so that steps of the same requests follow."""
    more: list[dict[str, Any]] = [{}] * 4 + [{"presence_penalty": 0.5}, {"logprobs": 1}, {"top_p": 0.8, "top_k": 20}]
    return [
        (
            random_tokens(rng.randint(1, 70), index),
            ResolvedParams(
                temperature=rng.choice([0.0, 1.0]),
                seed=index,
                max_tokens=rng.choice([2, 30, 3 * RECENT_TOKENS]),
                **rng.choice(more),
            ),
        )
        for index in range(12)
    ]


def test_requests_that_come_and_go(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(1)
    requests = random_requests(rng)
    alone = Engine(ReferenceCpu(), monkeypatch)
    for index, (prompt, params) in enumerate(requests):
        alone.add(index, prompt, params)
    alone.run()

    engine = Engine(fake, monkeypatch, num_blocks=11)
    left: set[int] = set()
    waiting = list(enumerate(requests))
    while waiting or engine.in_flight or engine.scheduler.has_unfinished:
        if waiting and rng.random() < 0.2:
            index, (prompt, params) = waiting.pop(0)
            engine.add(index, prompt, params)
        elif rng.random() < 0.02:
            index = rng.randrange(len(requests))
            if index in engine.outputs and engine.scheduler.abort_request(index):
                left.add(index)
        elif not (rng.random() < 0.7 and engine.launch()) and engine.in_flight:
            engine.retire()
    engine.scheduler.check_integrity()
    assert left and engine.scheduler.num_preemptions
    for index, tokens in alone.outputs.items():
        if index in left:
            tokens = tokens[: len(engine.outputs[index])]
        assert engine.outputs[index] == tokens


def test_memory_is_known_before_the_cache(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(fake, monkeypatch)
    ready = next(answer for answer in engine.answers if isinstance(answer, WorkerReady))
    runner = engine.worker.runner
    assert runner.program is not None
    planned = runner.program.num_bytes
    assert sum(arena.nbytes for arena in fake.channel.arenas[-2:]) == planned
    assert ready.step_bytes > planned + fake.channel.fake_graphs.reserve_bytes
    runner.initialize(InitKVCache((48,), MAX_LEN))


@pytest.mark.parametrize(
    "step, size",
    [((1, 1, 1), (8, 8, 8)), ((9, 3, 9), (16, 16, 16)), ((100, 1, 1), (112, 64, 8)), ((300, 64, 64), (512, 64, 64))],
)
def test_sizes(step: tuple[int, int, int], size: tuple[int, int, int]) -> None:
    chosen = GraphSizes(64, 2048, 64).size(*step)
    assert (chosen.tokens, chosen.rows, chosen.samples) == size and chosen.is_padded
    assert not GraphSizes(64, 2048, 64).size(513, 1, 1).is_padded


def test_every_step_fits_its_size() -> None:
    sizes = GraphSizes(37, 300, 41)
    for tokens in range(1, 301, 7):
        for rows in range(1, min(tokens, 37) + 1, 5):
            for samples in {0, 1, min(tokens, 41) // 2, min(tokens, 41)}:
                size = sizes.size(tokens, rows, samples)
                assert tokens <= size.tokens <= 300 and rows <= size.rows <= 37 and samples <= size.samples <= 41
    assert np.all(np.diff([size.tokens for size in sizes.warm]) < 0)
