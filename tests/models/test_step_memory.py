"""The memory of a step is known before there is a KV cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import ops
from executor.config import ExecutorConfig, ModelConfig, StepSize
from executor.graphs import Program
from executor.input_batch import InputBatch, ModelOutput
from executor.messages import (
    FromWorker,
    InitKVCache,
    ModelRunnerOutput,
    NewRequest,
    ResolvedParams,
    SchedulerOutput,
    WorkerReady,
)
from executor.models.llama import LlamaForCausalLM
from executor.parallel import ParallelState
from executor.peak_memory import PeakMemory
from executor.request_states import RequestStates
from executor.worker import Worker
from ops.cpu.op_set import CpuOps
from ops.cpu.program import NativeProgram
from ops.dispatch import Spec
from tests import tiny
from tests.ops.cpu import using


def started(
    max_num_seqs: int = 8, max_num_batched_tokens: int = 64, *, enforce_eager: bool = False, kind: str = "llama"
) -> tuple[Worker, WorkerReady]:
    size = StepSize(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)
    model = ModelConfig(model=str(tiny.checkpoint(kind)), max_model_len=100, enforce_eager=enforce_eager)
    config = ExecutorConfig(model=model, step_size=size)
    answers: list[FromWorker] = []
    worker = Worker(ParallelState(), config, answers.append)
    worker.start()
    (ready,) = (answer for answer in answers if isinstance(answer, WorkerReady))
    return worker, ready


def test_rows_between_the_products_of_experts_count() -> None:
    if not isinstance(ops.op_set("cpu"), CpuOps):
        pytest.skip("no kernels are available on this machine")
    worker, few = started(max_num_batched_tokens=64, kind="mixtral")
    native = worker.runner.capture()._runner
    assert isinstance(native, NativeProgram)
    values = sum(memory.nbytes for memory in native._arena._memory.values())
    hidden, inner, top_k = 64, 48, 2
    between = 64 * top_k * (8 * hidden + 8 * inner)  # in bfloat16
    assert values + between <= few.step_bytes


def test_a_worker_says_what_its_steps_will_take() -> None:
    if not isinstance(ops.op_set("cpu"), CpuOps):
        pytest.skip("no kernels are available on this machine")
    worker, ready = started()
    worker.handle(InitKVCache((8,), 100))
    assert worker.runner.program is not None
    native = worker.runner.program._runner
    assert isinstance(native, NativeProgram)
    arena = sum(memory.nbytes for memory in native._arena._memory.values())
    logits = 8 * tiny.VOCAB_SIZE * 4
    assert logits < arena <= ready.step_bytes < arena + logits * torch.get_num_threads()
    tables = worker.runner.states
    assert ready.position_bytes > tables.token_ids.nbytes // tables.token_ids.shape[1]
    assert started(max_num_seqs=16)[1].step_bytes >= ready.step_bytes + logits
    assert started(max_num_batched_tokens=128)[1].step_bytes > ready.step_bytes


def first_step(*lengths: int) -> SchedulerOutput:
    """Prompts of these lengths that begin, each with blocks of its own."""
    requests = tuple(
        NewRequest(
            slot=slot,
            token_ids=np.arange(5, 5 + length, dtype=np.int32).tobytes(),
            num_prompt_tokens=length,
            num_computed_tokens=0,
            block_ids=(np.arange(4 * slot, 4 * slot + 4, dtype=np.int32).tobytes(),),
            params=ResolvedParams(temperature=0.0),
        )
        for slot, length in enumerate(lengths)
    )
    return SchedulerOutput(
        step_id=1,
        slots=np.arange(len(lengths), dtype=np.int32).tobytes(),
        num_scheduled_tokens=np.array(lengths, np.int32).tobytes(),
        num_sampled=bytes([1] * len(lengths)),
        new_reqs=requests,
    )


@pytest.mark.parametrize(("num_tokens", "lengths"), [(64, [64]), (64, [8] * 8), (250, [100, 100, 50])])
def test_no_eager_step_takes_more_than_a_worker_says(num_tokens: int, lengths: list[int]) -> None:
    worker, ready = started(8, num_tokens, enforce_eager=True)
    assert ready.step_bytes > 8 * tiny.VOCAB_SIZE * 4
    assert started(num_tokens, num_tokens, enforce_eager=True)[1].step_bytes > ready.step_bytes
    assert started(8, 2 * num_tokens, enforce_eager=True)[1].step_bytes > ready.step_bytes
    worker.handle(InitKVCache((32,), 100))
    with PeakMemory() as memory:
        worker.handle(first_step(*lengths))
    assert memory.peak_bytes <= ready.step_bytes


class Uncapturable(LlamaForCausalLM):
    """Calls torch in its forward pass, not ops alone."""

    def forward(self, batch: InputBatch, hidden: torch.Tensor | None = None) -> ModelOutput:
        return ModelOutput(torch.tanh(super().forward(batch, hidden).hidden))


def test_eager_mode_captures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("executor.loader.resolve_model", lambda *_: Uncapturable)
    with pytest.raises(TypeError, match="Value"):
        started()
    worker, _ = started(enforce_eager=True)
    answers: list[FromWorker] = []
    worker._send = answers.append
    worker.handle(InitKVCache((8,), 100))
    worker.handle(first_step(20))
    output = answers[-1]
    assert isinstance(output, ModelRunnerOutput) and len(output.sampled_token_ids) == 4 and not output.row_errors


def test_the_peak_is_of_tensors_that_live_together() -> None:
    older = torch.ones(1000)
    with PeakMemory() as memory:
        assert older[:500].numel() == 500  # a view
        assert memory.peak_bytes == 0
        x = torch.zeros(100)
        y = x.view(10, 10).T  # keeps the memory of x
        del x
        z = torch.zeros(200)
        del z
        z = torch.zeros(100)
        assert memory.num_bytes == 800
        assert memory.peak_bytes == 1200
        del y, z
        assert memory.num_bytes == 0
    torch.zeros(1000)
    assert memory.peak_bytes == 1200


def test_tables_grow_by_what_is_said_for_each_position() -> None:
    short, long = (RequestStates(5, length, [32, 16]) for length in (320, 640))

    def size(states: RequestStates) -> int:
        return states.token_ids.nbytes + sum(table.nbytes for table in states.block_tables)

    said = 320 * RequestStates.position_bytes(5, [32, 16])
    assert size(long) - size(short) <= said < 1.1 * (size(long) - size(short))


def test_the_values_that_live_together_without_a_runner() -> None:
    """x and y of 4 columns and their parts, 10 rows of float32: 160 bytes each."""
    with using("reference"):
        program = Program("cpu", max_tokens=10)
        x: Any = program.input("x", Spec("tokens", 4, torch.float32))
        y = x + x  # x, y
        first, second = y.split([2, 2])  # views of y
        z = first + second  # x has gone; y, z of 2 columns
        w = z + z  # y has gone; z, w
        program.finish(w)
    assert program.num_bytes == 320
    with using("reference"):
        program = Program("cpu", max_tokens=10)
        x = program.input("x", Spec("tokens", 4, torch.float32))
        first, _ = (x + x).split([2, 2])
        program.finish(x + x, first)  # the columns keep all of their value alive
    assert program.num_bytes == 480
