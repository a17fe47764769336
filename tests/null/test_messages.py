"""Messages between processes: each class and each field says what it is."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def undocumented(source: str) -> list[str]:
    """Classes without a docstring, and fields and members of enumerations without a text below them."""
    missing = []
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        if ast.get_docstring(node) is None:
            missing.append(node.name)
        for field, after in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                target: ast.expr = field.target
            elif isinstance(field, ast.Assign):
                (target,) = field.targets
            else:
                continue
            has_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if not has_text:
                missing.append(f"{node.name}.{ast.unparse(target)}")
    return missing


@pytest.mark.parametrize("floor", ["engine_core", "executor"])
def test_every_field_is_described(floor: str) -> None:
    assert not undocumented((ROOT / floor / "messages.py").read_text())


def test_what_is_missing_is_found() -> None:
    source = 'class A:\n    x: int\n    y: int = 0\n    """A number."""\n    Z = 1\n'
    assert undocumented(source) == ["A", "A.x", "A.Z"]
