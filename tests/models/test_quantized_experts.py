"""Experts in every method of quantisation: they compute with the numbers that their codes stand for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from executor.imatrix import load as load_plain
from executor.imatrix import measure
from tests import tiny
from tests.models import test_bitsandbytes, test_quantized, test_quantized_floats
from tests.models.harness import (
    Chunk,
    Runner,
    assert_close,
    assert_independent_of_batch,
    load,
    logits_of,
    random_tokens,
)
from tests.models.quantized import written
from tests.models.test_bitsandbytes import eight_bits, four_bits
from tests.models.test_quantized import awq_module, gptq, gptq_module
from tests.models.test_quantized_floats import FLOATS, fp8, fp8_module, modelopt_module
from tests.ops.cpu import NEEDS_KERNELS

SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 96, "moe_intermediate_size": 96}
INTEGERS = test_quantized.compressed("pack-quantized", strategy="group", group_size=32, symmetric=True)
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "awq": (awq_module, {"quant_method": "awq", "bits": 4, "group_size": 32, "modules_to_not_convert": ["gate"]}),
    "bitsandbytes, 4 bits": (four_bits, test_bitsandbytes.config()),
    "bitsandbytes, 8 bits": (eight_bits, test_bitsandbytes.INT8),
    "compressed-tensors, fp8": (test_quantized_floats.compressed_module, FLOATS["channel"]),
    "compressed-tensors, groups": (
        test_quantized.compressed_module,
        {**INTEGERS, "ignore": ["lm_head", "re:.*mlp.gate$"]},
    ),
    "compressed-tensors, mxfp4": (test_quantized_floats.compressed_module, FLOATS["mxfp4"]),
    "compressed-tensors, nvfp4": (test_quantized_floats.compressed_module, FLOATS["nvfp4"]),
    "fp8 in blocks": (fp8_module, fp8(weight_block_size=[32, 32], modules_to_not_convert=["model.layers.0.mlp.gate"])),
    "gptq": (gptq_module, gptq()),
    "gptq, 8 bits": (gptq_module, gptq(bits=8, sym=True)),
    "modelopt, fp8": (modelopt_module, {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}),
    "modelopt, nvfp4": (modelopt_module, {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}),
}
"""What writes a module, and the configuration; gates of routers are never quantised."""


@NEEDS_KERNELS
@pytest.mark.parametrize("name", METHODS)
def test_experts_of_a_quantised_checkpoint(tmp_path: Path, name: str) -> None:
    """In one call of the kernels, though experts may differ."""
    folder, plain = written(tmp_path, *METHODS[name], family="qwen3_moe", **SIZES)
    tokens = random_tokens(40)
    loaded = load(folder)
    runner = Runner(loaded, captured=True)
    assert_close(runner.step([Chunk(0, tokens)]), logits_of(load(plain), tokens))
    assert runner.program is not None and not runner.program.python_ops
    assert loaded.weight_bytes < 0.6 * load(plain).weight_bytes


def test_experts_alone_as_in_kimi_k2_thinking(tmp_path: Path) -> None:
    exceptions = ["re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*", "lm_head"]
    skipped = re.compile(r"self_attn|shared_experts|mlp\.(gate|up|down)_proj")
    folder, plain = written(
        tmp_path,
        test_quantized.compressed_module,
        {**INTEGERS, "ignore": exceptions},
        lambda name: skipped.search(name) is not None,
        family="deepseek_v3",
        hidden_size=128,
        moe_intermediate_size=64,
    )
    tokens = random_tokens(40)
    loaded = load(folder)
    assert_close(logits_of(loaded, tokens), logits_of(load(plain), tokens))
    assert loaded.weight_bytes < 0.8 * load(plain).weight_bytes


@NEEDS_KERNELS
def test_experts_with_an_order_of_their_own(tmp_path: Path) -> None:
    """Each has another, and its inputs are sorted for it alone."""
    folder, plain = written(tmp_path, gptq_module, gptq(desc_act=True), family="qwen3_moe", **SIZES)
    loaded, tokens = load(folder), random_tokens(40)
    logits = logits_of(loaded, tokens)
    assert_close(logits, logits_of(load(plain), tokens))
    assert loaded.weight_bytes < 0.6 * load(plain).weight_bytes
    assert_independent_of_batch(load(folder, dtype="bfloat16"))


@pytest.mark.parametrize(("method", "most"), [("int8", 0.1), ("int4", 0.4), ("fp8", 0.15)])
def test_experts_quantised_at_load(method: str, most: float) -> None:
    folder, tokens = tiny.checkpoint("qwen3_moe", **{**SIZES, "hidden_size": 64}), random_tokens(40)
    loaded, plain = load(folder, quantization=method), load(folder)
    logits, expected = logits_of(loaded, tokens), logits_of(plain, tokens)
    assert 0 < (logits - expected).std() < most * expected.std()
    assert torch.equal(logits_of(loaded, tokens, captured=True), logits)
    assert loaded.weight_bytes < 0.5 * plain.weight_bytes


def test_experts_with_an_importance_matrix(tmp_path: Path) -> None:
    folder, tokens = tiny.checkpoint("qwen3_moe", **SIZES), random_tokens(40)
    found = measure(load_plain(folder, "float32"), [tokens])
    assert found["model.layers.0.mlp.experts"].shape == (128,)
    save_file(found, tmp_path / "imatrix.safetensors")
    logits = logits_of(load(folder, quantization="int4", imatrix=str(tmp_path / "imatrix.safetensors")), tokens)
    expected = logits_of(load(folder), tokens)
    assert (logits - expected).std() < 0.4 * expected.std()
    assert not torch.equal(logits, logits_of(load(folder, quantization="int4"), tokens))


HYBRID_SIZES: dict[str, dict[str, Any]] = {
    kind: {"hidden_size": 64, "num_hidden_layers": 3} for kind in ("bamba", "granite4_h", "qwen3_5", "qwen3_next")
} | {"nemotron_h": {"hidden_size": 64, "num_hidden_layers": 5}}
LISTS: dict[str, tuple[str, dict[str, list[str]]]] = {
    "bamba": (r"\.mamba\.", {"ignore": ["re:.*mamba.*"]}),
    "granite4_h": (r"\.mamba\.", {"targets": ["re:.*\\.self_attn\\..*"]}),
    "nemotron_h": (r"layers\.0\.mixer\.", {"ignore": ["backbone.layers.0.mixer.in_proj", "re:.*0.mixer.out_proj"]}),
    "qwen3_5": (r"linear_attn", {"ignore": ["re:.*linear_attn.*"]}),
    "qwen3_next": (r"linear_attn", {"ignore": ["model.layers.0.linear_attn.out_proj", "re:.*2.linear_attn.*"]}),
}
"""What is not quantised, and how the checkpoint says so, in its own names."""


@pytest.mark.parametrize("kind", LISTS)
def test_lists_of_modules_have_the_names_of_the_checkpoint(tmp_path: Path, kind: str) -> None:
    """Other than the model's: the recurrences of all families are in the place of attention."""
    pattern, lists = LISTS[kind]
    group = {**FLOATS["channel"]["config_groups"]["group_0"], "targets": lists.get("targets", ["Linear"])}
    config = {**FLOATS["channel"], "config_groups": {"group_0": group}}
    config["ignore"] = ["lm_head", "re:.*in_proj_.*", *lists.get("ignore", [])]
    module = test_quantized_floats.compressed_module
    sizes = HYBRID_SIZES[kind]
    folder, plain = written(
        tmp_path, module, config, lambda name: re.search(pattern, name) is not None, family=kind, **sizes
    )
    tokens = random_tokens(40)
    loaded = load(folder)
    assert_close(logits_of(loaded, tokens), logits_of(load(plain), tokens))
    assert loaded.weight_bytes < load(plain).weight_bytes
