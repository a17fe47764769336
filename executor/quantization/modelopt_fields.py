"""The ``quantization_config`` of NVIDIA's Model Optimizer, which older releases wrote to hf_quant_config.json."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from msgspec import Struct

ALGORITHMS = ("FP8", "NVFP4")


class ModelOptFields(Struct, frozen=True, kw_only=True):
    quant_algo: str
    kv_cache_quant_algo: str | None = None
    kv_cache_scheme: dict[str, Any] | None = None
    """The same, in config.json."""
    group_size: int | None = None
    exclude_modules: list[str] | None = None
    ignore: list[str] | None = None
    """The same, in config.json."""

    def check(self) -> None:
        if self.quant_algo not in ALGORITHMS:
            raise ValueError(f"quant_algo {self.quant_algo!r} is not supported yet; use {' or '.join(ALGORITHMS)}")
        if self.quant_algo == "NVFP4" and self.group_size not in (None, 16):
            raise ValueError(f"group_size must be 16, not {self.group_size}")

    def has_module(self, name: str) -> bool:
        """Whether a linear module is quantised. Exceptions are names with wildcards, of a module or one around it."""
        exceptions = [*(self.exclude_modules or []), *(self.ignore or [])]
        return not any(fnmatchcase(name, each) or fnmatchcase(name, f"{each}.*") for each in exceptions)
