"""Pooled vectors against transformers' hidden states, and their bits against how prompts are scheduled."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel

from engine_core.cache_shape import CacheShape, GroupShape
from engine_core.config import CacheConfig, SchedulerConfig
from engine_core.messages import (
    POOLING_TYPES,
    EngineCoreRequest,
    FinishReason,
    ResolvedParams,
    ResolvedPoolingParams,
    to_array,
)
from engine_core.request import Request
from engine_core.scheduler import Scheduler
from executor.config import StepSize
from executor.device.cpu import CpuDevice
from executor.layers.attention import form_groups
from executor.messages import InitKVCache
from executor.model_runner import ModelRunner
from executor.pooling import BAD_STATES
from tests import tiny
from tests.models.harness import load, random_tokens

F32 = npt.NDArray[np.float32]
BLOCK_SIZE = 32
NUM_BLOCKS = 48
MAX_LEN = 256
MAX_SEQS = 4


@functools.cache
def runner(kind: str, dtype: str = "float32", cache: str = "auto") -> ModelRunner:
    loaded = load(tiny.checkpoint(kind), dtype=dtype, kv_cache_dtype=cache)
    groups = form_groups(loaded.model.attention_layers(), BLOCK_SIZE)
    return ModelRunner(
        loaded,
        CpuDevice(),
        groups,
        step_size=StepSize(max_num_seqs=MAX_SEQS, max_num_batched_tokens=512),
        enforce_eager=False,
    )


class Engine:
    """A scheduler and a model, one step after another."""

    def __init__(self, kind: str = "llama", dtype: str = "float32", cache: str = "auto", **config: Any) -> None:
        self.runner = runner(kind, dtype, cache)
        self.runner.initialize(InitKVCache((NUM_BLOCKS,) * len(self.runner.groups), MAX_LEN))
        self.scheduler = Scheduler(
            SchedulerConfig(**{"max_num_seqs": MAX_SEQS, "max_num_batched_tokens": 512, **config}),
            CacheConfig(),
            CacheShape(
                tuple(GroupShape(NUM_BLOCKS, BLOCK_SIZE, own.shape.sliding_window) for own in self.runner.groups)
            ),
            MAX_LEN,
        )
        self.vectors: dict[int, F32] = {}
        self.cached: dict[int, int] = {}
        self.errors: dict[int, str | None] = {}

    def add(self, index: int, prompt: list[int], pooling: ResolvedPoolingParams | None) -> None:
        message = EngineCoreRequest(
            request_id=str(index),
            index=index,
            prompt_token_ids=np.array(prompt, np.int32).tobytes(),
            sampling_params=None if pooling else ResolvedParams(temperature=0, max_tokens=9),
            pooling_params=pooling,
        )
        self.scheduler.add_request(Request(message))

    def step(self) -> bool:
        planned = self.scheduler.schedule()
        if planned is None:
            return False
        plan, step = planned
        with torch.inference_mode():
            result = self.runner.execute(plan)
        for output in self.scheduler.update_from_output(step, result).outputs:
            if output.pooling_output is not None:
                assert output.finish_reason == FinishReason.STOP
                self.vectors[output.index] = to_array(output.pooling_output)
                self.cached[output.index] = output.num_cached_tokens or 0
            if output.finish_reason is not None:
                self.errors[output.index] = output.error
        self.scheduler.check_integrity()
        return True

    def run(self) -> None:
        while self.step():
            pass


def pooled(prompt: list[int], params: ResolvedPoolingParams, *engine: str, **config: Any) -> F32:
    """The vector of a prompt that runs alone."""
    machine = Engine(*engine, **config)
    machine.add(0, prompt, params)
    machine.run()
    return machine.vectors[0]


@functools.cache
def reference(kind: str) -> Any:
    return AutoModel.from_pretrained(tiny.checkpoint(kind), dtype=torch.float32, attn_implementation="eager").eval()


def expected(kind: str, prompt: list[int], params: ResolvedPoolingParams) -> torch.Tensor:
    with torch.inference_mode():
        states: torch.Tensor = reference(kind)(torch.tensor([prompt])).last_hidden_state[0]
    weights = torch.arange(1.0, len(prompt) + 1)[params.num_skipped :]
    states = states[params.num_skipped :]
    ways = {
        "LAST": states[-1],
        "MEAN": states.mean(0),
        "CLS": states[0],
        "ALL": states,
        "MAX": states.max(0).values,
        "MEAN_SQRT_LEN": states.sum(0) / len(states) ** 0.5,
        "WEIGHTED_MEAN": weights @ states / weights.sum(),
    }
    vectors = torch.cat([ways[part] for part in params.pooling_type.split("+")], -1)[..., : params.dimensions]
    return torch.nn.functional.normalize(vectors, dim=-1) if params.normalize else vectors


TYPES = (*POOLING_TYPES, "CLS+MAX+LAST")


@pytest.mark.parametrize("pooling_type", TYPES)
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_vectors_are_those_of_transformers(kind: str, pooling_type: str) -> None:
    prompt = random_tokens(90)
    for normalize, dimensions in ((True, None), (False, None), (True, 10), (False, 7)):
        params = ResolvedPoolingParams(pooling_type=pooling_type, normalize=normalize, dimensions=dimensions)
        theirs = expected(kind, prompt, params)
        for budget in (512, 37):
            ours = pooled(prompt, params, kind, max_num_batched_tokens=budget)
            assert ours.dtype == np.float32 and ours.shape == theirs.shape
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-4)
            if normalize:
                np.testing.assert_allclose(np.linalg.norm(ours, axis=-1), 1, rtol=1e-6)


PARAMS = [ResolvedPoolingParams(pooling_type=pooling_type, normalize=False) for pooling_type in TYPES]
PROMPTS = [random_tokens(length, seed) for seed, length in enumerate((1, 40, 70, 131, 256))]
PROMPTS += [PROMPTS[3][:96] + PROMPTS[1]]


@functools.cache
def alone(dtype: str, cache: str, prompt: int, pooling: int) -> F32:
    return pooled(PROMPTS[prompt], PARAMS[pooling], "llama", dtype, cache)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(["float32", "bfloat16"]), cache=st.sampled_from(["auto", "int8", "fp8"]))
def test_bits_do_not_depend_on_batch_chunks_and_cache(data: st.DataObject, dtype: str, cache: str) -> None:
    """Alone in one step, or chunked anywhere, beside requests that pool or generate, preempted, from the cache."""
    engine = Engine(
        "llama",
        dtype,
        cache,
        max_num_batched_tokens=data.draw(st.sampled_from([3, 17, 32, 100, 512])),
        long_prefill_token_threshold=data.draw(st.sampled_from([0, 0, 5, 33])),
    )
    wanted: dict[int, tuple[int, int]] = {}
    for index in range(data.draw(st.integers(1, 6))):
        prompt = data.draw(st.integers(0, len(PROMPTS) - 1))
        pooling = data.draw(st.integers(-1, len(PARAMS) - 1))
        if pooling < 0:
            engine.add(index, PROMPTS[prompt][:200], None)
        else:
            wanted[index] = prompt, pooling
            engine.add(index, PROMPTS[prompt], PARAMS[pooling])
        for _ in range(data.draw(st.integers(0, 5))):
            engine.step()
        running = engine.scheduler.running_requests()
        if running and data.draw(st.integers(0, 3)) == 0:
            engine.scheduler.pool.preempt(running[-1])
    engine.run()
    for index, (prompt, pooling) in wanted.items():
        np.testing.assert_array_equal(engine.vectors[index], alone(dtype, cache, prompt, pooling))


@pytest.mark.parametrize("pooling_type", ["MEAN_SQRT_LEN", "CLS", "WEIGHTED_MEAN+CLS+LAST"])
def test_skipped_positions_keep_their_numbers(pooling_type: str) -> None:
    params = ResolvedPoolingParams(pooling_type=pooling_type, normalize=False, num_skipped=5)
    prompt = random_tokens(40)
    theirs = expected("llama", prompt, params).numpy()
    for budget in (512, 3):
        ours = pooled(prompt, params, "llama", max_num_batched_tokens=budget)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_only_the_last_position_reads_the_cache() -> None:
    engine = Engine()
    prompt = random_tokens(100)
    for index, pooling_type in enumerate(["MEAN", "LAST", "MEAN", "CLS", "ALL"]):
        engine.add(index, prompt, ResolvedPoolingParams(pooling_type=pooling_type))
        engine.run()
    assert engine.cached == {0: 0, 1: 96, 2: 0, 3: 0, 4: 0}
    np.testing.assert_array_equal(engine.vectors[0], engine.vectors[2])


def test_states_that_are_not_finite_fail_their_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    program = engine.runner.program
    assert program is not None
    replay = program.replay

    def broken(inputs: dict[str, Any]) -> list[torch.Tensor]:
        hidden, logits = (tensor.clone() for tensor in replay(inputs))
        hidden[2] = float("nan")
        return [hidden, logits]

    monkeypatch.setattr(program, "replay", broken)
    engine.add(0, random_tokens(5), ResolvedPoolingParams(pooling_type="MEAN"))
    engine.add(1, random_tokens(5, 2), ResolvedPoolingParams(pooling_type="MEAN"))
    engine.run()
    assert engine.errors == {0: BAD_STATES, 1: None} and list(engine.vectors) == [1]


def test_a_slot_forgets_its_former_owner() -> None:
    engine = Engine(max_num_batched_tokens=16)
    engine.add(0, random_tokens(100), ResolvedPoolingParams(pooling_type="ALL"))
    engine.step()
    engine.scheduler.abort_request(0)
    engine.add(1, random_tokens(40, 2), ResolvedPoolingParams(pooling_type="MEAN", normalize=False))
    engine.run()
    np.testing.assert_array_equal(
        engine.vectors[1], pooled(random_tokens(40, 2), ResolvedPoolingParams(pooling_type="MEAN", normalize=False))
    )
    assert not any(pooling is not None for pooling in engine.runner.pooler._poolings)
