"""What a model would take on this machine, found out without loading it.

The model is built as for serving, and its parameters are matched with the checkpoint. Layers with the same shapes and
stored types take the same memory, so one of each kind is read and packed, and stands in for the others: all numbers are
those of the real code, and most of the weights stay on the disk. The step is captured like that of a worker.

To time steps, as many layers are read as exceed the CPU's caches, and take turns as the others. So a step reads all its
weights from memory while it computes, as when serving: no model of how the two overlap is needed.

``python -m executor.plan [measure]`` takes an ``ExecutorConfig`` on standard input. It writes the ``ModelSurvey`` of
each rank, or a ``WorkerFailed``.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from executor.adapters import LoadedAdapters, check_adapters
from executor.base import ModelError
from executor.checkpoint import StoredTensor
from executor.config import ExecutorConfig, ParallelConfig
from executor.device.base import Device, Memory, create_device
from executor.draft_checks import speculation_of
from executor.image_inputs import create_image_inputs
from executor.layers.attention import form_groups
from executor.layers.embedding import VocabParallelEmbedding
from executor.layers.linear import LinearLayer
from executor.layers.moe import MoE, Router
from executor.layers.parameter import WeightParameter, Weights
from executor.loader import LoadedModel, Target, is_tied_by_file, load_tower, match_weights, prepare_model
from executor.messages import (
    EXIT_MODEL,
    InitKVCache,
    ModelSurvey,
    NewRequest,
    ResolvedParams,
    SchedulerOutput,
    WorkerFailed,
    WorkerReady,
)
from executor.model_runner import ModelRunner
from executor.parallel import ParallelState, places
from executor.readiness import worker_ready
from executor.stages import Stage
from ops import Communicator
from ops.cpu import library, memory
from ops.dispatch import Spec

LEAST_BANDWIDTH_BYTES = 256 << 20
"""Memory that is read to measure the bandwidth, if it exceeds twice the caches."""
UNKNOWN_CACHE_BYTES = 256 << 20
"""Size of the caches if the system does not say it: few CPUs have more."""
TIMED_STREAMS = (1, 8, 32)
"""Requests that decode at the same time in the steps that are timed."""
TIMED_CONTEXT = 512
"""Tokens of each of them."""
TIMED_STEPS = 5
"""At least; up to ``MOST_TIMED_STEPS`` within ``TIMED_SECONDS``."""
MOST_TIMED_STEPS = 25
TIMED_SECONDS = 0.5
_KINDS = (("experts", "experts"), ("attn", "attention"), ("mlp", "mlp"))


def survey(config: ExecutorConfig, parallel: ParallelState, *, measures: bool = True) -> ModelSurvey:
    """Surveys the share of a rank.

    Args:
        config: Configuration of the workers.
        parallel: The rank.
        measures: Measure what this machine can do, which takes seconds. Only of CPUs.

    Raises:
        ModelError: The model cannot be served as configured.
    """
    found, runner = prepare(config, parallel, measures=measures)
    if not measures or not runner.device.shares_memory:
        return found
    found = measure_bandwidth(found)
    return TimedSteps(found, runner).measure() if found.ready.pooling.generates else found


def prepare(
    config: ExecutorConfig, parallel: ParallelState, *, measures: bool = True
) -> tuple[ModelSurvey, ModelRunner]:
    """What ``survey`` finds before it measures, and what runs the steps to measure. See there."""
    torch.set_grad_enabled(False)
    device = create_device(config.device.device)
    device.initialize(config.device, parallel.local_rank)
    before = device.memory()
    communicator = _Alone(parallel, cuts_sums=not device.shares_memory) if parallel.tp_size > 1 else None
    model, context, checkpoint = prepare_model(
        config.model,
        parallel,
        device.torch_device,
        config.device.attention_backend,
        communicator,
        config.lora.max_loaded,
    )
    stored: Mapping[str, StoredTensor] = {}
    targets: Mapping[str, Target] = {}
    if checkpoint is not None:
        _, targets, stored = match_weights(model, checkpoint, context, is_tied_by_file=is_tied_by_file(config.model))
    has_experts = any(isinstance(module, MoE) for module in model.modules())
    num_bytes = (4 if has_experts else 2) * cache_bytes() if measures and device.shares_memory else 0
    weights = _pack_some(model, targets, stored, min(num_bytes, before.free_bytes // 4))
    tower = load_tower(config.model, context, config.device.attention_backend, lambda *_: None)
    if tower is not None:  # small enough to be loaded
        weights["images"] = sum(parameter.nbytes for parameter in tower.parameters())
    num_bytes = sum(weights.values())
    loaded = LoadedModel(model.eval(), context.config, num_bytes, context.dtype, context.max_model_len, tower=tower)
    runner = _runner(config, loaded, device, parallel, communicator)
    runner.images = create_image_inputs(loaded, device, runner.max_tokens)
    ready = _report(runner, loaded, device, before, parallel.node_rank)
    if config.lora.enable_lora:
        check_adapters(config.lora, loaded, config.parallel.world_size, device.kernels)
        of_adapters = LoadedAdapters(loaded, config.lora).num_bytes(runner.max_tokens)
        ready = msgspec.structs.replace(ready, step_bytes=ready.step_bytes + of_adapters)
    runner.speculative = None  # nothing is drafted in the steps that are timed
    return ModelSurvey(ready=ready, free_bytes=before.free_bytes, weights=weights), runner


def cache_bytes() -> int:
    """Size of the largest caches of the cores that this process may use, all together."""
    found: dict[tuple[int, str], int] = {}
    for core in os.sched_getaffinity(0):
        for cache in Path(f"/sys/devices/system/cpu/cpu{core}/cache").glob("index*"):
            try:
                level, shared, size = (
                    (cache / name).read_text().strip() for name in ("level", "shared_cpu_list", "size")
                )
                found[int(level), shared] = int(size.removesuffix("K")) << 10
            except (OSError, ValueError):  # a virtual machine may hide some
                continue
    last = max((level for level, _ in found), default=0)
    return sum(size for (level, _), size in found.items() if level == last) or UNKNOWN_CACHE_BYTES


class _Alone:
    """A rank whose steps are timed without the others: of their columns and rows, it has zeros."""

    shares_rows = False

    def __init__(self, parallel: ParallelState, *, cuts_sums: bool) -> None:
        self.rank, self.size = parallel.tp_rank, parallel.tp_size
        self.cuts_sums = cuts_sums

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        before = sum(widths[: self.rank])
        return torch.nn.functional.pad(x, (before, sum(widths) - before - widths[self.rank]))

    def select_rows(self, x: Tensor, is_here: Tensor) -> Tensor:
        return x * is_here.unsqueeze(1)

    def broadcast(self, x: Tensor) -> Tensor:
        return x

    def wait(self) -> None:
        pass

    def agree(self, number: int, what: str) -> None:
        pass

    def exchange(self, x: Tensor, out: Tensor) -> None:
        pass

    def swap(self, x: Tensor, out: Tensor) -> None:
        pass


def _runner(
    config: ExecutorConfig,
    loaded: LoadedModel,
    device: Device,
    parallel: ParallelState,
    communicator: Communicator | None,
) -> ModelRunner:
    model, hidden = loaded.model, Spec("tokens", loaded.hf_config.hidden_size, loaded.dtype)
    memory = None
    if parallel.pp_rank and not device.shares_memory:
        num_tokens = config.step_size.max_num_batched_tokens or device.max_num_batched_tokens
        num_bytes = num_tokens * hidden.width * hidden.dtype.itemsize
        memory = torch.zeros(num_bytes, dtype=torch.uint8, device=device.torch_device)
    speculative = speculation_of(config.speculative, loaded, device, config.parallel.world_size)
    return ModelRunner(
        loaded,
        device,
        form_groups(model.attention_layers(), config.device.block_size, model.attention_of_stages),
        step_size=config.step_size,
        enforce_eager=config.model.enforce_eager or not loaded.model.can_be_captured,
        speculative=speculative,
        draft=None,
        forced_outputs="",
        rank=parallel.rank,
        communicator=communicator,
        stage=Stage(parallel, hidden, memory=memory),
    )


def _report(runner: ModelRunner, loaded: LoadedModel, device: Device, before: Memory, node_rank: int) -> WorkerReady:
    """What a worker with the model would report. ``before`` is the memory without its weights."""
    of_stage = 0 if runner.stage.memory is None else runner.stage.memory.nbytes
    free_bytes = max(0, before.free_bytes - loaded.weight_bytes - of_stage)
    is_whole = runner.stage.is_first and runner.stage.is_last
    ready = worker_ready(
        runner,
        loaded,
        device,
        Memory(before.total_bytes, free_bytes),
        runner.step_memory(),
        min(device.default_kv_bytes(), free_bytes // 4),
        shares_memory=device.shares_memory and (runner.communicator is not None or not is_whole),
    )
    return msgspec.structs.replace(ready, node_rank=node_rank)


def _pack_some(
    model: nn.Module, targets: Mapping[str, Target], found: Mapping[str, StoredTensor], num_bytes: int
) -> dict[str, int]:
    """Loads and packs one of each kind of layer, and more up to ``num_bytes``. They stand in for the others, in turn.

    If there are to be more, steps are timed: then routers choose at random, as if all experts were alike.

    Returns:
        Bytes of the weights of all layers, by kind.

    Raises:
        ModelError: A layer's tensors do not fit together.
    """
    stored: dict[WeightParameter, list[tuple[StoredTensor, Target]]] = {}
    for name, target in targets.items():
        if name in found:
            stored.setdefault(target.parameter, []).append((found[name], target))
    sizes = {"attention": 0, "mlp": 0, "experts": 0, "tables": 0, "others": 0}
    packed: dict[object, list[Weights]] = {}
    turns: dict[object, int] = {}
    all_bytes = 0
    for parent, attribute, name, module in _outermost(model):
        signature = _signature(parent, module, stored)
        standins = packed.setdefault(signature, [])
        is_random = isinstance(parent, Router) and num_bytes > 0
        if not standins or is_random or all_bytes < num_bytes:
            _load(module, name, stored, is_random=is_random or not found)
            standins.append(module)
            all_bytes += sum(parameter.nbytes for parameter in module.parameters())
        turn = turns[signature] = turns.get(signature, -1) + 1
        module = standins[turn % len(standins)]
        setattr(parent, attribute, module)
        is_table = isinstance(parent, VocabParallelEmbedding)
        kind = next((kind for word, kind in _KINDS if word in name), "others")
        sizes["tables" if is_table else kind] += sum(parameter.nbytes for parameter in module.parameters())
    inner = {id(parameter) for modules in packed.values() for each in modules for parameter in each.parameters()}
    others = {name: each for name, each in model.named_parameters() if id(each) not in inner}
    sizes["others"] += sum(each.nbytes for each in others.values())
    if num_bytes:
        for name, parameter in others.items():
            if isinstance(parameter, WeightParameter):
                is_router = isinstance(model.get_submodule(name.rpartition(".")[0]), Router)
                _fill(parameter, stored, is_random=is_router or not found)
    return sizes


def _outermost(model: nn.Module) -> list[tuple[nn.Module, str, str, Weights]]:
    """Weights that are not part of others: parent, attribute, full name and module of each."""
    modules = dict(model.named_modules(remove_duplicate=False))
    inner: set[nn.Module] = set()
    found = []
    for name, module in modules.items():  # outer modules first
        if isinstance(module, Weights) and module not in inner:
            inner.update(module.modules())
            parent, _, attribute = name.rpartition(".")
            found.append((modules[parent], attribute, name, module))
    return found


def _signature(
    parent: nn.Module, module: Weights, stored: Mapping[WeightParameter, list[tuple[StoredTensor, Target]]]
) -> object:
    """What the form of packed weights depends on."""
    facts: list[object] = [type(module)]
    if isinstance(parent, LinearLayer | VocabParallelEmbedding):
        facts.append(repr(parent.shape))
    for name, parameter in module.named_parameters():
        assert isinstance(parameter, WeightParameter)
        sizes = tuple(tensor.num_bytes for tensor, _ in stored.get(parameter, ()))
        facts.append((name, tuple(parameter.shape), parameter.dtype, sizes))
    return tuple(facts)


_Stored = Mapping[WeightParameter, list[tuple[StoredTensor, Target]]]


def _load(module: Weights, name: str, stored: _Stored, *, is_random: bool) -> None:
    """Reads the tensors of a layer, or makes them up, and packs it."""
    try:
        for parameter in list(module.parameters()):
            assert isinstance(parameter, WeightParameter)
            _fill(parameter, stored, is_random=is_random)
        for inner in module.modules():  # one that packs may drop those inside it
            if isinstance(inner, Weights):
                inner.pack()
    except ValueError as error:
        raise ModelError(f"{name.removesuffix('.weights')}: {error}") from error


def _fill(parameter: WeightParameter, stored: _Stored, *, is_random: bool) -> None:
    """Reads the tensors of a parameter, or makes them up."""
    if is_random and not parameter.is_optional:
        parameter.fill_randomly(torch.Generator().manual_seed(0))
        return
    for tensor, target in stored.get(parameter, ()):
        parameter.load(tensor.read(parameter.stored_dtype), target.shard_id)


def measure_bandwidth(survey: ModelSurvey) -> ModelSurvey:
    """Adds the memory bandwidth of this machine right now; nothing without kernels."""
    kernels, num_threads = library.chosen(), torch.get_num_threads()
    if kernels is None:
        return msgspec.structs.replace(survey, num_threads=num_threads)
    buffer = memory.map_zeros(max(LEAST_BANDWIDTH_BYTES, 2 * cache_bytes())).fill_(1)
    data, size = buffer.data_ptr(), len(buffer)
    return msgspec.structs.replace(
        survey,
        num_threads=num_threads,
        capability=kernels.capability,
        bytes_per_s=statistics.median(kernels.measure_bandwidth(data, size, num_threads) for _ in range(5)),
    )


class TimedSteps:
    """Steps with the few layers that are there.

    Computing, reading weights and reading K and V take what they take with the whole model.
    """

    def __init__(self, survey: ModelSurvey, runner: ModelRunner) -> None:
        """Takes what ``prepare`` returns, of a model that generates."""
        self._survey = survey
        self._runner = runner
        most = runner.step_size.max_num_seqs
        max_len = min(survey.ready.max_model_len, TIMED_CONTEXT + MOST_TIMED_STEPS + 1)
        blocks = [-(-max_len // group.block_size) for group in survey.ready.kv_cache_groups]
        self._context = max_len - MOST_TIMED_STEPS - 1
        self._num_tokens = min(max_len, runner.max_tokens, TIMED_CONTEXT)
        runner.initialize(InitKVCache(tuple(most * count for count in blocks), max_len))
        self._plans = _Plans(blocks, survey.ready.vocab_size)
        groups = zip(survey.ready.kv_cache_groups, blocks, strict=True)
        of_stream = sum(group.bytes_per_block * count for group, count in groups)
        room = runner.device.memory().free_bytes // 2
        self.streams = [count for count in TIMED_STREAMS if count <= most and (count == 1 or count * of_stream <= room)]
        """Numbers of requests of the steps that can be timed: their KV cache fits twice."""
        for tensors, count in zip(runner.cached_tensors(), blocks, strict=True):
            for tensor in tensors:
                tensor[: self.streams[-1] * count].zero_()  # reading a page that was never written reads no memory

    def decode(self, num_streams: int) -> float:
        """Median seconds of a step in which each request gets a token."""
        slots = list(range(num_streams))
        _seconds(self._runner, self._plans.start(slots, self._context))
        times: list[float] = []
        while len(times) < TIMED_STEPS or (len(times) < MOST_TIMED_STEPS and sum(times) < TIMED_SECONDS):
            times.append(_seconds(self._runner, self._plans.go_on(slots)))
        return statistics.median(times)

    def measure(self) -> ModelSurvey:
        """The survey with the times of steps."""
        decode = {count: self.decode(count) for count in self.streams}
        num_tokens = self._num_tokens
        prefill = min(_seconds(self._runner, self._plans.start([0], 0, num_tokens)) for _ in range(2))
        return msgspec.structs.replace(
            self._survey, decode_seconds=decode, prefill_seconds=prefill, prefill_tokens=num_tokens
        )


class _Plans:
    """Plans of steps, as the scheduler would make them."""

    def __init__(self, num_blocks: Sequence[int], vocab_size: int) -> None:
        """``num_blocks`` are the blocks of a request in each KV cache group."""
        self._num_blocks = num_blocks
        self._vocab_size = vocab_size
        self._step_id = 0
        self._taken: set[int] = set()

    def start(self, slots: Sequence[int], num_computed: int, num_tokens: int = 1) -> SchedulerOutput:
        """Requests whose first tokens are in the cache, and which compute so many more."""
        rng = np.random.default_rng(0)
        requests = [
            NewRequest(
                slot=slot,
                token_ids=rng.integers(0, self._vocab_size, num_computed + num_tokens, np.int32).tobytes(),
                num_prompt_tokens=num_computed + num_tokens,
                num_computed_tokens=num_computed,
                block_ids=tuple(
                    np.arange(slot * count, (slot + 1) * count, dtype=np.int32).tobytes() for count in self._num_blocks
                ),
                params=ResolvedParams(max_tokens=1 << 20, temperature=0.0),
            )
            for slot in slots
        ]
        finished = np.array(sorted(self._taken), np.int32).tobytes()
        self._taken = set(slots)
        return self.go_on(slots, num_tokens, new_reqs=tuple(requests), finished_slots=finished)

    def go_on(self, slots: Sequence[int], num_tokens: int = 1, **fields: Any) -> SchedulerOutput:
        """Requests that compute so many tokens each."""
        self._step_id += 1
        return SchedulerOutput(
            step_id=self._step_id,
            slots=np.array(slots, np.int32).tobytes(),
            num_scheduled_tokens=np.full(len(slots), num_tokens, np.int32).tobytes(),
            num_sampled=np.ones(len(slots), np.uint8).tobytes(),
            **fields,
        )


def _seconds(runner: ModelRunner, plan: SchedulerOutput) -> float:
    """What a step takes."""
    begin = time.perf_counter()
    runner.execute(plan)
    return time.perf_counter() - begin


def survey_ranks(config: ExecutorConfig, *, measures: bool) -> list[ModelSurvey]:
    """Surveys all workers of an engine. See ``survey``.

    Ranks cannot compute without each other, so steps are timed as one worker with all cores would take them.
    """
    ranks = places(config.parallel)
    surveys = [survey(config, rank, measures=measures and len(ranks) == 1) for rank in ranks]
    if not measures or len(ranks) == 1 or not surveys[0].ready.shares_memory:
        return surveys
    alone = survey(msgspec.structs.replace(config, parallel=ParallelConfig()), ParallelState())
    names = ("num_threads", "capability", "bytes_per_s", "decode_seconds", "prefill_seconds", "prefill_tokens")
    rates = {name: getattr(alone, name) for name in names}
    return [msgspec.structs.replace(each, **rates) for each in surveys]


def main() -> int:
    """Answers the message on standard input. Returns the exit code."""
    config = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=ExecutorConfig)
    answer: list[ModelSurvey | WorkerFailed]
    try:
        measures = sys.argv[1:] == ["measure"]
        answer = list(survey_ranks(config, measures=measures))
    except ModelError as error:
        answer = [WorkerFailed(rank=0, message=str(error), exit_code=EXIT_MODEL)]
    sys.stdout.buffer.write(msgspec.msgpack.encode(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
