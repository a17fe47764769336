"""Quantised checkpoints: their logits are those of the numbers that they stand for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file
from torch import Tensor

import ops
from executor.base import ModelError
from executor.imatrix import load as load_plain
from executor.imatrix import measure
from executor.layers.parameter import Part, Parts
from executor.parallel import ParallelState
from executor.quantization.at_load import QuantizingWeights
from executor.quantization.compressed_tensors import PackedCodes
from executor.quantization.packed import PackedWeights
from executor.quantization.unquantized import PlainLinear
from executor.supported import check_supported
from tests import tiny
from tests.models.harness import assert_close, load, logits_of, random_tokens, refusal
from tests.models.quantized import FIELDS, Tensors, check, int8_numbers, written
from tests.thread_ranks import ThreadRank, on_ranks


def words_of(numbers: Tensor, bits: int) -> Tensor:
    """int32 [words, columns]: the numbers [rows, columns] of each column as a stream of bits, the lowest first."""
    rows, columns = numbers.shape
    words = torch.zeros(-(-rows * bits // 32), columns, dtype=torch.int64)
    for row in range(rows):
        for bit in range(bits):
            word, place = divmod(row * bits + bit, 32)
            words[word] |= (numbers[row].long() >> bit & 1) << place
    return words.to(torch.uint32).view(torch.int32)


def quantized(weight: Tensor, bits: int, group_of: Tensor, *, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [columns, rows], zero points and float16 scales [groups, rows] of a weight [rows, columns]."""
    most = (1 << bits) - 1
    zeros, scales = [], []
    inputs = weight.t()
    for group in range(int(group_of.max()) + 1):
        part = inputs[group_of == group]
        low, high = part.amin(0).clamp(max=0), part.amax(0).clamp(min=0)
        if symmetric:
            scales.append((2 * part.abs().amax(0) / most).half())
            zeros.append(torch.full_like(low, 1 << bits - 1))
        else:
            scales.append(((high - low) / most).half())
            zeros.append((-low / scales[-1].float()).round().clamp(0, most))
    result = torch.empty(inputs.shape, dtype=torch.int64)
    for group, (scale, zero) in enumerate(zip(scales, zeros, strict=True)):
        here = group_of == group
        result[here] = (inputs[here] / scale.float() + zero).round().clamp(0, most).long()
    return result, torch.stack(zeros).long(), torch.stack(scales)


def meaning(codes: Tensor, zeros: Tensor, scales: Tensor, group_of: Tensor) -> Tensor:
    numbers: Tensor = (codes - zeros[group_of]) * scales.float()[group_of]
    return numbers.t().contiguous()


def gptq_module(weight: Tensor, config: Mapping[str, Any], order: Tensor) -> tuple[Tensors, Tensor]:
    """The tensors of a module, and the weight that they stand for."""
    bits, size = config["bits"], config["group_size"]
    columns = weight.shape[1]
    size = columns if size == -1 else size
    group_of = torch.arange(columns)[order.argsort()] // size if config["desc_act"] else torch.arange(columns) // size
    codes, zeros, scales = quantized(weight, bits, group_of, symmetric=config["sym"])
    words = words_of(zeros.t(), bits).t().contiguous()
    if config.get("checkpoint_format") != "gptq_v2":
        if bits == 3:
            words = words_of((zeros.t() - 1) & 7, bits).t().contiguous()
        else:  # from whole words, as GPTQModel does
            words = words - {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}[bits]
    tensors = {"qweight": words_of(codes, bits), "qzeros": words, "scales": scales, "g_idx": group_of.int()}
    return tensors, meaning(codes, zeros, scales, group_of)


def awq_module(weight: Tensor, config: Mapping[str, Any], order: Tensor) -> tuple[Tensors, Tensor]:
    group_of = torch.arange(weight.shape[1]) // config["group_size"]
    codes, zeros, scales = quantized(weight, 4, group_of, symmetric=False)

    def words(numbers: Tensor) -> Tensor:
        eights = numbers.unflatten(1, (-1, 8))[:, :, [0, 2, 4, 6, 1, 3, 5, 7]]
        result = torch.stack([eights[:, :, place] << 4 * place for place in range(8)]).sum(0)
        return result.to(torch.uint32).view(torch.int32)

    return {"qweight": words(codes), "qzeros": words(zeros), "scales": scales}, meaning(codes, zeros, scales, group_of)


