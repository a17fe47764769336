#!/usr/bin/env python
"""Times whole steps of a model on this machine, without server or scheduler, against their floor.

    python scripts/bench_step.py --model folder                        decode, 1 to 64 requests
    python scripts/bench_step.py --model folder --decode 16 --context 1024
    python scripts/bench_step.py --model folder --prefill 256 2048     prompts alone
    python scripts/bench_step.py --model folder --explain              where the time of a step goes
    python scripts/bench_step.py --model folder --neighbours 1         beside a busy loop on one core
    python scripts/bench_step.py --model 1b --load-format dummy        a shape with random weights
    python scripts/bench_step.py --model experts --load-format dummy   one with experts

The floor of a step is the larger of two times: reading weights and KV cache once, at the memory bandwidth of all
threads together, and the multiplications, at the rate at which all threads multiply in registers. Loops that share no
code with the kernels measure both. Bandwidth is measured before and after each batch of steps, since other programs use
part of it. ``python`` is the share of a step that is not spent in compiled kernels. Of experts, as many count as a
step's tokens touch if a router has no preference.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import numpy.typing as npt
import torch
from bench_models import LLAMA, SHAPES, config_of
from torch import nn

import ops
from api.model.gguf_file import read_gguf
from executor.config import DeviceConfig, ExecutorConfig, LoRAConfig, ModelConfig, ParallelConfig, StepSize
from executor.layers.embedding import VocabParallelEmbedding
from executor.layers.linear import LinearLayer
from executor.layers.moe import MoE
from executor.messages import FromWorker, InitKVCache, NewRequest, ResolvedParams, SchedulerOutput, WorkerReady
from executor.nodes.links import NetworkLinks
from executor.parallel import ParallelState
from executor.quantization.packed import PackedWeights
from executor.worker import Worker
from ops.cpu import library, memory

BANDWIDTH_BYTES = 512 << 20
MAX_IN_FLIGHT = 64
"""Steps by which pipeline stages may be apart."""
EXPERT_SHAPES: dict[str, dict[str, Any]] = {
    "experts": {
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_local_experts": 16,
        "num_experts_per_tok": 2,
    },
    "30b-a3b": {  # Qwen3-30B-A3B with fewer layers
        "architectures": ["Qwen3MoeForCausalLM"],
        "head_dim": 128,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 6,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
}
"""Models with experts, without weights."""
DType = Literal["auto", "float32", "bfloat16", "float16"]
LoadFormat = Literal["auto", "dummy"]


class Steps:
    """A worker in this process, with plans for it."""

    def __init__(
        self,
        model: str,
        dtype: DType,
        max_tokens: int,
        max_seqs: int,
        max_len: int,
        load_format: LoadFormat = "auto",
        lora: LoRAConfig | None = None,
        parallel: ParallelState | None = None,
        num_threads: int | None = None,
        descriptors: Mapping[str, int] | None = None,
        links: NetworkLinks | None = None,
        max_kv_bytes: int | None = None,
        ranks: ParallelConfig | None = None,
        **fields: Any,
    ) -> None:
        """Starts a worker, which may be one of several ranks.

        ``fields``: others of the model's configuration. ``descriptors``, ``links``: see ``Worker``. ``max_kv_bytes``:
        the KV cache is no larger; by default all requests may be as long as the longest. ``ranks``: how many there
        are, with ``links``.
        """
        path = Path(model)
        gguf = read_gguf(path).header() if path.suffix == ".gguf" else None
        config = ExecutorConfig(
            model=ModelConfig(model=model, dtype=dtype, gguf=gguf, load_format=load_format, **fields),
            device=DeviceConfig(num_threads=num_threads),
            lora=lora or LoRAConfig(),
            parallel=ranks or ParallelConfig(),
            step_size=StepSize(
                max_num_seqs=max_seqs, max_num_batched_tokens=max_tokens, max_in_flight_steps=MAX_IN_FLIGHT
            ),
        )
        self.answers: list[FromWorker] = []
        self.worker = Worker(parallel or ParallelState(), config, self.answers.append, descriptors, links)
        self.worker.start()
        ready = next(answer for answer in self.answers if isinstance(answer, WorkerReady))
        self.groups = ready.kv_cache_groups
        self.vocab_size = ready.vocab_size
        self._count(list(self.worker.runner.model.modules()))
        self.blocks_each = [-(-max_len // group.block_size) for group in self.groups]
        blocks = [max_seqs * each for each in self.blocks_each]
        if max_kv_bytes is not None:
            of_all = sum(group.bytes_per_block * count for group, count in zip(self.groups, blocks, strict=True))
            share = min(1.0, max_kv_bytes / of_all)
            blocks = [max(1, int(count * share)) for count in blocks]
        self.num_blocks = tuple(blocks)
        self.worker.handle(InitKVCache(self.num_blocks, max_len))
        self.step_id = 0

    def _count(self, modules: list[nn.Module]) -> None:
        """Notes what a step reads and multiplies."""
        tables = [module for module in modules if isinstance(module, VocabParallelEmbedding)]
        heads = [table.shape for table in tables if table.shape.makes_logits]
        self.head_parameters = sum(shape.vocab.size * shape.hidden.size for shape in heads)
        mixtures = [module for module in modules if isinstance(module, MoE)]
        of_experts = [layer for each in mixtures for layer in each.experts.modules() if isinstance(layer, LinearLayer)]
        layers = [module for module in modules if isinstance(module, LinearLayer)]
        every, experts = (
            sum(layer.shape.input.size * sum(layer.output_sizes) for layer in some) for some in (layers, of_experts)
        )
        self.share = mixtures[0].routing.top_k / mixtures[0].num_experts if mixtures else 1.0
        """Of the experts that a token has."""
        self.layer_parameters = every - experts + self.share * experts
        """Multiplied by a token."""
        self.expert_bytes = sum(parameter.nbytes for each in mixtures for parameter in each.experts.parameters())
        unread = {id(parameter) for table in tables if not table.shape.makes_logits for parameter in table.parameters()}
        parameters = modules[0].parameters()
        self.weight_bytes = sum(parameter.nbytes for parameter in parameters if id(parameter) not in unread)
        self.weight_bytes -= self.expert_bytes
        """Read by each step: all but experts and the input embedding, unless that also computes the logits."""
        packed = [module.packed for module in modules if isinstance(module, PackedWeights)]
        rounds = any(isinstance(each, ops.QuantizedWeight) and each.activations == "int8" for each in packed)
        dtypes = [shape.dtype for shape in heads or [table.shape for table in tables]]  # a stage may lack both
        self.numbers = library.INT8 if rounds else library.TYPES[dtypes[0] if dtypes else torch.bfloat16]
        """What is multiplied; see ``Library.measure_peak``."""

    def bytes_of(self, tokens: int) -> float:
        """Of weights that a step reads."""
        return self.weight_bytes + self.expert_bytes * (1 - (1 - self.share) ** tokens)

    def operations(self, tokens: int, samples: int) -> float:
        """Multiplications and additions of a step that computes the logits of some of its tokens."""
        return 2.0 * (tokens * self.layer_parameters + samples * self.head_parameters)

    def run(self, slots: list[int], counts: list[int], *, samples: bool = True, **fields: Any) -> float:
        """Runs one step and returns its seconds. ``samples``: each row ends with a token that is sampled."""
        self.step_id += 1
        plan = SchedulerOutput(
            step_id=self.step_id,
            slots=np.array(slots, np.int32).tobytes(),
            num_scheduled_tokens=np.array(counts, np.int32).tobytes(),
            num_sampled=np.full(len(slots), samples, np.uint8).tobytes(),
            **fields,
        )
        begin = time.perf_counter()
        self.worker.handle(plan)
        while self.worker.has_plans:  # a pipeline stage, which waits for another one
            select.select(self.worker.wake_fds, [], [])
            self.worker.take_results()
        return time.perf_counter() - begin

    def admit(self, slot: int, length: int, lora_id: int = 0) -> NewRequest:
        blocks = [np.arange(slot * each, (slot + 1) * each, dtype=np.int32) for each in self.blocks_each]
        tokens = np.random.default_rng(slot).integers(0, self.vocab_size, length).astype(np.int32)
        return NewRequest(
            slot=slot,
            token_ids=tokens.tobytes(),
            num_prompt_tokens=length,
            num_computed_tokens=0,
            block_ids=tuple(ids.tobytes() for ids in blocks),
            params=ResolvedParams(temperature=0.0, max_tokens=1 << 20),
            lora_id=lora_id,
        )

    def plan_length(self, requests: int, length: int) -> bool:
        """Gives each slot blocks for sequences of this length. Returns False if there are too few for the requests."""
        self.blocks_each = [-(-length // group.block_size) for group in self.groups]
        return all(requests * each <= most for each, most in zip(self.blocks_each, self.num_blocks, strict=True))

    def kv_bytes(self, context: float) -> float:
        """Bytes of K and V that a token reads after so many others."""
        return sum(
            min(context, group.sliding_window or context) * group.bytes_per_block / group.block_size
            for group in self.groups
        )

    def fill(self, requests: int, length: int) -> None:
        """Computes a prompt in each of the first slots."""
        for slot in range(requests):
            free = np.array([slot], np.int32).tobytes() if self.step_id else b""
            self.run([slot], [length], new_reqs=(self.admit(slot, length),), finished_slots=free)


class Clock:
    """Accumulates the time spent in a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.seconds = 0.0

    @classmethod
    def of(cls, kernels: Any, run: Callable[..., Any]) -> Clock:
        """A clock of all calls of the kernels, which go to ``run``."""
        kernels.run = clock = cls(run)
        return clock

    def __call__(self, *args: Any) -> Any:
        begin = time.perf_counter()
        try:
            return self.function(*args)
        finally:
            self.seconds += time.perf_counter() - begin


