#!/usr/bin/env python
"""Compares engines on this machine, under the same loads over HTTP.

    python scripts/bench_compare.py --model smollm2 --json compare.json \\
        --engine llama.cpp=llama.cpp/build/bin/llama-server --engine vllm=vllm/bin/python
    python scripts/bench_compare.py --model 1b --engine ik_llama.cpp=ik_llama.cpp/build/bin/llama-server
    OCTAVO_CPU_CAPABILITY=avx2 python scripts/bench_compare.py ...    with builds of the others for AVX2

Octavo always runs, as ``python -m api``. ``peers.py`` knows the best settings of some other engines; environment
variables may precede the path, flags may follow it, and ``KIND/variant=...`` gives an engine another name. Any other
one is given as ``NAME=COMMAND``, which may contain ``{model}`` and ``{port}``. ``PEERS.md`` says how to build some.

A model is a folder, a GGUF file, or one that ``bench_models.py`` writes: ``smollm2``, or a shape with random weights,
in bfloat16 or quantised (``1b-Q4_0``). ``a3b-Q4_K`` is that of ``bench_experts.py``: of its experts, the floor counts
those that a step's tokens have.

For each load, all servers are started anew, with room for its requests: more slots or a fuller cache than needed make
some of them slower. They run at the same time, and the load visits them in turn, several times, while the others are
idle (those that poll all the time are stopped meanwhile): memory bandwidth and clock of a shared machine change within
minutes, so only ratios of neighbouring runs mean anything. A ratio above 1 means that Octavo is better; the table shows
the median of the rounds, and the least and greatest.

``x floor`` is the time taken relative to the least that this machine needs: for reading weights and KV cache in each
step, or for the multiplications. ``peak`` is the share of the machine's rate of multiplications. Loops that share no
code with the kernels measure both before and after each run (``floors.py``). Weights of a GGUF file count with their
bytes there; those of a quantised one are multiplied in 8 bits.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bench_experts
import torch
from bench_models import DEMO, SHAPES, BenchModel, make_model
from floors import Machine, ModelCost, Rates, is_quantized
from peers import Engine, Room, parse_engine
from processes import Server, processor_seconds, signals_as_exceptions

from api.commands.bench.options import Options
from api.commands.bench.result import Result
from api.commands.bench.serve import run, run_loop
from api.model.gguf_file import GGUFFile, read_gguf
from executor.gguf import hf_config_from_gguf
from executor.quantization.gguf import SCALES
from ops.cpu import library

OCTAVO = "octavo"
WARM_TOKENS = 208
"""Length of the requests that warm a server up."""
SPARE_TOKENS = 32
"""Added to the length of the longest request: prompts of words are of approximate length."""
IDLE_SHARE = 0.05
"""Processor time of an idle server, in cores, from which it disturbs the others."""
SETTLE_SECONDS = 3.0
"""After its first answers, in which a server may still import or compile what later requests want."""


@dataclass(frozen=True)
class Load:
    """One load and its figure of merit.

    Attributes:
        name: What the table calls it.
        unit: Unit of the figure.
        options: Fields of ``Options``.
        figure: The figure of a result.
        higher_is_better: Whether a greater figure is better.
    """

    name: str
    unit: str
    options: dict[str, Any]
    figure: Callable[[Result], float]
    higher_is_better: bool = False

    @property
    def streams(self) -> int:
        return int(self.options["max_concurrency"])

    @property
    def length(self) -> int:
        """Tokens of a request."""
        return int(self.options["input_len"] + self.options["output_len"] + self.options.get("prefix_len", 0))


def prefill_rate(result: Result) -> float:
    """Prompt tokens per second until the last first token."""
    tokens = sum(request.num_prompt_tokens for request in result.requests)
    return tokens / max(request.start + request.ttft for request in result.requests)


def stream(input_len: int, output_len: int, num_prompts: int) -> Load:
    options = {"max_concurrency": 1, "num_prompts": num_prompts, "input_len": input_len, "output_len": output_len}
    return Load(
        f"1 stream, {input_len} + {output_len}",
        "ms per token",
        options,
        lambda result: float(result.summary()["tpot_ms"]["median"]),
    )


def streams(count: int, num_prompts: int, input_len: int, output_len: int) -> Load:
    options = {"max_concurrency": count, "num_prompts": num_prompts, "input_len": input_len, "output_len": output_len}
    return Load(
        f"{count} streams, {input_len} + {output_len}",
        "tokens/s",
        options,
        lambda result: float(result.summary()["output_tokens_per_s"]),
        higher_is_better=True,
    )


def prefill(count: int, input_len: int) -> Load:
    name = f"{count} prompt{'s' if count > 1 else ''} of {input_len:,}"
    options = {"max_concurrency": count, "num_prompts": count, "input_len": input_len, "output_len": 4}
    return Load(name, "prompt tokens/s", options, prefill_rate, higher_is_better=True)


SMALL = (
    stream(128, 128, 4),
    streams(4, 8, 256, 128),
    streams(16, 32, 256, 128),
    streams(64, 64, 256, 128),
    prefill(4, 1500),
    Load(
        "shared prefix 1,000",
        "s",
        {"max_concurrency": 8, "num_prompts": 32, "prefix_len": 1000, "input_len": 50, "output_len": 32},
        lambda result: result.duration,
    ),
)
"""Loads for models of some hundred million parameters."""
LARGE = (stream(32, 48, 1), streams(16, 16, 32, 64), prefill(1, 512), prefill(1, 1500))
"""Loads for larger models, which would take minutes with those of ``SMALL``."""
LARGE_PARAMETERS = 500_000_000


@dataclass(frozen=True)
class Sample:
    """One run of an engine under a load."""

    engine: str
    load: str
    round: int
    value: float
    bytes_per_s: float
    operations_per_s: float
    floor: float
    """Time relative to the least possible; 0: unknown."""
    peak: float
    """Share of the machine's rate of multiplications."""


