"""Replays requests through the real scheduler in virtual time: what a policy or a cache size would do, in seconds.

    python scripts/simulate.py trace.csv --num-requests 5000 --speedup 2 --max-num-seqs 512
    python scripts/simulate.py --rate 20 --shared-fraction 0.8 --prefix-len 512 --json shared.json
    python scripts/simulate.py --steady 1000
    python scripts/simulate.py trace.csv --data-parallel-size 4 --shared-fraction 0.9 --num-prefixes 256

A trace is a CSV file with the columns TIMESTAMP, ContextTokens and GeneratedTokens, such as those of Azure's LLM
inference traces. Without one, requests are made up: Poisson arrivals, lengths of a log-normal distribution. Traces
have no text, so token ids are made up as well, the same in every run; a share of the prompts can start with one of a
few common prefixes, as system prompts do.

The device is ``executor/simulated.py``'s model: it executes steps one after another, and up to
``--max-in-flight-steps`` are planned ahead. Nothing sleeps. What the scheduler's Python costs is measured, and becomes
part of virtual time only with ``--charge-python``. All flags of the engine hold, such as ``--max-num-batched-tokens``,
``--no-enable-prefix-caching``, ``--num-gpu-blocks-override`` and ``--simulated-device '{"step_us": 8000}'``.

``--data-parallel-size N`` replays the requests through N engines and the server's router, and compares it with taking
turns and with giving each request to the engine that has the fewest (``simulated_replicas.py``). It also prints the hit
rate of one cache as large as those of all engines, and of one that forgets nothing, which no routing can exceed.

``--steady N`` measures planning and retiring with exactly N requests that decode, and nothing else.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from api.commands.bench.figures import describe, format_distributions
from api.flags import ConfigError, add_arguments, build, options
from engine_core.cache_shape import CacheShape, GroupShape
from engine_core.config import CacheConfig, EngineConfig, SchedulerConfig, SimulatedDevice
from engine_core.in_flight import InFlight
from engine_core.memory import plan_kv_cache
from engine_core.messages import EngineCoreOutputs, EngineCoreRequest, ResolvedParams, i64
from engine_core.request import Request
from engine_core.scheduler import Scheduler
from executor.messages import ModelRunnerOutput, SchedulerOutput
from executor.simulated import FIRST_TOKEN_ID, DeviceModel

F64 = npt.NDArray[np.float64]

STOP_TOKEN_ID = 2
"""Stop token of all requests, which the device never samples: they run to full length, at the usual cost."""
BUCKETS = (1, 8, 32, 64, 128, 256, 512, 1024, 2048)
"""Lower bounds of the running counts by which step costs are shown."""


@dataclass(frozen=True)
class TraceRequest:
    """One request of a workload."""

    arrival: float
    """Seconds from the start."""
    num_prompt_tokens: int
    num_output_tokens: int


def read_trace(path: Path, limit: int | None = None, speedup: float = 1.0) -> list[TraceRequest]:
    """Reads a trace.

    Args:
        path: CSV with the columns TIMESTAMP, ContextTokens and GeneratedTokens.
        limit: Requests to read; None reads all.
        speedup: Divides the time between arrivals.

    Raises:
        KeyError: A column is missing.
        ValueError: A field is not a valid number or time.
    """
    requests: list[TraceRequest] = []
    first: datetime | None = None
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if limit is not None and len(requests) == limit:
                break
            moment = datetime.fromisoformat(row["TIMESTAMP"][:26])  # microseconds; the files have one digit more
            first = first or moment
            arrival = (moment - first).total_seconds() / speedup
            lengths = max(1, int(row["ContextTokens"])), max(1, int(row["GeneratedTokens"]))
            requests.append(TraceRequest(arrival, *lengths))
    return requests


def synthetic(
    count: int,
    rate: float,
    *,
    mean_prompt: float = 1000.0,
    mean_output: float = 200.0,
    sigma: float = 0.8,
    seed: int = 0,
) -> list[TraceRequest]:
    """Poisson arrivals with log-normal lengths.

    Args:
        count: Requests.
        rate: Arrivals per second.
        mean_prompt: Mean number of prompt tokens.
        mean_output: Mean number of output tokens.
        sigma: Standard deviation of the logarithm of lengths.
        seed: Same seed, same workload.
    """
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1 / rate, count))
    columns = [
        np.maximum(1, rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, count)).astype(int).tolist()
        for mean in (mean_prompt, mean_output)
    ]
    return [TraceRequest(*row) for row in zip(arrivals.tolist(), *columns, strict=True)]


@dataclass(frozen=True)
class PromptMaker:
    """Token ids of prompts: a function of the request's number, so every run has the same ones."""

    vocab_size: int
    shared_fraction: float = 0.0
    """Share of the prompts that start with a common prefix."""
    prefix_len: int = 256
    """Tokens of a common prefix; shorter prompts are the start of one and a token of their own."""
    num_prefixes: int = 4
    seed: int = 0

    def token_ids(self, index: int, count: int) -> npt.NDArray[np.int32]:
        """The prompt of request ``index``, int32 [count]."""
        rng = np.random.default_rng((self.seed, index))
        ids = self._draw(rng, count)
        if rng.random() < self.shared_fraction:
            prefix = np.random.default_rng((self.seed, 1 << 40, int(rng.integers(self.num_prefixes))))
            shared = min(self.prefix_len, count - 1)
            ids[:shared] = self._draw(prefix, self.prefix_len)[:shared]
        return ids

    def _draw(self, rng: np.random.Generator, count: int) -> npt.NDArray[np.int32]:
        low = min(FIRST_TOKEN_ID, self.vocab_size - 1)
        return rng.integers(low, self.vocab_size, count, dtype=np.int32)


