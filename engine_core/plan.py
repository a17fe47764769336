"""What a configuration would take on this machine, and which one would fit if it does not.

``python -m engine_core.plan`` takes an ``EngineConfig`` on standard input and writes a ``ServingPlan``, or
``EngineDead`` if the model cannot be served at all. The workers'
share comes from ``executor/plan.py``, in a process of its own; the cache is sized by the function that sizes it when
serving (``memory.py``).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import TypeAlias

import msgspec

from engine_core.config import EngineConfig, StepSize
from engine_core.memory import AUTO_MAX_MODEL_LEN, format_bytes, plan_kv_cache
from engine_core.messages import EXIT_MODEL, EngineDead, ModelSurvey, ServingPlan
from executor.base import ModelError
from executor.config import ExecutorConfig
from executor.messages import WorkerFailed
from executor.process import child_command, child_environment

Survey: TypeAlias = Callable[[ExecutorConfig, bool], tuple[ModelSurvey, ...]]


def survey(config: ExecutorConfig, measures: bool) -> tuple[ModelSurvey, ...]:
    """What the workers of an engine would report, and if ``measures`` is set, how fast they would be.

    Raises:
        ModelError: The model cannot be served as configured.
    """
    ended = subprocess.run(
        child_command("executor.plan", *(["measure"] if measures else [])),
        input=msgspec.msgpack.encode(config),
        stdout=subprocess.PIPE,
        env=child_environment(),
        check=True,
    )
    answers = msgspec.msgpack.decode(ended.stdout, type=list[ModelSurvey | WorkerFailed])
    for answer in answers:
        if isinstance(answer, WorkerFailed):
            raise ModelError(answer.message)
    return tuple(answer for answer in answers if isinstance(answer, ModelSurvey))


def make_plan(config: EngineConfig, survey: Survey = survey) -> ServingPlan:
    """Plans a configuration, and if it does not fit, the smallest change of it that does.

    Args:
        config: Configuration of one engine, with the number of engines on this machine.
        survey: Surveys the workers.

    Raises:
        ModelError: The model cannot be served as configured.
    """
    config = config.settled()
    scheduler = config.scheduler
    step_size = StepSize(max_num_seqs=scheduler.max_num_seqs, max_num_batched_tokens=scheduler.max_num_batched_tokens)
    config = msgspec.structs.replace(config, executor=msgspec.structs.replace(config.executor, step_size=step_size))
    plan = fit(config, survey(config.executor, True))
    if not plan.problem:
        return plan
    for change, changed in _changes(config):
        try:
            if not fit(changed, survey(changed.executor, False)).problem:
                return msgspec.structs.replace(plan, change=change)
        except ModelError:  # this model cannot be changed in this way
            continue
    return plan


def fit(config: EngineConfig, surveys: tuple[ModelSurvey, ...]) -> ServingPlan:
    """Places engines on this machine, or one on several machines like it.

    Args:
        config: Configuration of each engine.
        surveys: Of the workers of one engine, as if it were alone.
    """
    ready = []
    for each in surveys:
        own, others = _neighbours(each, surveys, config.num_replicas)
        if each.free_bytes < own + others:
            return ServingPlan(surveys, problem=_lack_of_memory(each, surveys, own + others, config.num_replicas))
        left = max(0, each.ready.free_bytes + each.ready.weight_bytes - own - others)
        default = min(each.ready.default_kv_bytes, left if _has_own_memory(each) else left // 4)
        ready.append(msgspec.structs.replace(each.ready, free_bytes=left, default_kv_bytes=default))
    if not ready[0].kv_cache_groups:
        return ServingPlan(surveys, max_model_len=min(each.max_model_len for each in ready))
    planned = plan_kv_cache(ready, config)
    if isinstance(planned, str):
        return ServingPlan(surveys, problem=planned)
    shape, max_model_len = planned
    ranks = [each.kv_cache_groups for each in ready]
    return ServingPlan(
        surveys,
        num_kv_tokens=shape.num_tokens,
        kv_cache_bytes=tuple(
            sum(spec.bytes_per_block * group.num_blocks for spec, group in zip(specs, shape.groups, strict=True))
            for specs in ranks
        ),
        kv_bytes_per_token=sum(spec.bytes_per_block / spec.block_size for specs in ranks for spec in specs),
        max_model_len=max_model_len,
    )


def _has_own_memory(survey: ModelSurvey) -> bool:
    """Whether nobody else uses the memory of a worker's device."""
    return survey.ready.device != "cpu"


def _neighbours(survey: ModelSurvey, surveys: tuple[ModelSurvey, ...], num_replicas: int) -> tuple[int, int]:
    """Bytes of weights in a worker's memory: of its own engine, and of others."""
    if _has_own_memory(survey):
        return survey.ready.weight_bytes, 0
    own = sum(each.ready.weight_bytes for each in surveys if each.ready.node_rank == survey.ready.node_rank)
    return own, (num_replicas - 1) * own


def _lack_of_memory(survey: ModelSurvey, surveys: tuple[ModelSurvey, ...], num_bytes: int, num_replicas: int) -> str:
    take, free = format_bytes(num_bytes), format_bytes(survey.free_bytes)
    if _has_own_memory(survey):
        return f"the weights of worker {survey.ready.rank} take {take}, and {free} are free on its device"
    several = " of one machine" if len({each.ready.node_rank for each in surveys}) > 1 else ""
    several = f" of {num_replicas} engines" if num_replicas > 1 else several
    return f"the weights{several} take {take}, and {free} are free; the rest would be read from the disk in each step"


def _changes(config: EngineConfig) -> Iterator[tuple[str, EngineConfig]]:
    """Changes of a configuration that make it smaller, the least first: the flags, and the configuration with them."""
    executor = config.executor
    quantizations = ["int8", "int4"] if executor.model.quantization is None else []
    for quantization in [None, *quantizations]:
        for kv_cache_dtype in ("auto", "int8"):
            for max_model_len in (executor.model.max_model_len, AUTO_MAX_MODEL_LEN):
                flags: list[str] = []
                model = executor.model
                if quantization is not None:
                    flags.append(f"--quantization {quantization}")
                    model = msgspec.structs.replace(model, quantization=quantization)
                if kv_cache_dtype != "auto" and model.kv_cache_dtype == "auto":
                    flags.append(f"--kv-cache-dtype {kv_cache_dtype}")
                    model = msgspec.structs.replace(model, kv_cache_dtype=kv_cache_dtype)
                if max_model_len == AUTO_MAX_MODEL_LEN:
                    flags.append("--max-model-len auto")
                    model = msgspec.structs.replace(model, max_model_len=max_model_len)
                if model != executor.model:
                    changed = msgspec.structs.replace(executor, model=model)
                    yield " ".join(flags), msgspec.structs.replace(config, executor=changed)


def main() -> int:
    """Answers the message on standard input. Returns the exit code."""
    config = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=EngineConfig)
    answer: ServingPlan | EngineDead
    try:
        answer = make_plan(config)
    except ModelError as error:
        answer = EngineDead(engine_epoch=0, message=str(error), exit_code=EXIT_MODEL)
    sys.stdout.buffer.write(msgspec.msgpack.encode(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