@contextmanager
def folder_of(model: str) -> Iterator[str]:
    """The model itself, or a folder with the configuration of one of ``SHAPES`` or ``EXPERT_SHAPES``."""
    if model not in (*SHAPES, *EXPERT_SHAPES):
        yield model
        return
    config = {**LLAMA, **EXPERT_SHAPES[model]} if model in EXPERT_SHAPES else config_of(model)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        yield folder


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Busy loops on some of this process's cores, one each."""
    cores = sorted(os.sched_getaffinity(0))[:count]
    loops = [
        subprocess.Popen([sys.executable, "-c", f"import os\nos.sched_setaffinity(0, [{core}])\nwhile True: pass"])
        for core in cores
    ]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


KINDS = ("products", "logits", "attention", "others")
"""Of kernel calls, in the table of ``Explanation``."""


class Explanation:
    """Seconds that a step spends in each kind of kernel call. Wraps ``octavo_run``."""

    def __init__(self, kernels: library.Library, function: Callable[..., Any], threads: int) -> None:
        self._kernels = kernels
        self._run = function
        self._threads = threads
        self.begins: dict[str, npt.NDArray[np.float64]] = defaultdict(lambda: np.zeros(threads))
        """From when the first thread begins until each does."""
        self.own: dict[str, npt.NDArray[np.float64]] = defaultdict(lambda: np.zeros(threads))
        """In each thread's part."""
        self.all: dict[str, float] = defaultdict(float)
        """From when the first thread begins until it begins with the next call."""
        self.calls: dict[str, int] = defaultdict(int)
        self.table: list[str] = []
        """Of all kinds of steps, in Markdown."""

    def clear(self) -> None:
        for figures in (self.begins, self.own, self.all, self.calls):
            figures.clear()

    def __call__(self, nodes: Any, count: int, *args: Any) -> None:
        if not isinstance(nodes, ctypes.Array):
            self._run(nodes, count, *args)
            return
        times = np.zeros((count, self._threads, 2))
        self._kernels.profile(times.ctypes.data, self._threads)
        try:
            self._run(nodes, count, *args)
        finally:
            self._kernels.profile(None, 0)
        ran = times[:, :, 1] > 0  # not all threads do if other programs keep some from their cores
        own = np.where(ran, times[:, :, 1] - times[:, :, 0], 0.0)
        late = np.where(ran, times[:, :, 0] - times[:, :1, 0], 0.0)
        ends = np.append(times[1:, 0, 0], times[-1].max())
        for i in range(count):
            name = _name(nodes[i])
            self.own[name] += own[i]
            self.begins[name] += late[i]
            self.all[name] += ends[i] - times[i, 0, 0]
            self.calls[name] += 1

    def show(self, step: str, times: list[float], floor: float) -> None:
        """Prints one line per kind of call, per step, and adds a row to the table. Times are in seconds."""
        steps, total = len(times), sum(self.all.values())
        shares = dict.fromkeys(KINDS, 0.0)
        for name, seconds in self.all.items():
            kind = "logits" if name.endswith(" logits") else "products" if name.startswith("linear") else name
            shares[kind if kind in KINDS else "others"] += seconds / sum(times)
        shown = [f"{share:.0%}" for share in (*shares.values(), 1 - sum(shares.values()))]
        seconds = statistics.median(times)
        self.table.append(f"| {' | '.join([step, f'{seconds * 1e3:.1f}', f'{seconds / floor:.2f}', *shown])} |")
        for name, seconds in sorted(self.all.items(), key=lambda item: -item[1]):
            waits = " ".join(f"{1 - own / seconds:5.1%}" for own in self.own[name])
            late = max(self.begins[name]) / self.calls[name] * 1e6
            print(
                f"    {name:36} {self.calls[name] / steps:5.0f} calls {seconds / steps * 1e3:9.3f} ms "
                f"{seconds / total:6.1%}   threads wait {waits}, the last begins {late:.1f} us late"
            )