def make_request(index: int, prompt: npt.NDArray[np.int32], num_output_tokens: int, arrival: float = 0.0) -> Request:
    """A request as the engine core receives it."""
    return Request(
        EngineCoreRequest(
            request_id=str(index),
            index=index,
            prompt_token_ids=prompt.tobytes(),
            sampling_params=ResolvedParams(
                max_tokens=num_output_tokens, seed=index + 1, eos_token_ids=(STOP_TOKEN_ID,)
            ),
            arrival_time=arrival,
        )
    )


@dataclass
class StepCosts:
    """What each step cost in Python, in microseconds, and how many requests ran and were in it."""

    plan_us: list[float] = field(default_factory=list)
    retire_us: list[float] = field(default_factory=list)
    num_running: list[int] = field(default_factory=list)
    num_rows: list[int] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)

    def together(self) -> F64:
        """Planning and retiring of each step, microseconds [num_steps]."""
        return np.add(self.plan_us, self.retire_us)

    def summary(self) -> dict[str, Any]:
        """Distributions in microseconds: of all steps, and by the number of running requests."""
        running = np.array(self.num_running)
        columns = {"plan": np.array(self.plan_us), "retire": np.array(self.retire_us), "together": self.together()}
        by_running: dict[str, Any] = {}
        for low, high in zip(BUCKETS, (*BUCKETS[1:], 1 << 40), strict=True):
            chosen = (running >= low) & (running < high)
            if chosen.any():
                name = f"{low}-{min(high - 1, int(running.max()))}"
                by_running[name] = {"steps": int(chosen.sum())} | {
                    key: describe(values[chosen].tolist()) for key, values in columns.items()
                }
        return {
            "steps": len(running),
            **{f"{key}_us": describe(values.tolist()) for key, values in columns.items()},
            "by_running": by_running,
        }


def _ignore(index: int) -> None:
    pass


@dataclass(frozen=True)
class Submitted:
    """A step that the device has been given."""

    step: InFlight
    result: ModelRunnerOutput
    done_at: float
    """Virtual seconds."""
    plan_us: float