def gptq(**fields: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False, **fields}


GPTQ: dict[str, dict[str, Any]] = {
    "4 bits": gptq(),
    "symmetric": gptq(sym=True),
    "version 2": gptq(checkpoint_format="gptq_v2"),
    "8 bits": gptq(bits=8, sym=True, group_size=64),
    "8 bits with zero points": gptq(bits=8),
    "2 bits": gptq(bits=2),
    "3 bits": gptq(bits=3, sym=True),
    "3 bits with zero points": gptq(bits=3),
    "rows": gptq(group_size=-1),
    "order": gptq(desc_act=True),
    "order of rows": gptq(desc_act=True, group_size=-1),
    "small groups": gptq(group_size=16),
}


@pytest.mark.parametrize("name", GPTQ)
def test_gptq(tmp_path: Path, name: str) -> None:
    check(*written(tmp_path, gptq_module, GPTQ[name], attention_bias=True))


def test_auto_round_leaves_out_the_groups_of_inputs(tmp_path: Path) -> None:
    def module(weight: Tensor, config: Mapping[str, Any], order: Tensor) -> tuple[Tensors, Tensor]:
        tensors, numbers = gptq_module(weight, config, order)
        return {name: tensor for name, tensor in tensors.items() if name != "g_idx"}, numbers

    exception = "model.layers.0.self_attn.o_proj"
    config = gptq(
        quant_method="auto-round", packing_format="auto_round:auto_gptq", extra_config={exception: {"bits": 16}}
    )
    check(*written(tmp_path, module, config, lambda name: name == exception))


def test_awq(tmp_path: Path) -> None:
    check(*written(tmp_path, awq_module, {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}))


