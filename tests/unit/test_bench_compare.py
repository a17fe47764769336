"""Comparisons with other servers: which commands are run, what a model costs at least, and whose ratio is above 1."""

from __future__ import annotations

import argparse
from pathlib import Path

import bench_compare
import numpy as np
import peers
import pytest
from bench_compare import LARGE, OCTAVO, SMALL, Sample, ratios, room_for
from bench_models import BenchModel, config_of, shapes_of
from floors import ModelCost, Rates, is_quantized
from gguf import GGMLQuantizationType

from api.commands.bench.options import Options
from api.commands.bench.result import RequestResult, Result
from api.model.gguf_file import GGUFFile
from executor.config import GGUFTensor

MODEL = BenchModel(Path("/models/1b.gguf"), Path("/models/1b"))
ROOM = peers.Room(streams=16, length=200)


def test_a_known_server_gets_its_best_settings() -> None:
    engine = peers.parse_engine("llama.cpp/fa-off=A=1 /opt/llama-server -fa off", MODEL, ROOM)
    assert engine.name == "llama.cpp/fa-off" and engine.env == {"A": "1"}
    assert engine.command[:3] == ["/opt/llama-server", "-m", "/models/1b.gguf"]
    assert engine.command[-2:] == ["-fa", "off"]
    command = " ".join(engine.command)
    assert "--port {port}" in command and "-np 16 -c 3200" in command and command.count("{") == 1
    vllm = peers.parse_engine("vllm=VLLM_CPU_KVCACHE_SPACE=9 /opt/python", MODEL, ROOM)
    assert vllm.env["VLLM_CPU_KVCACHE_SPACE"] == "9" and vllm.env["PYTHONPATH"] == ""
    assert vllm.command[:2] == ["/opt/python", "-m"]
    assert " ".join(vllm.command).endswith("--max-model-len 200 --load-format dummy")


