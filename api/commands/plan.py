"""``octavo plan``: what a model would take and how fast it would be, before anything is loaded."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from api.config import ServerConfig
from api.errors import EngineDeadError
from engine_core.launch import child_command, child_environment
from engine_core.messages import EngineDead, ModelSurvey, ServingPlan

DESCRIPTION = "Say what a model would take on this machine and how fast it would be, without loading it."
EXIT_DOES_NOT_FIT = 3
STREAMS = (1, 8, 32)
"""Requests that decode at the same time, for which times are predicted."""
CONTEXT = 512
"""Tokens before each request's next one in these predictions."""
FIXED_SECONDS = 0.0003
"""What a step costs besides reading and multiplying."""
NODES = Path("/sys/devices/system/node")


@dataclass(frozen=True)
class Speed:
    """Predicts the times of one engine.

    Attributes:
        survey: What its workers would report and what the machine can do.
        kv_bytes_per_token: What a token of context takes in the KV cache.
        share: Share of the machine's bandwidth and arithmetic that the engine has.
    """

    survey: ModelSurvey
    kv_bytes_per_token: float
    share: float = 1.0

    @property
    def is_known(self) -> bool:
        return self.survey.bytes_per_s > 0

    def _step(self, num_bytes: float, operations: float) -> float:
        rates = self.survey
        work = max(num_bytes / rates.bytes_per_s, operations / rates.operations_per_s)
        return work / self.share + FIXED_SECONDS

    def _weight_bytes(self, num_tokens: int) -> float:
        """Weights that a step reads; experts as if tokens chose them at random."""
        survey = self.survey
        return survey.read_bytes + survey.expert_bytes * (1 - (1 - survey.expert_share) ** num_tokens)

    def decode(self, num_streams: int, context: int = CONTEXT) -> float:
        """Seconds of a step in which each stream gets a token."""
        survey = self.survey
        num_bytes = self._weight_bytes(num_streams) + num_streams * context * self.kv_bytes_per_token
        return self._step(num_bytes, 2.0 * num_streams * (survey.layer_parameters + survey.head_parameters))

    def prefill(self) -> float:
        """Prompt tokens per second."""
        num_tokens = self.survey.ready.max_num_batched_tokens or 512
        return num_tokens / self._step(self._weight_bytes(num_tokens), 2.0 * num_tokens * self.survey.layer_parameters)


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
    num_replicas = config.num_local_replicas
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
        print(json.dumps(figures(answer, name, num_replicas), indent=1))
    else:
        print("\n".join(report(answer, name, num_replicas, count_nodes())))
    return EXIT_DOES_NOT_FIT if answer.problem else 0


def count_nodes(root: Path = NODES) -> int:
    """Number of NUMA nodes with cores that this process may use; at least 1."""
    usable, count = os.sched_getaffinity(0), 0
    for folder in root.glob("node[0-9]*"):
        cores = {int(path.name[3:]) for path in folder.glob("cpu[0-9]*")}
        count += bool(cores & usable)
    return max(1, count)


def figures(plan: ServingPlan, name: str, num_replicas: int = 1) -> dict[str, Any]:
    """All figures as JSON: bytes, tokens, milliseconds."""
    speed = Speed(plan.surveys[0], plan.kv_bytes_per_token, 1 / num_replicas)
    ranks = [
        {
            "rank": survey.ready.rank,
            "weight_bytes": survey.ready.weight_bytes,
            "weights": survey.weights,
            "step_bytes": survey.ready.step_bytes,
            "kv_cache_bytes": plan.kv_cache_bytes,
        }
        for survey in plan.surveys
    ]
    known = speed.is_known and not plan.problem
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
        "bytes_per_s": speed.survey.bytes_per_s,
        "operations_per_s": speed.survey.operations_per_s,
        "decode_ms": {str(count): speed.decode(count) * 1e3 for count in STREAMS} if known else {},
        "prefill_tokens_per_s": speed.prefill() if known else None,
    }


def report(plan: ServingPlan, name: str, num_replicas: int, num_nodes: int) -> Iterator[str]:
    """The plan as lines of text."""
    survey = plan.surveys[0]
    ready = survey.ready
    engines = f", {num_replicas} engines with" if num_replicas > 1 else ","
    kernels = survey.capability or "without kernels"
    yield f"{name}: {ready.architecture}, {ready.dtype}{engines} {survey.num_threads} threads ({kernels})"
    for each in plan.surveys:
        kinds = ", ".join(f"{kind} {_size(count)}" for kind, count in each.weights.items() if count)
        rank = f" of rank {each.ready.rank}" if len(plan.surveys) > 1 else ""
        yield f"  weights{rank}: {_size(each.ready.weight_bytes)} ({kinds})"
    yield f"  steps: {_size(ready.step_bytes)}; free: {_size(survey.free_bytes)} of {_size(ready.total_bytes)}"
    if plan.problem:
        yield f"does not fit: {plan.problem}"
        if plan.change:
            yield f"would fit: {plan.change}"
        return
    if plan.num_kv_tokens:
        yield (
            f"  KV cache: {_size(plan.kv_cache_bytes)}, {plan.num_kv_tokens} tokens of {_size(plan.kv_bytes_per_token)}"
        )
    yield f"  longest sequence: {plan.max_model_len} tokens"
    speed = Speed(survey, plan.kv_bytes_per_token, 1 / num_replicas)
    if speed.is_known:
        times = ", ".join(f"{count}: {speed.decode(count) * 1e3:.4g} ms" for count in STREAMS)
        yield f"  predicted step by number of streams, with {CONTEXT} tokens of context each: {times}"
        yield f"  predicted prefill: at most {speed.prefill():.4g} tokens/s"
        rates = f"{survey.bytes_per_s / 1e9:.3g} GB/s and {survey.operations_per_s / 1e9:.4g} Gop/s"
        yield f"  measured: {rates} with {survey.num_threads} threads"
    yield "fits"
    yield from advice(plan, num_replicas, num_nodes)


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
            yield "advice: one engine, as it is: on one memory, more engines or ranks add no bandwidth"
        return
    fitting = min(num_nodes, int(free // max(1, weights)))
    if fitting > 1:
        yield (
            f"advice: for throughput --data-parallel-size {fitting}, an engine per NUMA node, with "
            f"{_size(fitting * weights)} of weights; for the latency of one stream one engine with all cores"
        )
    else:
        yield (
            f"advice: one engine with all cores: there is no room for a second copy of the weights ({_size(weights)})"
        )


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.4g} {unit}"
