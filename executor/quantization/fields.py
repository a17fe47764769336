"""The ``quantization_config`` of config.json for each method, and what of it is supported. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import msgspec
from msgspec import Struct, field

from executor.base import ModelError


class GPTQFields(Struct, frozen=True, kw_only=True):
    """As AutoGPTQ, GPTQModel and auto-round write it."""

    bits: int
    group_size: int = 128
    """-1: all columns."""
    desc_act: bool = False
    sym: bool = True
    quant_method: str = "gptq"
    checkpoint_format: str | None = None
    format: str | None = None
    lm_head: bool = False
    dynamic: dict[str, dict[str, Any]] | None = None
    """Expressions for names of modules, after ``-:`` for those that are not quantised, and fields that differ there."""
    modules_in_block_to_quantize: list[list[str] | str] | None = None
    modules_to_not_convert: list[str] | None = None
    extra_config: dict[str, dict[str, Any]] | None = None
    """auto-round's fields that differ for a module; one of 16 bits is not quantised."""

    def check(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise ValueError(f"bits must be 2, 3, 4 or 8, not {self.bits}")
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(f"group_size must be -1 or at least 1, not {self.group_size}")
        if self.layout not in ("gptq", "gptq_v2"):
            raise ValueError(f"the format {self.layout!r} is not supported; save the model as gptq or gptq_v2")
        for module in self.extra_config or {}:
            own = self.of_module(module)
            if own is not None and own.extra_config is None:
                own.check()
        for module, changes in self.overrides().items():
            try:
                re.compile(module)
                msgspec.structs.replace(self, dynamic=None, **changes).check()
            except (TypeError, ValueError, re.error) as error:
                raise ValueError(f"dynamic: {module!r}: {error}") from None

    @property
    def layout(self) -> str:
        return self.checkpoint_format or self.format or "gptq"

    def overrides(self) -> dict[str, dict[str, Any]]:
        """Fields that differ for modules whose names match an expression."""
        return {name.removeprefix("+:"): each for name, each in (self.dynamic or {}).items() if name[:2] != "-:"}

    def of_module(self, name: str) -> GPTQFields | None:
        """The fields of a module; None: it is not quantised."""
        if self.modules_to_not_convert and is_listed(name, self.modules_to_not_convert):
            return None
        if self.modules_in_block_to_quantize is not None:
            listed = [each for group in self.modules_in_block_to_quantize for each in _several(group)]
            if not any(name.endswith(f".{each}") for each in listed):
                return None
        if self.extra_config and name in self.extra_config:
            own = self.extra_config[name]
            fields = {"bits", "group_size", "sym"} & own.keys()
            changed = msgspec.structs.replace(self, extra_config=None, **{each: own[each] for each in fields})
            return None if changed.bits == 16 else changed
        for pattern, changes in (self.dynamic or {}).items():
            if pattern.startswith("-:"):
                if re.match(pattern[2:], name):
                    return None
            elif re.match(pattern.removeprefix("+:"), name):
                return msgspec.structs.replace(self, dynamic=None, **changes)
        return self


def _several(names: str | list[str]) -> list[str]:
    return [names] if isinstance(names, str) else names


class AWQFields(Struct, frozen=True, kw_only=True):
    """As AutoAWQ writes it; ``w_bit`` and ``q_group_size`` are its older names."""

    bits: int = field(default=4)
    group_size: int = 128
    zero_point: bool = True
    version: str = "gemm"
    modules_to_not_convert: list[str] | None = None
    extra_config: dict[str, dict[str, Any]] | None = None
    """As of GPTQ."""

    def check(self) -> None:
        if self.bits != 4:
            raise ValueError(f"bits must be 4, not {self.bits}")
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(f"group_size must be -1 or at least 1, not {self.group_size}")
        if self.version.lower() != "gemm":
            raise ValueError(f"version {self.version!r} is not supported; save the model with version gemm")

    def of_module(self, name: str) -> AWQFields | None:
        """The fields of a module; None: it is not quantised."""
        own = (self.extra_config or {}).get(name, {})
        if own.get("bits") == 16 or is_listed(name, self.modules_to_not_convert or []):
            return None
        return self


class IntegerScheme(Struct, frozen=True, kw_only=True):
    """How compressed-tensors quantised the weights of some modules."""

    num_bits: int
    type: str = "int"
    symmetric: bool = True
    strategy: str = "channel"
    group_size: int | None = None
    actorder: Any = None
    is_packed: bool = True

    def check(self) -> None:
        if self.type != "int":
            raise ValueError(f"weights of type {self.type!r} are not supported yet; use integers")
        if self.num_bits not in (4, 8):
            raise ValueError(f"num_bits must be 4 or 8, not {self.num_bits}")
        if self.strategy not in ("channel", "group") or (self.strategy == "group") != bool(self.group_size):
            raise ValueError(f"the strategy {self.strategy!r} of weights must be channel, or group with a group_size")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size must be at least 1, not {self.group_size}")
        if self.actorder == "group":
            raise ValueError("the actorder 'group' is not supported yet; use static, or a GPTQ checkpoint")
        if not self.is_packed and (self.num_bits != 8 or not self.symmetric):
            raise ValueError("the format int-quantized must have 8 bits, symmetric")


class CompressedGroup(Struct, frozen=True, kw_only=True):
    targets: list[str]
    weights: IntegerScheme | None = None
    input_activations: dict[str, Any] | None = None
    format: str | None = None


class CompressedFields(Struct, frozen=True, kw_only=True):
    """As compressed-tensors writes it."""

    config_groups: dict[str, CompressedGroup]
    ignore: list[str] | None = None
    format: str | None = None
    transform_config: Any = None
    kv_cache_scheme: Any = None

    def check(self) -> None:
        if self.transform_config:
            raise ValueError("transform_config is not supported yet; serve a model without transforms")
        if self.kv_cache_scheme:
            raise ValueError("kv_cache_scheme is not supported yet; serve a model without it")
        for group in self.config_groups.values():
            if group.input_activations and not group.input_activations.get("dynamic"):
                raise ValueError("input_activations must be dynamic; static scales are not supported yet")
            form = group.format or self.format
            if form not in ("pack-quantized", "int-quantized") or group.weights is None:
                raise ValueError(f"the format {form!r} is not supported yet; use pack-quantized or int-quantized")
            msgspec.structs.replace(group.weights, is_packed=form == "pack-quantized").check()

    def of_module(self, name: str) -> IntegerScheme | None:
        """How a linear module is quantised; None: it is not."""
        if _is_target(name, self.ignore or []):
            return None
        for group in self.config_groups.values():
            if group.weights is not None and _is_target(name, group.targets):
                return msgspec.structs.replace(
                    group.weights, is_packed=(group.format or self.format) == "pack-quantized"
                )
        return None


def _is_target(name: str, targets: list[str]) -> bool:
    """Whether a list has a linear module: its name, the class, or an expression after ``re:``."""
    return any(
        re.match(each[3:], name) is not None if each.startswith("re:") else each in (name, "Linear") for each in targets
    )


def is_listed(name: str, exceptions: list[str]) -> bool:
    """Whether a list of exceptions has a module, one that it is in, or parts of its name, as transformers reads it."""
    return any(f".{each}." in f".{name}." or name.startswith(each) for each in exceptions)


F = TypeVar("F", GPTQFields, AWQFields, CompressedFields)


def compressed_fields(values: Mapping[str, Any]) -> CompressedFields:
    """Raises as ``check_fields`` does."""
    return _read(CompressedFields, values)


def auto_round_method(values: Mapping[str, Any]) -> str:
    """The method whose tensors a checkpoint of auto-round has.

    Raises:
        ModelError: It is not supported.
    """
    packing = str(values.get("packing_format") or values.get("backend") or "")
    for method in ("gptq", "awq"):
        if method in packing:
            return method
    raise ModelError(
        f"quantization_config: packing_format {packing[:100]!r} is not supported; save the model as auto_gptq or "
        "auto_awq"
    )


def check_fields(method: str, values: Mapping[str, Any]) -> None:
    """Checks the fields of a method that has any.

    Raises:
        ModelError: One is invalid, or asks for something that is not supported.
    """
    if method in READERS:
        READERS[method](values)


def gptq_fields(values: Mapping[str, Any]) -> GPTQFields:
    """Raises as ``check_fields`` does."""
    return _read(GPTQFields, values)


def awq_fields(values: Mapping[str, Any]) -> AWQFields:
    """Raises as ``check_fields`` does."""
    return _read(AWQFields, values)


def _read(kind: type[F], values: Mapping[str, Any]) -> F:
    old = {"w_bit": "bits", "q_group_size": "group_size"}
    try:
        result = msgspec.convert({old.get(name, name): value for name, value in values.items()}, kind)
        result.check()
    except (msgspec.ValidationError, TypeError, ValueError, re.error) as error:
        raise ModelError(f"quantization_config: {str(error)[:300]}") from error
    return result


READERS: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "awq": awq_fields,
    "compressed-tensors": compressed_fields,
    "gptq": gptq_fields,
}
"""By ``quant_method``."""
