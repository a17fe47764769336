"""GGUF files of models with experts: a tensor holds the same matrix of all experts of a layer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import msgspec
import pytest
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

import ops
from api.model.gguf_file import read_gguf
from executor.base import ModelError
from executor.gguf import hf_config_from_gguf
from executor.layers.moe import MoE
from tests import tiny
from tests.family import YARN
from tests.mixtures import MIXTURES
from tests.models.harness import assert_close, assert_independent_of_batch, load, logits_of, random_tokens
from tests.models.test_gguf import reference_logits

WIDE: dict[str, Any] = {"hidden_size": 256, "head_dim": 64, "moe_intermediate_size": 256, "num_hidden_layers": 2}
F32 = GGMLQuantizationType.F32
FACTOR = math.sqrt(1 + math.log(512 / 32) / math.log(32))
PHIMOE_ROPE: dict[str, Any] = {
    **MIXTURES["phimoe"].fields["rope_parameters"],
    "long_mscale": FACTOR,
    "short_mscale": FACTOR,
}
"""The converter computes the factor, as of other models of Phi."""
FAMILIES: dict[str, dict[str, Any]] = {
    # What files do not say is as llama.cpp knows it.
    "glm4_moe": {"n_group": 1, "topk_group": 1},
    "gpt_oss": {"layer_types": None, "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
    "mixtral": {"sliding_window": None},
    "olmoe": {"attention_bias": False, "clip_qkv": None},
    "phimoe": {"router_jitter_noise": 0.01, "sliding_window": None, "rope_parameters": PHIMOE_ROPE},
    "qwen3_moe": {"attention_bias": False, "mlp_only_layers": [], "use_sliding_window": False},
}


GROUPS: dict[str, Any] = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}


def in_memory(kind: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names and layouts of transformers' modules."""
    result = {}
    for name, weight in weights.items():
        if ".up_proj." in name and ".experts." in name:
            continue
        if ".gate_proj." in name and ".experts." in name:
            prefix, _, leaf = name.partition(".gate_proj.")
            up = weights[name.replace(".gate_proj.", ".up_proj.")]
            own = torch.stack([weight, up], 2).flatten(1, 2) if kind == "gpt_oss" else torch.cat([weight, up], 1)
            name, weight = f"{prefix}.gate_up_proj{'_bias' * (leaf == 'bias')}", own
            if kind == "gpt_oss" and leaf == "weight":
                weight = weight.transpose(1, 2)
        elif ".down_proj." in name and ".experts." in name:
            prefix, _, leaf = name.partition(".down_proj.")
            name = f"{prefix}.down_proj{'_bias' * (leaf == 'bias')}"
            weight = weight.transpose(1, 2) if kind == "gpt_oss" and leaf == "weight" else weight
        name = name.replace("block_sparse_moe", "mlp")
        result[name.replace(".gate.", ".router.") if kind == "phimoe" else name] = weight
    return result


