"""GGUF files: names, types, the order of rows, and what is refused."""

from __future__ import annotations

import functools
import json
import math
import shutil
import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from transformers import AutoConfig, AutoModelForCausalLM

from api.errors import ModelFileError
from api.model.gguf_file import read_gguf
from executor.base import ModelError
from executor.config import GGUFHeader, ModelConfig
from executor.gguf import check_size, hf_config_from_gguf
from executor.gguf_architectures import ARCHITECTURES
from executor.loader import load_model
from executor.parallel import ParallelState
from executor.supported import GGUF_ARCHITECTURES
from tests import tiny
from tests.families import FAMILIES
from tests.models.harness import CPU, assert_close, load, logits_of, random_tokens, refusal, split_shares

GGUF_TYPES = [
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS",
]  # fmt: skip


@functools.cache
def gguf_model(kind: str, type_name: str, tied: bool = False) -> tuple[Path, tiny.GGUFModel]:
    folder = tiny.checkpoint(kind, tied=tied, hidden_size=256, intermediate_size=256, num_hidden_layers=2)
    return folder, tiny.gguf_file(folder, GGMLQuantizationType[type_name])


def reference_logits(folder: Path, weights: dict[str, torch.Tensor], token_ids: list[int], **fields: Any) -> Any:
    """transformers' logits with the weights that a GGUF file stands for."""
    config = AutoConfig.from_pretrained(folder, **fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    weights = {name.replace("embed_out.", "lm_head."): weight for name, weight in weights.items()}  # GPT-NeoX
    result = model.load_state_dict(weights, strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= {"lm_head.weight"}
    model.tie_weights()
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0]


@pytest.mark.parametrize("type_name", GGUF_TYPES)
def test_gguf_types(type_name: str) -> None:
    folder, file = gguf_model("llama", type_name)
    token_ids = random_tokens(40)
    theirs = reference_logits(folder, file.weights, token_ids)
    # Random blocks make a model with large logits, which float32 knows less well.
    assert_close(logits_of(load(file.path), token_ids), theirs, max(1e-4, 2e-5 * theirs.abs().max().item()))


@pytest.mark.parametrize("type_name", ["F32", "Q8_0", "Q4_K"])
def test_gguf_weights_are_exact(type_name: str) -> None:
    _, file = gguf_model("llama", type_name)
    for dtype in ("float32", "bfloat16"):
        loaded = load(file.path, dtype=dtype, quantization="none")
        for name, tensor in split_shares(loaded).items():
            assert torch.equal(tensor, file.weights[name].to(loaded.dtype)), name


@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("qwen2", False), ("qwen3", True), ("qwen3", False)])
def test_gguf_architectures(kind: str, tied: bool) -> None:
    folder, file = gguf_model(kind, "Q8_0", tied)
    loaded = load(file.path, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert loaded.hf_config.architecture == json.loads((folder / "config.json").read_text())["architectures"][0]
    assert loaded.hf_config.tie_word_embeddings == tied
    token_ids = random_tokens(40)
    assert_close(logits_of(load(file.path), token_ids), reference_logits(folder, file.weights, token_ids))


@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
def test_gguf_of_gemma(kind: str) -> None:
    """Norms are stored with their offset; the pattern of layers and their angles are known, not stored."""
    base = {"rope_type": "default", "rope_theta": 10000.0}
    scaled = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
    gemma3: dict[str, Any] = {
        "layer_types": None,
        "rope_parameters": {"full_attention": scaled, "sliding_attention": base},
    }
    folder = tiny.checkpoint(
        kind,
        head_dim=32,
        query_pre_attn_scalar=32,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=7,
        **(gemma3 if kind == "gemma3" else {}),
    )
    file = tiny.gguf_file(folder, GGMLQuantizationType.Q8_0)
    token_ids = random_tokens(40)
    loaded = load(file.path)
    assert loaded.hf_config.architecture == json.loads((folder / "config.json").read_text())["architectures"][0]
    assert_close(logits_of(loaded, token_ids), reference_logits(folder, file.weights, token_ids), 2e-4)


GGUF_FAMILIES: dict[str, dict[str, Any]] = {
    # llama.cpp knows the layers of SmolLM3 that are not rotated.
    "smollm3": {"no_rope_layers": None, "num_hidden_layers": 4, "use_sliding_window": False},
    "phi3": {},
    "glm": {},
    "glm4": {},
    "granite": {},
    "olmo2": {},
    "olmo3": {},
    "ministral3": {"sliding_window": None},
    "exaone4": {},
    "seed_oss": {},
    "ernie4_5": {},
    "arcee": {},
    "cohere": {},
    "cohere2": {"layer_types": None, "num_hidden_layers": 4},
    "falcon": {},
    "gemma": {},
    "gemma4": {},
    "lfm2": {"conv_bias": False},
    "gpt2": {"scale_attn_by_inverse_layer_idx": False},
    "gpt_neox": {},
    "nemotron": {},
    "olmo": {},
    "phi": {"qk_layernorm": False},
    "stablelm": {},
    "starcoder2": {"sliding_window": None},
}


@pytest.mark.parametrize("kind", GGUF_FAMILIES)
def test_gguf_of_families(kind: str) -> None:
    folder = tiny.checkpoint(kind, **GGUF_FAMILIES[kind])
    file = tiny.gguf_file(folder, GGMLQuantizationType.F32)
    loaded = load(file.path)
    assert loaded.hf_config.architecture == json.loads((folder / "config.json").read_text())["architectures"][0]
    token_ids = random_tokens(100)
    expected = reference_logits(folder, file.weights, token_ids)
    assert_close(logits_of(loaded, token_ids), expected)


@pytest.mark.parametrize(
    ("kind", "variant"), [("falcon", "7b"), ("falcon", "11b"), ("gemma4", "no inputs of layers"), ("gemma4", "v")]
)
def test_gguf_of_variants(kind: str, variant: str) -> None:
    folder = tiny.checkpoint(kind, **FAMILIES[kind].variants[variant])
    file = tiny.gguf_file(folder, GGMLQuantizationType.F32)
    token_ids = random_tokens(60)
    assert_close(logits_of(load(file.path), token_ids), reference_logits(folder, file.weights, token_ids))


@pytest.mark.parametrize(
    ("kind", "options"), [("glm", {}), ("glm", {"attention_bias": False}), ("phi", {"qk_layernorm": False})]
)
def test_q_k_and_v_in_one_tensor(kind: str, options: dict[str, Any]) -> None:
    """As files made from checkpoints in ChatGLM's own format have them, and others if llama.cpp's converter is told."""
    folder = tiny.checkpoint(kind, **options)
    file = tiny.gguf_file(folder, GGMLQuantizationType.F32, is_fused=True)
    token_ids = random_tokens(60)
    assert_close(logits_of(load(file.path), token_ids), reference_logits(folder, file.weights, token_ids))


def test_gguf_of_lfm2_keeps_the_blocks_of_convolutions() -> None:
    folder = tiny.checkpoint(
        "lfm2", hidden_size=256, intermediate_size=96, block_auto_adjust_ff_dim=False, conv_bias=False
    )
    file = tiny.gguf_file(folder, GGMLQuantizationType.Q8_0, kinds={".conv.conv.": GGMLQuantizationType.F32})
    loaded = load(file.path)
    assert loaded.hf_config.quantization is not None
    types = loaded.hf_config.quantization["types"]
    assert {"model.layers.0.self_attn.in_proj", "model.layers.0.self_attn.out_proj"} <= types.keys()
    token_ids = random_tokens(60)
    assert_close(logits_of(loaded, token_ids), reference_logits(folder, file.weights, token_ids))


@pytest.mark.parametrize(("kind", "arch"), [("llama", "internlm2"), ("qwen2", "qwen2vl"), ("qwen3", "qwen3vl")])
def test_gguf_of_models_that_are_others_by_another_name(kind: str, arch: str) -> None:
    folder = tiny.checkpoint(kind)
    file = tiny.gguf_file(folder, GGMLQuantizationType.F32, arch=arch)
    token_ids = random_tokens(60)
    assert_close(logits_of(load(file.path), token_ids), reference_logits(folder, file.weights, token_ids))


def test_gguf_of_exaone_without_windows() -> None:
    folder = tiny.checkpoint("exaone4", **FAMILIES["exaone4"].variants["no windows"])
    file = tiny.gguf_file(folder, GGMLQuantizationType.F32)
    token_ids = random_tokens(60)
    assert_close(logits_of(load(file.path), token_ids), reference_logits(folder, file.weights, token_ids))


def test_gguf_of_granite_without_rotation_is_refused() -> None:
    file = tiny.gguf_file(tiny.checkpoint("granite"), GGMLQuantizationType.F32)
    header = read_gguf(file.path).header()
    metadata = {**header.metadata, "granite.rope.scaling.finetuned": False}
    message = refusal(file.path, gguf=msgspec.structs.replace(header, metadata=metadata))
    assert "without rotary embeddings are not supported yet" in message


@pytest.mark.parametrize("flags", [[True, False], "every"])
def test_gguf_with_a_wrong_pattern_is_refused(flags: Any) -> None:
    file = tiny.gguf_file(tiny.checkpoint("exaone4"), GGMLQuantizationType.F32)
    header = read_gguf(file.path).header()
    metadata = {**header.metadata, "exaone4.attention.sliding_window_pattern": flags}
    message = refusal(file.path, gguf=msgspec.structs.replace(header, metadata=metadata))
    assert "exaone4.attention.sliding_window_pattern must be" in message


def test_gguf_of_a_mistral_model_is_a_llama() -> None:
    folder = tiny.checkpoint("mistral")
    file = tiny.gguf_file(folder, GGMLQuantizationType.F32)
    loaded = load(file.path)
    assert loaded.hf_config.architecture == "LlamaForCausalLM"
    expected = reference_logits(folder, file.weights, random_tokens(20))  # shorter than the window of 24
    assert_close(logits_of(loaded, random_tokens(20)), expected)


def test_the_names_that_are_known_without_torch() -> None:
    assert sorted(ARCHITECTURES) == list(GGUF_ARCHITECTURES)


@pytest.mark.parametrize("given", [1, 3])
def test_a_split_model_is_the_whole(given: int) -> None:
    folder = tiny.checkpoint("llama")
    parts = tiny.split_gguf(folder, 3)
    whole, split = load(folder), load(parts[given - 1])
    assert torch.equal(logits_of(split, random_tokens(20)), logits_of(whole, random_tokens(20)))


def damaged_parts(folder: Path) -> list[Path]:
    folder.mkdir()
    return [folder / path.name for path in tiny.split_gguf(tiny.checkpoint("llama"), 3) if shutil.copy(path, folder)]


def test_damaged_split_models(tmp_path: Path) -> None:
    first, second, third = damaged_parts(tmp_path / "missing")
    third.unlink()
    with pytest.raises(ModelFileError, match=f"{third.name}: cannot be read: No such file"):
        read_gguf(first)
    first, second, third = damaged_parts(tmp_path / "twice")
    shutil.copy(second, third)
    with pytest.raises(ModelFileError, match=f"{third.name}: is not part 3 of 3"):
        read_gguf(first)
    first, second, third = damaged_parts(tmp_path / "renamed")
    alone = first.rename(first.with_name("model.gguf"))
    with pytest.raises(ModelFileError, match=r"split.count is 3, but the name says 1; .* must end in -00001-of-00003"):
        read_gguf(alone)
    first, second, third = damaged_parts(tmp_path / "short")
    header = read_gguf(first).header()
    third.write_bytes(third.read_bytes()[:-64])
    with pytest.raises(ModelError, match=f"{third.name}: tensor .* truncated"):
        load_model(ModelConfig(model=str(first), gguf=header), ParallelState(), CPU, None, lambda *_: None)


def test_gguf_rope_factors() -> None:
    folder = tiny.checkpoint("llama")
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    factors = []
    for i in range(8):  # as convert_hf_to_gguf computes them
        wavelength = 2 * math.pi * 10000.0 ** (2 * i / 16)
        smooth = (64 / wavelength - 1.0) / (4.0 - 1.0)
        factors.append(1.0 if wavelength < 16 else 8.0 if wavelength > 64 else 1 / ((1 - smooth) / 8.0 + smooth))
    file = tiny.gguf_file(folder, GGMLQuantizationType.F32, rope_factors=factors)
    token_ids = random_tokens(200)
    expected = reference_logits(folder, file.weights, token_ids, rope_parameters=rope)
    assert_close(logits_of(load(file.path), token_ids), expected)


def gguf_header(**metadata: Any) -> GGUFHeader:
    _, file = gguf_model("llama", "F32")
    header = read_gguf(file.path).header()
    return msgspec.structs.replace(header, metadata={**header.metadata, **metadata})


def test_gguf_configuration() -> None:
    config = hf_config_from_gguf(gguf_header())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["vocab_size"] == tiny.VOCAB_SIZE
    assert config["hidden_size"] == 256
    assert config["head_dim"] == 64
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    yarn = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 128,
        "llama.rope.scaling.attn_factor": 1.0,
    }
    rope = hf_config_from_gguf(gguf_header(**yarn))["rope_parameters"]
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 4.0, 128)
    assert rope["attention_factor"] == pytest.approx(1 + 0.1 * math.log(4))


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (
            {"general.architecture": "mamba"},
            "architecture 'mamba' is not supported yet in GGUF files; choose a file of another one (",
        ),
        ({"llama.block_count": "many"}, "llama.block_count must be"),
        ({"llama.context_length": 0}, "llama.context_length must be at least 1"),
        ({"llama.expert_count": 8}, "llama.expert_used_count is missing"),
        ({"llama.attention.head_count_kv": [2]}, "llama.attention.head_count_kv must be one number, or one for each"),
    ],
)
def test_gguf_header_that_is_refused(metadata: dict[str, Any], expected: str) -> None:
    with pytest.raises(ModelError, match="header") as caught:
        hf_config_from_gguf(gguf_header(**metadata))
    assert expected in str(caught.value)


