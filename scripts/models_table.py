#!/usr/bin/env python3
"""Writes the table of model families into docs/models.md."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from executor.models.catalog import CATALOG, ONE_RANK, ONE_STAGE, Entry  # noqa: E402
from executor.models.registry import ENCODERS  # noqa: E402

TARGET = ROOT / "docs" / "models.md"
START = "<!-- scripts/models_table.py writes this table -->\n"
END = "<!-- end of the table -->\n"
HEAD = """\
| family | `architectures` | examples | tested weights | in GGUF files | `-tp` | `-pp` | limits |
|---|---|---|---|---|---|---|---|
"""


def shared(entry: Entry, unshared: Mapping[str, str]) -> str:
    """Which of the architectures several ranks can share; ``unshared`` are those that they cannot."""
    if any(name in ENCODERS for name in entry.architectures):
        return ""
    own = [name for name in entry.architectures if name not in unshared]
    return "yes" if len(own) == len(entry.architectures) else ", ".join(f"`{name}`" for name in own)


def row(entry: Entry) -> str:
    tested = "random" + (f", {entry.real_weights}" if entry.real_weights else "")
    cells = (
        entry.name,
        ", ".join(f"`{name}`" for name in entry.architectures),
        ", ".join(entry.examples),
        tested,
        ", ".join(f"`{name}`" for name in entry.gguf),
        shared(entry, ONE_RANK),
        shared(entry, ONE_STAGE),
        entry.limits,
    )
    return "".join(f"| {cell} " if cell else "| " for cell in cells) + "|\n"


def table() -> str:
    """The table, between its marks."""
    return START + HEAD + "".join(map(row, CATALOG)) + END


def text(page: str) -> str:
    """The page with the table as it should be."""
    before, _, rest = page.partition(START)
    return before + table() + rest.partition(END)[2]


if __name__ == "__main__":
    TARGET.write_text(text(TARGET.read_text()))
