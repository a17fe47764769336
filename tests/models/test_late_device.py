"""Steps on a device whose results come late: launched before the last ones are there, and the tokens are the same."""

from __future__ import annotations

import select
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ops
from engine_core.cache_shape import CacheShape, GroupShape
from engine_core.config import CacheConfig, SchedulerConfig
from engine_core.messages import EngineCoreRequest, ResolvedParams, ResolvedPoolingParams
from engine_core.request import Request
from engine_core.scheduler import Scheduler
from engine_core.snapshots import Snapshots
from executor.config import DeviceConfig, ExecutorConfig, LoRAConfig, ModelConfig, SpeculativeConfig, StepSize
from executor.device.base import Device
from executor.device.cpu import CpuDevice
from executor.inline import InlineExecutor
from executor.messages import (
    STATES_LAYOUT,
    FromWorker,
    InitKVCache,
    ModelRunnerOutput,
    Tensor,
    ThinkingBudget,
    WorkerReady,
)
from executor.parallel import ParallelState
from executor.request_states import RequestStates
from executor.worker import Worker
from ops.dispatch import OpSet
from tests import tiny
from tests.late_device import HostReadError, LateDevice, on_device
from tests.models.harness import random_tokens
from tests.null.test_scheduler import token_rows

BLOCK_SIZE = 32
WINDOWS: dict[str, Any] = {
    "use_sliding_window": True,
    "sliding_window": 17,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
"""A model with two KV cache groups."""
MAX_LEN = 256
MAX_SEQS = 5
STEP_SIZE = StepSize(max_num_seqs=MAX_SEQS, max_num_batched_tokens=64)


@pytest.fixture(autouse=True)
def op_set() -> Iterator[None]:
    """Puts the op set of the CPU back: devices choose their own."""
    before = ops.op_set("cpu")
    yield
    ops.use("cpu", before)


class ReferenceCpu(CpuDevice):
    """A CPU without kernels."""

    def initialize(self, config: DeviceConfig, rank: int) -> None:
        ops.use("cpu", OpSet())


def new_scheduler(
    num_blocks: int = 48,
    groups: Sequence[tuple[int, int | None, Snapshots | None]] = ((BLOCK_SIZE, None, None),),
    max_draft_tokens: int = 0,
    num_lookahead_tokens: int = 0,
    **config: Any,
) -> Scheduler:
    return Scheduler(
        SchedulerConfig(**{"max_num_seqs": MAX_SEQS, "max_num_batched_tokens": 64, **config}),
        CacheConfig(),
        CacheShape(tuple(GroupShape(num_blocks, *group) for group in groups)),
        MAX_LEN,
        max_draft_tokens=max_draft_tokens,
        num_lookahead_tokens=num_lookahead_tokens,
    )


class Engine:
    """A scheduler and a worker, with as many steps in flight as the scheduler may have."""

    def __init__(
        self,
        device: Device,
        monkeypatch: pytest.MonkeyPatch,
        *,
        num_blocks: int = 48,
        eager: bool = False,
        windows: bool = False,
        kv_cache_dtype: str = "auto",
        family: str = "llama",
        folder: Path | None = None,
        speculative: SpeculativeConfig | None = None,
        forced_outputs: str = "",
        lora: LoRAConfig | None = None,
        **config: Any,
    ) -> None:
        monkeypatch.setattr("executor.worker.create_device", lambda name: device)
        folder = folder or (tiny.checkpoint("qwen2", **WINDOWS) if windows else tiny.checkpoint(family))
        model = ModelConfig(model=str(folder), dtype="float32", enforce_eager=eager, kv_cache_dtype=kv_cache_dtype)
        self.answers: list[FromWorker] = []
        self.device = device
        executor = ExecutorConfig(
            model=model,
            speculative=speculative,
            step_size=STEP_SIZE,
            forced_outputs=forced_outputs,
            lora=lora or LoRAConfig(),
        )
        self.worker = Worker(ParallelState(), executor, self.answers.append)
        self.worker.start()
        (ready,) = (answer for answer in self.answers if isinstance(answer, WorkerReady))
        snapshots = Snapshots(BLOCK_SIZE, 2 * BLOCK_SIZE, RequestStates.tokens_of_drafts)
        groups = [
            (group.block_size, group.sliding_window, snapshots if group.layout == STATES_LAYOUT else None)
            for group in ready.kv_cache_groups
        ]
        self.worker.handle(InitKVCache((num_blocks,) * len(groups), MAX_LEN))
        self.scheduler = new_scheduler(
            num_blocks, groups, executor.max_draft_tokens, executor.num_lookahead_tokens, **config
        )
        self.num_accepted = 0
        self.plans: list[tuple[int, bool]] = []
        """Steps of each plan, and whether it allows drafts."""
        self.in_flight: deque[Any] = deque()
        self.outputs: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[tuple[int, bytes, bytes, int]]] = {}
        self.vectors: dict[int, Tensor] = {}

    def add(
        self,
        index: int,
        prompt: list[int],
        params: ResolvedParams | ResolvedPoolingParams,
        resumed: Sequence[int] = (),
    ) -> None:
        pools = isinstance(params, ResolvedPoolingParams)
        message = EngineCoreRequest(
            request_id=str(index),
            index=index,
            prompt_token_ids=np.array(prompt, np.int32).tobytes(),
            sampling_params=None if pools else params,  # type: ignore[arg-type]
            pooling_params=params if pools else None,  # type: ignore[arg-type]
            resumed_output_token_ids=np.array(resumed, np.int32).tobytes(),
        )
        self.outputs[index] = []
        self.scheduler.add_request(Request(message))

    def launch(self) -> bool:
        """Plans a step if there is room for one, and lets the worker go on with it."""
        if len(self.in_flight) == self.scheduler.config.max_in_flight_steps:
            return False
        planned = self.scheduler.schedule()
        if planned is None:
            return False
        plan, step = planned
        self.in_flight.append(step)
        self.plans.append((plan.num_steps, any(plan.num_draft_tokens)))
        self.worker.handle(plan)
        return True

    @property
    def results(self) -> list[ModelRunnerOutput]:
        """Answers of the worker that nobody has looked at."""
        return [answer for answer in self.answers if isinstance(answer, ModelRunnerOutput)]

    def retire(self) -> None:
        """Waits for the results of the oldest step, and takes them."""
        if self.worker.results_fd is not None:
            while not self.results:
                if isinstance(self.device, LateDevice):
                    assert self.device.channel is not None
                    self.device.channel.let_come()
                assert select.select([self.worker.results_fd], [], [], 60)[0], "no results"
                self.worker.take_results()
        result = self.results[0]
        self.answers.remove(result)
        self.num_accepted += sum(result.num_accepted)
        told = self.scheduler.update_from_output(self.in_flight.popleft(), result)
        for index, _, tokens in token_rows(told):
            self.outputs[index] += tokens
        for output in told.outputs:
            assert output.error is None
            self.outputs[output.index] += output.new_token_ids
            entries = [(entry, entry.position) for entry in output.prompt_logprobs]
            entries += [(entry, -1) for entry in output.new_logprobs]
            for entry, position in entries:
                self.logprobs.setdefault(output.index, []).append(
                    (position, entry.token_ids, entry.logprobs, entry.rank)
                )
            if output.pooling_output is not None:
                self.vectors[output.index] = output.pooling_output

    def run(self) -> None:
        while True:
            while self.launch():
                pass
            if not self.in_flight:
                return
            self.retire()


