#!/usr/bin/env python
"""Times whole steps on a GPU against their floor; without one, what the host spends on a step.

    python scripts/bench_gpu.py --model folder                   decode and prefill on this machine's GPU
    python scripts/bench_gpu.py --model 1b --load-format dummy   a shape with random weights
    python scripts/bench_gpu.py --host                           Python per step at 256 rows, with launches stubbed

The floor of a decode step is reading weights and KV cache once, at the rate of a large copy in the same run. Steps are
two deep in flight, as the engine runs them: the time of a step is that between results.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if "--host" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # nothing is compiled

import torch
from bench_step import Steps, folder_of

import ops
from executor.config import DeviceConfig
from executor.device.cuda import CudaDevice, CudaSteps
from executor.messages import ModelRunnerOutput

HOST_ROWS = 256
HOST_STEPS = 300


class StubbedGpu(CudaDevice):
    """A GPU whose kernels take no time, and compute nothing."""

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")

    def initialize(self, config: DeviceConfig, rank: int) -> None:
        ops.use("cpu", "triton")

    def memory(self) -> Any:
        from executor.device.base import Memory

        return Memory(80 << 30, 80 << 30)

    def steps(self) -> CudaSteps:
        return CudaSteps(self.torch_device)


def collect(steps: Steps) -> None:
    """Waits for the results of a step, and takes them: those of the next one may have come, too."""
    worker = steps.worker
    while not any(isinstance(answer, ModelRunnerOutput) for answer in steps.answers):
        if worker.results_fd is not None:
            select.select([worker.results_fd], [], [])
            worker.take_results()
    found = next(answer for answer in steps.answers if isinstance(answer, ModelRunnerOutput))
    steps.answers.remove(found)


def host() -> None:
    """Prints the microseconds of Python that a decode step takes, and what it consists of.

    The CPU time of the thread that launches counts, since other programs may use the machine.
    """
    from unittest import mock

    from ops.triton import launch
    from tests import tiny
    from tests.stub_cuda import Event, stubbed

    with (
        stubbed(),
        mock.patch.object(Event, "synchronize", lambda event: time.sleep(0.002)),  # waits without the interpreter lock
        mock.patch.object(launch.Launch, "run", lambda each: None),
        mock.patch("executor.worker.create_device", lambda _: StubbedGpu()),
    ):
        steps = Steps(str(tiny.checkpoint("llama")), "float32", 8192, HOST_ROWS, 1024)
        runner = steps.worker.runner
        for slot in range(HOST_ROWS):
            steps.run([slot], [3], new_reqs=(steps.admit(slot, 3),))
            collect(steps)
        spent: dict[str, list[float]] = {"begin": [], "finish": [], "collect": []}
        begin, finish = runner.begin, runner.finish
        slots, counts = list(range(HOST_ROWS)), [1] * HOST_ROWS

        def clocked(name: str, function: Any) -> Any:
            def run(*args: Any) -> Any:
                start = time.thread_time()
                result = function(*args)
                spent[name].append(time.thread_time() - start)
                return result

            return run

        with (
            mock.patch.object(runner, "begin", clocked("begin", begin)),
            mock.patch.object(runner, "finish", clocked("finish", finish)),
        ):
            steps.run(slots, counts)
            for _ in range(HOST_STEPS):
                steps.run(slots, counts)
                start = time.thread_time()
                collect(steps)
                spent["collect"].append(time.thread_time() - start)
            collect(steps)
    medians = {name: statistics.median(times[20:]) * 1e6 for name, times in spent.items()}
    for name, microseconds in medians.items():
        print(f"{name:8} {microseconds:7.1f} us")
    print(f"launching a step of {HOST_ROWS} rows: {medians['begin'] + medians['finish']:.1f} us")


def bandwidth() -> float:
    """Bytes per second of a copy of 2 GB, read and written."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * source.nbytes / float(min(times))


def timed(steps: Steps, slots: list[int], count: int) -> float:
    """Seconds between results of decode steps."""
    steps.run(slots, [1] * len(slots))
    begin = time.perf_counter()
    for _ in range(count):
        steps.run(slots, [1] * len(slots))
        collect(steps)
    seconds = (time.perf_counter() - begin) / count
    collect(steps)
    return seconds


def measure(options: argparse.Namespace) -> None:
    rate = bandwidth()
    print(f"{torch.cuda.get_device_name()}: copies at {rate / 1e12:.2f} TB/s")
    longest = max(options.context) + options.steps + 64
    rows: list[dict[str, float]] = []
    with folder_of(options.model) as folder:
        start = time.perf_counter()
        steps = Steps(folder, options.dtype, 8192, max(options.decode), longest, options.load_format)
        print(f"loaded and captured in {time.perf_counter() - start:.1f} s")
        for context in options.context:
            for batch in options.decode:
                for slot in range(batch):
                    free = bytes(torch.tensor([slot], dtype=torch.int32).numpy()) if steps.step_id else b""
                    steps.run([slot], [context], new_reqs=(steps.admit(slot, context),), finished_slots=free)
                    collect(steps)
                seconds = timed(steps, list(range(batch)), options.steps)
                floor = (steps.weight_bytes + batch * steps.kv_bytes(context)) / rate
                rows.append({"batch": batch, "context": context, "ms": seconds * 1e3, "floor_ms": floor * 1e3})
                print(f"decode {batch:4} x {context:6}: {seconds * 1e3:8.3f} ms, {seconds / floor:5.2f} of the floor")
        for tokens in options.prefill:
            begin = time.perf_counter()
            steps.run([0], [tokens], new_reqs=(steps.admit(0, tokens),), finished_slots=bytes(4))
            collect(steps)
            seconds = time.perf_counter() - begin
            operations = steps.operations(tokens, 1)
            print(f"prefill {tokens:6}: {tokens / seconds:9.0f} tokens/s, {operations / seconds / 1e12:6.1f} TFLOP/s")
    if options.json:
        Path(options.json).write_text(json.dumps(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", action="store_true", help="measure the host alone; needs no GPU")
    parser.add_argument("--model", default="1b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--decode", type=int, nargs="*", default=[1, 8, 64, 256])
    parser.add_argument("--context", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("--prefill", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--json", default="")
    options = parser.parse_args()
    if options.host:
        host()
    else:
        reason = CudaDevice.unavailable()
        if reason is not None:
            sys.exit(f"error: {reason}")
        measure(options)


if __name__ == "__main__":
    main()
