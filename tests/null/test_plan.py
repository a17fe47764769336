"""Fitting engines on a machine, and predicting their speed."""

from __future__ import annotations

import json
import os
from typing import Any

import msgspec
import pytest

from api.commands import plan as command
from engine_core.config import CacheConfig, EngineConfig, ExecutorConfig, ModelConfig
from engine_core.messages import ModelSurvey
from engine_core.plan import fit, make_plan
from executor.base import ModelError
from executor.messages import KVCacheGroupSpec, WorkerReady

MIB = 1 << 20
BYTES_PER_TOKEN = 1024


def survey(weight_mib: int = 100, free_mib: int = 400, **fields: Any) -> ModelSurvey:
    """A model on an otherwise idle CPU with so much memory."""
    free = (free_mib - weight_mib) * MIB
    ready = WorkerReady(
        rank=0,
        free_bytes=max(0, free),
        total_bytes=500 * MIB,
        weight_bytes=weight_mib * MIB,
        default_kv_bytes=max(0, free) // 4,
        kv_cache_groups=(
            KVCacheGroupSpec(kind="full", block_size=32, bytes_per_block=32 * BYTES_PER_TOKEN, layers=(0,)),
        ),
        max_model_len=4096,
        vocab_size=1000,
        device="cpu",
        architecture="LlamaForCausalLM",
        dtype="bfloat16",
        max_num_batched_tokens=512,
    )
    made = ModelSurvey(
        ready=ready,
        free_bytes=free_mib * MIB,
        weights={"attention": 30 * MIB, "mlp": 70 * MIB, "experts": 0},
        num_threads=2,
        capability="avx2",
        bytes_per_s=100 * MIB / 0.01,
        decode_seconds={1: 0.01, 8: 0.014, 32: 0.03},
        prefill_seconds=0.4,
        prefill_tokens=512,
    )
    return msgspec.structs.replace(made, **fields)


def config(num_replicas: int = 1, model: ModelConfig | None = None, **cache: Any) -> EngineConfig:
    return EngineConfig(
        cache=CacheConfig(**cache), executor=ExecutorConfig(model=model or ModelConfig()), num_replicas=num_replicas
    )


def test_the_cache_is_sized_as_when_serving() -> None:
    plan = fit(config(), (survey(),))
    assert plan.problem == "" and plan.max_model_len == 4096
    assert plan.kv_cache_bytes == (75 * MIB,) and plan.num_kv_tokens == 75 * MIB // BYTES_PER_TOKEN
    assert plan.kv_bytes_per_token == BYTES_PER_TOKEN
    assert fit(config(kv_cache_memory=8 * MIB), (survey(),)).num_kv_tokens == 8 * 1024


def test_engines_share_memory() -> None:
    plan = fit(config(num_replicas=3), (survey(),))
    assert plan.kv_cache_bytes[0] // MIB == 8  # a quarter of the 100 MiB that all weights leave, by three
    plan = fit(config(num_replicas=5), (survey(),))
    assert plan.problem.startswith(
        "the weights of 5 engines take 500 MiB, and 400 MiB are free; the rest would be read"
    )


def test_ranks_are_listed() -> None:
    ranks = [msgspec.structs.replace(survey(), ready=msgspec.structs.replace(survey().ready, rank=n)) for n in (0, 1)]
    plan = fit(config(kv_cache_memory=8 * MIB), tuple(ranks))
    assert len(plan.kv_cache_bytes) == 2 and plan.kv_bytes_per_token == 2 * BYTES_PER_TOKEN
    text = "\n".join(command.report(plan, "tiny", 1, 1))
    assert "weights of rank 0: 100 MiB" in text and "weights of rank 1: 100 MiB" in text
    assert [each["rank"] for each in command.figures(plan, "tiny")["ranks"]] == [0, 1]


