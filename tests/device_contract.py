"""What every device must do: tests for packages that bring one.

pytest tests/device_contract.py --octavo-device NAME

``NAME`` is the name of an entry point of the group ``octavo.devices``, or of a device of ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import ops
from executor.config import DeviceConfig, ExecutorConfig, ModelConfig, StepSize
from executor.device.base import Device, create_device, device_problem
from executor.device.steps import StepChannel
from executor.messages import FromWorker, InitKVCache, ModelRunnerOutput, NewRequest, ResolvedParams, SchedulerOutput
from executor.parallel import ParallelState
from executor.worker import Worker
from tests import tiny

NUM_TOKENS = 12


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """The device under test, initialised."""
    before = ops.op_set("cpu")
    device = create_device(request.config.getoption("--octavo-device"))
    device.initialize(DeviceConfig(num_threads=1), 0)
    yield device
    ops.use("cpu", before)


def collected(channel: StepChannel, tensors: list[torch.Tensor]) -> list[Any]:
    """Results of a step, waited for as a worker does."""
    return list(channel.download(tensors).collect())


def test_it_has_a_name_and_memory(device: Device) -> None:
    assert device_problem(device.name) is None
    assert device.unavailable() is None
    memory = device.memory()
    assert 0 < memory.free_bytes <= memory.total_bytes
    assert device.default_kv_bytes() > 0 and device.max_num_batched_tokens > 0
    assert device.memory_utilization is None or 0 < device.memory_utilization <= 1
    assert device.communicator(ParallelState()).size == 1


def test_a_cache_is_zero_and_may_lie_in_given_memory(device: Device) -> None:
    channel = device.steps()
    cache = device.allocate_kv((3, 4, 2), torch.float16)
    assert cache.shape == (3, 4, 2) and cache.dtype == torch.float16
    (values,) = collected(channel, [cache * 1])
    assert not values.any()


def test_uploads_come_back(device: Device) -> None:
    channel = device.steps()
    numbers, halves = np.arange(7, dtype=np.int32), np.array([[0.5], [2.5]])
    views = channel.upload({"numbers": numbers, "halves": halves})
    first = channel.download([views["numbers"] * 2, views["halves"] + 1])
    later = channel.upload({"numbers": numbers + 1})
    second = channel.download([later["numbers"] * 2])
    assert [array.tolist() for array in first.collect()] == [[0, 2, 4, 6, 8, 10, 12], [[1.5], [3.5]]]
    assert second.collect()[0].tolist() == [2, 4, 6, 8, 10, 12, 14]


def run(name: str, *, eager: bool, together: bool) -> list[list[int]]:
    """Tokens of three requests on a device, one after another or in the same steps."""
    answers: list[FromWorker] = []
    config = ExecutorConfig(
        model=ModelConfig(model=str(tiny.checkpoint("llama")), dtype="float32", enforce_eager=eager),
        device=DeviceConfig(device=name, num_threads=1),
        step_size=StepSize(max_num_seqs=3, max_num_batched_tokens=64),
    )
    worker = Worker(ParallelState(), config, answers.append)
    worker.start()
    worker.handle(InitKVCache((12,) * len(worker.runner.groups), 128))
    prompts = [[5, 9, 2, 40, 11], [7] * 20, [3, 1, 4, 1, 5, 9, 2, 6]]
    tokens: list[list[int]] = [[], [], []]
    for batch in [[0, 1, 2]] if together else [[0], [1], [2]]:
        step_id = 0
        for step in range(NUM_TOKENS):
            new = tuple(_new_request(slot, prompts[slot]) for slot in batch) if step == 0 else ()
            counts = [len(prompts[slot]) if step == 0 else 1 for slot in batch]
            plan = SchedulerOutput(
                step_id=(step_id := step_id + 1),
                slots=np.array(batch, np.int32).tobytes(),
                num_scheduled_tokens=np.array(counts, np.int32).tobytes(),
                num_sampled=np.ones(len(batch), np.uint8).tobytes(),
                new_reqs=new,
            )
            result = worker.runner.execute(plan)
            assert isinstance(result, ModelRunnerOutput) and not result.row_errors
            sampled = np.frombuffer(result.sampled_token_ids, np.int32).tolist()
            for slot, token in zip(batch, sampled, strict=True):
                tokens[slot].append(token)
    return tokens


def _new_request(slot: int, prompt: list[int]) -> NewRequest:
    return NewRequest(
        slot=slot,
        token_ids=np.array(prompt, np.int32).tobytes(),
        num_prompt_tokens=len(prompt),
        num_computed_tokens=0,
        block_ids=(np.arange(4 * slot, 4 * slot + 4, dtype=np.int32).tobytes(),),
        params=ResolvedParams(temperature=0.0 if slot == 0 else 1.0, seed=slot, max_tokens=NUM_TOKENS),
    )


def test_tokens_depend_on_the_request_alone(device: Device) -> None:
    alone = run(device.name, eager=False, together=False)
    assert run(device.name, eager=False, together=True) == alone
    assert run(device.name, eager=True, together=True) == alone
    assert run("cpu", eager=True, together=True) == alone