# ---------------------------------------------------------------------------------------------------------
# quantised while they are loaded


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_int8(tmp_path: Path, tied: bool, dtype: str) -> None:
    folder = tiny.checkpoint("llama", **FIELDS, tied=tied, dtype=dtype)
    plain = tiny.copy_of(tiny.checkpoint("llama", **FIELDS, tied=tied), tmp_path / "plain")
    numbers = {
        name: int8_numbers(tensor.float()) if tensor.dim() == 2 else tensor.float()
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(numbers, plain / "model.safetensors")
    tokens = random_tokens(40)
    expected = logits_of(load(plain), tokens)
    loaded = load(folder, quantization="int8")
    assert_close(logits_of(loaded, tokens), expected)
    assert loaded.weight_bytes < 0.56 * load(folder, dtype="bfloat16").weight_bytes
    rounded = load(folder, quantization="int8", dtype="bfloat16", quantized_activations="int8")
    assert (logits_of(rounded, tokens, captured=True) - expected).std() < 0.1 * expected.std()


def best_int4(groups: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and minimums of [rows, groups, 32]."""
    count, columns = groups.shape[1], groups.shape[1] * 32
    weights = None if importance is None else importance.flatten()
    rows = ops.quantize_groups(groups.flatten(1), 4, weights)
    scales, minimums = rows[:, columns:].contiguous().view(torch.float16).split(count, dim=1)
    return rows[:, :columns].unflatten(1, (count, 32)), scales, minimums


def error_of(codes: Tensor, scales: Tensor, minimums: Tensor, groups: Tensor) -> float:
    numbers = scales.float()[..., None] * codes.float() + minimums.float()[..., None]
    return float((numbers - groups).square().mean())


def test_int4_errs_less_than_rounding_to_the_nearest() -> None:
    groups = torch.randn(64, 8, 32, generator=torch.Generator().manual_seed(0)) * 0.02
    groups[0, 0], groups[1, 1] = 0, 0.01
    low, high = groups.amin(-1), groups.amax(-1)
    scales = (high - low) / 15
    codes = ((groups - low[..., None]) / scales.clamp(min=1e-9)[..., None]).round()
    best = best_int4(groups)
    assert best[0].max() <= 15
    assert error_of(*best, groups) < 0.94 * error_of(codes, scales, low, groups)
    codes, scales, minimums = best_int4(groups[:2, :2])
    assert error_of(codes[0, 0], scales[0, 0], minimums[0, 0], groups[0, 0]) == 0
    assert error_of(codes[1, 1], scales[1, 1], minimums[1, 1], groups[1, 1]) < 1e-10


def test_int4(tmp_path: Path) -> None:
    folder = tiny.checkpoint("llama", **FIELDS, tied=True)
    loaded = load(folder, quantization="int4")
    plain = load(folder)
    drift = (logits_of(loaded, random_tokens(40)) - (expected := logits_of(plain, random_tokens(40)))).std()
    assert 0 < drift < 0.4 * expected.std()
    assert torch.equal(logits_of(loaded, random_tokens(40), captured=True), logits_of(loaded, random_tokens(40)))
    assert loaded.weight_bytes < load(folder, quantization="int8").weight_bytes < plain.weight_bytes / 3


def test_int4_with_an_importance_matrix(tmp_path: Path) -> None:
    folder = tiny.checkpoint("llama", **FIELDS, tied=True)
    model = load_plain(folder, "float32")
    inputs: list[Tensor] = []
    gate = model.get_submodule("model.layers.1.mlp.up_proj")
    gate.register_forward_hook(lambda _, given, result: inputs.append(given[0].flatten(0, -2)))
    with torch.no_grad():
        found = measure(model, [random_tokens(9), random_tokens(17)])
    assert_close(found["model.layers.1.mlp.up_proj"], torch.cat(inputs).square().mean(0))
    file = tmp_path / "imatrix.safetensors"
    save_file(found, file)
    tokens = random_tokens(40)
    plain = logits_of(load(folder, quantization="int4"), tokens)
    int4 = logits_of(load(folder, quantization="int4", imatrix=str(file)), tokens)
    expected = logits_of(load(folder), tokens)
    assert not torch.equal(plain, int4) and (int4 - expected).std() < 0.4 * expected.std()
    refused = refusal(folder, quantization="int8", imatrix=str(file))
    assert refused == "--imatrix is used by --quantization int4 alone; leave it out"
    save_file({"model.layers.0.self_attn.q_proj": torch.ones(5)}, file)
    assert "--imatrix has 5 columns, not" in refusal(folder, quantization="int4", imatrix=str(file))
    save_file({"x": torch.ones(5)}, file)
    assert "has no model.layers.0.self_attn.q_proj; make it from" in refusal(
        folder, quantization="int4", imatrix=str(file)
    )
    file.write_bytes(b"x")
    assert "octavo imatrix makes such files" in refusal(folder, quantization="int4", imatrix=str(file))


def test_an_importance_matrix_has_the_names_of_the_checkpoint(tmp_path: Path) -> None:
    folder = tiny.checkpoint("qwen3_5", linear_key_head_dim=32, linear_value_head_dim=32)
    found = measure(load_plain(folder, "float32"), [random_tokens(20)])
    assert "model.layers.0.linear_attn.out_proj" in found
    save_file(found, tmp_path / "imatrix.safetensors")
    logits = logits_of(
        load(folder, quantization="int4", imatrix=str(tmp_path / "imatrix.safetensors")), random_tokens(9)
    )
    assert logits.isfinite().all()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_int4_measures_the_model_on_a_text_first(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {**FIELDS, "num_hidden_layers": 3}
    folder = tiny.checkpoint(family, **fields, tied=True)
    tokens = random_tokens(40)
    expected = measure(load_plain(folder, "float32"), [tokens])
    found: list[Tensor] = []
    calibrated = QuantizingWeights.calibrated

    def spy(weights: QuantizingWeights) -> None:
        if weights.probe is not None and weights.probe.squares is not None:
            found.append(weights.probe.squares.float())
        calibrated(weights)

    monkeypatch.setattr(QuantizingWeights, "calibrated", spy)
    loaded = load(folder, quantization="int4", calibration=tuple(tokens))
    names = [f"layers.{index}.{name}" for index in range(len(found) // 4)
             for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")]  # fmt: skip
    assert len(names) == len(found) > 4
    for name, squares in zip(names, found, strict=True):
        assert_close(squares, expected[f"model.{name}"])
    found.clear()
    again = load(folder, quantization="int4", calibration=tuple(tokens))
    assert torch.equal(logits_of(loaded, tokens), logits_of(again, tokens))
    assert not torch.equal(logits_of(loaded, tokens), logits_of(load(folder, quantization="int4"), tokens))


def test_importance_decides_which_errors_are_small() -> None:
    groups = torch.randn(64, 8, 32, generator=torch.Generator().manual_seed(0))
    importance = torch.rand(8, 32, generator=torch.Generator().manual_seed(1)) ** 4 + 1e-4

    def errors(weights: Tensor | None) -> Tensor:
        codes, scales, minimums = best_int4(groups, weights)
        return ((codes * scales[..., None] + minimums[..., None] - groups).square() * importance).sum()

    assert errors(importance) < 0.85 * errors(None)


def test_int8_of_a_plain_gguf_file() -> None:
    folder = tiny.checkpoint("llama", **FIELDS)
    file = tiny.gguf_file(folder, GGMLQuantizationType.F32)
    tokens = random_tokens(20)
    expected = logits_of(load(folder, quantization="int8"), tokens)
    assert torch.equal(logits_of(load(file.path, quantization="int8"), tokens), expected)


def test_int8_leaves_out_what_has_no_whole_groups() -> None:
    folder = tiny.checkpoint("llama", hidden_size=64, intermediate_size=80)
    loaded = load(folder, quantization="int8")
    mlp = loaded.model.get_submodule("model.layers.0.mlp")
    assert isinstance(mlp.get_submodule("gate_up_proj.weights"), QuantizingWeights)
    assert isinstance(mlp.get_submodule("down_proj.weights"), PlainLinear)
    assert_close(logits_of(loaded, random_tokens(20)), logits_of(load(folder), random_tokens(20)), 0.2)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_random_weights(quantization: str) -> None:
    loaded = load(tiny.checkpoint("llama", **FIELDS), quantization=quantization, load_format="dummy")
    logits = logits_of(loaded, random_tokens(9))
    assert logits.isfinite().all() and logits.std() > 0


def test_int8_on_two_ranks() -> None:
    folder = tiny.checkpoint("llama", **FIELDS)
    tokens = random_tokens(20)

    def run(rank: ThreadRank) -> Tensor:
        place = ParallelState(rank.rank, rank.size)
        return logits_of(load(folder, quantization="int8", parallel=place, communicator=rank), tokens)

    first, second = on_ranks(2, run)
    assert torch.equal(first, second)
    assert_close(first, logits_of(load(folder, quantization="int8"), tokens))


# ---------------------------------------------------------------------------------------------------------
# what is refused, and exceptions


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", **weights}, "format": None}
    ignore = ["lm_head", "re:.*layers\\.1\\.mlp"]
    return {
        "quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}, "ignore": ignore
    }  # fmt: skip


def compressed_module(weight: Tensor, config: Mapping[str, Any], order: Tensor) -> tuple[Tensors, Tensor]:
    scheme = config["config_groups"]["group_0"]["weights"]
    bits, size = scheme["num_bits"], scheme.get("group_size") or weight.shape[1]
    columns = torch.arange(weight.shape[1])
    has_order = scheme.get("actorder") in ("group", "dynamic")
    group_of = columns[order.argsort()] // size if has_order else columns // size
    codes, zeros, scales = quantized(weight, bits, group_of, symmetric=scheme["symmetric"])
    numbers = meaning(codes, zeros, scales, group_of)
    if config["format"] == "int-quantized":
        return {"weight": (codes - (1 << bits - 1)).t().to(torch.int8), "weight_scale": scales.t()}, numbers
    tensors = {"weight_packed": words_of(codes, bits).t(), "weight_scale": scales.t()}
    tensors["weight_shape"] = torch.tensor(weight.shape)
    if has_order:
        tensors["weight_g_idx"] = group_of.int()
    if not scheme["symmetric"]:
        tensors["weight_zero_point"] = words_of(zeros.t(), bits)
    return tensors, numbers


def ten_to_a_word(words: Tensor, count: int) -> Tensor:
    result = torch.zeros(-(-count // 10), words.shape[1], dtype=torch.int64)
    for index in range(count):
        bits = [words[(3 * index + bit) // 32].long() >> (3 * index + bit) % 32 & 1 for bit in range(3)]
        result[index // 10] |= bits[0] + 2 * bits[1] + 4 * bits[2] << 3 * (index % 10)
    return result.int()


def compressed_module_of_old_releases(
    weight: Tensor, config: Mapping[str, Any], order: Tensor
) -> tuple[Tensors, Tensor]:
    """Codes of 3 bits, ten to a word of which two bits are unused."""
    tensors, numbers = compressed_module(weight, config, order)
    tensors["weight_packed"] = ten_to_a_word(tensors["weight_packed"].t(), weight.shape[1]).t()
    tensors["weight_zero_point"] = ten_to_a_word(tensors["weight_zero_point"], weight.shape[0])
    return tensors, numbers


def test_compressed_tensors_of_old_releases(tmp_path: Path) -> None:
    config = compressed("pack-quantized", num_bits=3, strategy="group", group_size=32, symmetric=False)
    folder, plain = written(tmp_path, compressed_module_of_old_releases, config, lambda name: "layers.1.mlp" in name)
    tokens = random_tokens(9)
    assert torch.equal(logits_of(load(folder, quantization="none"), tokens), logits_of(load(plain), tokens))


@pytest.mark.parametrize("count", [16, 48, 80, 96])
def test_streams_of_3_bits_of_any_release(count: int) -> None:
    """Some take as many words in old releases."""
    codes = torch.randint(8, (count, 4), generator=torch.Generator().manual_seed(count))
    filled = words_of(codes, 3)
    for words in (filled, ten_to_a_word(filled, count)):
        parts: Parts = {None: (Part.whole(len(filled)), Part.whole(4))}
        parameter = PackedCodes.of(parts, 3, {None: count}, 0, torch.device("cpu"))
        parameter.load(words)
        assert torch.equal(parameter.data, filled)


@pytest.mark.parametrize(
    "config",
    [
        compressed("pack-quantized", strategy="group", group_size=32, symmetric=True),
        compressed("pack-quantized", strategy="group", group_size=64, symmetric=False),
        compressed("pack-quantized", strategy="group", group_size=32, symmetric=False, actorder="dynamic"),
        compressed("pack-quantized", num_bits=8, strategy="channel", symmetric=True),
        compressed("pack-quantized", num_bits=3, strategy="group", group_size=32, symmetric=True),
        compressed("int-quantized", num_bits=8, strategy="channel", symmetric=True),
        compressed("int-quantized", strategy="group", group_size=64, symmetric=True),
    ],
    ids=["groups", "zero points", "order", "8 bits", "3 bits", "integers", "integers of 4 bits"],
)
def test_compressed_tensors(tmp_path: Path, config: dict[str, Any]) -> None:
    check(*written(tmp_path, compressed_module, config, lambda name: "layers.1.mlp" in name))


def test_activations_in_8_bits_by_token(tmp_path: Path) -> None:
    config = compressed("int-quantized", num_bits=8, strategy="channel", symmetric=True)
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    config["config_groups"]["group_0"]["input_activations"] = inputs
    folder, plain = written(tmp_path, compressed_module, config, lambda name: "layers.1.mlp" in name)
    tokens = random_tokens(40)
    expected = logits_of(load(plain), tokens)
    loaded = load(folder)
    activations = {each.activations for each in (packed_of(module) for module in loaded.model.modules()) if each}
    assert activations == {"int8_per_token"}
    logits = logits_of(loaded, tokens)
    assert 0 < (logits - expected).std() < 0.1 * expected.std()
    assert torch.equal(logits_of(loaded, tokens, captured=True), logits)
    assert_close(logits_of(load(folder, quantized_activations="float"), tokens), expected)
    inputs["dynamic"] = False  # with scales of the whole tensor, which are not used
    tiny.edit_json(folder / "config.json", lambda values: values.update(quantization_config=config))
    assert_close(logits_of(load(folder), tokens), expected)


def packed_of(module: torch.nn.Module) -> ops.QuantizedWeight | None:
    packed = module.packed if isinstance(module, PackedWeights) else None
    return packed if isinstance(packed, ops.QuantizedWeight) else None


def test_modules_that_are_not_quantised(tmp_path: Path) -> None:
    def skips(name: str) -> bool:
        return "layers.1.self_attn.k_proj" in name or "layers.0.mlp" in name

    dynamic: dict[str, Any] = {"-:.*layers\\.1\\.self_attn\\.k_proj": {}, "-:.*layers\\.0\\.mlp": {}}
    check(*written(tmp_path / "dynamic", gptq_module, gptq(dynamic=dynamic), skips))
    exceptions = ["model.layers.1.self_attn.k_proj", "layers.0.mlp"]
    awq = {"quant_method": "awq", "bits": 4, "group_size": 32, "modules_to_not_convert": exceptions}
    check(*written(tmp_path / "awq", awq_module, awq, skips))


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        (None, {"quant_method": "hqq"}, "weights quantised with 'hqq' are not supported yet; serve the unquantised"),
        (None, {"bits": 4}, "quantization_config: quant_method is missing"),
        ("awq", gptq(), "--quantization is awq, but the model's config.json says quant_method: gptq"),
        ("int8", gptq(), "--quantization is int8, but the model is already quantised with gptq; leave it out"),
        (
            "gptq",
            None,
            "--quantization is gptq, but the model is not quantised; leave it out, or use int8, int4 or fp8",
        ),
        (None, {"quant_method": "auto-round", "packing_format": "x"}, "packing_format 'x' is not supported"),
        (None, compressed("marlin-24"), "the format 'marlin-24' is not supported yet; use pack-quantized, int-"),
        (None, compressed("pack-quantized", num_bits=5), "num_bits must be 2, 3, 4 or 8, not 5"),
        (None, compressed("int-quantized", symmetric=False), "weights of the format int-quantized must be symmetric"),
        (None, compressed("pack-quantized", strategy="block"), "the strategy 'block' of weights must be tensor or"),
        (
            None,
            compressed("pack-quantized", strategy="channel", actorder="group"),
            "actorder 'group' needs the strategy group, not 'channel'",
        ),
        (
            None,
            compressed("pack-quantized", strategy="group", group_size=32, actorder="column"),
            "actorder must be group or weight, or null, not 'column'",
        ),
        (
            None,
            compressed("int-quantized", num_bits=8) | {"sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparsity_config is not supported yet; save the model with the format dense",
        ),
        (None, gptq(bits=5), "bits must be 2, 3, 4 or 8, not 5"),
        (None, gptq(group_size=0), "group_size must be -1 or at least 1, not 0"),
        (None, gptq(group_size="all"), "group_size"),
        (None, gptq(checkpoint_format="marlin"), "the format 'marlin' is not supported; save the model as gptq"),
        (None, gptq(dynamic={"x(": {"bits": 8}}), "dynamic: 'x('"),
        (None, {"quant_method": "awq", "bits": 3}, "bits must be 4, not 3"),
        (None, {"quant_method": "awq", "version": "gemv"}, "version 'gemv' is not supported; save the model with"),
    ],
)
def test_configurations_that_are_refused(
    tmp_path: Path, name: str | None, config: dict[str, Any] | None, expected: str
) -> None:
    folder = tiny.copy_of(tiny.checkpoint("llama"), tmp_path / "model")
    tiny.edit_json(folder / "config.json", lambda values: values.update(quantization_config=config))
    assert expected in refusal(folder, quantization=name)
    fields = json.loads((folder / "config.json").read_text())
    with pytest.raises(ModelError, match=re.escape(expected)):  # before anything is downloaded
        check_supported(fields, name)


def test_names_that_vllm_has_for_kernels(tmp_path: Path) -> None:
    folder, _ = written(tmp_path, gptq_module, gptq())
    tokens = random_tokens(9)
    assert torch.equal(logits_of(load(folder, quantization="gptq_marlin"), tokens), logits_of(load(folder), tokens))
    fields = json.loads((folder / "config.json").read_text())
    with pytest.raises(ModelError, match="--quantization is gguf, but the model is no GGUF file"):
        check_supported(fields, "gguf")


def test_a_shape_that_contradicts_the_model(tmp_path: Path) -> None:
    config = compressed("pack-quantized", strategy="channel", symmetric=True)
    folder, _ = written(tmp_path, compressed_module, config, lambda name: "layers.1.mlp" in name)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight_shape"][0] += 32
    save_file(tensors, folder / "model.safetensors")
    assert "q_proj.weight_shape' is [160, 128], the model needs [128, 128]; weights and" in refusal(folder)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_scales_that_are_no_numbers(tmp_path: Path, value: float) -> None:
    folder, _ = written(tmp_path, gptq_module, gptq())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.scales"][0, 3] = value
    save_file(tensors, folder / "model.safetensors")
    assert "scales of a quantised weight are not finite; download the model again" in refusal(folder)


def test_groups_beyond_the_last(tmp_path: Path) -> None:
    folder, _ = written(tmp_path, gptq_module, gptq(desc_act=True))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.g_idx"][3] = 4
    save_file(tensors, folder / "model.safetensors")
    assert "q_proj.g_idx' names groups beyond the 4 that there are" in refusal(folder)
