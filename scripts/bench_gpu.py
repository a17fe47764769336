#!/usr/bin/env python
"""Times kernels and whole steps on this machine's GPU, against what the card can do and against its vendor's libraries.

    python scripts/bench_gpu.py                          all, with the shape of Qwen3-8B and random weights
    python scripts/bench_gpu.py --parts steps            decode and prefill alone
    python scripts/bench_gpu.py --model folder           another model
    python scripts/bench_gpu.py --rehearse               every line of it without a GPU: its figures mean nothing
    python scripts/bench_gpu.py --host                   Python per step at 256 rows, with launches stubbed

The floor of a decode step is reading weights and KV cache once, at the rate of a large copy in the same run, or its
multiplications at the rate of a large product, if that takes longer. Steps are two deep in flight, as the engine runs
them: the time of a step is that between results. Figures are printed as they come, and once more at the end.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import select
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if {"--host", "--rehearse"} & set(sys.argv):
    os.environ["TRITON_INTERPRET"] = "1"  # nothing is compiled

import torch
from bench_models import LLAMA
from bench_step import Steps, folder_of
from gpu_card import Card, IdleTimes, RealCard, empty_launch, without_hardware
from gpu_kernels import Ceilings, Shape, decode_attention, measure_ceilings, products, sampling

from executor.device.cuda import CudaDevice
from executor.messages import ModelRunnerOutput

HOST_ROWS = 256
HOST_STEPS = 300
PARTS = ("kernels", "steps", "sampling")
QWEN3_8B: dict[str, Any] = {
    **LLAMA,
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}
LEAST_BYTES_PER_S = 2.8e12
LEAST_OPERATIONS_PER_S = 750e12
"""A card of Hopper that does less is used by others, or slowed down: its figures do not count."""
Row = dict[str, float | str]


def collect(steps: Steps) -> None:
    """Waits for the results of a step, and takes them: those of the next one may have come, too."""
    worker = steps.worker
    while not any(isinstance(answer, ModelRunnerOutput) for answer in steps.answers):
        if worker.results_fd is not None:
            select.select([worker.results_fd], [], [])
            worker.take_results()
    found = next(answer for answer in steps.answers if isinstance(answer, ModelRunnerOutput))
    steps.answers.remove(found)


@contextmanager
def model_folder(model: str) -> Iterator[str]:
    """A folder with the model; of ``8b`` with a configuration alone."""
    if model != "8b":
        with folder_of(model) as folder:
            yield folder
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(QWEN3_8B))
        yield folder


# ---------------------------------------------------------------------------------------------------------
# the host


def host() -> None:
    """Prints the microseconds of Python that a decode step takes, and what it consists of.

    The CPU time of the thread that launches counts, since other programs may use the machine.
    """
    from unittest import mock

    from tests import tiny

    with without_hardware():
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


# ---------------------------------------------------------------------------------------------------------
# steps


def start_engine(card: Card, folder: str, options: argparse.Namespace, *, eager: bool = False) -> tuple[Steps, Row]:
    """Loads the model, and says how long that took, with how much memory."""
    longest = max((*options.context, *options.prefill)) + options.steps + 64
    before, begin = card.used_bytes(), time.perf_counter()
    kv_bytes = int(card.free_bytes() * 0.9) - options.weight_bytes
    steps = Steps(
        folder,
        options.dtype,
        options.chunk,
        max(options.decode),
        longest,
        options.load_format,
        max_kv_bytes=max(kv_bytes, 1 << 20),
        enforce_eager=eager,
    )
    seconds, taken = time.perf_counter() - begin, card.used_bytes() - before
    forward: Any = steps.worker.runner.forward
    count = sum(frame.graph is not None for frame in getattr(forward, "_frames", {}).values())
    print(f"loaded in {seconds:.1f} s, {count} graphs, {taken / 2**30:.2f} GiB")
    return steps, {"load_s": seconds, "graphs": count, "gib": taken / 2**30}


def capture_cost(card: Card, steps: Steps, sizes: list[int]) -> Row:
    """Captures graphs of decode steps again, and says how long that takes, with how much memory."""
    forward: Any = steps.worker.runner.forward
    frames = [frame for frame in forward._frames.values() if frame.graph is not None]
    before, begin = card.used_bytes(), time.perf_counter()
    kept = [forward._graphs.capture(frame.launches) for frame in frames]
    seconds, taken = time.perf_counter() - begin, card.used_bytes() - before
    print(f"{len(kept)} graphs captured in {seconds:.2f} s, {taken / 2**20:.0f} MiB (sizes {sizes})")
    return {"captured": len(kept), "capture_s": seconds, "capture_mib": taken / 2**20}


def fill(steps: Steps, batch: int, context: int) -> None:
    """Computes the prompts of a batch."""
    for slot in range(batch):
        free = bytes(torch.tensor([slot], dtype=torch.int32).numpy()) if steps.step_id else b""
        steps.run([slot], [context], new_reqs=(steps.admit(slot, context),), finished_slots=free)
        collect(steps)


def timed(steps: Steps, slots: list[int], count: int) -> tuple[float, float, float]:
    """Seconds between results of decode steps, of Python per step, and that the GPU is idle between two."""
    idle = IdleTimes(steps.worker.runner.channel)  # type: ignore[arg-type]
    steps.run(slots, [1] * len(slots))
    begin, spent = time.perf_counter(), 0.0
    for _ in range(count):
        start = time.thread_time()
        steps.run(slots, [1] * len(slots))
        spent += time.thread_time() - start
        collect(steps)
    seconds = (time.perf_counter() - begin) / count
    collect(steps)
    return seconds, spent / count, idle.seconds()


def decode(steps: Steps, ceilings: Ceilings, options: argparse.Namespace, how: str) -> list[Row]:
    """Times decode steps."""
    rows: list[Row] = []
    for context in options.context:
        for batch in options.decode:
            if not steps.plan_length(batch, context + options.steps + 8):
                print(f"decode {batch:4} x {context:6}: the KV cache is too small")
                continue
            fill(steps, batch, context)
            seconds, python, idle = timed(steps, list(range(batch)), options.steps)
            num_bytes = steps.bytes_of(batch) + batch * steps.kv_bytes(context)
            floor = ceilings.floor(num_bytes, steps.operations(batch, batch))
            print(
                f"decode {batch:4} x {context:6}, {how}: {seconds * 1e3:8.3f} ms, {seconds / floor:5.2f} of the floor, "
                f"Python {python * 1e6:5.0f} us, idle {idle * 1e6:5.0f} us"
            )
            row: Row = {"batch": batch, "context": context, "how": how, "ms": seconds * 1e3}
            rows.append(row | {"floor_ms": floor * 1e3, "python_us": python * 1e6, "idle_us": idle * 1e6})
    return rows


def prefill(steps: Steps, ceilings: Ceilings, options: argparse.Namespace) -> list[Row]:
    """Times prompts, in steps of as many tokens as the engine computes at once."""
    rows: list[Row] = []
    for tokens in options.prefill:
        if not steps.plan_length(1, tokens + 8):
            print(f"prefill {tokens:6}: the KV cache is too small")
            continue
        seconds = 0.0
        for _ in range(2):  # the first one compiles
            begin = time.perf_counter()
            new = (steps.admit(0, tokens),)
            for start in range(0, tokens, options.chunk):
                fields: dict[str, Any] = {} if start else {"new_reqs": new, "finished_slots": bytes(4)}
                count = min(options.chunk, tokens - start)
                steps.run([0], [count], samples=start + count == tokens, **fields)
                collect(steps)
            seconds = time.perf_counter() - begin
        rate = steps.operations(tokens, 1) / seconds
        share = rate / ceilings.operations_per_s
        print(
            f"prefill {tokens:6}: {tokens / seconds:9.0f} tokens/s, {rate / 1e12:6.1f} TFLOP/s, {share:.2f} of the card"
        )
        rows.append({"prefill": tokens, "tokens_per_s": tokens / seconds, "share": share})
    return rows


def all_steps(card: Card, ceilings: Ceilings, folder: str, options: argparse.Namespace) -> list[Row]:
    """Decode and prefill, with graphs and without."""
    steps, loaded = start_engine(card, folder, options)
    rows: list[Row] = [loaded, capture_cost(card, steps, options.decode)]
    rows += decode(steps, ceilings, options, "graphs")
    rows += prefill(steps, ceilings, options)
    rows.append({"peak_gib": card.used_bytes() / 2**30})
    del steps
    if options.eager:
        gc.unfreeze()  # a worker has all that it loads stay
        gc.collect()
        steps, _ = start_engine(card, folder, options, eager=True)
        rows += decode(steps, ceilings, options, "eager")
    return rows


# ---------------------------------------------------------------------------------------------------------


def warn_of_slow_cards(card: Card, ceilings: Ceilings) -> None:
    """Says so if the card does less than its kind can."""
    print(
        f"{card.name}: copies at {ceilings.bytes_per_s / 1e12:.2f} TB/s, products in bfloat16 at "
        f"{ceilings.operations_per_s / 1e12:.0f} TFLOP/s"
    )
    is_slow = ceilings.bytes_per_s < LEAST_BYTES_PER_S or ceilings.operations_per_s < LEAST_OPERATIONS_PER_S
    if any(kind in card.name for kind in ("H100", "H200")) and is_slow:
        print("warning: these figures do not count: others use the card, or it is slowed down")


def measure(card: Card, options: argparse.Namespace) -> list[Row]:
    """All parts that are asked for."""
    torch.set_grad_enabled(False)
    ceilings = measure_ceilings(card)
    warn_of_slow_cards(card, ceilings)
    name = card.name
    rows: list[Row] = [{"card": name, "tb_per_s": ceilings.bytes_per_s / 1e12}]
    rows[0]["tflop_per_s"] = ceilings.operations_per_s / 1e12
    shape = Shape(4096, 12288, 32, 8, 128, 151936) if card.is_real else Shape(64, 64, 4, 2, 16, 320)
    if "kernels" in options.parts:
        rows += products(card, shape, ceilings, options.rows)
        rows += decode_attention(card, shape, ceilings, [(b, c) for c in options.context for b in options.decode])
    if "sampling" in options.parts:
        rows += sampling(card, shape.vocab, [count for count in options.decode if count != 8])
    if "steps" in options.parts:
        with model_folder(options.model) as folder:
            rows += all_steps(card, ceilings, folder, options)
    print(json.dumps(rows))
    if options.json:
        options.json.write_text(json.dumps(rows))
    return rows


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--host", action="store_true", help="measure the host alone; needs no GPU")
    add("--rehearse", action="store_true", help="run all parts, on a tiny model and without a GPU")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    add("--model", default="8b", help="a folder, 8b (the shape of Qwen3-8B), or a shape of bench_step.py")
    add("--dtype", default="bfloat16")
    add("--load-format", default="dummy", help="auto reads the weights of a folder")
    add("--decode", type=int, nargs="+", default=[1, 8, 64, 256], help="requests of a batch")
    add("--context", type=int, nargs="+", default=[512, 2048, 8192], help="tokens before those that are decoded")
    add("--prefill", type=int, nargs="+", default=[1024, 2048, 8192, 32768], help="tokens of a prompt")
    add("--chunk", type=int, default=8192, help="most tokens of a step")
    add("--rows", type=int, nargs="+", default=[1, 8, 16, 32, 64, 128, 256, 512, 2048], help="rows of products")
    add("--weight-bytes", type=int, default=18 << 30, help="memory that is left for weights and steps")
    add("--eager", action="store_true", help="time steps without graphs, too")
    add("--steps", type=int, default=50, help="decode steps of a measurement")
    add("--json", type=Path, metavar="FILE", help="write all figures there as well")
    return parser.parse_args(given)


def rehearse(options: argparse.Namespace) -> list[Row]:
    """Runs everything once, on little."""
    from tests import tiny

    options.model, options.dtype, options.load_format = str(tiny.checkpoint("llama")), "float32", "auto"
    options.decode, options.context, options.prefill, options.rows = [1, 8, 16], [9], [20], [1, 9]
    options.steps, options.eager, options.weight_bytes, options.chunk = 3, True, 0, 16
    with without_hardware(empty_launch) as card:
        return measure(card, options)


def main() -> None:
    options = arguments()
    if options.host:
        host()
    elif options.rehearse:
        rehearse(options)
    else:
        reason = CudaDevice.unavailable()
        if reason is not None:
            sys.exit(f"error: {reason}")
        measure(RealCard(), options)


if __name__ == "__main__":
    main()
