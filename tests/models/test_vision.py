"""Models that see, against transformers: logits and greedy tokens, and the same bits however images are scheduled."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ops
from engine_core.cache_shape import CacheShape, GroupShape
from engine_core.config import CacheConfig, SchedulerConfig
from engine_core.messages import EngineCoreRequest, ResolvedParams, f32
from engine_core.request import Request
from engine_core.scheduler import Scheduler
from engine_core.validation import request_problem
from executor import forward
from executor.captured_layers import CapturedLayers
from executor.config import DeviceConfig, ModelConfig, StepSize
from executor.device.base import Device
from executor.device.cpu import CpuDevice
from executor.forward import run_model
from executor.image_inputs import ImageInputs
from executor.layers.attention import form_groups
from executor.layers.rotary import RotaryEmbedding
from executor.loader import load_model
from executor.messages import InitKVCache
from executor.model_runner import ModelRunner
from executor.models.vision.layer_stack import LayerStack
from executor.parallel import ParallelState
from ops.cpu.ranks import SharedRank
from tests import tiny
from tests.late_device import plain
from tests.models.harness import CPU, random_tokens
from tests.ops.cpu import NEEDS_KERNELS
from tests.shared_ranks import on_shared_ranks, state_of
from tests.vision_families import IMAGE_TOKEN, VISION, checkpoint, picture, reference_logits, spec_of, with_images

BLOCK_SIZE = 32
MAX_LEN = 256
MAX_SEQS = 4
MAX_TOKENS = 6


@functools.cache
def runner(name: str, step: int) -> ModelRunner:
    return new_runner(name, step)


def new_runner(
    name: str,
    step: int,
    rank: SharedRank | None = None,
    config: ModelConfig | None = None,
    device: Device | None = None,
) -> ModelRunner:
    config = config or ModelConfig(model=str(checkpoint(name)), dtype="float32")
    device = device or CpuDevice()
    place = ParallelState() if rank is None else state_of(rank)
    loaded = load_model(config, place, CPU, None, lambda *_: None, communicator=rank)
    groups = form_groups(loaded.model.attention_layers(), BLOCK_SIZE)
    size = StepSize(max_num_seqs=MAX_SEQS, max_num_batched_tokens=step)
    made = ModelRunner(loaded, device, groups, step_size=size, enforce_eager=False, communicator=rank)
    assert loaded.tower is not None
    captures, hidden_size = made.channel.graphs is None, loaded.hf_config.hidden_size
    made.images = ImageInputs(
        loaded.tower, hidden_size, loaded.dtype, device, step, captures=captures, channel=made.channel
    )
    return made


@dataclass
class Answer:
    """What a request gives, to the bit."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[bytes] = field(default_factory=list)
    num_cached: int = 0


