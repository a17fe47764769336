"""Token embeddings and the output layer."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

import ops
from executor.input_batch import InputBatch
from executor.layers.context import ModelContext
from executor.layers.parameter import Part
from executor.parallel import split_columns
from executor.quantization.base import TableShape
from ops import AdapterTable


class VocabParallelEmbedding(nn.Module):
    """An embedding table sharded by rows over the ranks. Tied models also compute their logits with it."""

    is_output: ClassVar[bool] = False

    def __init__(
        self, context: ModelContext, embedding_dim: int | None = None, *, bias: bool = False, prefix: str
    ) -> None:
        """Creates the table.

        Args:
            context: The model's construction context.
            embedding_dim: Columns of the table. Default: ``config.hidden_size``.
            bias: Whether the logits have a bias.
            prefix: The layer's name in the model.
        """
        super().__init__()
        config = context.config
        self.communicator = context.communicator
        shares = split_columns(config.vocab_size, context.communicator.size, prefix)
        self.widths = tuple(share.size for share in shares)
        """Rows of the table that each rank has."""
        self.shape = TableShape(
            vocab=Part.share(config.vocab_size, shares[context.communicator.rank]),
            hidden=Part.whole(embedding_dim or config.hidden_size),
            makes_logits=self.is_output or config.tie_word_embeddings,
            bias=bias,
            dtype=context.dtype,
            device=context.device,
        )
        self.method = context.quantization.embedding_method(prefix)
        try:
            self.weights = self.method.create(self.shape)
        except ValueError as error:
            raise ValueError(f"{prefix}: {error}") from error
        if context.max_adapters:
            self.weights.table_adapters = {}
            self.weights.adapters = (
                AdapterTable(context.max_adapters, context.device) if self.shape.makes_logits else None
            )

    def forward(self, ids: Tensor, batch: InputBatch) -> Tensor:
        """``ids`` [num_tokens] -> [num_tokens, embedding_dim]."""
        if self.communicator.size == 1:
            return self.method.embed(self.weights, ids, batch)
        (rows,) = self.shape.vocab.ranges
        local_ids, is_here = ops.shard_ids(ids, rows.start, rows.size)
        found = self.method.embed(self.weights, local_ids, batch)
        return ops.select_rows(found, self.communicator, is_here)

    def logits(self, hidden: Tensor, batch: InputBatch) -> Tensor:
        """``hidden`` [num_samples, embedding_dim] -> float32 [num_samples, vocab_size]."""
        return ops.all_gather(self.method.logits(self.weights, hidden, batch), self.communicator, self.widths)


class LMHead(VocabParallelEmbedding):
    """An output layer with its own table."""

    is_output = True


def output_layer(
    context: ModelContext, embedding: VocabParallelEmbedding, *, bias: bool = False, prefix: str
) -> VocabParallelEmbedding:
    """The layer that computes logits: the embedding itself if the configuration ties the two.

    Raises:
        ModelError: The configuration ties a layer that has a bias.
    """
    if not context.config.tie_word_embeddings:
        return LMHead(context, embedding.shape.hidden.size, bias=bias, prefix=prefix)
    if bias:
        context.config.bad("tie_word_embeddings", "false for this architecture, whose output layer has a bias")
    return embedding