THINKING = ThinkingBudget(3, (101,), (7, 8, 9), starts_open=True)
PLAIN: dict[str, Any] = {"max_tokens": 30}
REQUESTS: list[tuple[list[int], ResolvedParams | ResolvedPoolingParams]] = [
    (random_tokens(40, 1), ResolvedParams(temperature=0.0, **PLAIN)),
    (random_tokens(7, 2), ResolvedParams(seed=2, top_p=0.9, top_k=40, logprobs=3, **PLAIN)),
    (random_tokens(90, 3), ResolvedParams(seed=3, repetition_penalty=1.3, frequency_penalty=0.4, **PLAIN)),
    (random_tokens(33, 4), ResolvedParams(seed=4, min_p=0.05, prompt_logprobs=2, logprobs=-1, max_tokens=6)),
    (random_tokens(64, 5), ResolvedPoolingParams(pooling_type="MEAN")),
    (
        random_tokens(12, 6),
        ResolvedParams(seed=6, bad_words_token_ids=((5,), (6, 7)), thinking_budget=THINKING, **PLAIN),
    ),
    (
        random_tokens(50, 7),
        ResolvedParams(seed=7, logit_bias=((9, 4.0), (11, -3.0)), min_tokens=9, stop_token_ids=(9,), **PLAIN),
    ),
    (random_tokens(70, 8), ResolvedPoolingParams(pooling_type="ALL", normalize=False)),
    (
        random_tokens(3, 9),
        ResolvedParams(seed=9, allowed_token_ids=tuple(range(40, 90)), logprob_token_ids=(3, 50), logprobs=0, **PLAIN),
    ),
    (random_tokens(100, 10), ResolvedPoolingParams()),
    (random_tokens(40, 1) + [5], ResolvedParams(temperature=0.0, **PLAIN)),
]