class Engine:
    """A scheduler and a model."""

    def __init__(
        self,
        name: str,
        step: int = 256,
        *,
        num_tokens: int = 2048,
        caching: bool = False,
        rank: SharedRank | None = None,
        made: ModelRunner | None = None,
    ) -> None:
        self.name = name
        self.runner = made or (runner(name, step) if rank is None else new_runner(name, step, rank))
        assert self.runner.images is not None
        self.encoded: list[str] = []
        self.images = self.runner.images
        self.images._requests, self.images._outputs = {}, {}
        sizes = [group.block_size for group in self.runner.groups]
        shapes = [GroupShape(num_tokens // BLOCK_SIZE, size, None) for size in sizes]
        self.runner.initialize(InitKVCache(tuple(shape.num_blocks for shape in shapes), MAX_LEN))
        self.scheduler = Scheduler(
            SchedulerConfig(max_num_seqs=MAX_SEQS, max_num_batched_tokens=step),
            CacheConfig(enable_prefix_caching=caching),
            CacheShape(tuple(shapes), has_states=len(set(sizes)) > 1),
            MAX_LEN,
            multimodal=self.images.support,
        )
        self.in_flight: deque[Any] = deque()
        self.answers: dict[int, Answer] = {}
        self.prompts: dict[int, tuple[list[int], list[Any]]] = {}

    def add(self, index: int, prompt: list[int], pictures: list[Any]) -> None:
        tokens, features = with_images(self.name, prompt, pictures)
        self.prompts[index] = tokens, pictures
        message = EngineCoreRequest(
            request_id=str(index),
            index=index,
            prompt_token_ids=np.array(tokens, np.int32).tobytes(),
            sampling_params=ResolvedParams(
                temperature=0, max_tokens=MAX_TOKENS, logprobs=3, logit_bias=((IMAGE_TOKEN, -100.0),)
            ),
            mm_features=features,
        )
        assert request_problem(message, self.runner.vocab_size, MAX_LEN, multimodal=self.images.support) is None
        self.answers[index] = Answer()
        self.scheduler.add_request(Request(message))

    def run(self) -> dict[int, Answer]:
        while True:
            planned = self.plan() if len(self.in_flight) < 2 else None
            if planned is not None:
                self.in_flight.append(planned)
                continue
            if not self.in_flight:
                return self.answers
            self.take(self.in_flight.popleft())

    def plan(self) -> Any:
        planned = self.scheduler.schedule()
        if planned is not None:
            self.encoded += [str(entry) for entry in planned[0].encoder_inputs]
        return planned

    def take(self, planned: Any) -> None:
        """Computes a step."""
        plan, step = planned
        with torch.inference_mode():
            result = self.runner.execute(plan)
        for output in self.scheduler.update_from_output(step, result).outputs:
            assert output.error is None
            answer = self.answers[output.index]
            answer.tokens += output.new_token_ids
            answer.logprobs += [entry.logprobs + entry.token_ids for entry in output.new_logprobs]
            answer.num_cached = output.num_cached_tokens or answer.num_cached
        self.scheduler.check_integrity()


def prompt(name: str, *counts: int) -> list[int]:
    """Texts of so many tokens, with an image between each two."""
    placeholder = spec_of(name).placeholder_id or IMAGE_TOKEN
    result: list[int] = []
    for number, count in enumerate(counts):
        result += [*([placeholder] if number else []), *(token % 300 for token in random_tokens(count, number))]
    return result


def requests(name: str) -> dict[int, tuple[list[int], list[Any]]]:
    """One image, two, none, one at the end, one at the beginning."""
    first, second = (picture(name, size, seed) for seed, size in enumerate(VISION[name].sizes))
    return {
        1: (prompt(name, 5, 7), [first]),
        2: (prompt(name, 3, 4, 9), [second, first]),
        3: (prompt(name, 20), []),
        4: (prompt(name, 35, 0), [second]),
        5: (prompt(name, 0, 6), [first]),
    }


@functools.cache
def alone(name: str) -> dict[int, Answer]:
    """The answers to each request in an engine of its own."""
    answers = {}
    for index, (tokens, pictures) in requests(name).items():
        engine = Engine(name)
        engine.add(index, tokens, pictures)
        answers.update(engine.run())
    return answers


@pytest.mark.parametrize("name", VISION)
def test_logits_and_greedy_tokens_are_those_of_transformers(name: str) -> None:
    for index, (tokens, pictures) in requests(name).items():
        expanded, _ = with_images(name, tokens, pictures)
        answer = alone(name)[index]
        logits = reference_logits(name, [*expanded, *answer.tokens], pictures)[len(expanded) - 1 : -1].clone()
        expected = logits.log_softmax(dim=-1)
        logits[:, IMAGE_TOKEN] = -torch.inf
        assert answer.tokens == logits.argmax(dim=-1).tolist()
        for row, (token, entry) in enumerate(zip(answer.tokens, answer.logprobs, strict=True)):
            assert abs(float(f32(entry[:16])[0]) - float(expected[row, token])) < 2e-4, (index, row)


@pytest.mark.parametrize("name", VISION)
@pytest.mark.parametrize("step", [256, 40, 7])
def test_neighbours_and_chunks_change_no_bit(name: str, step: int) -> None:
    """Images of several requests in a step; prompts that are cut before, inside and after images; two rounds, of which
    the second finds its prefixes and encodes nothing again."""
    engine = Engine(name, step, caching=True)
    for index, (tokens, pictures) in requests(name).items():
        engine.add(index, tokens, pictures)
    answers = engine.run()
    for index, each in alone(name).items():
        assert (answers[index].tokens, answers[index].logprobs) == (each.tokens, each.logprobs), index
    num_parts = sum(len(picture.image.patches) for picture in requests(name)[2][1])
    assert len(engine.encoded) == num_parts, "each image is encoded once"
    for index, (tokens, pictures) in requests(name).items():
        engine.add(index + 10, tokens, pictures)
    again = engine.run()
    for index, each in alone(name).items():
        assert (again[index + 10].tokens, again[index + 10].logprobs) == (each.tokens, each.logprobs)
    assert len(engine.encoded) == num_parts
    assert again[14].num_cached >= BLOCK_SIZE or name == "qwen3_5"  # whose states are kept for each 256 tokens


@pytest.mark.parametrize("name", VISION)
def test_programs_of_layers_change_no_bit(name: str) -> None:
    """Images of two sizes, the larger one last, and the smaller one again."""
    images = Engine(name).images
    stacks = [module for module in images.tower.modules() if isinstance(module, LayerStack)]
    features = with_images(name, *requests(name)[2])[1]
    found = []
    for has_programs in (False, True):
        for stack in stacks:
            stack.replay = CapturedLayers(stack) if has_programs else None
        with torch.inference_mode():
            found.append([images.encode(feature) for feature in (*features, features[0])])
    assert stacks and all(map(torch.equal, *found))


def test_experts_as_files_of_the_hub_hold_them(tmp_path: Path) -> None:
    folder = tiny.copy_of(checkpoint("qwen3_vl_moe"), tmp_path / "hub")
    tensors = load_file(folder / "model.safetensors")
    stacks = {name: each.transpose(1, 2).contiguous() for name, each in tensors.items() if "experts" in name}
    assert stacks
    save_file({**tensors, **stacks}, folder / "model.safetensors")
    made = new_runner("qwen3_vl_moe", 256, config=ModelConfig(model=str(folder), dtype="float32"))
    engine = Engine("qwen3_vl_moe", made=made)
    engine.add(3, *requests("qwen3_vl_moe")[3])
    assert engine.run()[3] == alone("qwen3_vl_moe")[3]


@NEEDS_KERNELS
def test_ranks_that_share_the_language_model() -> None:
    expected = alone("llava")

    def run(rank: SharedRank) -> dict[int, Answer]:
        engine = Engine("llava", rank=rank)
        for index, (tokens, pictures) in requests("llava").items():
            engine.add(index, tokens, pictures)
        return engine.run()

    first, second = on_shared_ranks(2, run)
    assert first == expected
    assert [answer.tokens for answer in second.values()] == [answer.tokens for answer in first.values()]


def test_preempted_requests_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine("qwen2_vl", 40, num_tokens=6 * BLOCK_SIZE)
    for index, (tokens, pictures) in requests("qwen2_vl").items():
        engine.add(index, tokens, pictures)
    answers = engine.run()
    assert {index: each.tokens for index, each in answers.items()} == {
        index: each.tokens for index, each in alone("qwen2_vl").items()
    }


@pytest.mark.parametrize("name", ["llava", "idefics3", "llava_next"])
def test_restarted_workers_get_the_images_again(name: str) -> None:
    """Also in the middle of one."""
    engine = Engine(name, 40)
    tokens, pictures = requests(name)[2]
    engine.add(2, tokens, pictures)
    plan, step = engine.scheduler.schedule() or pytest.fail()
    with torch.inference_mode():
        engine.scheduler.update_from_output(step, engine.runner.execute(plan))
    engine.scheduler.restart()
    engine.images._outputs.clear()
    assert engine.run()[2].tokens == alone(name)[2].tokens


@pytest.mark.parametrize("name", ["idefics3", "llava_next"])
def test_answers_go_on_between_the_tiles_of_an_image(name: str) -> None:
    engine = Engine(name, 40)
    engine.add(3, *requests(name)[3])
    engine.take(engine.plan())
    engine.add(1, *requests(name)[1])
    (slot,) = engine.scheduler.table.running.tolist()
    sizes = [feature.num_patches for feature in with_images(name, *requests(name)[1])[1]]
    num_steps = 0
    while len(engine.encoded) < len(sizes):
        plan, step = engine.plan()
        if slot in engine.scheduler.table.running.tolist():
            chosen = [sizes[index] for _, index in plan.encoder_inputs]
            assert slot in step.slots and (len(chosen) <= 1 or sum(chosen) <= 40)
            num_steps += 1
        engine.take((plan, step))
    assert num_steps >= 2
    answers = engine.run()
    for index in (1, 3):
        assert (answers[index].tokens, answers[index].logprobs) == (
            alone(name)[index].tokens,
            alone(name)[index].logprobs,
        )


def test_text_alone_runs_the_captured_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only steps with tokens of images go op by op: neither other requests nor the rest of an answer cost more."""
    eager: list[int] = []

    def counted(model: Any, batch: Any, embeds: Any = None) -> Any:
        eager.append(len(batch.input_ids))
        return run_model(model, batch, embeds)

    engine = Engine("llava")
    monkeypatch.setattr(forward, "run_model", counted)
    engine.add(3, *requests("llava")[3])
    engine.run()
    assert not eager and not engine.encoded
    engine.add(1, *requests("llava")[1])
    engine.run()
    assert eager == [5 + 16 + 7] and len(engine.encoded) == 1


@contextmanager
def a_gpu(kernels: str) -> Iterator[Any]:
    """A GPU without hardware."""
    fake_cuda = pytest.importorskip("tests.fake_cuda", reason="Triton is not installed")
    before = ops.op_set("cpu")
    fake = fake_cuda.FakeCuda(by_itself=False, kernels=kernels)
    try:
        fake.initialize(DeviceConfig(), 0)
        yield fake
    finally:
        fake.close()
        ops.use("cpu", before)


def put_on_device(made: ModelRunner) -> ImageInputs:
    from tests import fake_cuda

    assert made.images is not None
    for module in (made.images.tower, *made.model.modules()):
        if module is made.images.tower or isinstance(module, RotaryEmbedding):
            fake_cuda.put_on_device(module)
    return made.images


@pytest.mark.parametrize("name", ["llava_next", "mistral3", "gemma3", "idefics3", "qwen2_5_vl", "qwen3_vl"])
def test_gpus_answer_likewise(name: str) -> None:
    """Images of several requests in a step, prompts that are cut, and decoding in graphs; the host reads nothing."""
    chosen = (2, 4)
    expected = {index: alone(name)[index].tokens for index in chosen}
    with a_gpu("reference") as fake:
        engine = Engine(name, 40, made=new_runner(name, 40, device=fake))
        put_on_device(engine.runner)
        for index in chosen:
            engine.add(index, *requests(name)[index])
        found = engine.run()
        assert {index: answer.tokens for index, answer in found.items()} == expected
        assert fake.channel.calls["graph"] > 0


def test_kernels_of_gpus_encode_images() -> None:
    name = "llava"
    feature = with_images(name, *requests(name)[1])[1][0]
    images = Engine(name).images
    with torch.inference_mode():
        expected = images.encode(feature)
    with a_gpu("triton") as fake:
        images = put_on_device(new_runner(name, 256, device=fake))
        with torch.inference_mode():
            found = images.encode(feature)
            fake.channel.flush()
    torch.testing.assert_close(plain(found), expected, rtol=1e-4, atol=1e-4)
