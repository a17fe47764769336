"""Quantised checkpoints, written by formulas of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import tiny
from tests.models.harness import assert_close, load, logits_of, random_tokens

Tensors = dict[str, Tensor]

FIELDS: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
Module = Callable[[Tensor, Mapping[str, Any], Tensor], tuple[Tensors, Tensor]]


def written(
    tmp_path: Path,
    module: Module,
    config: dict[str, Any],
    skip: Callable[[str], bool] = lambda name: False,
    *,
    has_head: bool = False,
    family: str = "llama",
    **fields: Any,
) -> tuple[Path, Path]:
    """A quantised checkpoint, and one with the numbers that it stands for. ``has_head``: so is the output layer."""
    folder, plain = (
        tiny.copy_of(tiny.checkpoint(family, **{**FIELDS, **fields}), tmp_path / name) for name in ("q", "p")
    )
    stored, numbers = {}, {}
    generator = torch.Generator().manual_seed(0)
    orders: dict[tuple[int, str], Tensor] = {}  # that of q, k and v, or of gate and up of an expert
    for name, tensor in load_file(folder / "model.safetensors").items():
        stored[name] = numbers[name] = tensor
        prefix = name.removesuffix(".weight")
        if name.endswith("_proj.weight") and not skip(prefix) or has_head and prefix == "lm_head":
            columns = tensor.shape[1]
            order = orders.setdefault(
                (columns, prefix.rpartition(".")[0]), torch.randperm(columns, generator=generator)
            )
            tensors, numbers[name] = module(stored.pop(name), config, order)
            stored |= {f"{prefix}.{leaf}": each.contiguous() for leaf, each in tensors.items()}
    save_file(stored, folder / "model.safetensors")
    save_file(numbers, plain / "model.safetensors")
    tiny.edit_json(folder / "config.json", lambda values: values.update(quantization_config=config))
    return folder, plain


def check(folder: Path, plain: Path) -> None:
    """Exactly the dequantised model with floating-point activations, and close to it with those of 8 bits."""
    tokens = random_tokens(40)
    expected = logits_of(load(plain), tokens)
    assert_close(logits_of(load(folder), tokens), expected)
    assert torch.equal(logits_of(load(folder, quantization="none"), tokens), expected)
    for captured in (False, True):
        loaded = load(folder, quantized_activations="int8")
        drift = (logits_of(loaded, tokens, captured=captured) - expected).std() / expected.std()
        assert drift < 0.1


def int8_numbers(weight: Tensor) -> Tensor:
    """What ``--quantization int8`` makes of a weight."""
    groups = weight.unflatten(1, (-1, 32))
    scales = (groups.abs().amax(-1) / 127).half().float()[..., None]
    numbers: Tensor = (groups / scales).round().clamp(-127, 127) * scales
    return numbers.flatten(1)
