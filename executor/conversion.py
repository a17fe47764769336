"""Converts pickled weights (``pytorch_model.bin``) to safetensors. Jobs for a ``Helper``: never imported by a server.

A pickle may name any function. ``weights_only`` restricts torch's reader to tensors and containers, and whatever gets
past it runs in a process with limits that ends after the job.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from executor.files import open_regular


def convert(data: bytes) -> bytes:
    """Writes one file as safetensors.

    Args:
        data: JSON object with ``source`` and ``target``, the paths.

    Returns:
        JSON list of the tensors' names.

    Raises:
        ValueError: The source is not a file of tensors; one line says why.
    """
    paths = json.loads(data)
    source, target = Path(paths["source"]), Path(paths["target"])
    with open_regular(source):
        pass
    try:
        state = _read(source)
    except Exception as error:  # the reader has no common base of its errors
        first = str(error).strip().split("\n", 1)[0]
        raise ValueError(f"cannot be read as tensors only: {type(error).__name__}: {first[:300]}") from error
    save_file(_tensors(state), target, {"format": "pt"})
    return json.dumps(sorted(state)).encode()


def _read(source: Path) -> Any:
    try:
        return torch.load(source, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
    # The format before torch 1.6 cannot be mapped.
    return torch.load(source, map_location="cpu", weights_only=True)


def _tensors(state: Any) -> dict[str, torch.Tensor]:
    """The tensors, each with memory of its own, as safetensors wants them."""
    if not isinstance(state, dict) or not state:
        raise ValueError("does not hold named tensors")
    tensors: dict[str, torch.Tensor] = {}
    storages = set()
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{str(name)[:100]!r} is not a tensor: expected the state dict of a model")
        storage = tensor.untyped_storage().data_ptr()
        is_shared = storage in storages
        storages.add(storage)
        tensors[name] = tensor.detach().clone() if is_shared else tensor.detach().contiguous()
    return tensors
