"""Adapters in PEFT's format: ``adapter_config.json``, and tensors named after the modules that they change."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from executor.adapter_files import CONFIG, AdapterFiles
from executor.base import ModelError
from executor.checkpoint import StoredTensor, parse_safetensors
from executor.hf_config import Fields, shorten

MAX_PATTERN = 256
"""Characters of a pattern of modules."""
MAX_REPEATS = 4
"""Repetitions in such a pattern: with more, or repeated groups, matching might take forever."""
PREFIX = "base_model.model."
REFUSED = {
    "alora_invocation_tokens": "activated adapters (aLoRA)",
    "arrow_config": "Arrow's routing",
    "layer_replication": "replicated layers",
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QA-LoRA",
}
"""Fields that change what an adapter computes, and what they ask for."""

_NAME = "(?:\\.default)?"
LEAVES = (
    ("a", re.compile(rf"^(.*)\.lora_A{_NAME}\.weight$")),
    ("b", re.compile(rf"^(.*)\.lora_B{_NAME}\.weight$")),
    ("b_bias", re.compile(rf"^(.*)\.lora_B{_NAME}\.bias$")),
    ("table_a", re.compile(rf"^(.*)\.lora_embedding_A{_NAME}$")),
    ("table_b", re.compile(rf"^(.*)\.lora_embedding_B{_NAME}$")),
    ("magnitude", re.compile(rf"^(.*)\.lora_magnitude_vector{_NAME}(?:\.weight)?$")),
    ("vectors", re.compile(r"^(.*?)(?:\.token_adapter)?\.trainable_tokens_delta$")),
    ("bias", re.compile(rf"^(.*?)(?:\.base_layer|\.modules_to_save{_NAME})?\.bias$")),
    ("weight", re.compile(rf"^(.*?)(?:\.base_layer|\.modules_to_save{_NAME})?\.weight$")),
)
"""What the tensors of a module are, by the ends of their names."""
_ORIGINAL = re.compile(r"\.original_module\.(?:weight|bias)$")
_WRAPPED = re.compile(rf"\.modules_to_save{_NAME}(?=\.(?:weight|bias)$)")


@dataclass(frozen=True)
class PeftConfig:
    """The fields of adapter_config.json that say what an adapter computes."""

    source: str
    rank: int
    alpha: float
    use_rslora: bool = False
    rank_pattern: Mapping[str, float] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    token_indices: Mapping[str, list[int]] = field(default_factory=dict)
    """Tokens with vectors of their own, by the last component of the table's name; empty name: of any."""
    scale: float = 1.0
    """Factor of all products."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Ranks of modules by their names, which patterns would take too long to find."""

    def factor(self, module: str, rank: int) -> float:
        """The factor of a module's product with A and B."""
        alpha = _of_module(self.alpha_pattern, module, self.alpha)
        return self.scale * alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def rank_of(self, module: str) -> int:
        return self.ranks.get(module) or int(_of_module(self.rank_pattern, module, self.rank))


