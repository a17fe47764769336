"""Runs several engines under the same loads, one at a time on this machine, and compares them.

    python scripts/bench_compare.py --model folder --json compare.json --plot compare.png \
        --engine 'other=SOME_VARIABLE=4 other/bin/python -m other.server --model {model} --port {port}'

Octavo always runs, as ``python -m api``. Any other engine is given as ``NAME=COMMAND``; the command may begin with
environment variables and may contain ``{model}`` and ``{port}``. ``scripts/PEERS.md`` describes how to install and
start some. A ratio above 1 means that Octavo is better. Loads:

* one stream, prompt 128, output 128: time per output token
* 4, 16 and 64 streams, prompt 256, output 128: output tokens per second
* four prompts of 1,500 tokens at once: mean time to first token over the four
* 32 requests that share 1,000 tokens, 50 of their own, 32 output tokens, 8 at a time: wall time
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from processes import Server, signals_as_exceptions

from api.commands.bench.options import Options
from api.commands.bench.result import Result
from api.commands.bench.serve import run, run_loop

OCTAVO = "octavo"
VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*=.*", re.DOTALL)


@dataclass(frozen=True)
class Load:
    """One load and its figure of merit."""

    name: str
    unit: str
    options: dict[str, Any]
    figure: str
    """Path in ``Result.summary()``."""
    higher_is_better: bool = False
    repeats: int = 3
    """Runs with different prompts; the median is reported."""

    def value(self, result: Result) -> float:
        node: Any = result.summary()
        for part in self.figure.split("."):
            node = node[part]
        return float(node)


def streams(count: int, num_prompts: int) -> Load:
    options = {"max_concurrency": count, "num_prompts": num_prompts, "input_len": 256, "output_len": 128}
    return Load(
        f"{count} streams, 256 + 128", "tokens/s", options, "output_tokens_per_s", higher_is_better=True, repeats=2
    )


LOADS = (
    Load(
        "1 stream, 128 + 128",
        "ms per token",
        {"max_concurrency": 1, "num_prompts": 4, "input_len": 128, "output_len": 128},
        "tpot_ms.median",
    ),
    streams(4, 16),
    streams(16, 48),
    streams(64, 128),
    Load(
        "4 prompts of 1,500",
        "ms to first token",
        {"max_concurrency": 4, "num_prompts": 4, "input_len": 1500, "output_len": 8},
        "ttft_ms.mean",
        repeats=5,
    ),
    Load(
        "shared prefix 1,000",
        "s",
        {"max_concurrency": 8, "num_prompts": 32, "prefix_len": 1000, "input_len": 50, "output_len": 32},
        "duration_s",
    ),
)


@dataclass
class Engine:
    """A server to compare."""

    name: str
    command: list[str]
    env: dict[str, str]

    @classmethod
    def parse(cls, text: str, model: str) -> Engine:
        """``NAME=[VARIABLE=value ...] command`` with ``{model}``."""
        name, _, rest = text.partition("=")
        words = [word.replace("{model}", model) for word in shlex.split(rest)]
        env = {}
        while words and VARIABLE.fullmatch(words[0]):
            key, _, value = words.pop(0).partition("=")
            env[key] = value
        if not name or not words:
            raise argparse.ArgumentTypeError(f"--engine {text!r}: expected NAME=COMMAND")
        return cls(name, words, env)


def measure(engine: Engine, loads: Sequence[Load], seed: int) -> dict[str, Any]:
    """Starts one engine, measures all loads, and stops it.

    Raises:
        RuntimeError: The engine did not start.
        OSError: The engine did not answer.
    """
    server = Server(engine.command, engine.env)
    try:
        server.wait_ready(path="/v1/models")
        run_loop(run(Options(base_url=server.url, num_prompts=4, max_concurrency=2, input_len=300, output_len=8)))
        figures: dict[str, Any] = {}
        for number, load in enumerate(loads):
            values = []
            for repeat in range(load.repeats):
                options = Options(base_url=server.url, seed=seed + 100 * number + repeat, warmup=1, **load.options)
                result = run_loop(run(options))
                if result.errors():
                    raise RuntimeError(f"{engine.name} failed: {result.errors()}")
                values.append(load.value(result))
            figures[load.name] = {"value": statistics.median(values), "all": values, "unit": load.unit}
            print(f"  {load.name:24} {figures[load.name]['value']:10.2f} {load.unit}", flush=True)
        figures["memory_mib"] = server.memory_bytes() / 2**20
        return figures
    finally:
        server.stop()


def ratio(load: Load, ours: float, theirs: float) -> float:
    """Ratio of two figures; above 1, ours is better."""
    return ours / theirs if load.higher_is_better else theirs / ours


def format_table(figures: dict[str, dict[str, Any]], loads: Sequence[Load]) -> str:
    """A Markdown table of the values, with a ratio for each other engine."""
    others = [name for name in figures if name != OCTAVO]
    head = ["load", "unit", OCTAVO]
    for name in others:
        head += [name, f"{OCTAVO} is better by"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for load in loads:
        ours = figures[OCTAVO][load.name]["value"]
        row = [load.name, load.unit, f"{ours:.2f}"]
        for name in others:
            theirs = figures[name][load.name]["value"]
            row += [f"{theirs:.2f}", f"{ratio(load, ours, theirs):.2f}x"]
        lines.append("| " + " | ".join(row) + " |")
    memory = ["memory of all processes", "MiB", f"{figures[OCTAVO]['memory_mib']:.0f}"]
    for name in others:
        theirs = figures[name]["memory_mib"]
        memory += [f"{theirs:.0f}", f"{theirs / max(figures[OCTAVO]['memory_mib'], 1):.2f}x"]
    return "\n".join([*lines, "| " + " | ".join(memory) + " |"])


def plot(figures: dict[str, dict[str, Any]], loads: Sequence[Load], file: Path) -> None:
    """Bars of the ratios, one group per load. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    others = [name for name in figures if name != OCTAVO]
    figure, axes = plt.subplots(figsize=(9, 4.5))
    height = 0.8 / max(1, len(others))
    for number, name in enumerate(others):
        ratios = [ratio(load, figures[OCTAVO][load.name]["value"], figures[name][load.name]["value"]) for load in loads]
        places = [place + number * height for place in range(len(loads))]
        bars = axes.barh(places, ratios, height=height * 0.9, label=f"against {name}")
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


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare engines on this machine.")
    add = parser.add_argument
    add("--model", required=True, help="model folder, for every engine")
    add(
        "--engine", action="append", default=[], metavar="NAME=COMMAND", help="another engine; see the top of this file"
    )
    add("--octavo-flags", default="", help="additional flags for Octavo, as one string")
    add("--only", nargs="*", default=[], metavar="TEXT", help="only loads whose names contain one of these strings")
    add("--seed", type=int, default=0)
    add("--json", type=Path, metavar="FILE", help="write all figures to this file")
    add("--plot", type=Path, metavar="FILE.png", help="draw the ratios (needs matplotlib)")
    arguments = parser.parse_args()
    loads = [load for load in LOADS if not arguments.only or any(text in load.name for text in arguments.only)]
    octavo = [sys.executable, "-m", "api", "serve", arguments.model, "--port", "{port}"]
    engines = [Engine(OCTAVO, [*octavo, *shlex.split(arguments.octavo_flags)], {})]
    engines += [Engine.parse(text, arguments.model) for text in arguments.engine]
    figures: dict[str, dict[str, Any]] = {}
    with signals_as_exceptions():
        for engine in engines:
            print(f"{engine.name}:", flush=True)
            try:
                figures[engine.name] = measure(engine, loads, arguments.seed)
            except (RuntimeError, OSError) as error:
                print(f"failed: {error}", file=sys.stderr)
                return 1
    print("\n" + format_table(figures, loads))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))
    if arguments.plot and len(figures) > 1:
        plot(figures, loads, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
