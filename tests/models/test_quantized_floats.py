"""Checkpoints in FP8 and FP4, of several writers, and models quantised to FP8 while they are loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from executor.parallel import ParallelState
from executor.supported import check_supported
from tests import tiny
from tests.models.harness import assert_close, load, logits_of, random_tokens, refusal
from tests.models.quantized import FIELDS, Tensors, check, int8_numbers, written
from tests.thread_ranks import ThreadRank, on_ranks

E4M3 = torch.float8_e4m3fn
E2M1 = torch.tensor([sign * each for sign in (1, -1) for each in (0, 0.5, 1, 1.5, 2, 3, 4, 6)])


def in_fp8(weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and what they stand for. ``scales`` broadcast to the weight."""
    codes = (weight / scales).to(E4M3)
    return codes, codes.float() * scales


def fp8_scales(weight: Tensor, strategy: str, size: int = 128) -> tuple[Tensor, Tensor]:
    """Scales as they are stored, and one for each number."""
    if strategy == "tensor":
        scales = weight.abs().max() / 448
        return scales, scales
    if strategy == "channel":
        scales = weight.abs().amax(1, keepdim=True) / 448
        return scales, scales
    rows, columns = weight.shape
    padded = torch.zeros(-(-rows // size) * size, -(-columns // size) * size)
    padded[:rows, :columns] = weight
    scales = padded.unflatten(0, (-1, size)).unflatten(2, (-1, size)).abs().amax((1, 3)) / 448
    return scales, scales.repeat_interleave(size, 0)[:rows].repeat_interleave(size, 1)[:, :columns]


def fp8_module(weight: Tensor, config: Mapping[str, Any], order: Tensor) -> tuple[Tensors, Tensor]:
    strategy = "block" if config.get("weight_block_size") else config.get("strategy", "tensor")
    scales, each = fp8_scales(weight, strategy, (config.get("weight_block_size") or [0])[0])
    codes, numbers = in_fp8(weight, each)
    name = "weight_scale_inv" if strategy == "block" else "weight_scale"
    tensors = {"weight": codes, name: scales}
    if config["activation_scheme"] == "static":
        tensors["input_scale"] = torch.tensor(0.1)
    return tensors, numbers


def fp8(**fields: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "activation_scheme": "dynamic", **fields}


@pytest.mark.parametrize(
    "config",
    [
        fp8(activation_scheme="static"),
        fp8(strategy="channel", quant_method="fbgemm_fp8"),
        fp8(weight_block_size=[128, 128]),
    ],
    ids=["tensor", "row", "block"],
)
def test_fp8(tmp_path: Path, config: dict[str, Any]) -> None:
    check(*written(tmp_path, fp8_module, config, attention_bias=True))


def as_exponents(folder: Path) -> None:
    """Stores the scales, which are powers of two, in F8_E8M0."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("weight_scale"):
            tensors[name] = tensor.view(torch.float8_e8m0fnu)
        elif name.endswith("weight_scale_inv"):
            tensors[name] = tensor.to(torch.float8_e8m0fnu)
    save_file(tensors, folder / "model.safetensors")


def test_scales_that_are_powers_of_two(tmp_path: Path) -> None:
    def module(weight: Tensor, config: Mapping[str, Any], order: Tensor) -> tuple[Tensors, Tensor]:
        powers = fp8_scales(weight, "block")[0].log2().ceil().exp2()
        each = powers.repeat_interleave(128, 0).repeat_interleave(128, 1)[: len(weight), : weight.shape[1]]
        codes, numbers = in_fp8(weight, each)
        return {"weight": codes, "weight_scale_inv": powers}, numbers

    for name, config, make in (
        ("fp8", fp8(weight_block_size=[128, 128]), module),
        ("mxfp4", FLOATS["mxfp4"], compressed_module),
    ):
        (tmp_path / name).mkdir()
        folder, plain = written(tmp_path / name, make, config)
        as_exponents(folder)
        check(folder, plain)


def test_blocks_that_end_early(tmp_path: Path) -> None:
    config = fp8(weight_block_size=[128, 128])
    check(*written(tmp_path, fp8_module, config, hidden_size=96, intermediate_size=224))


def test_fp8_on_two_ranks(tmp_path: Path) -> None:
    folder, plain = written(tmp_path, fp8_module, fp8(weight_block_size=[32, 32]))
    tokens = random_tokens(20)

    def run(rank: ThreadRank) -> Tensor:
        return logits_of(load(folder, parallel=ParallelState(rank.rank, rank.size), communicator=rank), tokens)

    first, second = on_ranks(2, run)
    assert torch.equal(first, second)
    assert_close(first, logits_of(load(plain), tokens))


def test_blocks_of_deepseek(tmp_path: Path) -> None:
    """Experts keep their codes; what latent attention takes apart is dequantised."""
    exceptions = [f"model.layers.{layer}.self_attn.kv_a_proj_with_mqa" for layer in range(2)]
    config = fp8(weight_block_size=[32, 32], ignored_layers=exceptions)
    check(*written(tmp_path, fp8_module, config, family="deepseek_v3"))


def test_modules_that_are_not_quantised(tmp_path: Path) -> None:
    def skips(name: str) -> bool:
        return "layers.1.self_attn.k_proj" in name or "layers.0.mlp" in name

    exceptions = ["lm_head", "model.layers.1.self_attn.k_proj", "model.layers.0.mlp"]
    check(*written(tmp_path, fp8_module, fp8(ignored_layers=exceptions), skips))


# ---------------------------------------------------------------------------------------------------------
# compressed-tensors and Model Optimizer


def compressed(form: str, inputs: dict[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"type": "float", "symmetric": True, **weights}}
    return {
        "quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"],
        "config_groups": {"group_0": {**group, "input_activations": inputs}},
        "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False},
    }  # fmt: skip


DYNAMIC = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
FLOATS = {
    "tensor": compressed("float-quantized", DYNAMIC, num_bits=8, strategy="tensor"),
    "channel": compressed("float-quantized", DYNAMIC, num_bits=8, strategy="channel"),
    "block": compressed("float-quantized", DYNAMIC, num_bits=8, strategy="block", block_structure=[128, 128]),
    "mxfp4": compressed("mxfp4-pack-quantized", num_bits=4, strategy="group", group_size=32),
    "nvfp4": compressed("nvfp4-pack-quantized", num_bits=4, strategy="tensor_group", group_size=16),
}


def nearest_e2m1(weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Packed codes, and what they stand for."""
    codes = (weight[..., None] / scales[..., None] - E2M1).abs().argmin(-1)
    return (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8), E2M1[codes] * scales


def nvfp4(weight: Tensor, *, divides: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Packed codes, scales of groups, that of all, which multiplies or divides them, and what this stands for."""
    whole = weight.abs().max() / (6 * 448)
    scales = (weight.unflatten(1, (-1, 16)).abs().amax(-1) / 6 / whole).to(E4M3)
    inverse = 1 / whole
    each = scales.float() / inverse if divides else scales.float() * whole
    codes, numbers = nearest_e2m1(weight, each.repeat_interleave(16, 1))
    return codes, scales, inverse if divides else whole, numbers


def compressed_module(weight: Tensor, config: Mapping[str, Any], order: Tensor) -> tuple[Tensors, Tensor]:
    scheme = config["config_groups"]["group_0"]["weights"]
    if config["format"] == "float-quantized":
        scales, each = fp8_scales(weight, scheme["strategy"])
        codes, numbers = in_fp8(weight, each)
        return {"weight": codes, "weight_scale": scales.view(-1) if scales.dim() == 0 else scales}, numbers
    if config["format"] == "mxfp4-pack-quantized":
        exponents = weight.unflatten(1, (-1, 32)).abs().amax(-1).log2().floor() - 2
        codes, numbers = nearest_e2m1(weight, exponents.exp2().repeat_interleave(32, 1))
        return {"weight_packed": codes, "weight_scale": (exponents + 127).to(torch.uint8)}, numbers
    codes, scales, whole, numbers = nvfp4(weight, divides=True)
    return {"weight_packed": codes, "weight_scale": scales, "weight_global_scale": whole.view(1)}, numbers


@pytest.mark.parametrize("name", FLOATS)
def test_compressed_tensors(tmp_path: Path, name: str) -> None:
    folder, plain = written(tmp_path, compressed_module, FLOATS[name])
    tensors = load_file(folder / "model.safetensors")
    scales = {f"model.layers.0.self_attn.{name}_scale": torch.ones(1) for name in "kv"}
    save_file({**tensors, **scales}, folder / "model.safetensors")
    check(folder, plain)


@pytest.mark.parametrize("names", [("k_scale", "v_scale"), ("k_proj.output_scale", "v_proj.v_scale")], ids=str)
def test_scales_of_the_kv_cache(tmp_path: Path, names: tuple[str, str]) -> None:
    """Of numbers that exceed the range of FP8 by far, or are lost in its steps, without the scales."""
    folder, plain = written(tmp_path, compressed_module, FLOATS["channel"])
    for path in (folder, plain):
        tensors = load_file(path / "model.safetensors")
        for layer, size in enumerate((2.0**-14, 2.0**12)):
            attention = f"model.layers.{layer}.self_attn"
            leaf = "weight" if path == plain else "weight_scale"
            tensors[f"{attention}.v_proj.{leaf}"] *= size
            if path == folder:
                scales = dict(zip(names, (torch.tensor([0.5]), torch.tensor(size)), strict=True))
                tensors |= {f"{attention}.{name}": scale for name, scale in scales.items()}
        save_file(tensors, path / "model.safetensors")
    tokens = random_tokens(40)
    expected = logits_of(load(plain), tokens)
    assert_close(logits_of(load(folder), tokens), expected)
    for captured in (False, True):
        loaded = load(folder, kv_cache_dtype="fp8")
        found = [(layer.shape.k_scale, layer.shape.v_scale) for layer in loaded.model.attention_layers()]
        assert found == [(0.5, 2**-14), (0.5, 2**12)]
        drift = (logits_of(loaded, tokens, captured=captured) - expected).std() / expected.std()
        assert 1e-4 < drift < 0.1
    for cache in ("int8", "fp8_e5m2"):  # which have none
        load(folder, kv_cache_dtype=cache)


def test_scales_of_a_kv_cache_that_are_refused(tmp_path: Path) -> None:
    folder, _ = written(tmp_path, compressed_module, FLOATS["channel"])
    tensors = load_file(folder / "model.safetensors")
    for scale, message in ((torch.ones(2), "for each head"), (torch.zeros(1), "is 0.0, no scale")):
        save_file({**tensors, "model.layers.0.self_attn.k_scale": scale}, folder / "model.safetensors")
        load(folder)
        assert message in refusal(folder, kv_cache_dtype="fp8")


def test_output_layers(tmp_path: Path) -> None:
    check(*written(tmp_path, compressed_module, {**FLOATS["channel"], "ignore": []}, has_head=True))


def modelopt_module(weight: Tensor, config: Mapping[str, Any], order: Tensor) -> tuple[Tensors, Tensor]:
    if config["quant_algo"] == "FP8":
        scales, each = fp8_scales(weight, "tensor")
        codes, numbers = in_fp8(weight, each)
        return {"weight": codes, "weight_scale": scales, "input_scale": torch.tensor(1.0)}, numbers
    codes, scales, whole, numbers = nvfp4(weight, divides=False)
    return {"weight": codes, "weight_scale": scales, "weight_scale_2": whole, "input_scale": torch.ones(())}, numbers


@pytest.mark.parametrize("algorithm", ["FP8", "NVFP4"])
@pytest.mark.parametrize("separate", [False, True], ids=["config.json", "hf_quant_config.json"])
def test_model_optimizer(tmp_path: Path, algorithm: str, separate: bool) -> None:
    exceptions = ["lm_head", "model.layers.0*", "model.layers.1.mlp"]
    config = {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": exceptions}
    folder, plain = written(
        tmp_path, modelopt_module, config, lambda name: "layers.0" in name or "layers.1.mlp" in name
    )
    if separate:
        own = {"quant_algo": algorithm, "kv_cache_quant_algo": "FP8", "exclude_modules": exceptions}
        (folder / "hf_quant_config.json").write_text(json.dumps({"producer": {}, "quantization": own}))
        tiny.edit_json(folder / "config.json", lambda values: values.pop("quantization_config"))
        check_supported(json.loads((folder / "config.json").read_text()), "modelopt")
    check(folder, plain)


# ---------------------------------------------------------------------------------------------------------
# quantised while they are loaded


def test_fp8_at_load(tmp_path: Path) -> None:
    def numbers(weight: Tensor, config: Mapping[str, Any], order: Tensor) -> tuple[Tensors, Tensor]:
        _, each = fp8_scales(weight, "channel")
        return {"weight": weight}, in_fp8(weight, each)[1]

    folder, plain = written(tmp_path, numbers, {})
    tiny.edit_json(folder / "config.json", lambda values: values.pop("quantization_config"))
    tensors = load_file(plain / "model.safetensors")
    tables = {name: int8_numbers(tensors[name]) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    save_file({**tensors, **tables}, plain / "model.safetensors")
    tokens = random_tokens(20)
    loaded = load(folder, quantization="fp8")
    assert_close(logits_of(loaded, tokens), logits_of(load(plain), tokens))
    assert loaded.weight_bytes < 0.3 * load(folder).weight_bytes
    logits = logits_of(load(folder, quantization="fp8", load_format="dummy"), tokens)
    assert logits.isfinite().all() and logits.std() > 0


# ---------------------------------------------------------------------------------------------------------
# what is refused


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (fp8(activation_scheme="none"), "activation_scheme must be dynamic or static, not 'none'"),
        (fp8(weight_block_size=[128]), "weight_block_size must be the rows and columns of a block, the latter a"),
        (fp8(weight_block_size=[128, 48]), "the latter a multiple of 32, not [128, 48]"),
        (fp8(fmt="e5m2"), "fmt must be e4m3, not 'e5m2'"),
        (fp8(modules_to_convert=["model.embed_tokens"]), "modules_to_convert is not supported yet"),
        (compressed("float-quantized", num_bits=4), "the format float-quantized must have 8 bits, not 4"),
        (compressed("float-quantized", num_bits=8, strategy="group", group_size=64), "the strategy 'group' of FP8"),
        (compressed("float-quantized", num_bits=8, strategy="block"), "block_structure must be the rows and columns"),
        (compressed("mxfp4-pack-quantized", num_bits=4, group_size=16), "must have 4 bits in groups of 32"),
        (compressed("nvfp4-pack-quantized", num_bits=8, group_size=16), "must have 4 bits in groups of 16"),
        (compressed("pack-quantized", num_bits=8), "weights of type 'float' do not have the format 'pack-quantized'"),
        (compressed("mxfp8-quantized", num_bits=8), "the format 'mxfp8-quantized' is not supported yet; use pack-"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "quant_algo 'W4A8_AWQ' is not supported yet; use"),
        ({"quant_method": "modelopt"}, "quant_algo"),
        ({"quant_method": "quip"}, "weights quantised with 'quip' are not supported yet; serve the unquantised"),
    ],
)
def test_configurations_that_are_refused(tmp_path: Path, config: dict[str, Any], expected: str) -> None:
    folder = tiny.copy_of(tiny.checkpoint("llama"), tmp_path / "model")
    tiny.edit_json(folder / "config.json", lambda values: values.update(quantization_config=config))
    assert expected in refusal(folder)


@pytest.mark.parametrize(
    ("content", "expected"), [("{", "hf_quant_config.json: "), ("[]", "hf_quant_config.json: has no object named")]
)
def test_a_damaged_file_of_model_optimizer(tmp_path: Path, content: str, expected: str) -> None:
    folder = tiny.copy_of(tiny.checkpoint("llama"), tmp_path / "model")
    (folder / "hf_quant_config.json").write_text(content)
    assert expected in refusal(folder)


def test_scales_that_do_not_fit(tmp_path: Path) -> None:
    folder, _ = written(tmp_path, fp8_module, fp8(weight_block_size=[128, 128]), **{**FIELDS, "hidden_size": 256})
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight_scale_inv"
    save_file({**tensors, name: torch.ones(3, 2)}, folder / "model.safetensors")
    assert f"tensor '{name}' has shape [3, 2], the model needs [2, 2]; weights and configuration" in refusal(folder)
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    assert f"tensor '{name}' is missing" in refusal(folder)


def test_weights_that_are_not_quantised(tmp_path: Path) -> None:
    folder = tiny.copy_of(tiny.checkpoint("llama", **FIELDS), tmp_path / "model")
    tiny.edit_json(folder / "config.json", lambda values: values.update(quantization_config=fp8()))
    assert "q_proj.weight_scale' is missing; weights and configuration do not fit" in refusal(folder)