def answers(engine: Engine) -> tuple[dict[int, Any], ...]:
    for index, (prompt, params) in enumerate(REQUESTS):
        engine.add(index, prompt, params)
    engine.run()
    engine.scheduler.check_integrity()
    return engine.outputs, engine.logprobs, engine.vectors


SETUPS: list[dict[str, Any]] = [{}, {"eager": True}, {"num_blocks": 9}, {"max_in_flight_steps": 1}, {"windows": True}]


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_tokens_are_those_of_a_cpu(setup: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = answers(Engine(ReferenceCpu(), monkeypatch, **setup))
    late = LateDevice(by_itself=False)
    engine = Engine(late, monkeypatch, **setup)
    assert answers(engine) == expected
    assert late.channel is not None
    assert late.channel.most_in_flight == setup.get("max_in_flight_steps", 2) and late.channel.num_in_flight == 0
    assert (engine.scheduler.num_preemptions > 0) == ("num_blocks" in setup)


def test_a_step_is_launched_before_the_tokens_of_the_last_one_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    late = LateDevice(by_itself=False)
    engine = Engine(late, monkeypatch)
    engine.add(0, random_tokens(10), ResolvedParams(temperature=0.0, max_tokens=5))
    assert engine.launch() and engine.launch() and not engine.launch()
    assert late.channel is not None and late.channel.num_in_flight == 2
    assert not engine.results
    states = engine.worker.runner.states
    assert (int(states.num_tokens[0]), int(states.num_known[0])) == (12, 10)
    engine.retire()
    assert int(states.num_known[0]) == 11


def test_a_step_that_looks_at_tokens_waits_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    late = LateDevice(by_itself=False)
    engine = Engine(late, monkeypatch)
    engine.add(0, random_tokens(10), ResolvedParams(temperature=0.0, max_tokens=5, presence_penalty=1.0))
    assert engine.launch() and engine.launch()
    assert late.channel is not None and late.channel.num_in_flight == 1
    engine.retire()
    assert late.channel.num_in_flight == 1  # the second one went on
    engine.run()
    assert len(engine.outputs[0]) == 5


def test_late_tokens_do_not_reach_the_next_owner_of_a_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    late = LateDevice(by_itself=False)
    alone = Engine(late, monkeypatch)
    prompt = random_tokens(20, 5)
    alone.add(0, prompt, ResolvedParams(temperature=0.0, max_tokens=8))
    alone.run()
    engine = Engine(late, monkeypatch, max_num_seqs=1)
    engine.add(1, random_tokens(30), ResolvedParams(temperature=0.0, max_tokens=8))
    assert engine.launch()
    engine.scheduler.abort_request(1)
    engine.add(0, prompt, ResolvedParams(temperature=0.0, max_tokens=8))
    assert engine.launch()
    engine.run()
    assert engine.outputs == {1: [], 0: alone.outputs[0]}


def test_a_worker_inside_the_caller_says_when_results_have_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("executor.worker.create_device", lambda name: LateDevice())
    model = ModelConfig(model=str(tiny.checkpoint("llama")), dtype="float32")
    executor = InlineExecutor(ExecutorConfig(model=model, step_size=STEP_SIZE), "")
    executor.start()
    scheduler = new_scheduler()
    executor.submit(InitKVCache((48,), MAX_LEN))
    prompt = np.array(random_tokens(9), np.int32).tobytes()
    message = EngineCoreRequest(
        request_id="0", index=0, prompt_token_ids=prompt, sampling_params=ResolvedParams(max_tokens=9)
    )
    scheduler.add_request(Request(message))
    for _ in range(2):
        planned = scheduler.schedule()
        assert planned is not None
        executor.submit(planned[0])
    steps: list[int] = []
    while len(steps) < 2:
        assert select.select(executor.poll_fds(), [], [], 60)[0], "no news, and no results"
        steps += [answer.step_id for answer in executor.receive() if isinstance(answer, ModelRunnerOutput)]
    assert steps == [1, 2]


def test_the_host_cannot_read_the_device() -> None:
    tensor = on_device(torch.arange(6, dtype=torch.float32))
    reads: list[Callable[[], object]] = [
        lambda: tensor.tolist(),
        lambda: tensor.numpy(),
        lambda: np.asarray(tensor),
        lambda: float(tensor[0]),
        lambda: bool(tensor[0] > 0),
        lambda: list(tensor),
        lambda: tensor[tensor > 2],
        lambda: tensor[[0, 1]],
        lambda: tensor.nonzero(),
        lambda: torch.where(tensor > 2),
        lambda: tensor.cpu(),
        lambda: tensor.to("cpu"),
        lambda: tensor + torch.ones(6),
        lambda: torch.equal(tensor, tensor),
        lambda: f"{tensor[0]:.1f}",
        lambda: ops.gather_rows(tensor, torch.tensor([0])),
        lambda: (tensor * 2).sum().item(),
    ]
    ops.use("cpu", "reference")
    LateDevice().initialize(DeviceConfig(), 0)
    for read in reads:
        with pytest.raises(HostReadError):
            read()
    assert repr(tensor.to(torch.float64)) == "LateTensor([6], torch.float64)"


def test_uploads_hold_until_the_results_of_their_step_are_collected() -> None:
    channel = LateDevice(by_itself=False).steps()
    numbers = np.arange(5, dtype=np.int32)
    first = channel.upload({"numbers": numbers, "more": np.zeros((2, 3), np.float64)})
    pending = channel.download([first["numbers"] + 1])
    numbers[:] = 7
    second = channel.upload({"numbers": numbers})
    later = channel.download([second["numbers"], first["numbers"]])
    channel.let_come()
    assert pending.is_ready() and not later.is_ready()
    assert pending.collect()[0].tolist() == [1, 2, 3, 4, 5]
    third = channel.upload({"numbers": numbers + 1})  # where the first one was
    last = channel.download([first["numbers"], third["numbers"]])
    channel.let_come()
    channel.let_come()
    assert [column.tolist() for column in later.collect()] == [[7] * 5, [0, 1, 2, 3, 4]]
    assert [column.tolist() for column in last.collect()] == [[8] * 5] * 2
    channel.upload({"numbers": np.zeros(1 << 21, np.uint8)})  # more than a block holds