def room_for(loads: Sequence[Load]) -> Room:
    """What the loads need at once."""
    return Room(max(load.streams for load in loads), max(WARM_TOKENS, *(load.length for load in loads)) + SPARE_TOKENS)


def least_seconds(load: Load, result: Result, cost: ModelCost, rates: Rates) -> tuple[float, float]:
    """The least time for a run, and the time that it took; for one stream, per token after the first."""
    summary = result.summary()
    context = load.length - load.options["output_len"] / 2
    if load.streams == 1 and load.unit == "ms per token":
        return cost.decode(rates, 1, context), summary["tpot_ms"]["median"] / 1e3
    prompt_tokens = summary["prompt_tokens"] - summary["cached_tokens"]
    least = cost.prefill(rates, prompt_tokens, summary["completed"])
    if load.figure is prefill_rate:
        return least, max(request.start + request.ttft for request in result.requests)
    steps = (summary["output_tokens"] - summary["completed"]) / load.streams
    return least + steps * cost.decode(rates, load.streams, context), result.duration


class Comparison:
    """Servers that run at the same time for each load, and what was measured of them."""

    def __init__(self, cost: ModelCost, numbers: int, machine: Machine, seed: int) -> None:
        """``numbers``: what is multiplied; see ``Machine.measure``."""
        self._engines: Sequence[Engine] = ()
        self._cost = cost
        self._numbers = numbers
        self._machine = machine
        self._seed = seed
        self._servers: dict[str, Server] = {}
        self._restless: list[str] = []
        """Engines that use the processor while idle. They are stopped while others are measured."""
        self.samples: list[Sample] = []
        self.memory_mib: dict[str, float] = {}

    def start(self, engines: Sequence[Engine], stack: ExitStack) -> None:
        """Starts servers, one after the other, and warms them up.

        Raises:
            RuntimeError: One does not start.
            OSError: One does not answer.
        """
        self._engines = engines
        self._restless = []
        for engine in engines:
            begin = time.monotonic()
            server = Server(engine.command, engine.env)
            stack.callback(server.stop)
            self._servers[engine.name] = server
            server.wait_ready(path="/v1/models")
            seconds = time.monotonic() - begin
            warm = Options(
                base_url=server.url, num_prompts=2, max_concurrency=2, warmup=0, keep_alive=False,
                input_len=WARM_TOKENS - 8, output_len=8, seed=self._seed + 1_000_000,  # no prefix of a measured run
            )  # fmt: skip
            self._check(engine, run_loop(run(warm)))
            print(f"{engine.name} is ready after {seconds:.1f} s", file=sys.stderr, flush=True)
        self._check_idleness()

    def _check_idleness(self, seconds: float = 1.0) -> None:
        time.sleep(SETTLE_SECONDS)
        pids = {name: server.pids() for name, server in self._servers.items()}
        flat = {f"{name} {pid}": pid for name, found in pids.items() for pid in found}
        before = processor_seconds(flat)
        time.sleep(seconds)
        after = processor_seconds(flat)
        for name in pids:
            used = sum(after[key] - before[key] for key in flat if key.startswith(f"{name} ")) / seconds
            if used > IDLE_SHARE:
                self._restless.append(name)
                print(f"{name} takes {used:.0%} of a core while idle: stopped between its runs", file=sys.stderr)
        self._signal(signal.SIGSTOP, self._restless)

    def _signal(self, number: signal.Signals, names: Sequence[str]) -> None:
        """Sends a signal to all processes of servers."""
        for pid in (pid for name in names for pid in self._servers[name].pids()):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    @staticmethod
    def _check(engine: Engine, result: Result) -> None:
        if result.errors():
            raise RuntimeError(f"{engine.name} failed: {result.errors()}")

    def measure(self, load: Load, number: int, rounds: int) -> None:
        """Runs a load on each engine in turn, several times.

        Raises:
            RuntimeError: A request failed.
            OSError: A server did not answer.
        """
        for round_ in range(rounds):
            first = round_ % len(self._engines)
            for engine in (*self._engines[first:], *self._engines[:first]):
                self.samples.append(self._run(engine, load, self._seed + 100 * number + round_, round_))
                sample = self.samples[-1]
                print(
                    f"  {load.name:24} {engine.name:20} {sample.value:10.2f} {load.unit:16} {sample.floor:6.2f} x floor"
                    f" {sample.peak:6.1%} of peak  {sample.bytes_per_s / 1e9:5.1f} GB/s "
                    f"{sample.operations_per_s / 1e9:6.0f} Gflop/s",
                    flush=True,
                )

    def _run(self, engine: Engine, load: Load, seed: int, round_: int) -> Sample:
        url = self._servers[engine.name].url
        before = self._machine.measure(self._numbers)
        running = [engine.name] if engine.name in self._restless else []
        self._signal(signal.SIGCONT, running)
        result = run_loop(run(Options(base_url=url, seed=seed, warmup=0, keep_alive=False, **load.options)))
        self._signal(signal.SIGSTOP, running)
        after = self._machine.measure(self._numbers)
        self._check(engine, result)
        rates = Rates(
            (before.bytes_per_s + after.bytes_per_s) / 2, (before.operations_per_s + after.operations_per_s) / 2
        )
        least, taken = least_seconds(load, result, self._cost, rates)
        summary = result.summary()
        computed = self._cost.operations(
            summary["prompt_tokens"] - summary["cached_tokens"],
            0 if load.figure is prefill_rate else summary["output_tokens"],
        )
        per_token = load.unit == "ms per token"
        operations = self._cost.operations(0, 1) if per_token else computed
        return Sample(
            engine.name, load.name, round_, load.figure(result), rates.bytes_per_s, rates.operations_per_s,
            taken / least, operations / taken / rates.operations_per_s,
        )  # fmt: skip

    def finish(self) -> None:
        """Notes the memory of all processes of each server, if it is more than before, and lets stopped ones go on."""
        self._signal(signal.SIGCONT, self._restless)
        for name, server in self._servers.items():
            self.memory_mib[name] = max(self.memory_mib.get(name, 0.0), server.memory_bytes() / 2**20)


