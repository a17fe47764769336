"""How a family's checkpoints differ from its model: names and layouts of tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
"""The index of a layer in a tensor's name."""


@dataclass(frozen=True)
class WeightsMapper:
    """Turns the tensors of Hugging Face's checkpoints into the model's. Names are regular expressions (``re``)."""

    renames: Sequence[tuple[str, str]] = ()
    """Patterns and replacements (``re.sub``), applied to the checkpoint's names one after the other."""
    ignored: Sequence[str] = ()
    """Names, after ``renames``, of tensors that the model does not need."""
    transforms: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    """Names, after ``renames``, of tensors that are stored in another layout, and what turns them into the model's."""

    def within(self, renames: Sequence[tuple[str, str]], other_parts: str) -> WeightsMapper:
        """The mapper for a checkpoint that holds the model as a part.

        Args:
            renames: Turn the part's names into those of the model alone.
            other_parts: Names of tensors of the other parts.
        """
        return replace(self, renames=[*renames, *self.renames], ignored=[*self.ignored, other_parts])

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
