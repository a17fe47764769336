"""What ``octavo plan`` says of a model is what a worker reports that has loaded it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from gguf import GGMLQuantizationType

import ops
from api.model.gguf_file import read_gguf
from engine_core.config import EngineConfig
from engine_core.plan import fit
from executor import plan
from executor.config import ExecutorConfig, ModelConfig, ParallelConfig, SpeculativeConfig, StepSize
from executor.loader import load_model
from executor.messages import FromWorker, ModelSurvey, WorkerReady
from executor.parallel import ParallelState, places
from executor.worker import Worker
from tests import tiny, vision_families

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied, with windows": ("gemma3", {}),
    "experts": ("qwen3_moe", {}),
    "latents and experts": ("deepseek_v3", {}),
    "states, which keep drafts": ("qwen3_next", {}),
    "int8": ("qwen3", {"quantization": "int8"}),
    "int4, cache in 8 bits, eager": (
        "llama",
        {"quantization": "int4", "kv_cache_dtype": "int8", "enforce_eager": True},
    ),
    "no weights": ("olmoe", {"load_format": "dummy"}),
}


def surveyed(model: ModelConfig, speculative: SpeculativeConfig | None = None) -> tuple[ModelSurvey, WorkerReady]:
    """The survey of a model, and what a worker reports."""
    size = StepSize(max_num_seqs=8, max_num_batched_tokens=64)
    config = ExecutorConfig(model=model, speculative=speculative, step_size=size)
    survey = plan.survey(config, ParallelState(), measures=False)
    answers: list[FromWorker] = []
    Worker(ParallelState(), config, answers.append).start()
    (ready,) = (answer for answer in answers if isinstance(answer, WorkerReady))
    return survey, ready


def check(survey: ModelSurvey, ready: WorkerReady) -> None:
    """Everything is equal but the memory that is free at the moment, and what computes."""
    left_out = {"free_bytes", "total_bytes", "default_kv_bytes", "fingerprint", "kernels"}
    for name in ready.__struct_fields__:
        if name not in left_out:
            assert getattr(survey.ready, name) == getattr(ready, name), name
    assert sum(survey.weights.values()) == ready.weight_bytes


@pytest.mark.parametrize("name", MODELS)
def test_a_survey_is_what_a_worker_reports(name: str) -> None:
    kind, fields = MODELS[name]
    drafts = SpeculativeConfig(method="suffix", num_speculative_tokens=4) if "drafts" in name else None
    survey, ready = surveyed(ModelConfig(model=str(tiny.checkpoint(kind)), **fields), drafts)
    check(survey, ready)
    has_experts = "experts" in name or kind == "olmoe" or kind == "qwen3_next"
    assert bool(survey.weights["experts"]) == has_experts and survey.weights["tables"]


@pytest.mark.parametrize(("kind", "size", "stages"), [("llama", 2, 1), ("qwen3_moe", 2, 1), ("gemma3", 1, 2)])
def test_ranks_hold_what_the_survey_says(kind: str, size: int, stages: int) -> None:
    model = ModelConfig(model=str(tiny.checkpoint(kind)))
    parallel = ParallelConfig(tensor_parallel_size=size, pipeline_parallel_size=stages)
    config = ExecutorConfig(
        model=model, parallel=parallel, step_size=StepSize(max_num_seqs=8, max_num_batched_tokens=64)
    )
    surveys = plan.survey_ranks(config, measures=False)
    for place, survey in zip(places(parallel), surveys, strict=True):
        communicator = ops.NotConnected(place.tp_rank, size, cuts_sums=False) if size > 1 else None
        loaded = load_model(model, place, torch.device("cpu"), None, lambda *_: None, communicator=communicator)
        assert survey.ready.weight_bytes == loaded.weight_bytes == sum(survey.weights.values())
        assert survey.ready.shares_memory
    groups = [[spec.layers for spec in survey.ready.kv_cache_groups] for survey in surveys]
    assert len({len(each) for each in groups}) == 1, "plans name blocks by group"


def test_the_encoder_of_images_counts() -> None:
    survey, ready = surveyed(ModelConfig(model=str(vision_families.checkpoint("qwen2_vl")), dtype="float32"))
    assert ready.multimodal is not None and survey.weights["images"]
    check(survey, ready)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "qwen3_next", "deepseek_v3", "gpt_oss"])
def test_steps_are_timed_on_the_layers_that_are_there(kind: str) -> None:
    model = ModelConfig(model=str(tiny.checkpoint(kind)))
    config = ExecutorConfig(model=model, step_size=StepSize(max_num_seqs=8, max_num_batched_tokens=64))
    survey = plan.survey(config, ParallelState())
    assert list(survey.decode_seconds) == [1, 8] and all(survey.decode_seconds.values())
    assert survey.prefill_seconds > 0 and survey.prefill_tokens == 64 and survey.bytes_per_s > 0
    assert survey.ready.weight_bytes == plan.survey(config, ParallelState(), measures=False).ready.weight_bytes


def test_steps_that_are_timed_read_more_than_caches_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ExecutorConfig(model=ModelConfig(model=str(tiny.checkpoint("llama", num_hidden_layers=4))))

    def distinct(caches: int, *, measures: bool = True) -> int:
        monkeypatch.setattr(plan, "cache_bytes", lambda: caches)
        _, runner = plan.prepare(config, ParallelState(), measures=measures)
        layers = (layer for name, layer in runner.model.named_modules() if name.endswith("down_proj"))
        return len({id(layer.get_submodule("weights")) for layer in layers})

    assert plan.cache_bytes() > 1 << 20
    assert distinct(1 << 30) == 4
    assert distinct(1) == distinct(1 << 30, measures=False) == 1


def test_layers_of_different_types_are_told_apart() -> None:
    kinds = {"blk.0.ffn_down": GGMLQuantizationType.Q8_0, "token_embd": GGMLQuantizationType.Q8_0}
    path = Path(tiny.gguf_file(tiny.checkpoint("llama"), GGMLQuantizationType.Q4_0, kinds=kinds).path)
    survey, ready = surveyed(ModelConfig(model=str(path), gguf=read_gguf(path).header()))
    check(survey, ready)


@pytest.mark.parametrize(("size", "stages"), [(1, 1), (2, 2)])
def test_devices_with_memory_of_their_own(size: int, stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from tests.fake_cuda import FakeCuda

    before, device = ops.op_set("cpu"), FakeCuda(by_itself=False, kernels="reference")
    monkeypatch.setattr(plan, "create_device", lambda name: device)
    parallel = ParallelConfig(tensor_parallel_size=size, pipeline_parallel_size=stages)
    model = ModelConfig(model=str(tiny.checkpoint("llama")))
    sizes = StepSize(max_num_seqs=8, max_num_batched_tokens=64)
    config = ExecutorConfig(model=model, parallel=parallel, step_size=sizes)
    try:
        surveys = plan.survey_ranks(config, measures=True)
        for place, survey in zip(places(parallel), surveys, strict=True):
            communicator = ops.NotConnected(place.tp_rank, size) if size > 1 else None
            loaded = load_model(model, place, torch.device("cpu"), None, lambda *_: None, communicator=communicator)
            assert survey.ready.weight_bytes == loaded.weight_bytes == sum(survey.weights.values())
            assert not survey.ready.shares_memory and survey.ready.step_bytes and not survey.decode_seconds
            fits = fit(EngineConfig(executor=config), tuple(surveys))
            assert not fits.problem and len(fits.kv_cache_bytes) == size * stages
    finally:
        device.close()
        ops.use("cpu", before)
    small = msgspec.structs.replace(surveys[-1], free_bytes=1000)
    problem = fit(EngineConfig(executor=config), (*surveys[:-1], small)).problem
    assert problem.startswith(f"the weights of worker {size * stages - 1} take ") and "free on its device" in problem
