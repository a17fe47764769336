"""KV cache groups with real models: freeing blocks behind windows changes no token and no bit."""

from __future__ import annotations

import functools
import os
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from api import LLM, SamplingParams
from api.errors import RequestError
from engine_core.cache_shape import CacheShape, GroupShape
from engine_core.config import CacheConfig, SchedulerConfig
from engine_core.messages import EngineCoreRequest, ResolvedParams, ResolvedPoolingParams, to_array
from engine_core.request import Request
from engine_core.scheduler import Scheduler
from engine_core.snapshots import Snapshots
from executor.config import ModelConfig, StepSize
from executor.device.cpu import CpuDevice
from executor.kv_memory import KVMemory
from executor.layers.attention import form_groups
from executor.layers.context import ModelContext
from executor.layers.mlp import GatedMLP
from executor.loader import load_model
from executor.messages import STATES_LAYOUT, InitKVCache
from executor.model_runner import ModelRunner
from executor.models.decoder import CausalDecoder, DecoderParts
from executor.parallel import ParallelState
from tests import tiny
from tests.models.harness import CPU, random_model, random_tokens

BLOCK_SIZE = 32
SNAPSHOTS = Snapshots(BLOCK_SIZE, every=2 * BLOCK_SIZE)
"""More states are kept than of long sequences."""
WINDOW = 40
MAX_LEN = 512
MAX_SEQS = 4
STEP = 64
STEP_SIZE = StepSize(max_num_seqs=MAX_SEQS, max_num_batched_tokens=STEP)

MODELS: dict[str, dict[str, Any]] = {
    "falcon_h1": {},  # states of Mamba-2, and attention in the same layers
    "gemma3": {"num_hidden_layers": 6, "layer_types": None, "sliding_window": WINDOW},
    "lfm2": {},  # short convolutions look back a few tokens
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {
        "num_hidden_layers": 4,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
    },
    "qwen3_5": {},  # states, one per block
}
MIXTURES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {},  # latents
    "gpt_oss": {"sliding_window": WINDOW},
}
BACKENDS = ["cpu", "reference"]


@functools.cache
def runner(kind: str, backend: str, dtype: str) -> ModelRunner:
    own, _, cache = dtype.partition(", cache in ")
    folder = tiny.checkpoint(kind, **(MODELS | MIXTURES)[kind])
    config = msgspec.convert({"model": str(folder), "dtype": own, "kv_cache_dtype": cache or "auto"}, ModelConfig)
    loaded = load_model(config, ParallelState(), CPU, backend, lambda stage, done, total: None)
    groups = form_groups(loaded.model.attention_layers(), BLOCK_SIZE)
    return ModelRunner(loaded, CpuDevice(), groups, step_size=STEP_SIZE, enforce_eager=False)


