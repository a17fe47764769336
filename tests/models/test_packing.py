"""Layers are packed while others are still being loaded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from executor.layers.parameter import HUGE, Part, Parts, WeightParameter, Weights, single
from executor.packing import MAX_AHEAD, Packing, fill_with_random_numbers, in_threads

CPU = torch.device("cpu")
HALVES: Parts = {"a": (Part.whole(2), Part.whole(3)), "b": (Part.whole(2, offset=2), Part.whole(3))}


class Layer(Weights):
    """A weight of two checkpoint tensors and a bias."""

    def __init__(self, packed: list[str], name: str) -> None:
        super().__init__()
        self.weight = WeightParameter.empty(HALVES, dtype=torch.float32, device=CPU)
        self.bias = WeightParameter.empty(single(Part.whole(4)), dtype=torch.float32, device=CPU)
        self.packed, self.name = packed, name

    def pack(self) -> None:
        self.packed.append(self.name)


class Outer(Weights):
    def __init__(self, packed: list[str]) -> None:
        super().__init__()
        self.inner = Layer(packed, "inner")
        self.packed = packed

    def pack(self) -> None:
        self.packed.append("outer")


def test_a_layer_is_packed_with_its_last_tensor() -> None:
    packed: list[str] = []
    first, second = Layer(packed, "first"), Layer(packed, "second")
    packing = Packing(nn.ModuleList([first, second]))
    for parameter in (first.weight, second.bias, first.bias):
        packing.loaded(parameter)
        assert packed == []
    packing.loaded(first.weight)
    assert packed == ["first"]
    packing.loaded(second.weight, 2)
    assert packed == ["first", "second"]
    packing.finish()
    assert packed == ["first", "second"]


def test_weights_inside_weights_are_packed_together() -> None:
    packed: list[str] = []
    outer = Outer(packed)
    packing = Packing(nn.ModuleList([outer]))
    packing.loaded(outer.inner.weight, 2)
    packing.loaded(outer.inner.bias)
    assert packed == ["outer", "inner"]


def test_memory_of_packed_weights_is_used_again() -> None:
    class Large(Weights):
        def __init__(self) -> None:
            super().__init__()
            size = HUGE // 4
            self.weight = nn.Parameter()
            self.weight = WeightParameter.empty(single(Part.whole(size)), dtype=torch.float32, device=CPU)

        def pack(self) -> None:
            self.weight = nn.Parameter(torch.zeros(1), requires_grad=False)

    layers = [Large() for _ in range(40)]
    packing = Packing(nn.ModuleList(layers))
    addresses = set()
    for layer in layers:
        parameter = layer.weight
        assert isinstance(parameter, WeightParameter)
        packing.stage(parameter)
        addresses.add(parameter.data_ptr())
        packing.stage(parameter)
        assert parameter.data_ptr() in addresses, "only memory without content is replaced"
        packing.loaded(parameter)
    assert len(addresses) == 1


def test_after_an_error_no_work_begins() -> None:
    begun = []

    def work(item: int) -> int:
        begun.append(item)
        raise ValueError(item)

    num_threads = torch.get_num_threads()
    with pytest.raises(ValueError, match="0"):
        list(in_threads(work, range(10_000)))
    assert len(begun) < 10_000
    assert torch.get_num_threads() == num_threads


def test_items_are_taken_a_little_ahead_of_the_work() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        while taken < 300:
            taken += 1
            yield taken

    for index, result in enumerate(in_threads(lambda item: 2 * item, items())):
        assert result == 2 * (index + 1)
        assert taken <= index + MAX_AHEAD + 2
    assert taken == 300


def test_random_weights_are_the_same_in_any_order() -> None:
    def model() -> dict[str, Layer]:
        return {name: Layer([], name) for name in "abcd"}

    first, second = model(), model()
    for layers in (first, second):
        fill_with_random_numbers(nn.ModuleDict({name: nn.ModuleList([layer]) for name, layer in layers.items()}))
    for name, layer in first.items():
        assert torch.equal(layer.weight, second[name].weight) and 0 < layer.weight.abs().max() <= 0.05
    assert not torch.equal(first["a"].weight, first["b"].weight)
