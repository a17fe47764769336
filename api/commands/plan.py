"""``octavo plan``: what a model would take and how fast it would be, before anything is loaded."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from api.config import ServerConfig
from api.errors import EngineDeadError
from engine_core.launch import child_command, child_environment, numa_nodes
from engine_core.messages import EngineDead, ModelSurvey, ServingPlan

DESCRIPTION = "Say what a model would take on this machine and how fast it would be, without loading it."
EXIT_DOES_NOT_FIT = 3
CONTEXT = 512
"""Tokens before each request's next one in predictions (``executor/plan.py``)."""


@dataclass(frozen=True)
class Speed:
    """Predicts the times of one engine.

    Attributes:
        surveys: What its workers would report, and what the machine can do.
        share: Share of the machine's bandwidth and arithmetic that the engine has; with several machines like it, their
            number: each reads its own stages.
        num_stages: Pipeline stages, each with its share of that.
    """

    surveys: Sequence[ModelSurvey]
    share: float = 1.0
    num_stages: int = 1

    @property
    def streams(self) -> tuple[int, ...]:
        """Numbers of requests whose steps can be predicted."""
        return tuple(self.rates.decode_seconds)

    @property
    def rates(self) -> ModelSurvey:
        """The survey with what the machine can do."""
        return self.surveys[0]

    def _step(self, num_streams: int) -> float:
        """Seconds of a step with all layers: between the numbers of requests that were measured, in proportion."""
        measured = self.rates.decode_seconds
        below = max(count for count in measured if count <= num_streams)
        above = min((count for count in measured if count >= num_streams), default=below)
        part = (num_streams - below) / (above - below) if above > below else 0.0
        return (1 - part) * measured[below] + part * measured[above]

    def decode(self, num_streams: int) -> float:
        """Seconds in which each stream gets a token after ``CONTEXT`` others.

        With stages, streams take turns: each turn reads all weights, and one stream alone waits for all stages.
        """
        turns = self.num_stages
        return turns * self._step(-(-num_streams // turns)) / self.share

    def prefill(self) -> float:
        """Prompt tokens per second."""
        return self.rates.prefill_tokens * self.share / self.rates.prefill_seconds


def run(config: ServerConfig, name: str, *, as_json: bool = False) -> int:
    """Prints the plan of a configuration.

    Args:
        config: With the model resolved to local files.
        name: Name of the model.
        as_json: Print one JSON object.

    Returns:
        0 if it fits, else ``EXIT_DOES_NOT_FIT``.

    Raises:
        EngineDeadError: The model cannot be served at all; its exit code is 78.
    """
    parallel = config.engine.executor.parallel
    num_replicas, num_stages = max(1, config.num_local_replicas), parallel.pipeline_parallel_size
    engine = msgspec.structs.replace(config.engine, num_replicas=num_replicas)
    ended = subprocess.run(
        child_command("engine_core.plan"),
        input=msgspec.msgpack.encode(engine),
        stdout=subprocess.PIPE,
        env=child_environment(),
        check=False,
    )
    if ended.returncode:
        raise EngineDeadError("the planning process failed", 1)
    answer = msgspec.msgpack.decode(ended.stdout, type=ServingPlan | EngineDead)
    if isinstance(answer, EngineDead):
        raise EngineDeadError(answer.message, answer.exit_code)
    if as_json:
        print(json.dumps(figures(answer, name, num_replicas, num_stages), indent=1))
    else:
        print("\n".join(report(answer, name, num_replicas, count_nodes(numa_nodes()), num_stages)))
        speculative = config.engine.executor.speculative
        if speculative is not None and speculative.has_model:
            print("note: the draft model is not counted")
    return EXIT_DOES_NOT_FIT if answer.problem else 0


def count_nodes(nodes: Mapping[int, Collection[int]]) -> int:
    """How many of these NUMA nodes, given with their cores, have some that this process may use; at least 1."""
    usable = os.sched_getaffinity(0)
    return max(1, sum(not usable.isdisjoint(cores) for cores in nodes.values()))


def count_machines(plan: ServingPlan) -> int:
    """Machines over which the ranks are divided."""
    return len({each.ready.node_rank for each in plan.surveys})


def figures(plan: ServingPlan, name: str, num_replicas: int = 1, num_stages: int = 1) -> dict[str, Any]:
    """All figures as JSON: bytes, tokens, milliseconds."""
    speed = Speed(plan.surveys, count_machines(plan) / num_replicas, num_stages)
    ranks = [
        {
            "rank": survey.ready.rank,
            "machine": survey.ready.node_rank,
            "weight_bytes": survey.ready.weight_bytes,
            "weights": survey.weights,
            "step_bytes": survey.ready.step_bytes,
            "kv_cache_bytes": plan.kv_cache_bytes[place] if plan.kv_cache_bytes else 0,
        }
        for place, survey in enumerate(plan.surveys)
    ]
    streams = () if plan.problem else speed.streams
    return {
        "model": name,
        "fits": not plan.problem,
        "problem": plan.problem,
        "change": plan.change,
        "engines": num_replicas,
        "ranks": ranks,
        "free_bytes": plan.surveys[0].free_bytes,
        "num_kv_tokens": plan.num_kv_tokens,
        "kv_bytes_per_token": plan.kv_bytes_per_token,
        "max_model_len": plan.max_model_len,
        "bytes_per_s": speed.rates.bytes_per_s,
        "decode_ms": {str(count): speed.decode(count) * 1e3 for count in streams},
        "prefill_tokens_per_s": speed.prefill() if streams else None,
    }


def report(plan: ServingPlan, name: str, num_replicas: int, num_nodes: int, num_stages: int = 1) -> Iterator[str]:
    """The plan as lines of text."""
    survey = plan.surveys[0]
    ready = survey.ready
    engines = f", {num_replicas} engines with" if num_replicas > 1 else ","
    kernels = survey.capability or "without kernels"
    where = f"{survey.num_threads} threads ({kernels})" if ready.device == "cpu" else f"device {ready.device}"
    yield f"{name}: {ready.architecture}, {ready.dtype}{engines} {where}"
    for each in plan.surveys:
        kinds = ", ".join(f"{kind} {_size(count)}" for kind, count in each.weights.items() if count)
        rank = f" of rank {each.ready.rank}" if len(plan.surveys) > 1 else ""
        rank += f" on machine {each.ready.node_rank}" if count_machines(plan) > 1 else ""
        yield f"  weights{rank}: {_size(each.ready.weight_bytes)} ({kinds})"
    yield f"  steps: {_size(ready.step_bytes)}; free: {_size(survey.free_bytes)} of {_size(ready.total_bytes)}"
    if plan.problem:
        yield f"does not fit: {plan.problem}"
        if plan.change:
            yield f"would fit: {plan.change}"
        return
    if plan.num_kv_tokens:
        of_token = _size(plan.kv_bytes_per_token)
        yield f"  KV cache: {_size(sum(plan.kv_cache_bytes))}, {plan.num_kv_tokens} tokens of {of_token}"
    yield f"  longest sequence: {plan.max_model_len} tokens"
    speed = Speed(plan.surveys, count_machines(plan) / num_replicas, num_stages)
    if speed.streams:
        times = ", ".join(f"{count}: {speed.decode(count) * 1e3:.4g} ms" for count in speed.streams)
        yield f"  predicted step by number of streams, with {CONTEXT} tokens of context each: {times}"
        yield f"  predicted prefill: {speed.prefill():.4g} tokens/s"
        yield f"  measured bandwidth: {survey.bytes_per_s / 1e9:.3g} GB/s with {survey.num_threads} threads"
    yield "fits"
    if ready.device != "cpu":
        return
    if count_machines(plan) > num_stages:
        yield (
            f"advice: {count_machines(plan)} machines that divide layers read the weights sooner, and exchange columns "
            "four times per layer: add a round trip of the network for each time, which is not counted, and take each "
            "machine for one like this. The slower their memory, the more a slow network is worth it"
        )
        return
    if count_machines(plan) > 1:
        yield (
            f"advice: {count_machines(plan)} machines where the weights do not fit one; each is counted as one like "
            "this, and the network as if it took no time. Where they fit, a server on each machine answers as many "
            "requests, and each sooner"
        )
        return
    yield from advice(plan, num_replicas, num_nodes)
    if num_stages > 1:
        yield (
            f"advice: --pipeline-parallel-size {num_stages} where the weights do not fit one node's memory; decoding "
            "gets no faster, as streams take turns and each turn reads all weights"
        )


def advice(plan: ServingPlan, num_replicas: int, num_nodes: int) -> Iterator[str]:
    """Which parallelism to use on a machine with so many NUMA nodes, and why."""
    weights = sum(survey.ready.weight_bytes for survey in plan.surveys)
    free = plan.surveys[0].free_bytes
    if num_nodes == 1:
        if num_replicas > 1:
            yield (
                f"advice: one engine; {num_replicas} on one memory read {num_replicas} times the weights at the same "
                "bandwidth. They help with prompts and very small models, and against failures"
            )
        else:
            what = "with one rank" if len(plan.surveys) > 1 else "as it is"
            yield f"advice: one engine, {what}: on one memory, more engines or ranks add no bandwidth"
        return
    latency = f"--tensor-parallel-size {num_nodes}, which puts a part of each layer into each node's memory"
    fitting = min(num_nodes, int(free // max(1, weights)))
    if fitting > 1:
        yield (
            f"advice: for throughput --data-parallel-size {fitting}, engines on nodes of their own that never wait for "
            f"each other, with {_size(fitting * weights)} of weights; for the latency of one stream {latency}"
        )
    else:
        yield f"advice: {latency}; for more engines there is no room ({_size(weights)} of weights each)"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.4g} {unit}"
