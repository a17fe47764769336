"""Writes adapters in PEFT's format, and the checkpoints that PEFT would merge them into."""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny import session_folder

PREFIX = "base_model.model."
ATTENTION = r"(q|k|v|o)_proj$"
ALL_LINEAR = r"_proj$"


def random(*shape: int, seed: int, scale: float = 0.1) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def write_adapter(
    base: Path,
    *,
    targets: str = ALL_LINEAR,
    rank: int = 4,
    alpha: float = 8.0,
    seed: int = 1,
    dora: bool = False,
    biases: Sequence[str] = (),
    saved: Sequence[str] = (),
    table: str | None = None,
    tokens: Mapping[str, Sequence[int]] | None = None,
    stacks: Sequence[str] = (),
    transposed: bool = False,
    scale: float = 0.1,
    **fields: Any,
) -> Path:
    """A folder with a random adapter of a checkpoint.

    Args:
        base: The checkpoint.
        targets: Regular expression of modules with A and B.
        rank: Of those for which ``rank_pattern`` in ``fields`` says nothing else.
        alpha: ``lora_alpha``.
        seed: Of the numbers.
        dora: Whether the modules have magnitudes.
        biases: Modules with a bias of the adapter's.
        saved: Modules that are replaced as a whole.
        table: An embedding with A and B.
        tokens: Ids with vectors of their own, by table.
        stacks: Parameters of all experts with A and B, the innermost of PEFT's modules first.
        transposed: Weights are stored as [in_features, out_features].
        scale: Of the numbers in A and B.
        fields: More fields of adapter_config.json.
    """
    weights = load_file(base / "model.safetensors")
    tensors: dict[str, Tensor] = {}
    for index, name in enumerate(sorted(weights)):
        module = name.removesuffix(".weight")
        own = 1000 * seed + 10 * index
        if name.endswith(".weight") and re.search(targets, module) and weights[name].dim() == 2:
            out, columns = weights[name].T.shape if transposed else weights[name].shape
            size = _of(fields.get("rank_pattern", {}), module, rank)
            tensors[f"{module}.lora_A.weight"] = random(size, columns, seed=own, scale=scale)
            tensors[f"{module}.lora_B.weight"] = random(out, size, seed=own + 1, scale=scale)
            if dora:
                tensors[f"{module}.lora_magnitude_vector"] = 1 + random(out, seed=own + 2).abs()
            if module.rpartition(".")[2] in biases:
                tensors[f"{module}.base_layer.bias"] = random(out, seed=own + 3)
        if name.rpartition(".")[2] in stacks and weights[name].dim() == 3:
            count, out, columns = (weights[name].mT if transposed else weights[name]).shape
            parent, _, leaf = name.rpartition(".")
            module = parent + ".base_layer" * (len(stacks) - 1 - list(stacks).index(leaf))
            tensors[f"{module}.lora_A.weight"] = random(count * rank, columns, seed=own, scale=scale)
            tensors[f"{module}.lora_B.weight"] = random(out, rank * count, seed=own + 1, scale=scale)
        if module in saved:
            tensors[name] = weights[name].float() + random(*weights[name].shape, seed=own + 4)
        if module == table:
            vocab, hidden = weights[name].shape
            tensors[f"{module}.lora_embedding_A"] = random(rank, vocab, seed=own, scale=scale)
            tensors[f"{module}.lora_embedding_B"] = random(hidden, rank, seed=own + 1, scale=scale)
        if tokens and module.rpartition(".")[2] in tokens:
            count = len(tokens[module.rpartition(".")[2]])
            vectors = random(count, weights[name].shape[1], seed=own + 5, scale=0.5)
            tensors[f"{module}.token_adapter.trainable_tokens_delta"] = vectors
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "use_dora": dora,
        "target_modules": targets,
        "target_parameters": list(stacks),
        "bias": "lora_only" if biases else "none",
        "modules_to_save": [name.rpartition(".")[2] for name in saved] or None,
        "fan_in_fan_out": transposed,
        "trainable_token_indices": None if tokens is None else {name: list(ids) for name, ids in tokens.items()},
        **fields,
    }
    folder = Path(tempfile.mkdtemp(prefix="adapter-", dir=session_folder()))
    save_file({f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def as_gguf(adapter: Path, arch: str, num_layers: int, heads: Mapping[str, int] | None = None) -> Path:
    """The adapter as llama.cpp's ``convert_lora_to_gguf.py`` writes it.

    Args:
        adapter: A folder.
        arch: llama.cpp's name of the architecture.
        num_layers: Of the model.
        heads: Heads of projections whose rows the converter reorders, by the last component of their names.
    """
    config = json.loads((adapter / "adapter_config.json").read_text())
    path = adapter / "adapter.gguf"
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", config["lora_alpha"])
    stacks: dict[str, dict[int, Tensor]] = {}
    arch_id = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    names = gguf.get_tensor_name_map(arch_id, num_layers)
    for stored, tensor in sorted(load_file(adapter / "adapter_model.safetensors").items()):
        module, _, leaf = stored.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        expert = re.fullmatch(r"model\.layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])", module)
        if expert is not None:
            kind = {"w1": "gate", "w2": "down", "w3": "up"}[expert[3]]
            stack = f"blk.{expert[1]}.ffn_{kind}_exps.weight.{leaf.lower()}"
            stacks.setdefault(stack, {})[int(expert[2])] = tensor
            continue
        name = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        count = (heads or {}).get(module.rpartition(".")[2])
        if leaf == "lora_B" and count:
            pairs = tensor.view(count, 2, -1, tensor.shape[1])
            tensor = pairs.transpose(1, 2).reshape(tensor.shape)
        if leaf == "lora_embedding_A":
            tensor = tensor.T.contiguous()
        writer.add_tensor(f"{name}.{leaf.replace('embedding_', '').lower()}", tensor.numpy())
    for name, found in stacks.items():
        writer.add_tensor(name, torch.stack([found[index] for index in range(len(found))]).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _of(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)), default)


def _merge_stack(weights: dict[str, Tensor], module: str, config: Mapping[str, Any], a: Tensor, b: Tensor) -> None:
    """The formula of PEFT's ``ParamWrapper.get_delta_weight``."""
    depth = module.count(".base_layer")
    name = f"{module.replace('.base_layer', '')}.{config['target_parameters'][-1 - depth]}"
    count = len(weights[name])
    rank = len(a) // count
    pieces = b.reshape(len(b), rank, count), a.reshape(count, rank, -1)
    change = config["lora_alpha"] / rank * torch.einsum("abe,ebc->eac", *pieces)
    weights[name] = weights[name] + (change.mT if config["fan_in_fan_out"] else change)


def merge(base: Path, adapter: Path) -> Path:
    """A folder with the checkpoint that the adapter makes of another, in float32."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    stored = load_file(adapter / "adapter_model.safetensors")
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in stored.items()}
    weights = {name: weight.float() for name, weight in load_file(base / "model.safetensors").items()}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            weight = f"{module}.weight"
            alpha = _of(config.get("alpha_pattern", {}), module, config["lora_alpha"])
            factor = alpha / (math.sqrt(len(a)) if config.get("use_rslora") else len(a))
            b = tensors[f"{module}.lora_B.weight"]
            if weight not in weights:
                _merge_stack(weights, module, config, a, b)
                continue
            change = factor * b @ a
            merged = weights[weight] + (change.T if config["fan_in_fan_out"] else change)
            if config["use_dora"]:
                merged *= (tensors[f"{module}.lora_magnitude_vector"] / merged.norm(dim=1))[:, None]
            weights[weight] = merged
        elif name.endswith(".lora_embedding_A"):
            module = name.removesuffix(".lora_embedding_A")
            factor = config["lora_alpha"] / len(a)
            weights[f"{module}.weight"] += factor * (tensors[f"{module}.lora_embedding_B"] @ a).T
        elif name.endswith(".base_layer.bias"):
            weights[name.replace(".base_layer", "")] = a
        elif name.endswith(".trainable_tokens_delta"):
            module = name.removesuffix(".token_adapter.trainable_tokens_delta")
            weights[f"{module}.weight"][config["trainable_token_indices"][module.rpartition(".")[2]]] = a
        elif name in weights:
            weights[name] = a
    folder = Path(tempfile.mkdtemp(prefix="merged-", dir=session_folder()))
    shutil.copytree(base, folder, dirs_exist_ok=True)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "model.safetensors")
    return folder
