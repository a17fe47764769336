"""The ``quantization_config`` of compressed-tensors (llm-compressor)."""

from __future__ import annotations

import re
from typing import Any

import msgspec
from msgspec import Struct

from executor.quantization.fields import check_blocks

FORMATS = {
    "pack-quantized": "int",
    "int-quantized": "int",
    "float-quantized": "float",
    "mxfp4-pack-quantized": "float",
    "nvfp4-pack-quantized": "float",
}
"""How weights are stored, and the type of their numbers."""
OLD_FORMATS = {("naive-quantized", "int"): "int-quantized", ("naive-quantized", "float"): "float-quantized"}
ORDERS = (None, False, "weight", "static", "group", "dynamic", True)
"""Values of ``actorder``; the last three store the group of each column."""


class Activations(Struct, frozen=True, kw_only=True):
    """How inputs of some modules are quantised, beside their weights."""

    num_bits: int = 8
    type: str = "int"
    symmetric: bool = True
    strategy: str | None = None
    dynamic: bool | str = False

    @property
    def is_int8_per_token(self) -> bool:
        kind = (self.num_bits, self.type, self.strategy)
        return kind == (8, "int", "token") and self.symmetric and self.dynamic is True


class Scheme(Struct, frozen=True, kw_only=True):
    """How the weights of some modules are quantised."""

    num_bits: int
    type: str = "int"
    symmetric: bool = True
    strategy: str = "channel"
    group_size: int | None = None
    block_structure: list[int] | None = None
    actorder: Any = None
    format: str = "pack-quantized"
    """A key of ``FORMATS``."""
    has_int8_inputs: bool = False
    """Whether inputs are rounded to 8 bits, each row of them with a scale of its own."""

    @property
    def has_order(self) -> bool:
        """Whether columns belong to groups in an order of their own, which the checkpoint stores."""
        return self.actorder in ("group", "dynamic", True)

    def check(self) -> None:
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size must be at least 1, not {self.group_size}")
        if self.actorder not in ORDERS:
            raise ValueError(f"actorder must be group or weight, or null, not {str(self.actorder)[:100]!r}")
        if self.has_order and self.strategy != "group":
            raise ValueError(f"actorder {self.actorder!r} needs the strategy group, not {self.strategy!r}")
        if FORMATS[self.format] != self.type:
            raise ValueError(f"weights of type {self.type!r} do not have the format {self.format!r}")
        if self.type == "int":
            self._check_integers()
        elif self.format == "float-quantized":
            self._check_fp8()
        else:
            size = 32 if self.format.startswith("mx") else 16
            if self.num_bits != 4 or self.group_size != size:
                raise ValueError(f"the format {self.format} must have 4 bits in groups of {size}")

    def _check_integers(self) -> None:
        if self.num_bits not in (2, 3, 4, 8):
            raise ValueError(f"num_bits must be 2, 3, 4 or 8, not {self.num_bits}")
        is_group = self.strategy == "group"
        if self.strategy not in ("tensor", "channel", "group") or is_group != bool(self.group_size):
            raise ValueError(
                f"the strategy {self.strategy!r} of weights must be tensor or channel, or group with a group_size"
            )
        if self.format == "int-quantized" and not self.symmetric:
            raise ValueError("weights of the format int-quantized must be symmetric")

    def _check_fp8(self) -> None:
        if self.num_bits != 8:
            raise ValueError(f"the format float-quantized must have 8 bits, not {self.num_bits}")
        if self.strategy not in ("tensor", "channel", "block"):
            raise ValueError(f"the strategy {self.strategy!r} of FP8 weights must be tensor, channel or block")
        if self.strategy == "block":
            check_blocks("block_structure", self.block_structure)


class Group(Struct, frozen=True, kw_only=True):
    targets: list[str]
    weights: Scheme | None = None
    input_activations: Activations | None = None
    format: str | None = None


class CompressedFields(Struct, frozen=True, kw_only=True):
    """As compressed-tensors writes it."""

    config_groups: dict[str, Group]
    ignore: list[str] | None = None
    format: str | None = None
    transform_config: Any = None
    sparsity_config: dict[str, Any] | None = None
    kv_cache_scheme: dict[str, Any] | None = None

    def check(self) -> None:
        if self.transform_config:
            raise ValueError("transform_config is not supported yet; serve a model without transforms")
        if (self.sparsity_config or {}).get("format", "dense") != "dense":
            raise ValueError("sparsity_config is not supported yet; save the model with the format dense")
        for group in self.config_groups.values():
            if group.weights is not None:
                self._scheme(group, group.weights).check()
            _is_target("", group.targets)
        _is_target("", self.ignore or [])

    def _scheme(self, group: Group, weights: Scheme) -> Scheme:
        form = group.format or self.format
        form = OLD_FORMATS.get((form or "", weights.type), form)
        if form not in FORMATS:
            raise ValueError(f"the format {form!r} is not supported yet; use {', '.join(FORMATS)}")
        activations = group.input_activations
        return msgspec.structs.replace(
            weights, format=form, has_int8_inputs=activations is not None and activations.is_int8_per_token
        )

    def of_module(self, name: str) -> Scheme | None:
        """How a linear module is quantised; None: it is not."""
        if _is_target(name, self.ignore or []):
            return None
        for group in self.config_groups.values():
            if group.weights is not None and _is_target(name, group.targets):
                return self._scheme(group, group.weights)
        return None


def _is_target(name: str, targets: list[str]) -> bool:
    """Whether a list has a linear module: its name, the class, or an expression after ``re:``."""
    return any(
        re.match(each[3:], name) is not None if each.startswith("re:") else each in (name, "Linear") for each in targets
    )
