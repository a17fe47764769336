"""The adapters that a server starts with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from api.flags import ConfigError


class LoRAModule(NamedTuple):
    """An entry of ``--lora-modules``."""

    name: str
    path: str
    scale: float = 1.0
    """Factor of what the adapter adds."""


class _Entry(msgspec.Struct):
    """The same as JSON."""

    name: str
    path: str
    base_model_name: str | None = None
    scale: float = 1.0


def lora_modules(entries: Sequence[str]) -> list[LoRAModule]:
    """The adapters that ``--lora-modules`` names, each as ``name=path`` or as a JSON object.

    Raises:
        ConfigError: An entry is neither, or two have the same name.
    """
    modules: list[LoRAModule] = []
    for entry in entries:
        if entry.lstrip().startswith("{"):
            try:
                read = msgspec.json.decode(entry, type=_Entry)
            except msgspec.DecodeError as error:
                raise ConfigError(f"--lora-modules: {error}, got {entry!r}") from None
            module = LoRAModule(read.name, read.path, read.scale)
        else:
            module = LoRAModule(*entry.partition("=")[::2])
        if not module.name or not module.path:
            raise ConfigError(f"--lora-modules: expected name=path or a JSON object with name and path, got {entry!r}")
        if any(module.name == other.name for other in modules):
            raise ConfigError(f"--lora-modules: two adapters are named {module.name!r}")
        modules.append(module)
    return modules
