"""How a family's checkpoints differ from its model: names and layouts of tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor

LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
"""The index of a layer in a tensor's name."""


Cut = Callable[[Tensor], Tensor]
"""Takes a tensor, returns a part of it."""


@dataclass(frozen=True)
class Stack:
    """Tensors that hold the same matrix or vector of all experts of a layer, one after the other."""

    name: str
    """Regular expression of their names, after ``renames``. Its group is what precedes the index of an expert."""
    parts: Mapping[str, Cut]
    """The tensors that an expert has of it in the model, by what follows its index, and where they are in its part."""


def first_half(tensor: Tensor) -> Tensor:
    """The upper half of the rows."""
    return tensor[: len(tensor) // 2]


def second_half(tensor: Tensor) -> Tensor:
    """The lower half of the rows."""
    return tensor[len(tensor) // 2 :]


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself."""
    return tensor


STACKS = (
    Stack(r"^(.*\.experts\.)gate_up_proj$", {"gate_proj.weight": first_half, "up_proj.weight": second_half}),
    Stack(r"^(.*\.experts\.)down_proj$", {"down_proj.weight": whole}),
)
"""Experts as transformers 5 holds them in memory: [experts, out_features, in_features]."""


def stacks_of_either(hidden_size: int) -> tuple[Stack, ...]:
    """The same, whether files hold them so or as [experts, in_features, out_features]; the hidden size tells."""

    def inputs_last(cut: Cut) -> Cut:
        return lambda tensor: cut(tensor if tensor.shape[-1] == hidden_size else tensor.t())

    gates = {"gate_proj.weight": inputs_last(first_half), "up_proj.weight": inputs_last(second_half)}
    return (
        Stack(r"^(.*\.experts\.)gate_up_proj$", gates),
        Stack(
            r"^(.*\.experts\.)down_proj$",
            {"down_proj.weight": lambda tensor: tensor if tensor.shape[0] == hidden_size else tensor.t()},
        ),
    )


@dataclass(frozen=True)
class WeightsMapper:
    """Turns the tensors of Hugging Face's checkpoints into the model's. Names are regular expressions (``re``)."""

    renames: Sequence[tuple[str, str]] = ()
    """Patterns and replacements (``re.sub``), applied to the checkpoint's names one after the other."""
    ignored: Sequence[str] = ()
    """Names, after ``renames``, of tensors that the model does not need."""
    transforms: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    """Names, after ``renames``, of tensors that are stored in another layout, and what turns them into the model's."""

    stacks: Sequence[Stack] = ()
    """Tensors of all experts. The model has one of each expert."""

    def within(self, renames: Sequence[tuple[str, str]], other_parts: str) -> WeightsMapper:
        """The mapper for a checkpoint that holds the model as a part.

        Args:
            renames: Turn the part's names into those of the model alone.
            other_parts: Names of tensors of the other parts.
        """
        return replace(self, renames=[*renames, *self.renames], ignored=[*self.ignored, other_parts])

    def without_logits(self) -> WeightsMapper:
        """The mapper for a checkpoint of a model without an output layer, or with a classifier in its place."""
        renames = [
            (r"^score\.0\.", "head.dense."),  # of reward models
            (r"^(score\.2|score|v_head)\.", "head.out."),
            (r"^(?!model\.|head\.|lm_head\.|cls\.|pooler\.|vocab_|decoder\.)", "model."),
        ]
        return replace(self, renames=[*self.renames, *renames], ignored=[*self.ignored, r"^lm_head\.", r"^head\."])

    def quantized(self, renames: Sequence[tuple[str, str]], ignored: Sequence[str]) -> WeightsMapper:
        """The mapper for a checkpoint whose quantisation method has names of its own."""
        return replace(self, renames=[*self.renames, *renames], ignored=[*self.ignored, *ignored])

    def name(self, stored: str) -> str:
        """The model's name of a tensor."""
        for pattern, replacement in self.renames:
            stored = re.sub(pattern, replacement, stored)
        return stored

    def stored_name(self, name: str, examples: Iterable[str]) -> str:
        """The checkpoint's name of a tensor that it may lack, known from the same tensor of other layers.

        Args:
            name: The model's name.
            examples: Names in the checkpoint.

        Returns:
            The model's name if no example tells.
        """
        layer = LAYER.search(name)
        if layer is None:
            return name
        candidates = (LAYER.sub(layer.group(), example, 1) for example in examples)
        return next((each for each in candidates if self.name(each) == name), name)

    def ignores(self, name: str) -> bool:
        return any(re.search(pattern, name) for pattern in self.ignored)

    def transforms_of(self, name: str) -> list[Callable[[Tensor], Tensor]]:
        """What turns a stored tensor into the model's, in this order."""
        return [transform for pattern, transform in self.transforms.items() if re.search(pattern, name)]

    def parts(self, stored: str, wanted: Collection[str]) -> list[tuple[str, Cut]]:
        """The model's tensors in a stored one: their names, and how to get them.

        Args:
            stored: The checkpoint's name.
            wanted: Names that the model needs; they tell how many experts a stack has.
        """
        name = self.name(stored)
        for stack in self.stacks:
            found = re.search(stack.name, name)
            if found is None:
                continue
            leaf = next(iter(stack.parts))
            count = 0
            while f"{found[1]}{count}.{leaf}" in wanted:
                count += 1
            if count:
                return [
                    (f"{found[1]}{index}.{leaf}", partial(_of_expert, index=index, count=count, cut=cut))
                    for index in range(count)
                    for leaf, cut in stack.parts.items()
                ]
        return [(name, whole)]


def _of_expert(tensor: Tensor, index: int, count: int, cut: Cut) -> Tensor:
    if tensor.dim() == 0 or len(tensor) != count:
        raise ValueError(f"has shape {list(tensor.shape)}, the model needs that of {count} experts")
    return cut(tensor[index])