def ratio(load: Load, ours: float, theirs: float) -> float:
    """Ratio of two figures; above 1, ours is better."""
    return ours / theirs if load.higher_is_better else theirs / ours


def ratios(load: Load, samples: Sequence[Sample], name: str) -> list[float]:
    """Our ratio to an engine in each round."""
    ours, theirs = ({s.round: s.value for s in samples if (s.engine, s.load) == (e, load.name)} for e in (OCTAVO, name))
    return [ratio(load, ours[round_], theirs[round_]) for round_ in sorted(ours.keys() & theirs.keys())]


def _spread(values: Sequence[float], form: str) -> str:
    median = format(statistics.median(values), form)
    return f"{median} ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else median


def format_table(comparison: Comparison, names: Sequence[str], loads: Sequence[Load]) -> str:
    """A Markdown table with a line for each load and engine."""
    lines = [
        f"| load | engine | median (least to greatest) | x floor | peak | {OCTAVO} is better by |",
        "|---|---|---|---|---|---|",
    ]
    for load in loads:
        for name in names:
            own = [sample for sample in comparison.samples if (sample.engine, sample.load) == (name, load.name)]
            better = "" if name == OCTAVO else _spread(ratios(load, comparison.samples, name), ".2f")
            lines.append(
                f"| {load.name}, {load.unit} | {name} | {_spread([sample.value for sample in own], '.2f')} "
                f"| {statistics.median(sample.floor for sample in own):.2f} "
                f"| {statistics.median(sample.peak for sample in own):.0%} | {better} |"
            )
    memory = [f"| memory of all processes, MiB | {name} | {comparison.memory_mib[name]:.0f} | | | |" for name in names]
    return "\n".join([*lines, *memory])


