"""A checkpoint as transformers' models need it: renamed tensors, experts stacked, projections merged or split."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from executor.checkpoint import Checkpoint, StoredTensor
from executor.hf_config import shorten
from executor.weights_mapper import WeightsMapper

ROTARY_BUFFERS = r"rotary_emb\.inv_freq$"


@dataclass
class Source:
    """Tensors of the checkpoint that one conversion makes a tensor of the model from."""

    converter: Any
    """transformers' ``WeightConverter``."""
    target: str
    """The first of the tensors that it makes."""
    parts: list[tuple[str, StoredTensor]] = field(default_factory=list)
    """Pattern of the converter that matched, and the tensor."""

    def targets(self) -> list[str]:
        first, *others = self.converter.target_patterns
        return [self.target, *(self.target.replace(first, other) for other in others)]

    def stored(self, model: Any) -> list[StoredTensor]:
        """The tensors that the conversion makes."""
        first = self.parts[0][1]
        num_bytes = sum(part.num_bytes for _, part in self.parts) // len(self.converter.target_patterns)
        return [
            StoredTensor(name, first.origin, num_bytes, self._reader(name, model), self._prefetch)
            for name in self.targets()
        ]

    def _prefetch(self, first: int = 0, end: int = 1, of: int = 1) -> None:
        for _, part in self.parts:
            part.prefetch()

    def _reader(self, name: str, model: Any) -> Callable[[torch.dtype], Tensor]:
        def read(dtype: torch.dtype) -> Tensor:
            converter = copy.deepcopy(self.converter)
            for pattern, part in self.parts:
                tensor = part.read(dtype)
                converter.add_tensor(self.target, part.name, pattern, lambda tensor=tensor: tensor)
            try:
                made = converter.convert(self.target, model=model, config=model.config)[name]
            except Exception as error:  # whatever an operation raises for tensors of other shapes
                reason = shorten(" ".join(str(error).split()))
                raise ValueError(f"cannot be converted to {name!r}: {type(error).__name__}: {reason}") from error
            result: Tensor = made[0] if isinstance(made, list) else made
            return result

        return read


class ConvertedCheckpoint:
    """A checkpoint under the names of transformers' model, converted as transformers does."""

    def __init__(self, checkpoint: Checkpoint, model: Any) -> None:
        """
        Args:
            checkpoint: The files.
            model: transformers' model, as built.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self._checkpoint = checkpoint
        self._model = model
        mapping = get_model_conversion_mapping(model)
        self._renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
        self._converters = [each for each in mapping if isinstance(each, WeightConverter)]
        ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), ROTARY_BUFFERS]
        self._ignored = re.compile("|".join(f"(?:{pattern})" for pattern in ignored))

    def tensors(self, wanted: Collection[str], mapper: WeightsMapper) -> list[StoredTensor]:
        from transformers.core_model_loading import dot_natural_key

        known = dict.fromkeys(wanted, True)
        stored = sorted(self._checkpoint.tensors(wanted, mapper), key=lambda tensor: dot_natural_key(tensor.name))
        sources: dict[str, Source] = {}
        result = []
        for tensor in stored:
            name, pattern = self._rename(tensor.name, known)
            if name not in known:
                if not self._ignored.search(tensor.name):
                    result.append(tensor)  # the loader knows what to say about it
            elif pattern is None:
                result.append(replace(tensor, name=name))
            else:
                converter = next(each for each in self._converters if pattern in each.source_patterns)
                sources.setdefault(name, Source(converter, name)).parts.append((pattern, tensor))
        return result + [made for source in sources.values() for made in source.stored(self._model)]

    def _rename(self, name: str, known: dict[str, bool]) -> tuple[str, str | None]:
        """The model's name of a tensor, and the pattern of the converter that it needs, if any."""
        from transformers.core_model_loading import rename_source_key

        prefix = self._model.base_model_prefix
        renamed: tuple[str, str | None] = rename_source_key(name, self._renamings, self._converters, prefix, known)
        if renamed[0] not in known and name in known:
            renamed = rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=known)
        return renamed

    def origin(self, name: str) -> str:
        return self._checkpoint.origin(name)
