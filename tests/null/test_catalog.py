"""The table of model families in the documentation, the registry and the tests agree."""

from __future__ import annotations

import models_table

from executor.models.catalog import CATALOG
from executor.models.registry import ENCODERS, REGISTRY
from tests.families import FAMILIES


def test_the_documentation_has_the_table() -> None:
    page = models_table.TARGET.read_text()
    assert models_table.text(page) == page, "run scripts/models_table.py"
    assert page.count(models_table.START) == page.count(models_table.END) == 1


def test_every_architecture_is_in_one_row() -> None:
    listed = [name for entry in CATALOG for name in entry.architectures]
    assert sorted(listed) == sorted(REGISTRY | ENCODERS), "add the model to executor/models/catalog.py"


def test_every_architecture_is_tested() -> None:
    tested = {REGISTRY[family.own_model] for family in FAMILIES.values()}
    assert set(REGISTRY.values()) == tested, "add a row to tests/families.py"


def test_rows_are_in_order() -> None:
    names = [entry.name.lower() for entry in CATALOG]
    assert names == sorted(names)
