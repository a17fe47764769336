"""Experts in GGUF files: a tensor holds the same matrix of all experts of a layer, in older files of one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from msgspec.structs import replace

from executor.config import GGUFTensor

_MERGED = re.compile(r"^(blk\.\d+\.)ffn_(gate|up|down|gate_up)_exps\.(weight|bias)$")
_ALONE = re.compile(r"^blk\.(\d+)\.ffn_(gate|up|down)\.(\d+)\.(weight|bias)$")
_OURS = re.compile(r"^model\.layers\.(\d+)\.(?:mlp|moe|self_attn)\.experts\.(\d+)\.(gate|up|down)_proj\.(weight|bias)$")
_LAYER = re.compile(r"^blk\.(\d+)\.")


BLOCKS = ("mlp", "moe", "self_attn")
"""Blocks of layers that have experts, in any family."""


def apart(tensor: GGUFTensor) -> Iterator[GGUFTensor]:
    """The tensor itself, or one for each expert, named as in older files: ``blk.0.ffn_gate.3.weight``."""
    found = _MERGED.match(tensor.name)
    if found is None or not tensor.shape or not tensor.shape[0]:
        yield tensor
        return
    prefix, kind, leaf = found.groups()
    num_bytes = tensor.num_bytes // tensor.shape[0]
    kinds = kind.split("_")
    rows = tensor.shape[1] // len(kinds) if len(tensor.shape) > 1 else 0
    for expert in range(tensor.shape[0]):
        for index, each in enumerate(kinds):
            size = num_bytes // len(kinds)
            yield replace(
                tensor,
                name=f"{prefix}ffn_{each}.{expert}.{leaf}",
                shape=(rows, *tensor.shape[2:]),
                offset=tensor.offset + expert * num_bytes + index * size,
                num_bytes=size,
            )


def gguf_name(name: str) -> str | None:
    """The name of an expert's tensor of the model, as ``apart`` gives it; None: it is none."""
    found = _OURS.match(name)
    return None if found is None else f"blk.{found[1]}.ffn_{found[3]}.{found[2]}.{found[4]}"


def matrices(tensors: Iterable[GGUFTensor]) -> Iterator[tuple[str, GGUFTensor]]:
    """The model's names of experts' modules, and their weights, as ``apart`` gives them."""
    for tensor in tensors:
        found = _ALONE.match(tensor.name)
        if found is not None and found[4] == "weight":
            for block in BLOCKS:
                yield f"model.layers.{found[1]}.{block}.experts.{found[3]}.{found[2]}_proj", tensor


def layer_of(name: str) -> int | None:
    """The layer that a tensor belongs to."""
    found = _LAYER.match(name)
    return None if found is None else int(found[1])