def test_machines_have_memory_and_bandwidth_of_their_own() -> None:
    stages = tuple(
        msgspec.structs.replace(
            survey(300, 400),
            ready=msgspec.structs.replace(survey(300, 400).ready, rank=rank, node_rank=rank, shares_memory=True),
        )
        for rank in (0, 1)
    )
    plan = fit(config(), stages)
    assert plan.problem == "" and plan.kv_cache_bytes == (25 * MIB, 25 * MIB)
    text = "\n".join(command.report(plan, "tiny", 1, 1, 2))
    assert (
        "weights of rank 1 on machine 1: 300 MiB" in text and "advice: 2 machines where the weights do not fit" in text
    )
    figures = command.figures(plan, "tiny", 1, 2)
    assert [each["machine"] for each in figures["ranks"]] == [0, 1]
    # Each machine reads its own stage, in turn for one stream, at the same time for several.
    assert figures["decode_ms"]["1"] == pytest.approx(10) and figures["decode_ms"]["8"] == pytest.approx(
        11.714, rel=1e-3
    )
    # Of layers, each reads its part at the same time.
    assert "advice: 2 machines that divide layers read the weights sooner" in "\n".join(
        command.report(plan, "tiny", 1, 1)
    )
    assert command.figures(plan, "tiny")["decode_ms"]["1"] == pytest.approx(5)
    crowded = tuple(
        msgspec.structs.replace(each, ready=msgspec.structs.replace(each.ready, node_rank=0)) for each in stages
    )
    assert fit(config(), crowded).problem.startswith("the weights take 600 MiB, and 400 MiB are free; ")


def test_the_smallest_change_that_fits_is_found() -> None:
    asked: list[ModelConfig] = []

    def fake(executor: ExecutorConfig, measures: bool) -> tuple[ModelSurvey, ...]:
        asked.append(executor.model)
        assert measures == (len(asked) == 1)  # of the changes only the memory counts
        if executor.model.kv_cache_dtype == "int8" and executor.model.quantization is None:
            raise ModelError("no such cache")
        return (survey({None: 500, "int8": 250, "int4": 140}[executor.model.quantization]),)

    plan = make_plan(config(), fake)
    assert plan.problem.startswith("the weights take 500 MiB, and 400 MiB are free; ")
    assert plan.change == "--quantization int8"
    assert [model.quantization for model in asked] == [None] * 4 + ["int8"]
    long = config(model=ModelConfig(max_model_len=4096), kv_cache_memory=MIB)
    plan = make_plan(long, lambda executor, _: (survey(),))
    assert "use --max-model-len 1024 or less" in plan.problem and plan.change == "--max-model-len auto"
    assert make_plan(config(), lambda executor, _: (survey(9999),)).change == ""


def test_a_step_takes_what_was_measured() -> None:
    speed = command.Speed([survey()])
    assert speed.streams == (1, 8, 32)
    assert speed.decode(8) == pytest.approx(0.014) and speed.decode(20) == pytest.approx(0.022)
    assert speed.prefill() == pytest.approx(512 / 0.4)
    half = command.Speed([survey()], 0.5)
    assert half.decode(1) == pytest.approx(0.02) and half.prefill() == pytest.approx(512 / 0.8)
    assert command.Speed([survey(decode_seconds={})]).streams == ()
    ranks = [survey(), survey()]
    assert command.Speed(ranks).decode(1) == pytest.approx(0.01)  # of ranks, on one memory
    stages = command.Speed(ranks, num_stages=2)  # each with half of the cores, and weights read twice for two streams
    assert stages.decode(1) == stages.decode(2) == pytest.approx(0.02) and stages.decode(8) == pytest.approx(
        0.02343, rel=1e-3
    )


def test_the_report_names_what_fits_and_what_to_use() -> None:
    plan = fit(config(), (survey(),))
    text = "\n".join(command.report(plan, "tiny", 1, 1))
    assert "weights: 100 MiB (attention 30 MiB, mlp 70 MiB)" in text and "75 MiB, 76800 tokens of 1 KiB" in text
    assert "fits\nadvice: one engine, as it is" in text
    both = "\n".join(command.advice(plan, 1, 2))
    assert "--data-parallel-size 2" in both and "--tensor-parallel-size 2" in both
    assert "--tensor-parallel-size 2, which puts" in "\n".join(command.advice(fit(config(), (survey(300),)), 1, 2))
    assert "for more engines there is no room" in "\n".join(command.advice(fit(config(), (survey(300),)), 1, 2))
    assert "2 on one memory" in "\n".join(command.advice(plan, 2, 1))
    figures = command.figures(plan, "tiny")
    assert figures["fits"] and figures["ranks"][0]["weight_bytes"] == 100 * MIB and figures["num_kv_tokens"] == 76800
    json.dumps(figures, allow_nan=False)
    plan = make_plan(config(), lambda executor, _: (survey(500 if executor.model.quantization is None else 100),))
    assert list(command.report(plan, "tiny", 1, 1))[-2:] == [
        f"does not fit: {plan.problem}",
        "would fit: --quantization int8",
    ]
    assert command.figures(plan, "tiny")["decode_ms"] == {}
    assert command.count_nodes({0: os.sched_getaffinity(0), 1: {9999}}) == 1 == command.count_nodes({})
