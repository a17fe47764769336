"""Compares what ``octavo plan`` predicts with measured steps, interleaved.

    python scripts/bench_plan.py                     # the demo model
    python scripts/bench_plan.py --model folder --streams 1 8 32 --runs 5
    python scripts/bench_plan.py --model 30b-a3b --load-format dummy --quantization int8    # see bench_step.py

Bytes must be equal; times are printed as measured divided by predicted, the median of all runs. Each run predicts from
what the plan measures before and after its steps, since other programs use part of the machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import msgspec
from bench_step import DType, LoadFormat, Steps, folder_of

from api.commands.plan import CONTEXT, Speed
from api.config import make_config
from api.model.files import find_model, with_model
from executor import plan
from executor.config import ExecutorConfig, ModelConfig, StepSize
from executor.parallel import ParallelState


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="", help="folder or GGUF file (default: the demo model)")
    add("--dtype", default="auto", choices=get_args(DType), help="dtype of weights and activations")
    add("--streams", type=int, nargs="+", default=[1, 8, 32], help="requests that get one token each")
    add("--runs", type=int, default=5, help="times that each is measured")
    add("--steps", type=int, default=20, help="steps per measurement")
    add("--load-format", default="auto", choices=get_args(LoadFormat), help="dummy: a shape with random weights")
    add("--quantization", help="as of octavo serve, such as int8")
    options = parser.parse_args()
    with folder_of(options.model) as options.model:
        return compare(options)


def compare(options: argparse.Namespace) -> int:
    """Prints the bytes, and a line for each number of streams."""
    fields = {name: getattr(options, name) for name in ("quantization", "load_format")}
    if options.load_format == "dummy":  # a configuration without a tokenizer
        model = ModelConfig(model=options.model, dtype=options.dtype, **fields)
    else:
        config, _ = make_config({"model": options.model, "dtype": options.dtype, "quantization": options.quantization})
        model = with_model(config, find_model(config)).engine.executor.model
    num_steps = options.runs * options.steps
    context = CONTEXT - num_steps // 2
    longest = CONTEXT + num_steps + 1
    step_size = StepSize(max_num_seqs=max(options.streams), max_num_batched_tokens=512)
    executor = ExecutorConfig(model=model, step_size=step_size)
    survey, runner = plan.prepare(executor, ParallelState())
    survey = plan.measure_bandwidth(survey)
    timed = plan.TimedSteps(survey, runner)
    steps = Steps(model.model, options.dtype, 512, max(options.streams), longest, **fields)
    is_exact = survey.ready.weight_bytes == sum(
        parameter.nbytes for parameter in steps.worker.runner.model.parameters()
    )
    print(f"weights {survey.ready.weight_bytes} bytes, {'as' if is_exact else 'NOT AS'} loaded")
    ratios: dict[int, list[float]] = {count: [] for count in options.streams}
    times: dict[int, list[float]] = {count: [] for count in options.streams}
    for count in options.streams:
        steps.fill(count, context)
        for _ in range(options.runs):
            before = timed.decode(count)
            measured = statistics.median(steps.run(list(range(count)), [1] * count) for _ in range(options.steps))
            rates = msgspec.structs.replace(survey, decode_seconds={count: (before + timed.decode(count)) / 2})
            predicted = Speed([rates]).decode(count)
            ratios[count].append(measured / predicted)
            times[count].append(measured * 1e3)
    for count, found in ratios.items():
        print(
            f"{count:3} streams: {statistics.median(times[count]):8.2f} ms, measured / predicted "
            f"{statistics.median(found):.3f} ({min(found):.3f} to {max(found):.3f})",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
