"""Classifiers made of an output layer: a reranker whose score is its answer to a question, "yes" rather than "no", and
a judge of steps of solutions, by the tokens that it would write after each."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from executor.base import Head, ModelError
from executor.checkpoint import Checkpoint, StoredTensor
from executor.hf_config import HFConfig
from executor.weights_mapper import WeightsMapper

TOKEN_IDS = "classifier_token_ids"
"""Field of the configuration: the ids of "no" and "yes", or those of the judge's tokens."""
TABLES = ("lm_head.weight", "model.embed_tokens.weight")
"""Output layers, the latter where the configuration ties the two."""
OUT = "head.out.weight"


def answer_ids(config: HFConfig, head: Head) -> tuple[int, ...]:
    """The ids of "no" and "yes" for a classifier of sequences, any for one of tokens; empty: the checkpoint has a
    classifier of its own."""
    if head not in ("sequence", "token") or not config.has(TOKEN_IDS):
        return ()
    ids = config.numbers(TOKEN_IDS)
    is_fit = len(ids) == 2 if head == "sequence" else len(ids) == len(config.labels)
    if not is_fit or not all(isinstance(each, int) and 0 <= each < config.vocab_size for each in ids):
        config.bad(
            TOKEN_IDS, "two token ids" if head == "sequence" else f"ids below {config.vocab_size}, one per label"
        )
    return tuple(map(int, ids))


class AnswerRows:
    """A checkpoint whose classifier is rows of its output layer, or the difference of the second and the first.

    The sigmoid of that score is the softmax over both logits.
    """

    def __init__(self, checkpoint: Checkpoint, ids: Sequence[int], *, compares: bool) -> None:
        self._checkpoint = checkpoint
        self._ids = list(ids)
        self._compares = compares

    def tensors(self, wanted: Collection[str], mapper: WeightsMapper) -> list[StoredTensor]:
        stored = self._checkpoint.tensors(wanted, mapper)
        by_name = {tensor.name: tensor for tensor in stored}
        table = next((by_name[name] for name in TABLES if name in by_name), None)
        if table is None:
            raise ModelError(f"{self._checkpoint.origin(TABLES[0])} is missing; {TOKEN_IDS} needs an output layer")

        def read(dtype: torch.dtype) -> Tensor:
            rows = table.read(dtype)[self._ids].float()
            return rows[1:] - rows[:1] if self._compares else rows

        return [*stored, replace(table, name=OUT, num_bytes=0, read=read)]

    def origin(self, name: str) -> str:
        return self._checkpoint.origin(name)