class Simulation:
    """A scheduler and a simulated device in virtual time, with the outcome of each request."""

    def __init__(
        self,
        config: EngineConfig,
        workload: Sequence[TraceRequest],
        prompts: PromptMaker,
        *,
        charge_python: bool = False,
        num_requests: int | None = None,
    ) -> None:
        """Sizes the cache as the engine core would.

        Args:
            config: Configuration of the engine.
            workload: The requests that it gets.
            prompts: Their tokens.
            charge_python: Add the time that the scheduler takes to virtual time.
            num_requests: Numbers of requests in use, if ``arrive`` adds more than the workload has.

        Raises:
            ValueError: The configuration does not fit the device.
        """
        self._device = DeviceModel(config.executor.simulated_device)
        planned = plan_kv_cache([self._device.ready()], config)
        if isinstance(planned, str):
            raise ValueError(planned)
        shape, self.max_model_len = planned
        self.shape = shape
        self.scheduler = Scheduler(config.scheduler, config.cache, shape, self.max_model_len)
        self.on_begin: Callable[[int], None] = _ignore
        self.on_end: Callable[[int], None] = _ignore
        """Called with the number of a request at its first token, and at its end."""
        self.costs = StepCosts()
        self.num_clipped = 0
        """Number of requests shortened to the model's length."""
        self.busy = 0.0
        """Virtual seconds in which the device computed."""
        self.now = 0.0
        """The engine core's clock, virtual seconds."""
        self._depth = config.scheduler.max_in_flight_steps
        self._charge_python = charge_python
        self._prompts = prompts
        self._arrivals = deque(enumerate(sorted(workload, key=lambda request: request.arrival)))
        self._may_schedule = False
        self._device_free_at = 0.0
        self._in_flight: deque[Submitted] = deque()
        count = len(workload) if num_requests is None else num_requests
        self.arrival: F64 = np.zeros(count)
        self.first_token: F64 = np.full(count, np.nan)
        self.finished: F64 = np.full(count, np.nan)
        self.num_prompt_tokens = np.zeros(count, np.int64)
        self.num_output_tokens = np.zeros(count, np.int64)
        self._last_token: F64 = np.zeros(count)
        self._gaps: list[F64] = []

    def run(self) -> None:
        """Replays the whole workload.

        Raises:
            RuntimeError: Requests are left that can make no progress.
        """
        self.advance(math.inf)
        if self.scheduler.has_unfinished:
            raise RuntimeError(f"{len(self.scheduler.requests)} requests are stuck")
        self.scheduler.check_integrity()

    def arrive(self, index: int, request: TraceRequest) -> None:
        """Adds a request to the workload; it must not arrive before those that were added earlier."""
        self._arrivals.append((index, request))

    def advance(self, until: float) -> None:
        """Does all that happens up to a moment in virtual seconds."""
        while True:
            if self._receive():
                self._may_schedule = True
            if self._in_flight and self._in_flight[0].done_at <= self.now:
                self._retire(self._in_flight.popleft())
                self._may_schedule = True
            elif self._may_schedule and len(self._in_flight) < self._depth:
                self._may_schedule = self._plan()
            elif not self._wait(until):
                break

    def _wait(self, until: float) -> bool:
        """Lets time pass until a step is done or a request arrives. False: neither will happen by then."""
        moments = [self._in_flight[0].done_at] if self._in_flight else []
        if self._arrivals:
            moments.append(self._arrivals[0][1].arrival)
        if not moments or min(moments) > until:
            return False
        self.now = max(self.now, min(moments))
        return True

    def _receive(self) -> bool:
        """Queues the requests that have arrived."""
        has_new = False
        while self._arrivals and self._arrivals[0][1].arrival <= self.now:
            index, request = self._arrivals.popleft()
            num_prompt_tokens = self.prompt_len(request)
            num_output_tokens = min(request.num_output_tokens, self.max_model_len - num_prompt_tokens)
            self.num_clipped += num_prompt_tokens + num_output_tokens < (
                request.num_prompt_tokens + request.num_output_tokens
            )
            prompt = self._prompts.token_ids(index, num_prompt_tokens)
            self.scheduler.add_request(make_request(index, prompt, num_output_tokens, request.arrival))
            self.arrival[index] = request.arrival
            self.num_prompt_tokens[index] = num_prompt_tokens
            has_new = True
        return has_new

    def prompt_len(self, request: TraceRequest) -> int:
        """Tokens of a request's prompt, shortened to the model's length."""
        return min(request.num_prompt_tokens, self.max_model_len - 1)

    def _plan(self) -> bool:
        """Plans a step and gives it to the device. False: there was nothing to plan."""
        begin = time.perf_counter()
        planned = self.scheduler.schedule()
        seconds = time.perf_counter() - begin
        if self._charge_python:
            self.now += seconds
        if planned is None:
            return False
        plan, step = planned
        tokens, step_seconds = self._device.execute(plan)
        self._device_free_at = max(self._device_free_at, self.now) + step_seconds
        self.busy += step_seconds
        result = ModelRunnerOutput(step_id=plan.step_id, sampled_token_ids=tokens.tobytes())
        self._in_flight.append(Submitted(step, result, self._device_free_at, seconds * 1e6))
        return True

    def _retire(self, submitted: Submitted) -> None:
        costs = self.costs
        costs.num_running.append(self.scheduler.num_running)
        begin = time.perf_counter()
        outputs = self.scheduler.update_from_output(submitted.step, submitted.result)
        seconds = time.perf_counter() - begin
        if self._charge_python:
            self.now += seconds
        costs.plan_us.append(submitted.plan_us)
        costs.retire_us.append(seconds * 1e6)
        costs.num_rows.append(len(submitted.step.slots))
        costs.num_tokens.append(submitted.step.num_tokens)
        self._note(outputs)

    def _note(self, outputs: EngineCoreOutputs) -> None:
        """Takes the times of the tokens of a step."""
        now = self.now
        indices = i64(outputs.indices)
        if len(indices):
            self._gaps.append(now - self._last_token[indices])
            self._last_token[indices] = now
            self.num_output_tokens[indices] += 1
        for output in outputs.outputs:
            index = output.index
            if output.first_output_index == 0:
                self.first_token[index] = now
                self.on_begin(index)
            else:
                self._gaps.append(np.array([now - self._last_token[index]]))
            self._last_token[index] = now
            self.num_output_tokens[index] += len(output.new_token_ids)
            if output.finish_reason is not None:
                self.finished[index] = now
                self.on_end(index)

    def summary(self) -> dict[str, Any]:
        """All figures: rates in tokens per virtual second, distributions in milliseconds or microseconds."""
        costs, kv = self.costs, self.scheduler.kv
        begin = float(self.arrival.min()) if len(self.arrival) else 0.0
        makespan = max(self.now - begin, 1e-9)
        gaps = np.sort(np.concatenate(self._gaps)) if self._gaps else np.empty(0)
        decoded = self.num_output_tokens - 1
        several = decoded > 0
        tpot = (self.finished - self.first_token)[several] / decoded[several]
        num_steps = max(len(costs.num_rows), 1)
        return {
            "requests": len(self.arrival),
            "finished": int((~np.isnan(self.finished)).sum()),
            "clipped": int(self.num_clipped),
            "virtual_s": makespan,
            "device_busy_share": self.busy / makespan,
            "prompt_tokens": int(self.num_prompt_tokens.sum()),
            "output_tokens": int(self.num_output_tokens.sum()),
            "requests_per_s": len(self.arrival) / makespan,
            "prompt_tokens_per_s": float(self.num_prompt_tokens.sum()) / makespan,
            "output_tokens_per_s": float(self.num_output_tokens.sum()) / makespan,
            "ttft_ms": describe(((self.first_token - self.arrival) * 1e3).tolist()),
            "itl_ms": describe((gaps * 1e3).tolist()),
            "tpot_ms": describe((tpot * 1e3).tolist()),
            "e2e_ms": describe(((self.finished - self.arrival) * 1e3).tolist()),
            "preemptions": self.scheduler.num_preemptions,
            "prefix_cache_hit_rate": kv.num_hit_tokens / max(kv.num_queried_tokens, 1),
            "mean_batch_size": sum(costs.num_rows) / num_steps,
            "mean_tokens_per_step": sum(costs.num_tokens) / num_steps,
            "max_running": max(costs.num_running, default=0),
            "scheduler": costs.summary(),
        }


