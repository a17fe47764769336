"""GGUF files whose weights keep their blocks."""

from __future__ import annotations

import functools
from typing import Any

import msgspec
import pytest
import torch
from gguf import GGMLQuantizationType

import ops
from api.model.gguf_file import read_gguf
from executor.loader import LoadedModel
from executor.parallel import ParallelState
from executor.quantization.gguf import SCALES, BlockWeights
from tests import tiny
from tests.models.harness import Runner, assert_close, load, logits_of, random_tokens, refusal, steps_of
from tests.thread_ranks import ThreadRank, on_ranks

Q4_K, Q6_K, Q8_0 = (GGMLQuantizationType[name] for name in ("Q4_K", "Q6_K", "Q8_0"))
MIX = {".v_proj.": Q6_K, ".down_proj.": Q6_K, "embed_tokens": Q8_0}
"""As in Q4_K_M: one of three merged projections has another type."""


@functools.cache
def file_of(kind: GGMLQuantizationType, mix: bool = False, **fields: Any) -> tiny.GGUFModel:
    folder = tiny.checkpoint("llama", hidden_size=256, intermediate_size=512, num_hidden_layers=2, **fields)
    return tiny.gguf_file(folder, kind, kinds=MIX if mix else None)


def kinds_of(loaded: LoadedModel) -> dict[str, list[str]]:
    """The formats of each layer's segments."""
    return {
        name.removesuffix(".weights"): [segment.encoding.format for segment in module.packed.segments]
        for name, module in loaded.model.named_modules()
        if isinstance(module, BlockWeights) and isinstance(module.packed, ops.QuantizedWeight)
    }


@pytest.mark.parametrize("kind", SCALES)
def test_blocks_of_each_type_have_the_logits_of_their_numbers(kind: str) -> None:
    file = file_of(GGMLQuantizationType[kind])
    tokens = random_tokens(20)
    expected = logits_of(load(file.path, quantization="none"), tokens)
    loaded = load(file.path)
    tolerance = max(1e-4, 3e-5 * expected.abs().max().item())  # random blocks make large logits
    assert_close(logits_of(loaded, tokens), expected, tolerance)
    assert loaded.weight_bytes < 1.1 * file.path.stat().st_size


def test_a_mix_of_types(caplog: pytest.LogCaptureFixture) -> None:
    file = file_of(Q4_K, mix=True, tied=True)
    tokens = random_tokens(20)
    with caplog.at_level("INFO"):
        loaded = load(file.path)
    assert "quantised weights: Q4_K, Q6_K, Q8_0, with activations in float" in caplog.messages
    kinds = kinds_of(loaded)
    assert kinds["model.layers.1.self_attn.qkv_proj"] == ["Q4_K", "Q6_K"]
    assert kinds["model.layers.1.mlp.gate_up_proj"] == ["Q4_K"]
    assert kinds["model.layers.0.mlp.down_proj"] == ["Q6_K"] and kinds["model.embed_tokens"] == ["Q8_0"]
    expected = logits_of(load(file.path, quantization="none"), tokens)
    assert_close(logits_of(loaded, tokens), expected, 3e-5 * expected.abs().max().item())


def test_what_a_layer_has_in_both_forms_is_not_quantised() -> None:
    folder = tiny.checkpoint("llama", hidden_size=256, num_hidden_layers=1)
    file = tiny.gguf_file(folder, Q8_0, kinds={".k_proj.": GGMLQuantizationType.F16})
    loaded = load(file.path)
    assert "model.layers.0.self_attn.qkv_proj" not in (kinds := kinds_of(loaded))
    assert kinds["model.layers.0.self_attn.o_proj"] == ["Q8_0"]
    assert_close(logits_of(loaded, random_tokens(9)), logits_of(load(file.path, quantization="none"), random_tokens(9)))


def test_the_flags_choose_the_arithmetic() -> None:
    file = file_of(Q8_0)

    def activations(**options: Any) -> set[str]:
        modules = load(file.path, **options).model.modules()
        return {str(module.activations) for module in modules if isinstance(module, BlockWeights)}

    assert activations() == {"float"}, "who asks for float32 asks for exact products"
    assert activations(dtype="bfloat16") == activations(quantized_activations="int8") == {"int8"}
    assert activations(dtype="auto", quantized_activations="float") == {"float"}


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
def test_any_batch_has_the_same_bits(captured: bool) -> None:
    loaded = load(file_of(Q4_K, mix=True).path, dtype="bfloat16")
    for seed in range(2):
        batch, alone = Runner(loaded, captured=captured), Runner(loaded)
        for step in steps_of(seed, num_steps=3):
            together = batch.step(step).split([len(chunk.token_ids) for chunk in step])
            for chunk, logits in zip(step, together, strict=True):
                assert torch.equal(alone.step([chunk]), logits)


def test_types_without_a_kernel_become_q8_0(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    file = file_of(Q6_K)
    expected = logits_of(load(file.path, quantization="none"), random_tokens(20))
    monkeypatch.setattr(ops.op_set("cpu"), "block_types", frozenset({"Q8_0"}))
    with caplog.at_level("INFO"):
        loaded = load(file.path)
    assert {kind for kinds in kinds_of(loaded).values() for kind in kinds} == {"Q8_0"}
    assert [record.message for record in caplog.records if "no kernel" in record.message] == [
        "weights of type Q6_K have no kernel: they are converted to Q8_0 while they are loaded"
    ]
    assert (logits_of(loaded, random_tokens(20)) - expected).std() < 0.1 * expected.std()


def test_ranks_share_rows_and_whole_load() -> None:
    narrow = file_of(Q4_K, mix=True)
    message = refusal(narrow.path, parallel=ParallelState(0, 4))
    assert message.startswith("model.layers.0.self_attn.o_proj: 64 of 256 elements")
    assert "are not whole units of 256" in message
    wide = tiny.checkpoint("llama", hidden_size=256, intermediate_size=512, num_hidden_layers=1, head_dim=128)
    file = tiny.gguf_file(wide, Q4_K, kinds=MIX)
    steps = steps_of(3, num_steps=3)

    def run(rank: ThreadRank) -> list[torch.Tensor]:
        loaded = load(file.path, parallel=ParallelState(rank.rank, rank.size), communicator=rank)
        runner = Runner(loaded)
        return [runner.step(step) for step in steps]

    whole = Runner(load(file.path))
    first, second = on_ranks(2, run)
    for step, ours, theirs in zip(steps, first, second, strict=True):
        assert torch.equal(ours, theirs)
        expected = whole.step(step)
        assert_close(ours, expected, 3e-5 * expected.abs().max().item())


@pytest.mark.parametrize("kind", [*SCALES, "MXFP4"])
def test_random_blocks_for_benchmarks(kind: str) -> None:
    loaded = load(file_of(GGMLQuantizationType[kind]).path, load_format="dummy")
    logits = logits_of(loaded, random_tokens(9))
    assert logits.isfinite().all() and logits.std() > 0


def test_shapes_in_messages_count_numbers() -> None:
    file = file_of(Q4_K)
    header = read_gguf(file.path).header()
    tensors = [
        msgspec.structs.replace(each, shape=(256, each.shape[1] * 2), num_bytes=each.num_bytes)
        if each.name == "blk.0.ffn_gate.weight"
        else each
        for each in header.tensors
    ]
    message = refusal(file.path, gguf=msgspec.structs.replace(header, tensors=tensors))
    assert "has shape [256, 512], the model needs [512, 256]" in message