def _of_module(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first pattern that matches the end of a module's name, as PEFT chooses it."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def read_config(document: bytes, path: Path) -> PeftConfig:
    """Reads adapter_config.json.

    Raises:
        ModelError: It is not one, or asks for something that is not supported; the message names the field.
    """
    source = str(path / CONFIG)
    try:
        values = json.loads(document)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{source}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{source}: not a JSON object")
    fields = Fields(values, source)
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise ModelError(f"{source}: peft_type is {shorten(repr(kind))}; only LORA adapters are supported")
    for name, meaning in REFUSED.items():
        if fields.get(name):
            raise ModelError(f"{source}: {name}: {meaning} are not supported yet; merge the adapter into the model")
    return PeftConfig(
        source,
        fields.size("r"),
        fields.number("lora_alpha", 8.0),
        fields.boolean("use_rslora", False),
        _patterns(fields, "rank_pattern"),
        _patterns(fields, "alpha_pattern"),
        _token_indices(fields),
    )


def _patterns(fields: Fields, name: str) -> dict[str, float]:
    """A field with a number for each pattern of modules."""
    if not fields.has(name):
        return {}
    value = fields.get(name)
    if not isinstance(value, dict):
        fields.bad(name, "an object")
    result = {}
    for pattern in value:
        number = Fields(value, f"{fields.source}: {name}").positive(pattern)
        if (
            len(pattern) > MAX_PATTERN
            or len(re.findall(r"[*+{]", pattern)) > MAX_REPEATS
            or re.search(r"\)[*+{?]", pattern)
        ):
            raise ModelError(f"{fields.source}: {name}: {shorten(pattern)!r} is too complex a pattern of modules")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ModelError(f"{fields.source}: {name}: {shorten(pattern)!r} is no pattern: {error}") from error
        result[pattern] = number
    return result


def _token_indices(fields: Fields) -> dict[str, list[int]]:
    """``trainable_token_indices``: a list, or one for each table."""
    if not fields.has("trainable_token_indices"):
        return {}
    value: Any = fields.get("trainable_token_indices")
    by_name = value if isinstance(value, dict) else {"": value}
    for indices in by_name.values():
        if not isinstance(indices, list) or not all(type(index) is int and index >= 0 for index in indices):
            fields.bad("trainable_token_indices", "lists of token ids")
    return by_name


@dataclass
class ModuleTensors:
    """The tensors of one module, as stored."""

    name: str
    """Its name in the adapter, without the prefix."""
    stored: dict[str, StoredTensor] = field(default_factory=dict)
    """By what they are; see ``LEAVES``."""

    def add(self, kind: str, tensor: StoredTensor) -> None:
        """Adds a tensor.

        Raises:
            ModelError: There is one of its kind.
        """
        other = self.stored.setdefault(kind, tensor)
        if other is not tensor:
            raise ModelError(
                f"{tensor.origin}: a second {kind} of {shorten(self.name)!r}, after {shorten(other.name)!r}"
            )

    def read(self, kind: str, *shape: int) -> Tensor:
        """A tensor, in float32 or the type that it is stored as.

        Args:
            kind: What it is.
            shape: The shape that it must have; -1: any.

        Raises:
            ModelError: It is missing, of another shape, not of numbers, or not all of them are finite.
        """
        if kind not in self.stored:
            raise ModelError(f"the adapter has no {kind} of {shorten(self.name)!r}")
        stored = self.stored[kind]
        try:
            tensor = stored.read(torch.float32)
        except ValueError as error:
            raise ModelError(f"{stored.origin} {error}") from error
        if kind == "magnitude" and tensor.dim() > 1:
            tensor = tensor.flatten()
        if tensor.dim() != len(shape) or any(
            size not in (-1, actual) for size, actual in zip(shape, tensor.shape, strict=True)
        ):
            expected = ", ".join("any" if size < 0 else str(size) for size in shape)
            raise ModelError(f"{stored.origin} has shape {list(tensor.shape)}, the model needs [{expected}]")
        if tensor.numel() and not torch.isfinite(tensor.abs().max()):  # NaN is the largest
            raise ModelError(f"{stored.origin} has numbers that are not finite")
        return tensor


def read_modules(files: AdapterFiles) -> dict[str, ModuleTensors]:
    """The tensors of an adapter by module.

    Raises:
        ModelError: The file is corrupt, or a tensor is of an unknown kind, or there twice.
    """
    modules: dict[str, ModuleTensors] = {}
    tensors = parse_safetensors(files.path / "adapter_model.safetensors", files.weights)
    names = {tensor.name for tensor in tensors}
    for tensor in tensors:
        # With embedding layers, PEFT saves all that wraps them: the weight once more, and the one that it replaces.
        plain = _WRAPPED.sub("", tensor.name)
        if _ORIGINAL.search(tensor.name) or (plain != tensor.name and plain in names):
            continue
        name = tensor.name.removeprefix(PREFIX)
        for kind, pattern in LEAVES:
            found = pattern.match(name)
            if found is not None:
                modules.setdefault(found[1], ModuleTensors(found[1])).add(kind, tensor)
                break
        else:
            raise ModelError(f"{tensor.origin} is of a kind that is not supported")
    if not modules:
        raise ModelError(f"{files.path}: the adapter has no tensors")
    return modules