def _name(node: library.Node) -> str:
    struct = library.STRUCTS[node.op].from_address(node.args)
    if isinstance(struct, library.LinearArgs):
        weight = struct.weight
        extras = [
            word
            for word, there in (
                ("norm", struct.norm_weight),
                ("gated", struct.epilogue == library.EPILOGUE_GATED),
                ("add", struct.epilogue == library.EPILOGUE_RESIDUAL),
                ("logits", struct.epilogue == library.EPILOGUE_LOGITS),
            )
            if there
        ]
        return " ".join([f"linear {weight.columns} -> {weight.rows}", *extras])
    return type(struct).__name__.removesuffix("Args").lower()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--model",
        required=True,
        help=f"folder, GGUF file, or with --load-format dummy one of {', '.join((*SHAPES, *EXPERT_SHAPES))}",
    )
    add("--load-format", default="auto", choices=get_args(LoadFormat), help="dummy: random weights")
    add(
        "--dtype",
        default="auto",
        choices=get_args(DType),
        help="dtype of weights and activations (default: the model's)",
    )
    add("--quantization", help="as of octavo serve, such as int8")
    add("--quantized-activations", default="auto", help="as of octavo serve: auto, float or int8")
    add("--kv-cache-dtype", default="auto", help="as of octavo serve: auto, int8, fp8 or fp8_e5m2")
    add("--decode", type=int, nargs="*", default=[1, 4, 8, 16, 32, 64], help="requests that get one token each")
    add("--prefill", type=int, nargs="*", default=[], help="tokens of one prompt")
    add("--context", type=int, default=256, help="tokens before the first decode step")
    add("--steps", type=int, default=60, help="decode steps per measurement")
    add("--explain", action="store_true", help="also print what each kind of kernel call takes; slower a little")
    add("--neighbours", type=int, default=0, metavar="N", help="decode again beside busy loops on so many cores")
    options = parser.parse_args()
    with folder_of(options.model) as options.model:
        measure(options)