# -- steady decode ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SteadyCosts:
    """Costs of a step in which every running request gets its next token, in microseconds."""

    num_running: int
    steps: StepCosts
    encode_us: list[float]
    """Encoding the plan for the workers and the outputs for the api, in addition to planning and retiring."""

    def summary(self) -> dict[str, Any]:
        figures = self.steps.summary()
        return {
            "num_running": self.num_running,
            **{key: figures[key] for key in ("steps", "plan_us", "retire_us", "together_us")},
            "encode_us": describe(self.encode_us),
        }


def measure_steady(
    num_running: int, num_steps: int = 1000, *, block_size: int = 32, depth: int = 2, window: int | None = None
) -> SteadyCosts:
    """Runs exactly that many requests in steady decode and measures the scheduler.

    Prompts are of ``block_size`` different lengths, so that the same share of them needs a block in every step.

    Args:
        num_running: Requests, all of them running.
        num_steps: Steps to measure.
        block_size: Tokens in a KV block.
        depth: Steps in flight.
        window: Tokens that each sees; None: all.
    """
    prompt_len = 2 * block_size
    max_model_len = prompt_len + block_size + num_steps + 4 * depth + 64
    shape = CacheShape((GroupShape(num_running * (-(-max_model_len // block_size)), block_size, window),))
    config = SchedulerConfig(max_num_seqs=num_running, max_num_batched_tokens=num_running * prompt_len * 2)
    scheduler = Scheduler(config, CacheConfig(), shape, max_model_len)
    device = DeviceModel(SimulatedDevice(block_size=block_size, max_model_len=max_model_len))
    prompts = PromptMaker(vocab_size=49152)
    for index in range(num_running):
        prompt = prompts.token_ids(index, prompt_len + index % block_size)
        scheduler.add_request(make_request(index, prompt, max_model_len))
    costs, encode_us = StepCosts(), []
    encoder = msgspec.msgpack.Encoder()
    gc.collect()
    gc.freeze()  # as the engine core does at start
    in_flight: deque[tuple[SchedulerOutput, InFlight, float]] = deque()
    warmup = 20 + depth
    for turn in range(warmup + num_steps):
        while len(in_flight) < depth:
            begin = time.perf_counter()
            planned = scheduler.schedule()
            plan_us = (time.perf_counter() - begin) * 1e6
            assert planned is not None
            in_flight.append((*planned, plan_us))
        plan, step, plan_us = in_flight.popleft()
        tokens, _ = device.execute(plan)
        result = ModelRunnerOutput(step_id=plan.step_id, sampled_token_ids=tokens.tobytes())
        begin = time.perf_counter()
        outputs = scheduler.update_from_output(step, result)
        retired = time.perf_counter()
        encoder.encode(plan)
        encoder.encode(outputs)
        encoded = time.perf_counter()
        if turn < warmup:
            continue
        assert len(step.slots) == scheduler.num_running == num_running
        costs.plan_us.append(plan_us)
        costs.retire_us.append((retired - begin) * 1e6)
        costs.num_running.append(num_running)
        costs.num_rows.append(len(step.slots))
        costs.num_tokens.append(step.num_tokens)
        encode_us.append((encoded - retired) * 1e6)
    gc.unfreeze()
    return SteadyCosts(num_running, costs, encode_us)


def format_steady(figures: dict[str, Any]) -> str:
    """What ``SteadyCosts.summary`` says, as text."""
    columns = ("plan", "retire", "together", "encode")
    table = format_distributions({f"{column} (us)": figures[f"{column}_us"] for column in columns})
    median = figures["together_us"]["median"] / 1e3
    return (
        f"steady decode, {figures['num_running']} running, {figures['steps']} steps: "
        f"planning and retiring take {median:.3f} ms in the median\n{table}"
    )


# -- command line ----------------------------------------------------------------------------------------------


def format_report(figures: dict[str, Any], wall: float) -> str:
    """What ``Simulation.summary`` says, as text; ``wall`` is in seconds."""
    scheduler = figures["scheduler"]
    lines = [
        f"{figures['finished']} of {figures['requests']} requests in {figures['virtual_s']:.1f} virtual seconds "
        f"({wall:.1f} s of wall time), device busy {figures['device_busy_share']:.1%}",
    ]
    if figures["clipped"]:
        lines.append(f"{figures['clipped']} requests were shortened to the model's length")
    lines += [
        f"requests/s {figures['requests_per_s']:.2f}   prompt tokens/s {figures['prompt_tokens_per_s']:.0f}   "
        f"output tokens/s {figures['output_tokens_per_s']:.0f}",
        format_distributions(
            {f"{name.upper()} (virtual ms)": figures[f"{name}_ms"] for name in ("ttft", "itl", "tpot", "e2e")}
        ),
        f"preemptions {figures['preemptions']}   prefix cache hits {figures['prefix_cache_hit_rate']:.1%} of tokens   "
        f"at most {figures['max_running']} running",
        f"{scheduler['steps']} steps of {figures['mean_batch_size']:.1f} requests and "
        f"{figures['mean_tokens_per_step']:.1f} tokens in the mean",
        "scheduler, microseconds of Python per step:",
        format_distributions({key: scheduler[f"{key}_us"] for key in ("plan", "retire", "together")}),
    ]
    lines.append(f"{'running':>12}{'steps':>9}{'plan med':>10}{'retire med':>12}{'together med':>14}{'p99':>9}")
    for name, row in scheduler["by_running"].items():
        lines.append(
            f"{name:>12}{row['steps']:9}{row['plan']['median']:10.1f}{row['retire']['median']:12.1f}"
            f"{row['together']['median']:14.1f}{row['together']['p99']:9.1f}"
        )
    return "\n".join(lines)


def engine_config(arguments: argparse.Namespace) -> EngineConfig:
    """The engine's flags among the parsed ones.

    Raises:
        ConfigError: One has a bad value.
    """
    known = {option.name for option in options(EngineConfig)}
    config: EngineConfig = build(EngineConfig, {key: value for key, value in vars(arguments).items() if key in known})
    return config


def create_parser() -> argparse.ArgumentParser:
    """The command line: the workload's flags, then those of the engine."""
    parser = argparse.ArgumentParser(description="Replay requests through the scheduler in virtual time.")
    add = parser.add_argument
    add("trace", nargs="?", type=Path, help="CSV file; default: synthetic requests")
    add("--num-requests", type=int, metavar="N", help="default: the whole trace, or 1000 synthetic requests")
    add("--speedup", type=float, default=1.0, metavar="X", help="divide the time between arrivals of the trace")
    add("--rate", type=float, default=10.0, metavar="R", help="arrivals per second of synthetic requests")
    add("--mean-prompt", type=float, default=1000.0, metavar="N", help="mean prompt tokens of synthetic requests")
    add("--mean-output", type=float, default=200.0, metavar="N", help="mean output tokens of synthetic requests")
    add(
        "--shared-fraction",
        type=float,
        default=0.0,
        metavar="X",
        help="fraction of prompts with a common prefix, 0 to 1",
    )
    add("--prefix-len", type=int, default=256, metavar="N", help="tokens of a common prefix")
    add("--num-prefixes", type=int, default=4, metavar="N", help="number of common prefixes")
    add("--seed", type=int, default=0)
    add("--charge-python", action="store_true", help="charge the scheduler's Python time to virtual time")
    add("--data-parallel-size", "-dp", type=int, default=1, metavar="N", help="engines behind one router")
    add(
        "--routing",
        choices=("prefix", "round_robin", "least_loaded", "all"),
        default="all",
        help="with several engines: who gets a request; all: compare",
    )
    add("--steady", type=int, metavar="N", help="measure steady decode of N requests instead")
    add("--steps", type=int, default=1000, metavar="N", help="steps to measure with --steady")
    add("--window", type=int, metavar="N", help="with --steady: a sliding window of N tokens; default: none")
    add("--json", type=Path, metavar="FILE", help="write all figures to this file")
    add_arguments(parser, EngineConfig)
    return parser


def make_workload(arguments: argparse.Namespace) -> list[TraceRequest]:
    """The requests of the trace, or made-up ones."""
    if arguments.trace:
        return read_trace(arguments.trace, arguments.num_requests, arguments.speedup)
    lengths = {"mean_prompt": arguments.mean_prompt, "mean_output": arguments.mean_output}
    return synthetic(arguments.num_requests or 1000, arguments.rate, **lengths, seed=arguments.seed)


def make_prompts(arguments: argparse.Namespace, vocab_size: int) -> PromptMaker:
    """The tokens of their prompts."""
    return PromptMaker(
        vocab_size=vocab_size,
        shared_fraction=arguments.shared_fraction,
        prefix_len=arguments.prefix_len,
        num_prefixes=arguments.num_prefixes,
        seed=arguments.seed,
    )


def main() -> int:
    parser = create_parser()
    arguments = parser.parse_args()
    try:
        config = engine_config(arguments)
    except ConfigError as error:
        parser.error(str(error))
    device = config.executor.simulated_device
    if arguments.steady:
        depth = config.scheduler.max_in_flight_steps
        steady = measure_steady(
            arguments.steady, arguments.steps, block_size=device.block_size, depth=depth, window=arguments.window
        )
        figures = steady.summary()
        print(format_steady(figures))
    elif arguments.data_parallel_size > 1:
        from simulated_replicas import compare, format_comparison

        try:
            figures = compare(
                config,
                make_workload(arguments),
                make_prompts(arguments, device.vocab_size),
                arguments.data_parallel_size,
                arguments.routing,
            )
        except ValueError as error:
            parser.error(str(error))
        print(format_comparison(figures))
    else:
        workload, prompts = make_workload(arguments), make_prompts(arguments, device.vocab_size)
        try:
            simulation = Simulation(config, workload, prompts, charge_python=arguments.charge_python)
        except ValueError as error:
            parser.error(str(error))
        gc.collect()
        gc.freeze()  # as the engine core does at start
        begin = time.perf_counter()
        simulation.run()
        wall = time.perf_counter() - begin
        figures = simulation.summary() | {"wall_s": wall}
        print(format_report(figures, wall))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
