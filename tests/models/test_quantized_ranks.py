"""Ranks on CPUs with quantised weights of each format: the bits of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType

from ops.cpu.ranks import SharedRank
from tests import tiny
from tests.models import test_bitsandbytes as bitsandbytes
from tests.models import test_quantized as integers
from tests.models import test_quantized_floats as floats
from tests.models.harness import load, logits_of, random_tokens
from tests.models.quantized import FIELDS, Module, written
from tests.ops.cpu import NEEDS_KERNELS
from tests.shared_ranks import on_shared_ranks, state_of

pytestmark = NEEDS_KERNELS

TOKENS = random_tokens(20)
INPUTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
BY_TOKEN = integers.compressed("int-quantized", num_bits=8, strategy="channel", symmetric=True)
BY_TOKEN["config_groups"]["group_0"]["input_activations"] = INPUTS
FORMATS: dict[str, tuple[Module, dict[str, Any]]] = {
    "gptq": (integers.gptq_module, integers.GPTQ["4 bits"]),
    "gptq in 3 bits": (integers.gptq_module, integers.GPTQ["3 bits with zero points"]),
    "gptq in an order": (integers.gptq_module, integers.GPTQ["order"]),
    "awq": (integers.awq_module, {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}),
    "compressed integers": (
        integers.compressed_module,
        integers.compressed("pack-quantized", strategy="group", group_size=32, symmetric=False),
    ),
    "integers by token": (integers.compressed_module, BY_TOKEN),
    "fp8 in blocks": (floats.fp8_module, floats.fp8(weight_block_size=[32, 32])),
    **{name: (floats.compressed_module, floats.FLOATS[name]) for name in ("channel", "mxfp4", "nvfp4")},
    "bitsandbytes in 4 bits": (bitsandbytes.four_bits, bitsandbytes.config()),
    "bitsandbytes in 8 bits": (bitsandbytes.eight_bits, bitsandbytes.INT8),
}


def check(folder: Path, **fields: Any) -> None:
    """Two ranks have the bits of one."""

    def run(rank: SharedRank) -> torch.Tensor:
        return logits_of(load(folder, parallel=state_of(rank), communicator=rank, **fields), TOKENS, captured=True)

    expected = logits_of(load(folder, **fields), TOKENS, captured=True)
    for logits in on_shared_ranks(2, run):
        assert torch.equal(logits, expected)


@pytest.mark.parametrize("name", FORMATS)
def test_formats_of_checkpoints(name: str, tmp_path: Path) -> None:
    module, config = FORMATS[name]
    skips = module is integers.compressed_module  # as the configuration says
    check(written(tmp_path, module, config, lambda name: skips and "layers.1.mlp" in name)[0])


@pytest.mark.parametrize("name", ["Q4_K", "Q5_1", "Q6_K", "IQ4_NL"])
@pytest.mark.parametrize("activations", ["float", "int8"])
def test_blocks_of_gguf_files(name: str, activations: str) -> None:
    wide = tiny.checkpoint("llama", hidden_size=256, intermediate_size=512, num_hidden_layers=1)
    check(tiny.gguf_file(wide, GGMLQuantizationType[name]).path, quantized_activations=activations)


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_quantised_at_load(activations: str) -> None:
    for quantization in ("int8", "fp8"):
        check(tiny.checkpoint("llama", **FIELDS), quantization=quantization, quantized_activations=activations)
