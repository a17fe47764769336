"""How a seam finds its implementations: a registry maps names to ``"module:attribute"`` strings.

The names are known without importing what they stand for.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any


def resolve(registry: Mapping[str, str], name: str, what: str) -> Any:
    """Imports what a registry has under a name.

    Args:
        registry: Name -> ``"module:attribute"``.
        name: As a person or a file says it.
        what: What the names are names of, for the error: "device".

    Raises:
        ValueError: The name is not in the registry; the message lists those that are.
    """
    if name not in registry:
        raise ValueError(f"unknown {what} {name!r}; choose from {', '.join(sorted(registry))}")
    module, _, attribute = registry[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