@pytest.mark.parametrize("kind", FAMILIES)
def test_families(kind: str) -> None:
    folder = tiny.checkpoint(kind, **FAMILIES[kind])
    file = tiny.gguf_file(folder, GGMLQuantizationType.F32)
    token_ids = random_tokens(60)
    expected = reference_logits(folder, in_memory(kind, file.weights), token_ids)
    assert_close(logits_of(load(file.path), token_ids), expected)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("dots1", {"sliding_window": None, "layer_types": None}),
        (
            "dots1",
            {"sliding_window": None, "layer_types": None, "n_group": 1, "topk_group": 1, "attention_bias": False},
        ),
        ("ernie4_5_moe", {"moe_layer_end_index": -1}),
        ("ernie4_5_moe", {"moe_layer_end_index": -1, "moe_layer_interval": 2, "moe_num_shared_experts": 0}),
        ("lfm2_moe", {"conv_bias": False, "routed_scaling_factor": 1.0}),
        (
            "lfm2_moe",
            {"conv_bias": False, "routed_scaling_factor": 1.0, "use_expert_bias": False, "num_dense_layers": 2},
        ),
        ("minimax_m2", {}),
    ],
)
@pytest.mark.parametrize("type_name", ["F32", "Q8_0"])
def test_corrected_routers(kind: str, fields: dict[str, Any], type_name: str) -> None:
    """Files name the bias of the choice in one way, models in four."""
    wide: dict[str, Any] = {} if type_name == "F32" else {"moe_intermediate_size": 64}
    wide |= {"intermediate_size": 64} if wide and kind == "minimax_m2" else {}
    folder = tiny.checkpoint(kind, **fields, **wide, tied=kind == "lfm2_moe")
    file = tiny.gguf_file(folder, GGMLQuantizationType[type_name], kinds={"conv.conv": F32, "e_score": F32})
    token_ids = random_tokens(60)
    loaded = load(file.path)
    assert loaded.hf_config.architecture == load(folder).hf_config.architecture
    expected = load(folder) if type_name == "F32" else load(file.path, quantization="none")
    assert_close(logits_of(loaded, token_ids), logits_of(expected, token_ids))
    layers = [layer for layer in loaded.model.modules() if isinstance(layer, MoE)]
    weights = [weight for layer in layers for weight in (*layer.weights().gate_up, *layer.weights().down)]
    assert weights and all(isinstance(weight, ops.QuantizedWeight) == (type_name == "Q8_0") for weight in weights)


def test_the_factor_of_phi_is_that_of_the_released_model() -> None:
    header = read_gguf(tiny.gguf_file(tiny.checkpoint("phimoe", **FAMILIES["phimoe"]), F32).path).header()
    lengths = {"phimoe.context_length": 131072, "phimoe.rope.scaling.original_context_length": 4096}
    for changes, factor in ((lengths, 1.243163121016122), ({}, FACTOR)):
        config = hf_config_from_gguf(msgspec.structs.replace(header, metadata={**header.metadata, **changes}))
        assert config["rope_parameters"]["attention_factor"] == pytest.approx(factor, rel=1e-7)


@pytest.mark.parametrize("is_older", [False, True])
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("deepseek_v2", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7}}),
        ("deepseek_v2", {**GROUPS, "q_lora_rank": 24, "rope_parameters": {"rope_theta": 3000.0}}),
        ("deepseek_v3", {"attention_bias": False}),
    ],
)
def test_latents(kind: str, fields: dict[str, Any], is_older: bool) -> None:
    """Newer files have the matrices that follow latents apart, by head, those of keys transposed."""
    folder = tiny.checkpoint(kind, **fields, rms_norm_eps=1e-6)  # as llama.cpp knows that of latents
    file = tiny.gguf_file(folder, GGMLQuantizationType.F32, is_fused=is_older)
    token_ids = random_tokens(60)
    assert_close(logits_of(load(file.path), token_ids), logits_of(load(folder), token_ids))


@pytest.mark.parametrize("type_name", ["Q4_K", "Q6_K", "Q8_0"])
def test_blocks_stay_as_they_are(type_name: str) -> None:
    folder = tiny.checkpoint("qwen3_moe", **FAMILIES["qwen3_moe"], **WIDE)
    file = tiny.gguf_file(folder, GGMLQuantizationType[type_name])
    loaded, token_ids = load(file.path), random_tokens(40)
    expected = reference_logits(folder, in_memory("qwen3_moe", file.weights), token_ids)
    assert_close(logits_of(loaded, token_ids), expected, max(1e-4, 2e-5 * expected.abs().max().item()))
    formats: set[str] = set()
    for layer in loaded.model.modules():
        if isinstance(layer, MoE):
            for weight in (*layer.weights().gate_up, *layer.weights().down):
                assert isinstance(weight, ops.QuantizedWeight)
                formats |= {segment.encoding.format for segment in weight.segments}
    assert formats == {type_name}
    assert_independent_of_batch(load(file.path, dtype="bfloat16"))


