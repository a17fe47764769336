"""Adapters of tasks that a checkpoint holds beside its weights (Jina Embeddings 3, arXiv:2409.10173).

For each weight there are stacks of A and B with an entry per task, in the form of torch's parametrisations. They are
written once as PEFT's files, an adapter per task.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from api.errors import ModelFileError
from api.model.kept_folders import kept_folder

WEIGHTS = "model.safetensors"
MAX_HEADER = 100 << 20
MAX_TASKS = 32
MAX_TASK_RANK = 16
"""Largest rank of their adapters. That of the embedding has twice the rank of the others."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
ENDS = {".parametrizations.weight.0.lora_A": "a", ".parametrizations.weight.0.lora_B": "b"}
UNUSED = re.compile(r"(^|\.)(pooler|classifier|lm_head)\.")
"""Layers that pooling does without."""
TYPES = {"F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}
"""Numbers as their bits."""

Pairs = dict[str, dict[str, tuple[str, Any]]]
"""A and B of each module, each with its type."""


def task_names(fields: Mapping[str, Any]) -> list[str]:
    """The tasks for which config.json says that there are adapters, in their order."""
    names = fields.get("lora_adaptations")
    if fields.get("position_embedding_type") != "rotary" or not isinstance(names, list):
        return []
    return names if len(names) <= MAX_TASKS and all(isinstance(x, str) and NAME.fullmatch(x) for x in names) else []


def task_adapters(path: Path, fields: Mapping[str, Any]) -> dict[str, Path]:
    """The folder of each task's adapter; writes them if that has not been done before.

    Args:
        path: The model's folder.
        fields: Contents of config.json.

    Raises:
        ModelFileError: The weights are damaged, or there is no room.
    """
    names, file = task_names(fields), path / WEIGHTS
    if not names or not file.is_file():
        return {}

    def make(folder: Path) -> None:
        pairs = _pairs(file, len(names))
        for index, name in enumerate(names) if pairs else ():
            _write(folder / name, pairs, index, fields)

    settings = json.dumps([names, fields.get("lora_rank"), fields.get("lora_alpha")])
    try:
        folder = kept_folder("tasks", path, [file], make, settings)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFileError(file, f"adapters of tasks: {error}") from error
    return {name: folder / name for name in names if (folder / name).is_dir()}


def _pairs(file: Path, count: int) -> Pairs:
    """The stacks of A and B by module, as views of the file."""
    data: npt.NDArray[np.uint8] = np.memmap(file, np.uint8, "r")
    size = int(data[:8].view(np.uint64)[0])
    if not 0 < size <= min(MAX_HEADER, len(data) - 8):
        raise ValueError("not a safetensors file")
    header, body = json.loads(data[8 : 8 + size].tobytes()), data[8 + size :]
    pairs: Pairs = {}
    for name, entry in header.items():
        end = next((end for end in ENDS if name.endswith(end)), None)
        module = name.removesuffix(end or "")
        if end is None or UNUSED.search(module):
            continue
        begin, stop = entry["data_offsets"]
        bits = TYPES[entry["dtype"]]
        if not 0 <= begin <= stop <= len(body) or len(entry["shape"]) != 3 or entry["shape"][0] != count:
            raise ValueError(f"{name[:200]} is damaged, or not of {count} tasks")
        array = np.frombuffer(body[begin:stop].data, bits).reshape(entry["shape"])
        pairs.setdefault(module, {})[ENDS[end]] = (entry["dtype"], array)
    return pairs


def _write(folder: Path, pairs: Pairs, index: int, fields: Mapping[str, Any]) -> None:
    """Writes the adapter of one task."""
    rank = fields["lora_rank"]
    if not isinstance(rank, int) or not 1 <= rank <= MAX_TASK_RANK // 2:
        raise ValueError(f"lora_rank must be between 1 and {MAX_TASK_RANK // 2}")
    tensors: dict[str, tuple[str, npt.NDArray[Any]]] = {}
    patterns: dict[str, int] = {}
    types: list[npt.NDArray[Any]] = []
    table = None
    for module, pair in pairs.items():
        (kind, a), (_, b) = ((kind, array[index]) for kind, array in (pair["a"], pair["b"]))
        if not module.endswith("_embeddings"):
            tensors[f"base_model.model.{module}.lora_A.weight"] = (kind, a)
            tensors[f"base_model.model.{module}.lora_B.weight"] = (kind, b)
        elif module.endswith("token_type_embeddings"):
            types = [a[0], b]
        else:
            table = module, kind, a, b
    if table is None:
        raise ValueError("there is none of the words' embedding")
    module, kind, a, b = table
    if types:  # all tokens are of one type, so what its row gains may be added to all words
        a = np.concatenate((a, np.broadcast_to(types[0], (len(a), len(types[0])))), axis=1)
        b = np.concatenate((b, types[1]))
        patterns[module.rpartition(".")[2]] = a.shape[1]
    tensors[f"base_model.model.{module}.lora_embedding_A"] = (kind, a.T)
    tensors[f"base_model.model.{module}.lora_embedding_B"] = (kind, b.T)
    alpha = fields["lora_alpha"]
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": patterns,
        "alpha_pattern": {name: alpha * each / rank for name, each in patterns.items()},
    }
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    header: dict[str, Any] = {}
    offset = 0
    for name, (dtype, array) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    document = json.dumps(header).encode()
    with (folder / "adapter_model.safetensors").open("wb") as out:
        out.write(len(document).to_bytes(8, "little") + document)
        for _, array in tensors.values():
            out.write(np.ascontiguousarray(array).tobytes())
