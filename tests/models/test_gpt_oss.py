"""gpt-oss's checkpoints: experts in MXFP4, as on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ops
from executor.layers.moe import MoE
from tests import tiny
from tests.models.harness import assert_independent_of_batch, load, logits_of, random_tokens, refusal
from tests.models.quantized import check

VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""What the codes of E2M1 stand for."""
SIZES: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 64}
CONFIG = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
}


def written(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint with experts in MXFP4, and one with the numbers that they stand for."""
    folder, plain = (tiny.copy_of(tiny.checkpoint("gpt_oss", **SIZES), tmp_path / name) for name in ("q", "p"))
    stored, numbers = {}, {}
    generator = torch.Generator().manual_seed(0)
    for name, tensor in load_file(folder / "model.safetensors").items():
        stored[name] = numbers[name] = tensor
        if name.endswith(("gate_up_proj", "down_proj")):  # [experts, inputs, outputs]
            del stored[name]
            experts, columns, rows = tensor.shape
            codes = torch.randint(0, 16, (experts, rows, columns // 32, 32), dtype=torch.uint8, generator=generator)
            scales = torch.randint(120, 124, (experts, rows, columns // 32), dtype=torch.uint8, generator=generator)
            stored[f"{name}_blocks"] = codes[..., ::2] | codes[..., 1::2] << 4
            stored[f"{name}_scales"] = scales
            values = VALUES[codes.long()] * 2.0 ** (scales[..., None].float() - 127)
            numbers[name] = values.flatten(2).transpose(1, 2).contiguous()
    save_file(stored, folder / "model.safetensors")
    save_file(numbers, plain / "model.safetensors")
    tiny.edit_json(folder / "config.json", lambda values: values.update(quantization_config=CONFIG))
    return folder, plain


def test_experts_are_those_of_the_formula_and_stay_packed(tmp_path: Path) -> None:
    folder, plain = written(tmp_path)
    check(folder, plain)
    loaded = load(folder, dtype="bfloat16")
    for layer in loaded.model.modules():
        if isinstance(layer, MoE):
            weights = layer.weights()
            for weight in (*weights.gate_up, *weights.down):
                assert isinstance(weight, ops.QuantizedWeight)
                assert [segment.encoding.format for segment in weight.segments] == ["mxfp4"]
                assert weight.tensors[0].nbytes < 0.6 * weight.shape[0] * weight.shape[1]
    assert_independent_of_batch(loaded)


def test_random_weights_for_benchmarks(tmp_path: Path) -> None:
    folder, _ = written(tmp_path)
    logits = logits_of(load(folder, load_format="dummy", dtype="bfloat16"), random_tokens(9))
    assert logits.isfinite().all() and logits.std() > 0


@pytest.mark.parametrize("leaf", ["blocks", "scales"])
def test_blocks_that_do_not_fit(tmp_path: Path, leaf: str) -> None:
    folder, _ = written(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = f"model.layers.1.mlp.experts.down_proj_{leaf}"
    save_file({**tensors, name: tensors[name][:, :, :1].contiguous()}, folder / "model.safetensors")
    assert f"down_proj_{leaf}" in refusal(folder)
