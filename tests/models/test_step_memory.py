"""The memory of a step is known before there is a KV cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ops
from executor.config import ExecutorConfig, ModelConfig, StepSize
from executor.graphs import Program
from executor.messages import FromWorker, InitKVCache, WorkerReady
from executor.parallel import ParallelState
from executor.request_states import RequestStates
from executor.worker import Worker
from ops.cpu.op_set import CpuOps
from ops.cpu.program import NativeProgram
from ops.dispatch import Spec
from tests import tiny
from tests.ops.cpu import using


def started(max_num_seqs: int = 8, max_num_batched_tokens: int = 64) -> tuple[Worker, WorkerReady]:
    size = StepSize(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)
    config = ExecutorConfig(model=ModelConfig(model=str(tiny.checkpoint("llama")), max_model_len=100), step_size=size)
    answers: list[FromWorker] = []
    worker = Worker(ParallelState(), config, answers.append)
    worker.start()
    (ready,) = (answer for answer in answers if isinstance(answer, WorkerReady))
    return worker, ready


def test_a_worker_says_what_its_steps_will_take() -> None:
    if not isinstance(ops.op_set("cpu"), CpuOps):
        pytest.skip("no kernels are available on this machine")
    worker, ready = started()
    worker.handle(InitKVCache((8,), 8, 64, 100))
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
