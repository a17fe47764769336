"""Adapters in llama.cpp's format: a GGUF file with ``NAME.lora_a`` and ``NAME.lora_b`` for tensors of the model."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFValueType
from gguf.tensor_mapping import TensorNameMap, get_tensor_name_map
from torch import Tensor

from executor.adapter_files import AdapterFiles
from executor.adapters.peft import ModuleTensors, PeftConfig
from executor.base import ModelError
from executor.checkpoint import StoredTensor
from executor.gguf import PLAIN_TYPES, SUFFIXES, dequantize_to, group, unpermute
from executor.gguf_architectures import ARCHITECTURES, Architecture
from executor.gguf_experts import gguf_name as expert_name
from executor.hf_config import HFConfig, shorten

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_ENTRIES = 1 << 20
MAX_DIMS = 4
LEAVES = re.compile(r"^(.*)\.(lora_[ab])$")
EXPERTS = re.compile(r"^(blk\.\d+\.ffn_(?:gate|up|down))_exps\.weight\.(lora_[ab])$")
_FORMATS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}


@dataclass(frozen=True)
class Entry:
    """A tensor of the file."""

    name: str
    shape: tuple[int, ...]
    """As in torch."""
    kind: GGMLQuantizationType
    offset: int
    num_bytes: int


class _Reader:
    """Takes numbers and strings from a document that may end anywhere."""

    def __init__(self, data: bytearray) -> None:
        self.data = data
        self.offset = 0

    def number(self, layout: str) -> Any:
        (value,) = struct.unpack_from(layout, self.data, self.offset)
        self.offset += struct.calcsize(layout)
        return value

    def count(self) -> int:
        count: int = self.number("<Q")
        if count > min(MAX_ENTRIES, len(self.data)):
            raise ValueError(f"{count} entries are too many")
        return count

    def text(self) -> str:
        length: int = self.number("<Q")
        if length > len(self.data) - self.offset:
            raise ValueError("a string is longer than the file")
        self.offset += length
        return self.data[self.offset - length : self.offset].decode("utf-8", "replace")

    def value(self, *, depth: int = 0) -> Any:
        return self.of_type(self.number("<I"), depth)

    def of_type(self, kind: int, depth: int) -> Any:
        if kind == GGUFValueType.STRING:
            return self.text()
        if kind == GGUFValueType.ARRAY:
            if depth:
                raise ValueError("lists of lists are not supported")
            inner = self.number("<I")
            return [self.of_type(inner, depth + 1) for _ in range(self.count())]
        if kind not in _FORMATS:
            raise ValueError(f"unknown type {kind}")
        return self.number(_FORMATS[GGUFValueType(kind)])


def read_entries(files: AdapterFiles) -> tuple[dict[str, Any], list[Entry]]:
    """The metadata and tensors of a file.

    Raises:
        ModelError: It is corrupt.
    """
    reader = _Reader(files.weights)
    try:
        if files.weights[:4] != MAGIC:
            raise ValueError("it does not begin with GGUF")
        reader.offset = 4
        if reader.number("<I") not in VERSIONS:
            raise ValueError(f"its version is none of {', '.join(map(str, VERSIONS))}")
        num_tensors, num_values = reader.count(), reader.count()
        metadata = {reader.text(): reader.value() for _ in range(num_values)}
        found = []
        for _ in range(num_tensors):
            name, dims = reader.text(), reader.number("<I")
            if dims > MAX_DIMS:
                raise ValueError(f"tensor {shorten(name)!r} has {dims} dimensions")
            shape = tuple(reader.number("<Q") for _ in range(dims))[::-1]
            kind, offset = GGMLQuantizationType(reader.number("<I")), reader.number("<Q")
            block, block_bytes = GGML_QUANT_SIZES[kind]
            if not shape or shape[-1] % block:
                raise ValueError(f"rows of tensor {shorten(name)!r} are not whole blocks")
            found.append(Entry(name, shape, kind, offset, math.prod(shape) // block * block_bytes))
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError("general.alignment is not a positive number")
        start = -(-reader.offset // alignment) * alignment
        for entry in found:
            if start + entry.offset + entry.num_bytes > len(files.weights):
                raise ValueError(f"truncated: the file ends before tensor {shorten(entry.name)!r} does")
        moved = [Entry(each.name, each.shape, each.kind, start + each.offset, each.num_bytes) for each in found]
    except (struct.error, ValueError, KeyError) as error:
        raise ModelError(f"{files.path}: not a GGUF file, or a damaged one: {error}") from error
    return metadata, moved


def read_gguf_adapter(
    files: AdapterFiles, config: HFConfig, modules: Iterable[str]
) -> tuple[PeftConfig, dict[str, ModuleTensors]]:
    """The tensors of an adapter by the model's names of modules.

    Args:
        files: The adapter.
        config: The model's configuration.
        modules: Names of the modules that can have adapters.

    Raises:
        ModelError: It is corrupt, of another architecture, or changes what cannot be changed.
    """
    metadata, entries = read_entries(files)
    if metadata.get("general.type") != "adapter" or metadata.get("adapter.type") != "lora":
        raise ModelError(f"{files.path}: general.type and adapter.type are not those of a LoRA adapter")
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in ARCHITECTURES or not ARCHITECTURES[arch].is_of(config.architecture):
        raise ModelError(
            f"{files.path}: general.architecture is {shorten(repr(arch))}, and the model is {config.architecture}"
        )
    names = Names(arch, config)
    known = {expert_name(f"{module}.weight") or names.gguf_name(module): module for module in modules}
    result: dict[str, ModuleTensors] = {}
    ranks: dict[str, int] = {}
    for entry in chain.from_iterable(map(_experts_apart, entries)):
        leaf = LEAVES.match(entry.name)
        module = None if leaf is None else known.get(leaf[1])
        if leaf is None or module is None:
            raise ModelError(f"{files.path}: the model has no layer for tensor {shorten(entry.name)!r}")
        kind = names.kind_of(leaf[1], leaf[2], entry)
        tensors = result.setdefault(module, ModuleTensors(module))
        read = partial(names.read, files.weights, entry, leaf[1], kind)
        origin = f"{files.path}: tensor {entry.name!r}"
        tensors.add(kind, StoredTensor(entry.name, origin, entry.num_bytes, read))
        if leaf[2] == "lora_b":
            ranks[module] = entry.shape[-1]
    alpha = metadata.get("adapter.lora.alpha", 0.0)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ModelError(f"{files.path}: adapter.lora.alpha is not a number")
    if not result:
        raise ModelError(f"{files.path}: the adapter has no tensors")
    return GGUFConfig(str(files.path), 1, float(alpha), ranks=ranks), result


class GGUFConfig(PeftConfig):
    """What the metadata says. Without alpha, products are added as they are."""

    def factor(self, module: str, rank: int) -> float:
        return super().factor(module, rank) if self.alpha else self.scale


def _experts_apart(entry: Entry) -> Iterator[Entry]:
    """The tensor itself, or one for each expert, named as in older files; see ``executor/gguf_experts.py``."""
    found = EXPERTS.match(entry.name)
    if found is None or len(entry.shape) != 3:
        yield entry
        return
    count = entry.num_bytes // max(entry.shape[0], 1)
    for expert in range(entry.shape[0]):
        name = f"{found[1]}.{expert}.weight.{found[2]}"
        yield Entry(name, entry.shape[1:], entry.kind, entry.offset + expert * count, count)


class Names:
    """llama.cpp's names and layouts of one model."""

    def __init__(self, arch: str, config: HFConfig) -> None:
        arch_id = next(key for key, value in MODEL_ARCH_NAMES.items() if value == arch)
        self.map: TensorNameMap = get_tensor_name_map(arch_id, config.num_layers)
        self.architecture: Architecture = ARCHITECTURES[arch]
        self.config = config
        self.known: Mapping[str, str] = {self._renamed(name): name for name in self.map.mapping}

    def _renamed(self, known: str) -> str:
        for pattern, replacement in self.architecture.renames:
            known = re.sub(pattern, replacement, known)
        return known

    def gguf_name(self, module: str) -> str:
        """llama.cpp's name of a module's weight."""
        name = f"{self.known.get(module, module)}.weight"
        return self.map.get_name(name, try_suffixes=SUFFIXES) or name

    def kind_of(self, name: str, leaf: str, entry: Entry) -> str:
        """What a tensor is; see ``ModuleTensors``."""
        if name == "token_embd.weight":
            return {"lora_a": "table_a", "lora_b": "table_b"}[leaf]
        return {"lora_a": "a", "lora_b": "b"}[leaf]

    def read(self, data: bytearray, entry: Entry, name: str, kind: str, dtype: torch.dtype) -> Tensor:
        """A tensor in the model's layout."""
        raw = np.frombuffer(data, np.uint8, entry.num_bytes, entry.offset)
        if entry.kind in PLAIN_TYPES:
            tensor = torch.from_numpy(raw.copy()).view(PLAIN_TYPES[entry.kind]).view(entry.shape).float()
        else:
            try:
                tensor = dequantize_to(raw, entry.kind, torch.float32).view(entry.shape)
            except NotImplementedError as error:
                raise ValueError(f"has type {entry.kind.name}, which is not supported") from error
        if kind == "table_a":
            return tensor.T.contiguous()
        return self._ordered(tensor, name) if kind == "b" else tensor

    def _ordered(self, b: Tensor, name: str) -> Tensor:
        """The rows of B as the model has those of the weight."""
        roles = {gguf_name: role for role, gguf_name in self.map.mapping.values()}
        role = roles.get(name.removesuffix(".weight"))
        architecture = self.architecture
        if role in architecture.by_head or role in architecture.transposed:
            raise ValueError("belongs to a matrix that the model has in another form")
        rows = b.contiguous().numpy().view(np.uint8).reshape(len(b), -1)
        if role is not None and role in architecture.permuted:
            rows = unpermute(rows, self.config.size(architecture.permuted[role]))
        elif role in architecture.ungrouped:
            rows = group(rows, self.config.size("num_attention_heads"), self.config.size("num_key_value_heads"))
        return torch.from_numpy(rows.copy()).view(torch.float32).view(b.shape)
