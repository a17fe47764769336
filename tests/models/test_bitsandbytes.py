"""Checkpoints of bitsandbytes."""

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
from tests import tiny
from tests.models.harness import assert_close, load, logits_of, random_tokens, refusal
from tests.models.quantized import FIELDS, Tensors, check, written
from tests.thread_ranks import ThreadRank, on_ranks

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
FP4 = tuple(sign * number / 12 for sign in (1, -1) for number in (0, 0.0625, 8, 12, 4, 6, 2, 3))


def config(**fields: Any) -> dict[str, Any]:
    values = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
    return {**values, "bnb_4bit_quant_type": "nf4", **fields}


def four_bits(weight: Tensor, config: Mapping[str, Any], order: Tensor) -> tuple[Tensors, Tensor]:
    """Blocks of 64 run on from row to row, and those of 256 scales over all of them."""
    kind = config["bnb_4bit_quant_type"]
    table = torch.tensor(NF4 if kind == "nf4" else FP4)
    blocks = weight.flatten().split(64)
    absmax = torch.stack([block.abs().max() for block in blocks])
    state: dict[str, Any] = {"quant_type": kind, "blocksize": 64, "dtype": "float32", "shape": list(weight.shape)}
    tensors = {"weight.quant_map": table}
    if config.get("bnb_4bit_use_double_quant"):
        numbers, offset = torch.linspace(-1, 1, 256), float(absmax.mean())
        outer = torch.stack([(each - offset).abs().max() for each in absmax.split(256)])
        scaled = (absmax - offset) / outer.repeat_interleave(256)[: len(absmax)]
        codes = (scaled[:, None] - numbers).abs().argmin(1)
        tensors |= {"weight.absmax": codes.to(torch.uint8), "weight.nested_absmax": outer}
        tensors["weight.nested_quant_map"] = numbers
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        absmax = numbers[codes] * outer.repeat_interleave(256)[: len(absmax)] + offset
    else:
        tensors["weight.absmax"] = absmax
    codes = torch.cat(
        [(each[:, None] / most - table).abs().argmin(1) for each, most in zip(blocks, absmax, strict=True)]
    )
    numbers = torch.cat([table[each] * most for each, most in zip(codes.split(64), absmax, strict=True)])
    tensors["weight"] = (codes[::2] << 4 | codes[1::2]).to(torch.uint8)[:, None]
    tensors[f"weight.quant_state.bitsandbytes__{kind}"] = torch.frombuffer(
        bytearray(json.dumps(state).encode()), dtype=torch.uint8
    )
    return tensors, numbers.view(weight.shape)


def eight_bits(weight: Tensor, config: Mapping[str, Any], order: Tensor) -> tuple[Tensors, Tensor]:
    most = weight.abs().amax(1)
    codes = (weight / most[:, None] * 127).round()
    tensors = {"weight": codes.to(torch.int8), "SCB": most, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors, codes * (most / 127)[:, None]


INT8 = config(load_in_4bit=False, load_in_8bit=True)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_four_bits(tmp_path: Path, kind: str, nested: bool) -> None:
    fields = config(bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested)
    check(*written(tmp_path, four_bits, fields))


def test_blocks_that_end_within_a_row(tmp_path: Path) -> None:
    check(*written(tmp_path, four_bits, config(), hidden_size=96, intermediate_size=80))


def test_eight_bits(tmp_path: Path) -> None:
    check(*written(tmp_path, eight_bits, INT8, attention_bias=True))


def test_modules_that_are_not_quantised(tmp_path: Path) -> None:
    def skips(name: str) -> bool:
        return "layers.1.self_attn.k_proj" in name or "layers.0.mlp" in name

    exceptions = ["lm_head", "model.layers.1.self_attn.k_proj", "model.layers.0.mlp"]
    check(*written(tmp_path, eight_bits, {**INT8, "llm_int8_skip_modules": exceptions}, skips))


def test_output_layers(tmp_path: Path) -> None:
    check(*written(tmp_path, four_bits, config(llm_int8_skip_modules=[]), has_head=True))


@pytest.mark.parametrize("module", [four_bits, eight_bits])
def test_two_ranks(tmp_path: Path, module: Any) -> None:
    folder, plain = written(tmp_path, module, config() if module is four_bits else INT8)
    tokens = random_tokens(20)

    def run(rank: ThreadRank) -> Tensor:
        place = ParallelState(rank.rank, rank.size)
        return logits_of(load(folder, quantization="none", parallel=place, communicator=rank), tokens)

    first, second = on_ranks(2, run)
    assert torch.equal(first, second)
    assert_close(first, logits_of(load(plain), tokens))


def test_random_weights(tmp_path: Path) -> None:
    folder, _ = written(tmp_path, four_bits, config())
    logits = logits_of(load(folder, load_format="dummy"), random_tokens(9))
    assert logits.isfinite().all() and logits.std() > 0


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (config(load_in_4bit=False), "one of load_in_4bit and load_in_8bit must be true"),
        (config(bnb_4bit_quant_type="int4"), "bnb_4bit_quant_type must be nf4 or fp4, not 'int4'"),
        (config(bnb_4bit_quant_storage="bfloat16"), "bnb_4bit_quant_storage 'bfloat16' is not supported; save the"),
        (config(llm_int8_skip_modules=["("]), "quantization_config: missing ), unterminated subpattern"),
    ],
)
def test_configurations_that_are_refused(tmp_path: Path, fields: dict[str, Any], expected: str) -> None:
    folder = tiny.copy_of(tiny.checkpoint("llama"), tmp_path / "model")
    tiny.edit_json(folder / "config.json", lambda values: values.update(quantization_config=fields))
    assert expected in refusal(folder)


def test_an_unquantised_model() -> None:
    message = refusal(tiny.checkpoint("llama", **FIELDS), quantization="bitsandbytes")
    assert message.startswith(
        "--quantization is bitsandbytes, but the model is not quantised; leave it out, or use int8"
    )


PROJECTION = "model.layers.0.self_attn.q_proj"
DAMAGES = {
    "weight": (torch.zeros(9, 1, dtype=torch.uint8), "weight has 9 elements, the model needs 8192; weights and"),
    "weight.absmax": (torch.ones(9), "weight.absmax has 9 elements, the model needs 256; weights and"),
    "weight.quant_map": (torch.ones(16), "'{}.weight.quant_map' has other numbers than nf4 and fp4"),
    "weight.quant_state.bitsandbytes__nf4": (
        torch.zeros(3, dtype=torch.uint8),
        "'{}.weight.quant_state.bitsandbytes__nf4' describes no quantised weight: JSON is malformed",
    ),
}


@pytest.mark.parametrize("leaf", DAMAGES)
def test_damaged_tensors(tmp_path: Path, leaf: str) -> None:
    folder, _ = written(tmp_path, four_bits, config())
    file = folder / "model.safetensors"
    tensor, expected = DAMAGES[leaf]
    save_file({**load_file(file), f"{PROJECTION}.{leaf}": tensor}, file)
    assert expected.format(PROJECTION) in refusal(folder)
    tensors = load_file(file)
    del tensors[f"{PROJECTION}.{leaf}"]
    save_file(tensors, file)
    assert f"tensor '{PROJECTION}.{leaf}' is missing" in refusal(folder)


def test_layouts_of_gpus(tmp_path: Path) -> None:
    folder, _ = written(tmp_path, eight_bits, INT8)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{PROJECTION}.weight_format"] += 1
    save_file(tensors, folder / "model.safetensors")
    assert f"'{PROJECTION}.weight_format' is the layout of a GPU; save the model again" in refusal(folder)
