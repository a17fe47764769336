"""Which elements of a checkpoint's tensor a parameter holds."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import pytest
import torch

from executor.layers.parameter import Part, Range, WeightParameter, single, stored_module
from executor.parallel import Share


def load(parts: Mapping[Any, tuple[Part, ...]], **tensors: torch.Tensor) -> torch.Tensor:
    parameter = WeightParameter.empty(parts, dtype=torch.int64, device=torch.device("cpu"))
    parameter.data.fill_(-1)
    for name, tensor in tensors.items():
        parameter.load(tensor, name)
    return parameter.data


def test_a_share_is_a_range() -> None:
    assert Part.share(12, Share(8, 4), offset=5) == Part(12, (Range(8, 4, 5),))


def test_ranges_go_where_they_say() -> None:
    part = Part(10, (Range(7, 3, 0), Range(1, 2, 4)))
    assert (part.size, part.end) == (5, 6)
    assert load({"x": (part,)}, x=torch.arange(10)).tolist() == [7, 8, 9, -1, 1, 2]
    grid = torch.arange(100).view(10, 10)
    loaded = load({"x": (part, part)}, x=grid)
    assert loaded.shape == (6, 6)
    assert torch.equal(loaded[[0, 1, 2, 4, 5]][:, [0, 1, 2, 4, 5]], grid[[7, 8, 9, 1, 2]][:, [7, 8, 9, 1, 2]])
    assert loaded[3].tolist() == [-1] * 6


def test_tensors_one_after_another_in_a_tensor() -> None:
    shares = [Part.piece(6, 2, 3, offset=0), Part.piece(4, 0, 2, offset=3), Part.piece(4, 3, 1, offset=5)]
    joined = Part.joined(shares)
    assert joined == Part(14, (Range(2, 3, 0), Range(6, 2, 3), Range(13, 1, 5)))
    assert load({"x": (joined,)}, x=torch.arange(14)).tolist() == [2, 3, 4, 6, 7, 13]
    assert shares[2].alone() == Part.piece(4, 3, 1)


def test_a_stack_has_a_tensor_for_each_element() -> None:
    parts = {f"experts.{index}": (Part.element(index), Part.piece(4, 1, 2)) for index in range(3)}
    tensors = {f"experts.{index}": torch.arange(4) + 10 * index for index in (2, 0, 1)}
    assert load(parts, **tensors).tolist() == [[1, 2], [11, 12], [21, 22]]
    with pytest.raises(ValueError, match=r"has shape \[1, 4\], the model needs \[4\]"):
        load(parts, **{"experts.0": torch.zeros(1, 4)})


def test_units() -> None:
    part = Part.piece(96, 32, 48, offset=16)
    assert part.in_units_of(8) == Part.piece(12, 4, 6, offset=2)
    assert part.in_units_of(16) == Part.piece(6, 2, 3, offset=1)
    # Three bits a number: 32 numbers are three words.
    assert Part.piece(96, 32, 32, offset=64).in_units_of(Fraction(32, 3)) == Part.piece(9, 3, 3, offset=6)
    assert Part.element(3).in_units_of(1) == Part.element(3)


@pytest.mark.parametrize("part", [Part.piece(96, 8, 32), Part.piece(96, 0, 40), Part.piece(96, 0, 32, offset=8)])
def test_units_are_not_split(part: Part) -> None:
    with pytest.raises(ValueError, match="are not whole units of 16"):
        part.in_units_of(16)


def test_a_dimension_may_end_within_a_unit() -> None:
    assert Part.whole(100).in_units_of(16) == Part.whole(7)
    assert Part.piece(100, 64, 36).in_units_of(16) == Part.piece(7, 4, 3)
    assert Part.piece(100, 64, 32).in_units_of(Fraction(32, 3)) == Part.piece(10, 6, 3)
    assert Part.whole(100).in_units_of(Fraction(32, 3)) == Part.whole(10)


def test_names_of_shards() -> None:
    assert stored_module("model.layers.0.self_attn.qkv_proj", "k_proj") == "model.layers.0.self_attn.k_proj"
    assert stored_module("model.layers.0.mlp.experts", "experts.3.w1") == "model.layers.0.mlp.experts.3.w1"
    assert stored_module("lm_head", None) == "lm_head"
    assert stored_module("qkv", "q") == "q"


def test_a_tensor_of_another_shape_is_refused() -> None:
    parameter = WeightParameter.empty(single(Part.whole(3)), dtype=torch.float32, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"has shape \[4\], the model needs \[3\]"):
        parameter.load(torch.zeros(4))
