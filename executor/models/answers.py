"""Classifiers made of an output layer: a reranker whose score is its answer to a question, "yes" rather than "no"."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

from executor.base import ModelError
from executor.checkpoint import Checkpoint, StoredTensor
from executor.hf_config import HFConfig
from executor.weights_mapper import WeightsMapper

TOKEN_IDS = "classifier_token_ids"
"""Field of the configuration: the ids of "no" and "yes"."""
TABLES = ("lm_head.weight", "model.embed_tokens.weight")
"""Output layers, the latter where the configuration ties the two."""
OUT = "head.out.weight"


def answer_ids(config: HFConfig) -> tuple[int, int] | None:
    """The ids of "no" and "yes"; None: the checkpoint has a classifier of its own."""
    if not config.has(TOKEN_IDS):
        return None
    ids = config.numbers(TOKEN_IDS)
    if len(ids) != 2 or not all(isinstance(each, int) and 0 <= each < config.vocab_size for each in ids):
        config.bad(TOKEN_IDS, "two token ids")
    return int(ids[0]), int(ids[1])


class AnswerRows:
    """A checkpoint whose classifier is the difference of two rows of its output layer.

    The sigmoid of that score is the softmax over both logits.
    """

    def __init__(self, checkpoint: Checkpoint, no: int, yes: int) -> None:
        self._checkpoint = checkpoint
        self._no, self._yes = no, yes

    def tensors(self, wanted: Collection[str], mapper: WeightsMapper) -> list[StoredTensor]:
        stored = self._checkpoint.tensors(wanted, mapper)
        by_name = {tensor.name: tensor for tensor in stored}
        table = next((by_name[name] for name in TABLES if name in by_name), None)
        if table is None:
            raise ModelError(f"{self._checkpoint.origin(TABLES[0])} is missing; {TOKEN_IDS} needs an output layer")

        def read(dtype: torch.dtype) -> Tensor:
            rows = table.read(dtype)[[self._yes, self._no]].float()
            return rows[:1] - rows[1:]

        return [*stored, replace(table, name=OUT, num_bytes=0, read=read)]

    def origin(self, name: str) -> str:
        return self._checkpoint.origin(name)
