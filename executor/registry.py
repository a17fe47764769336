"""Implementations by name: a registry maps names to ``"module:attribute"`` strings.

The names are known without importing the implementations.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Iterable, Mapping
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


_KIND = re.compile(r"(forcausallm|lmheadmodel|forconditionalgeneration)$")


def advice(name: str, known: Iterable[str]) -> str:
    """What to choose instead of an architecture that is not supported: the closest names, and where all are listed."""
    stems = {_stem(each): each for each in known}
    closest = difflib.get_close_matches(_stem(name[:100]), stems, n=3, cutoff=0.65)
    names = f"the closest: {', '.join(map(stems.__getitem__, closest))}; " if closest else ""
    return f"{names}docs/models.md lists all"


def _stem(architecture: str) -> str:
    """The part of a name in which architectures differ."""
    return _KIND.sub("", architecture.lower())