def rewritten(path: Path, target: Path, change: Any) -> Path:
    """A copy of a file whose tensors ``change`` replaces: takes the reader's, yields names and arrays."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            array_type = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], array_type)
    for tensor in reader.tensors:
        for name, data in change(tensor.name, tensor.data):
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_tensors_of_older_and_of_later_files(tmp_path: Path) -> None:
    """One for each expert, and gate and up in one."""
    file = tiny.gguf_file(tiny.checkpoint("mixtral", **FAMILIES["mixtral"]), GGMLQuantizationType.F32)
    token_ids = random_tokens(20)
    expected = logits_of(load(file.path), token_ids)

    def older(name: str, data: Any) -> Any:
        if "_exps" not in name:
            return [(name, data)]
        return [(name.replace("_exps", f".{index}"), each) for index, each in enumerate(data)]

    assert torch.equal(logits_of(load(rewritten(file.path, tmp_path / "older.gguf", older)), token_ids), expected)
    ups = {tensor.name: tensor.data for tensor in gguf.GGUFReader(file.path).tensors if "ffn_up_exps" in tensor.name}

    def later(name: str, data: Any) -> Any:
        if "ffn_up_exps" in name:
            return []
        if "ffn_gate_exps" in name:
            both = torch.cat([torch.from_numpy(each.copy()) for each in (data, ups[name.replace("gate", "up")])], 1)
            return [(name.replace("gate", "gate_up"), both.numpy())]
        return [(name, data)]

    assert torch.equal(logits_of(load(rewritten(file.path, tmp_path / "later.gguf", later)), token_ids), expected)


def test_weights_that_a_file_has_twice(tmp_path: Path) -> None:
    """None of them takes the place of the other unnoticed."""
    file = tiny.gguf_file(tiny.checkpoint("mixtral", **FAMILIES["mixtral"]), GGMLQuantizationType.F32)

    def twice(name: str, data: Any) -> Any:
        yield name, data
        if name == "blk.0.ffn_gate_exps.weight":
            yield "blk.0.ffn_gate.1.weight", data[0]

    path = rewritten(file.path, tmp_path / "twice.gguf", twice)
    with pytest.raises(ModelError) as caught:
        load(path)
    assert "'blk.0.ffn_gate_exps.weight'" in str(caught.value) and "'blk.0.ffn_gate.1.weight'" in str(caught.value)


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    folder = tiny.checkpoint("glm4_moe", **FAMILIES["glm4_moe"])
    file = tiny.gguf_file(folder, GGMLQuantizationType.F32)
    token_ids = random_tokens(20)
    expected = logits_of(load(file.path), token_ids)

    def longer(name: str, data: Any) -> Any:
        yield name, data
        if name.startswith("blk.2."):
            yield name.replace("blk.2.", "blk.3."), data
        if name == "blk.2.attn_norm.weight":
            yield "blk.3.nextn.enorm.weight", data

    path = rewritten(file.path, tmp_path / "mtp.gguf", longer)
    header = read_gguf(path).header()
    fields = {**header.metadata, "glm4moe.block_count": 4, "glm4moe.nextn_predict_layers": 1}
    loaded = load(path, gguf=msgspec.structs.replace(header, metadata=fields))
    assert torch.equal(logits_of(loaded, token_ids), expected)


def test_experts_of_other_architectures_are_refused() -> None:
    file = tiny.gguf_file(tiny.checkpoint("qwen2"), GGMLQuantizationType.F32)
    header = read_gguf(file.path).header()
    header = msgspec.structs.replace(header, metadata={**header.metadata, "qwen2.expert_count": 8})
    with pytest.raises(ModelError, match="qwen2 models with experts are not supported yet in GGUF files"):
        hf_config_from_gguf(header)