@dataclass
class Answer:
    """What a request gives, to the bit."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[bytes] = field(default_factory=list)
    num_cached: int = 0


class Engine:
    """A scheduler and a model, with some steps in flight."""

    def __init__(
        self,
        kind: str,
        backend: str = "cpu",
        dtype: str = "float32",
        *,
        frees: bool = True,
        num_tokens: int = 4096,
        depth: int = 2,
        caching: bool = True,
    ) -> None:
        """Creates an engine.

        Args:
            kind: A model of ``MODELS``.
            backend: Of its attention.
            dtype: Of its weights and its cache, or "..., cache in ...".
            frees: Whether blocks behind windows are freed; else the scheduler does not know of windows.
            num_tokens: Room in each group.
            depth: Steps in flight.
            caching: Whether prefixes are looked for.
        """
        self.runner = runner(kind, backend, dtype)
        groups = [
            GroupShape(
                num_tokens // BLOCK_SIZE,
                BLOCK_SIZE,
                group.shape.sliding_window if frees else None,
                SNAPSHOTS if frees and group.backend.kv_layout == STATES_LAYOUT else None,
            )
            for group in self.runner.groups
        ]
        num_blocks = tuple(group.num_blocks for group in groups)
        self.runner.initialize(InitKVCache(num_blocks, MAX_LEN))
        self.scheduler = Scheduler(
            SchedulerConfig(max_num_seqs=MAX_SEQS, max_num_batched_tokens=STEP, max_in_flight_steps=depth),
            CacheConfig(enable_prefix_caching=caching),
            CacheShape(tuple(groups)),
            MAX_LEN,
        )
        self.in_flight: deque[Any] = deque()
        self.answers: dict[int, Answer] = {}
        self.most_bytes = 0

    def add(self, index: int, prompt: list[int], max_tokens: int) -> None:
        params = ResolvedParams(temperature=0.8, seed=index, max_tokens=max_tokens, logprobs=3)
        message = EngineCoreRequest(
            request_id=str(index),
            index=index,
            prompt_token_ids=np.array(prompt, np.int32).tobytes(),
            sampling_params=params,
        )
        self.answers[index] = Answer()
        self.scheduler.add_request(Request(message))

    @property
    def bytes_in_use(self) -> int:
        pools = [manager.pool for manager in self.scheduler.kv.managers]
        specs = [group.spec for group in self.runner.groups]
        used = zip(pools, specs, strict=True)
        return sum((pool.num_blocks - pool.num_free) * spec.bytes_per_block for pool, spec in used)

    def turn(self, *, poison: bool = False) -> bool:
        """One turn of the engine core's loop. False: nothing is left to do.

        Args:
            poison: Fill blocks that nobody uses with what is not a number, before each plan is executed.
        """
        if len(self.in_flight) < self.scheduler.config.max_in_flight_steps:
            planned = self.scheduler.schedule()
            if planned is not None:
                self.in_flight.append(planned)
                self.most_bytes = max(self.most_bytes, self.bytes_in_use)
                return True
        if not self.in_flight:
            return False
        if poison:
            self.poison()
        plan, step = self.in_flight.popleft()
        with torch.inference_mode():
            result = self.runner.execute(plan)
        for output in self.scheduler.update_from_output(step, result).outputs:
            assert output.error is None
            answer = self.answers[output.index]
            answer.tokens += output.new_token_ids
            answer.logprobs += [entry.logprobs + entry.token_ids for entry in output.new_logprobs]
            answer.num_cached = output.num_cached_tokens or answer.num_cached
        self.scheduler.check_integrity()
        return True

    def poison(self) -> None:
        layers = self.runner.model.attention_layers()
        for group, manager in zip(self.runner.groups, self.scheduler.kv.managers, strict=True):
            for index in group.layers:
                for cache in layers[index].kv_cache:
                    cache.view(torch.uint8)[list(manager.pool._free)] = 0xFF  # NaN in every type of floats

    def run(self, *, poison: bool = False) -> dict[int, Answer]:
        while self.turn(poison=poison):
            pass
        assert self.scheduler.kv.num_free == self.scheduler.kv.num_blocks
        return self.answers


COMMON = random_tokens(230, seed=9)
PROMPTS = [COMMON[:100] + random_tokens(10, 1), random_tokens(150, 2), COMMON + random_tokens(9, 3), COMMON[:97]]
"""Sequences of several windows; some begin alike."""
PROMPTS += [random_tokens(9 + seed, seed) for seed in range(4, 8)]
"""They all fit the smallest cache at first."""


def add_all(engine: Engine) -> None:
    for index, prompt in enumerate(PROMPTS):
        engine.add(index, prompt, 90)


def without_freeing(kind: str, backend: str = "cpu", **options: Any) -> dict[int, Answer]:
    engine = Engine(kind, backend, frees=False, **options)
    add_all(engine)
    return engine.run()


def same(answers: dict[int, Answer], expected: dict[int, Answer]) -> bool:
    return all(
        answers[index].tokens == answer.tokens and answers[index].logprobs == answer.logprobs
        for index, answer in expected.items()
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bfloat16, cache in int8"])
@pytest.mark.parametrize("kind", MODELS)
def test_freed_blocks_change_no_bit(kind: str, dtype: str) -> None:
    expected = without_freeing(kind, dtype=dtype)
    assert all(len(answer.tokens) == len(answer.logprobs) == 90 for answer in expected.values())
    engine = Engine(kind, dtype=dtype)
    add_all(engine)
    assert same(engine.run(), expected)
    assert engine.answers[3].num_cached == 96, "all but the last block's tokens"
    crowded = Engine(kind, dtype=dtype, num_tokens=288 if kind == "mistral" else 576)
    add_all(crowded)
    assert same(crowded.run(), expected)
    assert crowded.scheduler.num_preemptions


@pytest.mark.parametrize("dtype", ["float32", "float32, cache in int8"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "falcon_h1"])  # whose states are as qwen3_5's
def test_nothing_reads_blocks_that_nobody_uses(kind: str, backend: str, dtype: str) -> None:
    # The reference's bits depend on how a prompt is cut: the same steps in either run.
    expected = without_freeing(kind, backend, dtype=dtype, depth=1, caching=False)
    engine = Engine(kind, backend, dtype, depth=1, caching=False)
    add_all(engine)
    assert same(engine.run(poison=True), expected)


@pytest.mark.parametrize("kind", [*MODELS, *MIXTURES])
def test_prefixes_are_found_with_windows(kind: str) -> None:
    """A second turn goes on where the first one ended, and somebody else where both began."""
    expected = without_freeing(kind)
    engine = Engine(kind)
    engine.add(2, PROMPTS[2], 90)
    engine.run()
    longer = PROMPTS[2] + expected[2].tokens[:83]
    engine.add(4, [*longer, 5, 6], 20)
    engine.run()
    assert engine.answers[4].num_cached == len(longer) // 64 * 64 == 320, "a state is kept every 64 tokens of an output"
    engine.add(0, PROMPTS[0], 90)
    engine.run()
    has_states = any(group.backend.kv_layout == STATES_LAYOUT for group in engine.runner.groups)
    assert engine.answers[0].num_cached == (64 if has_states else 96)
    assert same({0: engine.answers[0]}, {0: expected[0]})
    # Last, as both have the same memory.
    fresh = Engine(kind, frees=False)
    fresh.add(4, [*longer, 5, 6], 20)
    assert same(fresh.run(), {4: engine.answers[4]})


def test_a_model_of_windows_runs_in_a_fraction_of_the_bytes() -> None:
    engine, whole = Engine("mistral"), Engine("mistral", frees=False)
    for each in (engine, whole):
        each.add(0, random_tokens(400, seed=5), 100)
        each.run()
    assert same(engine.answers, whole.answers)
    (group,) = engine.runner.groups
    assert whole.most_bytes == 16 * group.spec.bytes_per_block
    assert engine.most_bytes == 4 * group.spec.bytes_per_block, "the window and a step, wherever they begin"


def test_two_groups_free_what_is_out_of_the_window_only() -> None:
    engine = Engine("qwen2")
    engine.add(0, random_tokens(400, seed=5), 100)
    engine.run()
    full, window = (group.spec.bytes_per_block for group in engine.runner.groups)
    assert [group.layers for group in engine.runner.groups] == [(0, 2), (1, 3)]
    assert engine.most_bytes == 16 * full + 3 * window


def test_gemma_3_holds_what_its_windows_and_its_global_layers_need() -> None:
    """Five layers of six have a window; in a long sequence, they hold that and the block it begins in."""
    engine = Engine("gemma3")
    engine.add(0, random_tokens(400, seed=5), 100)
    engine.run()
    bytes_of = {group.shape.sliding_window: group.spec.bytes_per_block for group in engine.runner.groups}
    full, window = bytes_of[None], bytes_of[WINDOW]
    assert window == 5 * full
    # 4 blocks of windows during the prompt, of which a step is part; at the end, 3 beside 16 of the global layer.
    assert 16 * full + 3 * window <= engine.most_bytes < 16 * full + 4 * window < 16 * (full + window) / 2


@pytest.mark.parametrize(("kind", "num_blocks"), [("lfm2", 18), ("mistral", 9), ("qwen2", 18)])
def test_a_whole_engine_serves_more_tokens_than_its_cache_holds(kind: str, num_blocks: int) -> None:
    """Sized by its core, in a process of its own: the longest sequence alone does not fit nine blocks."""
    model = str(tiny.checkpoint(kind, **MODELS[kind]))
    llm = LLM(
        model,
        dtype="float32",
        block_size=BLOCK_SIZE,
        num_gpu_blocks_override=num_blocks,
        max_num_seqs=MAX_SEQS,
        max_num_batched_tokens=STEP,
        max_model_len=MAX_LEN,
        distributed_executor_backend="inline",
        check_every_step=True,
    )
    params = [
        SamplingParams(temperature=0.8, seed=index, max_tokens=90, ignore_eos=True) for index in range(len(PROMPTS))
    ]
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False)
    expected = without_freeing(kind)
    assert [list(output.outputs[0].token_ids) for output in outputs] == [
        expected[index].tokens for index in range(len(PROMPTS))
    ]


def test_a_store_and_sleep_change_no_bit(tmp_path: Path) -> None:
    kind = "qwen3_5"  # attention, and a few states
    params = SamplingParams(temperature=0.8, seed=1, max_tokens=20, ignore_eos=True, logprobs=2)
    prompt = {"prompt_token_ids": random_tokens(300, seed=11)}

    def outputs(llm: LLM) -> tuple[Any, int | None]:
        (result,) = llm.generate([prompt], params, use_tqdm=False)
        return (result.outputs[0].token_ids, result.outputs[0].logprobs), result.num_cached_tokens

    options: dict[str, Any] = {"dtype": "float32", "max_model_len": MAX_LEN, "kv_cache_memory": "16MiB"}
    options |= {"distributed_executor_backend": "inline", "check_every_step": True}
    model = str(tiny.checkpoint(kind, **MODELS[kind]))
    with LLM(model, kv_cache_dir=str(tmp_path), **options) as llm:
        first, num_cached = outputs(llm)
        assert num_cached == 0
        llm.sleep(level=2)
        with pytest.raises(RequestError, match="sleeps"):
            outputs(llm)
        llm.wake_up()
        assert outputs(llm) == (first, 288)
    with LLM(model, kv_cache_dir=str(tmp_path), **options) as llm:
        assert outputs(llm) == (first, 288)


# -- memory that is handed over, and models without a cache -------------------------------------------------------


class OwnMemory(CpuDevice):
    """Puts all caches into memory that is there already, with whatever it holds."""

    def __init__(self, num_bytes: int) -> None:
        self.memory_left = torch.full((num_bytes,), 0xFF, dtype=torch.uint8)  # not a number, in any type

    def allocate_kv(
        self, shape: tuple[int, ...], dtype: torch.dtype, memory: torch.Tensor | None = None
    ) -> torch.Tensor:
        cache = super().allocate_kv(shape, dtype, self.memory_left)
        self.memory_left = self.memory_left[cache.nbytes :]
        return cache


@pytest.mark.parametrize("kind", MODELS)
def test_caches_lie_in_memory_that_is_handed_over(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Engine(kind)
    add_all(expected)
    expected.run()
    whole = sum(4096 // BLOCK_SIZE * group.spec.bytes_per_block for group in expected.runner.groups)
    device = OwnMemory(whole)
    monkeypatch.setattr(expected.runner, "device", device)
    engine = Engine(kind)
    assert engine.runner.device is device and not len(device.memory_left)
    add_all(engine)
    assert same(engine.run(), expected.answers)
    with pytest.raises(ValueError, match="does not fit into 0 bytes"):
        device.allocate_kv((1,), torch.float32)


@pytest.mark.parametrize("num_turns", [5, 24])
@pytest.mark.parametrize("kind", [*MODELS, *MIXTURES])
def test_new_workers_go_on_with_what_the_last_ones_wrote(
    kind: str, num_turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = without_freeing(kind)
    descriptor = os.memfd_create("kv")
    machine = runner(kind, "cpu", "float32")
    monkeypatch.setattr(machine, "kv_memory", KVMemory(descriptor))
    engine = Engine(kind)
    has_states = any(group.backend.kv_layout == STATES_LAYOUT for group in machine.groups)
    kv = engine.scheduler.pool.kv
    kv.shape = replace(kv.shape, has_states=has_states)
    add_all(engine)
    for _ in range(num_turns):
        engine.turn()
    lost = [step for _, step in engine.in_flight]
    assert lost
    with torch.inference_mode():
        machine.execute(engine.in_flight[0][0])  # its result is lost
    engine.in_flight.clear()
    size = machine.kv_memory.num_bytes if machine.kv_memory else 0
    machine.kv_memory = KVMemory(descriptor)
    machine.initialize(InitKVCache(tuple(group.num_blocks for group in engine.scheduler.shape.groups), MAX_LEN))
    assert machine.kv_memory.num_bytes == size > 0
    engine.scheduler.restart(lost)
    kept = sum(request.num_kept_tokens for request in engine.scheduler.waiting)
    assert has_states or kept
    assert same(engine.run(), expected)
    os.close(descriptor)


@pytest.mark.parametrize("enforce_eager", [False, True])
def test_a_model_without_attention_has_no_groups(enforce_eager: bool) -> None:
    """Blocks that mix nothing stand where attention stood."""

    def make_model(context: ModelContext) -> CausalDecoder:
        return CausalDecoder(context, DecoderParts(lambda index, prefix: GatedMLP(context, prefix=prefix)))

    loaded, _ = random_model(make_model)
    groups = form_groups(loaded.model.attention_layers(), None)
    assert groups == ()
    machine = ModelRunner(loaded, CpuDevice(), groups, step_size=STEP_SIZE, enforce_eager=enforce_eager)
    machine.initialize(InitKVCache((), MAX_LEN))
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs=MAX_SEQS, max_num_batched_tokens=STEP), CacheConfig(), CacheShape(()), MAX_LEN
    )
    inputs = [random_tokens(100, 1), random_tokens(30, 2)]
    for index, prompt in enumerate(inputs):
        column = np.array(prompt, np.int32).tobytes()
        pooling = ResolvedPoolingParams(pooling_type="ALL", normalize=False)
        scheduler.add_request(Request(EngineCoreRequest(str(index), index, column, pooling_params=pooling)))
    vectors: dict[int, Any] = {}
    while (planned := scheduler.schedule()) is not None:
        plan, step = planned
        with torch.inference_mode():
            outputs = scheduler.update_from_output(step, machine.execute(plan))
        vectors |= {
            output.index: to_array(output.pooling_output) for output in outputs.outputs if output.pooling_output
        }
    by_token: dict[int, bytes] = {}
    for index, prompt in enumerate(inputs):
        for token, vector in zip(prompt, vectors[index], strict=True):
            assert by_token.setdefault(token, vector.tobytes()) == vector.tobytes()
    assert len(set(by_token.values())) == len(by_token) > 90