def test_any_other_server_is_a_command() -> None:
    engine = peers.parse_engine("mine=X={folder} serve {folder} --port {port}", MODEL, ROOM)
    assert (engine.name, engine.env) == ("mine", {"X": "/models/1b"})
    assert engine.command == ["serve", "/models/1b", "--port", "{port}"]
    for text in ("mine", "mine=", "=serve", "mine=A=1"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected KIND=PATH or NAME=COMMAND"):
            peers.parse_engine(text, MODEL, ROOM)


@pytest.mark.parametrize("name", ["smollm2", "1b", "3b"])
def test_cost_agrees_with_the_tensors_of_a_model(name: str) -> None:
    config = config_of(name)
    sizes = {tensor: int(np.prod(shape)) for tensor, shape in shapes_of(config) if len(shape) == 2}
    cost = ModelCost.of(config)
    assert cost.weight_bytes == 2 * sum(sizes.values())
    assert cost.head_parameters == sizes["token_embd.weight"]
    assert cost.layer_parameters == sum(sizes.values()) - cost.head_parameters


def test_quantised_weights_count_with_their_bytes_in_the_file() -> None:
    sizes = {"token_embd.weight": 34, "blk.0.attn_q.weight": 18, "output_norm.weight": 4}
    kinds = [GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0, GGMLQuantizationType.F32]
    tensors = [
        GGUFTensor(name, (1, 1), int(kind), 0, size) for (name, size), kind in zip(sizes.items(), kinds, strict=True)
    ]
    tied = GGUFFile("a.gguf", {}, tensors)
    assert is_quantized(tied) and not is_quantized(GGUFFile("a.gguf", {}, tensors[2:]))
    config = config_of("smollm2")
    assert ModelCost.of(config, gguf=tied).weight_bytes == 56
    output = GGUFTensor("output.weight", (1, 1), int(kinds[0]), 0, 34)
    assert ModelCost.of(config, gguf=GGUFFile("a.gguf", {}, [*tensors, output])).weight_bytes == 56
    assert ModelCost.of(config, gguf=tied).layer_parameters == ModelCost.of(config).layer_parameters


def test_of_experts_those_count_that_tokens_have() -> None:
    config = {
        **config_of("1b"),
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 100,
        "num_hidden_layers": 3,
    }
    cost = ModelCost.of(config)
    one = 3 * 2048 * 100
    assert cost.expert_bytes == 2 * 3 * 8 * one
    assert cost.layer_parameters == cost.weight_bytes / 2 - cost.head_parameters + 3 * 2 * one
    assert cost.bytes_of_step(1) == cost.weight_bytes + cost.expert_bytes / 4
    assert cost.bytes_of_step(2) == cost.weight_bytes + cost.expert_bytes * 7 / 16
    tensors = [GGUFTensor(f"blk.0.ffn_{name}.weight", (1, 1), 0, 0, 40) for name in ("up_exps", "gate_inp")]
    found = ModelCost.of(config, gguf=GGUFFile("a.gguf", {}, tensors))
    assert (found.weight_bytes, found.expert_bytes) == (40, 40)


def test_floors_are_the_larger_of_reading_and_multiplying() -> None:
    cost = ModelCost(weight_bytes=100, layer_parameters=40, head_parameters=10, kv_bytes_per_token=2)
    slow_memory, slow_cores = Rates(10.0, 1e9), Rates(1e9, 100.0)
    assert cost.decode(slow_memory, requests=3, context=5.0) == (100 + 30) / 10
    assert cost.decode(slow_cores, requests=3, context=5.0) == 2 * 3 * 50 / 100
    assert cost.prefill(slow_memory, tokens=8) == 10
    assert cost.prefill(slow_cores, tokens=8, prompts=2) == 2 * (8 * 40 + 2 * 10) / 100
    assert cost.operations(8, 3) == 2 * (11 * 40 + 3 * 10)


def result_of(load: bench_compare.Load) -> Result:
    """Requests that take a second to the first token, and then 0.1 s per token."""
    count, output_len = load.options["num_prompts"], load.options["output_len"]
    requests = [
        RequestResult(
            start=0.0, e2e=1.0 + 0.1 * (output_len - 1), ttft=1.0, itls=[0.1] * (output_len - 1), num_events=output_len,
            num_prompt_tokens=load.options["input_len"], num_output_tokens=output_len,
        )
        for _ in range(count)
    ]  # fmt: skip
    return Result(Options(**load.options), "m", requests, 10.0, 0.1, load.streams)


@pytest.mark.parametrize("load", [*SMALL, *LARGE], ids=lambda load: load.name)
def test_every_load_has_a_figure_and_a_floor(load: bench_compare.Load) -> None:
    cost, rates = ModelCost.of(config_of("smollm2")), Rates(30e9, 400e9)
    result = result_of(load)
    assert load.figure(result) > 0
    least, taken = bench_compare.least_seconds(load, result, cost, rates)
    assert least > 0 and taken == pytest.approx({"ms per token": 0.1, "prompt tokens/s": 1.0}.get(load.unit, 10.0))
    room = room_for([load])
    assert room.streams == load.streams and room.length > load.length


def test_ratios_pair_the_runs_of_a_round() -> None:
    stream, many = SMALL[:2]

    def sample(engine: str, load: bench_compare.Load, round_: int, value: float) -> Sample:
        return Sample(engine, load.name, round_, value, 1.0, 1.0, 1.0, 1.0)

    samples = [
        sample(OCTAVO, stream, 0, 10.0), sample("x", stream, 0, 20.0), sample("x", stream, 1, 30.0),
        sample(OCTAVO, stream, 1, 10.0), sample(OCTAVO, many, 0, 50.0), sample("x", many, 0, 25.0),
    ]  # fmt: skip
    assert ratios(stream, samples, "x") == [2.0, 3.0]  # less time is better
    assert ratios(many, samples, "x") == [2.0]  # more tokens are better