def gguf_refusal(path: Path, header: GGUFHeader) -> str:
    message = refusal(path, gguf=header)
    assert message.startswith(str(path))
    return message


def one_tensor(ggml_type: int, columns: int) -> bytes:
    """A file of one tensor [3, columns], with more than enough data."""
    head = struct.pack("<4sIQQQ1sIQQIQ", b"GGUF", 3, 1, 0, 1, b"t", 2, columns, 3, ggml_type, 0)
    return head + bytes(-len(head) % 32) + bytes(3 * 8 * columns)


@pytest.mark.parametrize("kind", GGMLQuantizationType)
def test_reader_and_loader_agree_on_sizes(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    block, block_bytes = GGML_QUANT_SIZES[kind]
    path = tmp_path / "one.gguf"
    path.write_bytes(one_tensor(kind, 2 * block))
    (tensor,) = read_gguf(path).tensors
    assert (tensor.shape, tensor.num_bytes) == ((3, 2 * block), 6 * block_bytes)
    check_size(tensor, "one")
    for other in (-1, 1):
        with pytest.raises(ModelError, match="corrupt header"):
            check_size(msgspec.structs.replace(tensor, num_bytes=tensor.num_bytes + other), "one")
    if block > 1:
        path.write_bytes(one_tensor(kind, block + 1))
        with pytest.raises(ModelFileError, match="not whole"):
            read_gguf(path)
        with pytest.raises(ModelError, match="corrupt header"):
            check_size(msgspec.structs.replace(tensor, shape=(3, block + 1)), "one")


def test_gguf_file_that_is_refused(tmp_path: Path) -> None:
    _, file = gguf_model("llama", "Q8_0")
    header = read_gguf(file.path).header()
    name = "blk.1.attn_k.weight"
    entry = next(tensor for tensor in header.tensors if tensor.name == name)

    def changed(**fields: Any) -> GGUFHeader:
        others = [tensor for tensor in header.tensors if tensor.name != name]
        return msgspec.structs.replace(header, tensors=[*others, msgspec.structs.replace(entry, **fields)])

    def without() -> GGUFHeader:
        return msgspec.structs.replace(header, tensors=[t for t in header.tensors if t.name != name])

    assert f"tensor {name!r} is missing" in gguf_refusal(file.path, without())
    assert "tensor 'blk.7.attn_k.weight' is not part" in gguf_refusal(file.path, changed(name="blk.7.attn_k.weight"))
    assert f"tensor {name!r} has an unknown type (99)" in gguf_refusal(file.path, changed(ggml_type=99))
    assert f"tensor {name!r}: corrupt header" in gguf_refusal(file.path, changed(num_bytes=entry.num_bytes - 1))
    integers = changed(ggml_type=GGMLQuantizationType.I8, num_bytes=math.prod(entry.shape))
    assert f"tensor {name!r} has type I8, which is not supported" in gguf_refusal(file.path, integers)
    shape = (entry.shape[0] // 2, entry.shape[1] * 2)
    assert f"tensor {name!r} has shape {list(shape)}, the model needs" in gguf_refusal(file.path, changed(shape=shape))
    truncated = tmp_path / "truncated.gguf"
    truncated.write_bytes(file.path.read_bytes()[:-200])
    assert "truncated" in gguf_refusal(truncated, header)
    with pytest.raises(ModelError, match="not a GGUF file"):
        load_model(ModelConfig(model=str(file.path)), ParallelState(), CPU, None, lambda *_: None)
