"""The ``quantization_config`` of config.json for GPTQ, AWQ and bitsandbytes, and what of it is supported.

Needs no torch, as all modules of fields.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

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
            raise ValueError(f"bits must be 2, 3, 4 or 8, not {self.bits!r}")
        is_listed("", self.modules_to_not_convert or [])
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
        is_listed("", self.modules_to_not_convert or [])
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


class BitsAndBytesFields(Struct, frozen=True, kw_only=True):
    """As transformers writes it."""

    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: str = "fp4"
    bnb_4bit_quant_storage: str = "uint8"
    bnb_4bit_use_double_quant: bool = False
    llm_int8_skip_modules: list[str] | None = None

    def check(self) -> None:
        if self.load_in_4bit == self.load_in_8bit:
            raise ValueError("one of load_in_4bit and load_in_8bit must be true")
        is_listed("", self.llm_int8_skip_modules or [])
        if self.bnb_4bit_quant_type not in ("nf4", "fp4"):
            raise ValueError(f"bnb_4bit_quant_type must be nf4 or fp4, not {self.bnb_4bit_quant_type!r}")
        if self.load_in_4bit and self.bnb_4bit_quant_storage != "uint8":
            raise ValueError(
                f"bnb_4bit_quant_storage {self.bnb_4bit_quant_storage!r} is not supported; save the model with uint8"
            )

    def has_module(self, name: str) -> bool:
        """Whether a linear module is quantised."""
        if self.llm_int8_skip_modules is None:
            return not name.endswith("lm_head")
        return not is_listed(name, self.llm_int8_skip_modules)


class FP8Fields(Struct, frozen=True, kw_only=True):
    """As transformers, AutoFP8 and DeepSeek write it, and FBGEMM for weights with a scale for each row."""

    quant_method: str = "fp8"
    activation_scheme: str = "dynamic"
    weight_block_size: list[int] | None = None
    fmt: str = "e4m3"
    modules_to_not_convert: list[str] | None = None
    ignored_layers: list[str] | None = None
    """The same, as AutoFP8 calls it."""
    modules_to_convert: list[str] | None = None

    def check(self) -> None:
        if self.activation_scheme not in ("dynamic", "static"):
            raise ValueError(f"activation_scheme must be dynamic or static, not {self.activation_scheme!r}")
        if self.weight_block_size is not None:
            check_blocks("weight_block_size", self.weight_block_size)
        if self.fmt not in ("e4m3", "float8_e4m3fn"):
            raise ValueError(f"fmt must be e4m3, not {self.fmt!r}")
        if self.modules_to_convert:
            raise ValueError("modules_to_convert is not supported yet; quantise linear layers alone")
        is_listed("", self.exceptions)

    @property
    def exceptions(self) -> list[str]:
        return [*(self.modules_to_not_convert or []), *(self.ignored_layers or [])]

    def has_module(self, name: str) -> bool:
        """Whether a linear module is quantised."""
        return not is_listed(name, self.exceptions)


class MXFP4Fields(Struct, frozen=True, kw_only=True):
    """As transformers writes it for gpt-oss, of whose weights only those of experts are quantised."""

    modules_to_not_convert: list[str] | None = None

    def check(self) -> None:
        is_listed("", self.modules_to_not_convert or [])

    def has_module(self, name: str) -> bool:
        """Whether a linear module is quantised."""
        return ".experts." in name and not is_listed(name, self.modules_to_not_convert or [])


def check_blocks(name: str, sizes: list[int] | None) -> None:
    """Raises ValueError: These are no sizes of blocks, or columns that share a scale are no multiple of 32."""
    if sizes is None or len(sizes) != 2 or sizes[0] < 1 or sizes[1] < 1 or sizes[1] % 32:
        raise ValueError(f"{name} must be the rows and columns of a block, the latter a multiple of 32, not {sizes}")


def is_listed(name: str, exceptions: list[str]) -> bool:
    """Whether a list of exceptions has a module, one that it is in, or parts of its name, as transformers reads it.

    Entries may be expressions.

    Raises:
        re.error: An expression is invalid.
    """
    return any(
        f".{each}." in f".{name}." or name.endswith(each) or re.match(rf"(?:{each})(?:(?<=\.)|(?=\.|$))", name)
        for each in exceptions
    )


class Checked(Protocol):
    """Fields of a method."""

    def check(self) -> None:
        """Raises ValueError, TypeError or re.error: A field is invalid, or asks for something that is not supported."""


F = TypeVar("F", bound=Checked)


def read(kind: type[F], values: Mapping[str, Any]) -> F:
    """The fields of a method that has ``quantization_config``.

    Raises:
        ModelError: One is invalid, or asks for something that is not supported.
    """
    old = {"w_bit": "bits", "q_group_size": "group_size"}
    try:
        result = msgspec.convert({old.get(name, name): value for name, value in values.items()}, kind)
        result.check()
    except (msgspec.ValidationError, TypeError, ValueError, re.error) as error:
        raise ModelError(f"quantization_config: {str(error)[:300]}") from error
    return result
