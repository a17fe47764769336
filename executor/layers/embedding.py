"""The table of token embeddings, and the output layer."""

from __future__ import annotations

from torch import Tensor, nn

import ops
from executor.layers.context import ModelContext
from executor.layers.parameter import Part, WeightedLayer


class VocabParallelEmbedding(WeightedLayer):
    """An embedding table of which each rank holds some rows. Tied models take their logits from it as well."""

    weight: nn.Parameter
    packed: ops.Weight
    """What the ops read, once the weights are loaded."""
    makes_logits = False

    def __init__(self, context: ModelContext, *, prefix: str) -> None:
        super().__init__()
        self.device = context.device
        self.tp_size = context.parallel.tp_size
        self.vocab_part = Part.shard(context.config.vocab_size, context.parallel, f"{prefix}: vocabulary")
        self.hidden_size = context.config.hidden_size
        self.method = context.quantization.embedding_method(prefix)
        self.method.create_weights(self, context.dtype)

    def process_weights_after_loading(self) -> None:
        self.method.process_weights_after_loading(self)

    def forward(self, ids: Tensor) -> Tensor:
        assert self.tp_size == 1, "ids of other ranks must be masked, and the ranks' results added up, here"
        return self.method.embed(self, ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """``hidden`` [num_samples, hidden_size] -> float32 [num_samples, vocab_size]."""
        assert self.tp_size == 1, "the ranks' logits must be gathered here"
        return self.method.logits(self, hidden)


class LMHead(VocabParallelEmbedding):
    """An output layer with a table of its own."""

    makes_logits = True


def output_layer(context: ModelContext, embedding: VocabParallelEmbedding, *, prefix: str) -> VocabParallelEmbedding:
    """The layer that makes logits: the embedding itself where the configuration ties the two."""
    if not context.config.tie_word_embeddings:
        return LMHead(context, prefix=prefix)
    embedding.makes_logits = True
    return embedding
