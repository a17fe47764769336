"""Implementations by name: a registry maps names to ``"module:attribute"`` strings.

The names are known without importing the implementations.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any


def resolve(registry: Mapping[str, str], name: str, what: str) -> Any:
    """Imports the implementation registered under a name.

    Args:
        registry: Name -> ``"module:attribute"``.
        name: The name to look up.
        what: Kind of thing the registry holds, for the error message: "device".

    Raises:
        ValueError: The name is unknown; the message lists the known ones.
    """
    if name not in registry:
        raise ValueError(f"unknown {what} {name!r}; choose from {', '.join(sorted(registry))}")
    module, _, attribute = registry[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
