"""Adapters of the stacks in which transformers holds experts (PEFT's ``target_parameters``): one pair of matrices for
all experts of a layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from executor.adapters.layers import LinearTarget
from executor.adapters.peft import ModuleTensors
from executor.base import ModelError
from executor.checkpoint import StoredTensor
from executor.hf_config import shorten
from executor.weights_mapper import Cut, WeightsMapper

STACKS = ("gate_up_proj", "down_proj", "up_proj", "weight")
"""Parameters of transformers' modules. PEFT writes the adapters of several under nested names, which do not say which
is whose: their sizes do."""
NESTED = ".base_layer"
EXPERT = re.compile(r"^.*\.experts\.(\d+)\.")


@dataclass(frozen=True)
class _Projection:
    """A projection of one expert."""

    name: str
    """In the model."""
    expert: int
    target: LinearTarget
    cut: Cut
    """What takes its weight out of the stack."""

    @property
    def num_rows(self) -> int:
        return self.target.layer.shape.outputs[self.target.shard_id].full

    @property
    def num_inputs(self) -> int:
        return self.target.layer.shape.input.full

    def rows(self, num_experts: int, out_features: int, in_features: int) -> Tensor:
        """Which results of the stack are this projection's, int64 [num_rows], however weights are stored."""
        numbers = torch.arange(out_features)
        either = numbers[:, None].expand(-1, in_features), numbers.expand(in_features, -1)
        for matrix in either:
            found = self.cut(matrix.expand(num_experts, -1, -1))
            if found.shape == (self.num_rows, in_features) and torch.equal(found[:, 0], found[:, -1]):
                return found[:, 0]
        raise AssertionError(f"no layout of {self.name} fits its stack")


def of_each_expert(
    tensors: ModuleTensors, mapper: WeightsMapper, linears: Mapping[str, LinearTarget], wanted: set[str]
) -> dict[str, ModuleTensors]:
    """The adapter of a stack, taken apart.

    Args:
        tensors: A [experts * rank, in_features], an expert's rows one after the other, and B [out_features, rank *
            experts], a rank's columns one after the other.
        mapper: The names of the model's checkpoints.
        linears: The model's projections.
        wanted: Names of their weights.

    Returns:
        An adapter for each projection of each expert, by its name in the model; empty: it is none of a stack.

    Raises:
        ModelError: Its sizes are those of none of the layer's stacks.
    """
    if tensors.stored.keys() != {"a", "b"}:
        return {}
    module = _without_nesting(tensors.name)
    stacks = {leaf: _projections(mapper, f"{module}.{leaf}", wanted, linears) for leaf in STACKS}
    stacks = {leaf: found for leaf, found in stacks.items() if found}
    if not stacks:
        return {}
    a, b = tensors.read("a", -1, -1), tensors.read("b", -1, -1)
    sizes = {
        leaf: (sum(each.num_rows for each in found if not each.expert), found[0].num_inputs)
        for leaf, found in stacks.items()
    }
    for own, is_turned in (((len(b), a.shape[1]), False), ((a.shape[1], len(b)), True)):
        leaf = next((leaf for leaf, each in sizes.items() if each == own), "")
        if leaf:
            named = ModuleTensors(f"{module}.{leaf}", tensors.stored)
            return _apart(named, stacks[leaf], a, b, is_turned=is_turned)
    known = [f"{leaf} has {results} results of {inputs} inputs" for leaf, (results, inputs) in sizes.items()]
    raise ModelError(
        f"{tensors.stored['a'].origin} has {a.shape[1]} inputs, and B {len(b)} results; of the experts of "
        f"{shorten(module)}, {', '.join(known)}"
    )


def _without_nesting(name: str) -> str:
    """The module that PEFT's modules contain. In linear time, however long the name is."""
    end = len(name)
    while name.endswith(NESTED, 0, end):
        end -= len(NESTED)
    return name[:end]


def _projections(
    mapper: WeightsMapper, stored: str, wanted: set[str], linears: Mapping[str, LinearTarget]
) -> list[_Projection]:
    """The projections that a stack holds."""
    result = []
    for name, cut in mapper.parts(stored, wanted):
        module = name.removesuffix(".weight")
        expert = EXPERT.match(module)
        if name in wanted and expert is not None:
            result.append(_Projection(module, int(expert[1]), linears[module], cut))
    return result


def _apart(
    tensors: ModuleTensors, projections: list[_Projection], a: Tensor, b: Tensor, *, is_turned: bool
) -> dict[str, ModuleTensors]:
    """The pieces, which are named like the stack: patterns of ranks are.

    Where transformers does not say that weights are stored as [in_features, out_features] (Llama 4), PEFT takes one for
    the other (``is_turned``): the product of B and A is what is added to the stored weight.
    """
    count = 1 + max(each.expert for each in projections)
    if len(a) % count or b.shape[1] != len(a):
        raise ModelError(
            f"{tensors.stored['a'].origin} has {len(a)} rows, and B {b.shape[1]} columns; both must be the rank times "
            f"{count} experts"
        )
    of_a, of_b = a.view(count, -1, a.shape[1]), b.view(len(b), -1, count).permute(2, 0, 1)
    if is_turned:
        of_a, of_b = of_b.mT, of_a.mT
    rows: dict[str, Tensor] = {}
    result = {}
    for each in projections:
        leaf = each.name.rpartition(".")[2]
        if leaf not in rows:
            rows[leaf] = each.rows(count, of_b.shape[1], of_a.shape[2])
        pieces = {"a": of_a[each.expert], "b": of_b[each.expert, rows[leaf]]}
        result[each.name] = ModuleTensors(
            tensors.name, {kind: _read_before(tensors.stored[kind], piece) for kind, piece in pieces.items()}
        )
    return result


def _read_before(whole: StoredTensor, piece: Tensor) -> StoredTensor:
    return StoredTensor(whole.name, whole.origin, piece.nbytes, lambda dtype: piece)