def plot(samples: Sequence[Sample], names: Sequence[str], loads: Sequence[Load], file: Path) -> None:
    """Bars of the ratios, one group per load. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    others = [name for name in names if name != OCTAVO]
    figure, axes = plt.subplots(figsize=(9, 4.5))
    height = 0.8 / max(1, len(others))
    for number, name in enumerate(others):
        medians = [statistics.median(ratios(load, samples, name)) for load in loads]
        places = [place + number * height for place in range(len(loads))]
        bars = axes.barh(places, medians, height=height * 0.9, label=f"against {name}")
        axes.bar_label(bars, fmt="%.2fx", padding=3)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks([place + height * (len(others) - 1) / 2 for place in range(len(loads))])
    axes.set_yticklabels([load.name for load in loads])
    axes.invert_yaxis()
    axes.margins(x=0.12)  # room for the labels
    axes.set_xlabel(f"{OCTAVO} is better by")
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def find_model(name: str, folder: Path) -> tuple[BenchModel, dict[str, Any], GGUFFile | None]:
    """The files of a model, its config.json, and the header of the GGUF file if engines are given one."""
    base, _, kind = name.partition("-")
    if base in (DEMO, *SHAPES):
        model = make_model(name, folder)
    elif base == bench_experts.NAME and kind in SCALES:
        path = bench_experts.make(folder, kind)
        model = BenchModel(path, path)
    else:
        path = Path(name)
        model = BenchModel(path, path)
    gguf = read_gguf(model.gguf) if model.gguf.is_file() else None
    if (model.folder / "config.json").exists():
        return model, json.loads((model.folder / "config.json").read_text()), gguf
    return model, hf_config_from_gguf(read_gguf(model.gguf).header()), gguf


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compare engines on this machine.")
    add = parser.add_argument
    add("--model", required=True, help="folder, GGUF file, or a name that bench_models.py knows")
    add("--models", type=Path, default=Path("models"), help="folder for the models of bench_models.py")
    add("--engine", action="append", default=[], metavar="KIND=PATH", help="another engine; see the top of this file")
    add("--octavo-flags", default="", help="additional flags for Octavo, as one string")
    add("--only", nargs="*", default=[], metavar="TEXT", help="only loads whose names contain one of these strings")
    add("--rounds", type=int, default=3, help="runs of each load on each engine (default: 3)")
    add("--seed", type=int, default=0)
    add("--json", type=Path, metavar="FILE", help="write all figures to this file")
    add("--plot", type=Path, metavar="FILE.png", help="draw the ratios (needs matplotlib)")
    return parser


def main() -> int:
    arguments = create_parser().parse_args()
    model, config, gguf = find_model(arguments.model, arguments.models)
    cost = ModelCost.of(config, gguf=gguf)
    numbers = library.INT8 if gguf is not None and is_quantized(gguf) else library.TYPES[torch.bfloat16]
    parameters = cost.layer_parameters + cost.head_parameters
    loads = [
        load
        for load in (LARGE if parameters > LARGE_PARAMETERS else SMALL)
        if not arguments.only or any(text in load.name for text in arguments.only)
    ]
    if not loads:
        print(f"no load's name contains {' or '.join(arguments.only)}", file=sys.stderr)
        return 2
    flags = shlex.join(shlex.split(arguments.octavo_flags))
    ours = f"{OCTAVO}={sys.executable} -m api serve {{model}} --port {{port}} --max-model-len {{length}} {flags}"
    commands = (ours, *arguments.engine)
    names = [parse_engine(text, model, room_for(loads)).name for text in commands]
    machine = Machine()
    comparison = Comparison(cost, numbers, machine, arguments.seed)
    print(f"{arguments.model}, {parameters / 1e6:.0f} M parameters, {machine.capability}, {machine.threads} threads")
    with signals_as_exceptions():
        try:
            for number, load in enumerate(loads):
                with ExitStack() as stack:
                    engines = [parse_engine(text, model, room_for([load])) for text in commands]
                    comparison.start(engines, stack)
                    comparison.measure(load, number, arguments.rounds)
                    comparison.finish()
        except (RuntimeError, OSError) as error:
            print(f"failed: {error}", file=sys.stderr)
            return 1
    print("\n" + format_table(comparison, names, loads))
    if arguments.json:
        content = {"samples": [asdict(sample) for sample in comparison.samples], "memory_mib": comparison.memory_mib}
        arguments.json.write_text(json.dumps(content, indent=1))
    if arguments.plot and len(engines) > 1:
        plot(comparison.samples, names, loads, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