def measure(options: argparse.Namespace) -> None:
    """Prints the table."""
    kernels = library.chosen()
    if kernels is None:
        sys.exit("no kernels are available on this machine")
    explanation = Explanation(kernels, kernels.run, torch.get_num_threads()) if options.explain else None
    clock = Clock.of(kernels, explanation or kernels.run)
    threads = torch.get_num_threads()
    turns = 3 if options.neighbours else 1
    longest = max([options.context + turns * options.steps + 1, *options.prefill])
    max_tokens = max([2048, *options.prefill])
    steps = Steps(
        options.model,
        options.dtype,
        max_tokens,
        max([1, *options.decode]),
        longest,
        options.load_format,
        quantization=options.quantization,
        quantized_activations=options.quantized_activations,
        kv_cache_dtype=options.kv_cache_dtype,
    )
    buffer = memory.map_zeros(BANDWIDTH_BYTES).fill_(1)
    peak = 2 * max(kernels.measure_peak(steps.numbers, threads) for _ in range(8))

    def bandwidth() -> float:
        return float(np.median([kernels.measure_bandwidth(buffer.data_ptr(), len(buffer), threads) for _ in range(5)]))

    weights = f"weights {(steps.weight_bytes + steps.expert_bytes) / 1e6:.1f} MB"
    print(f"{kernels.capability}, {threads} threads, {weights}, {peak / 1e9:.0f} Gflop/s")
    print(f"{'step':22} {'ms':>8} {'GB/s':>6} {'floor ms':>9} {'x floor':>8} {'python':>8}")

    def show(name: str, times: list[float], clocked: float, read: float, num_bytes: float, operations: float) -> None:
        floor = max(num_bytes / read, operations / peak)
        seconds = statistics.median(times)
        python = 1 - clocked / sum(times)
        print(
            f"{name:22} {seconds * 1e3:8.2f} {read / 1e9:6.1f} {floor * 1e3:9.2f} {seconds / floor:8.3f} {python:8.1%}",
            flush=True,
        )
        if explanation is not None:
            explanation.show(name, times, floor)

    def restart_clocks() -> None:
        clock.seconds = 0.0
        if explanation is not None:
            explanation.clear()

    for requests in options.decode:
        steps.fill(requests, options.context)
        before = bandwidth()
        restart_clocks()
        times = [steps.run(list(range(requests)), [1] * requests) for _ in range(options.steps)]
        read = (before + bandwidth()) / 2
        kv = requests * steps.kv_bytes(options.context + options.steps / 2)
        show(
            f"decode {requests}",
            times,
            clock.seconds,
            read,
            steps.bytes_of(requests) + kv,
            steps.operations(requests, requests),
        )
        if options.neighbours:
            with neighbours(options.neighbours):
                beside = [steps.run(list(range(requests)), [1] * requests) for _ in range(options.steps)]
            after = [steps.run(list(range(requests)), [1] * requests) for _ in range(options.steps)]
            alone = statistics.median(times + after)
            slower = statistics.fmean(beside) / alone
            print(f"    beside {options.neighbours} busy loops {statistics.fmean(beside) * 1e3:.2f} ms, {slower:.2f}x")
    for length in options.prefill:
        times = []
        before = bandwidth()
        restart_clocks()
        for _ in range(5):
            new = steps.admit(0, length)
            free = np.array([0], np.int32).tobytes()
            times.append(steps.run([0], [length], new_reqs=(new,), finished_slots=free))
        read = (before + bandwidth()) / 2
        show(f"prefill {length}", times, clock.seconds, read, steps.bytes_of(length), steps.operations(length, 1))
    if explanation is not None:
        print(f"\n| step | ms | x floor | {' | '.join(KINDS)} | Python, sampling |\n|---{'|---' * (len(KINDS) + 3)}|")
        print("\n".join(explanation.table))


if __name__ == "__main__":
    main()
