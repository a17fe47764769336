"""Names that stand for implementations."""

from __future__ import annotations

import pytest

from executor.config import QUANTIZATION_ALIASES, QUANTIZATIONS
from executor.quantization.base import AT_LOAD, REGISTRY
from executor.registry import resolve


def test_names_stand_for_what_a_module_has() -> None:
    assert resolve({"own": f"{__name__}:{resolve.__name__}"}, "own", "function") is resolve


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"^unknown colour 'red'; choose from blue, green$"):
        resolve({"green": "nowhere:nothing", "blue": "nowhere:nothing"}, "red", "colour")


def test_the_flag_knows_the_quantisations() -> None:
    names = REGISTRY.keys() | AT_LOAD.keys() | QUANTIZATION_ALIASES.keys()
    assert set(QUANTIZATIONS) == names | {"none", "auto-round"}
    assert set(QUANTIZATION_ALIASES.values()) <= REGISTRY.keys()
