"""Learned position embeddings."""

from __future__ import annotations

from torch import Tensor, nn

import ops
from executor.layers.context import ModelContext
from executor.layers.parameter import Part, WeightParameter, single


class LearnedPositions(nn.Module):
    """A vector per position, added to the token embeddings (Vaswani et al., arXiv:1706.03762, section 3.5)."""

    def __init__(self, context: ModelContext, *, offset: int = 0) -> None:
        """Creates the table for ``max_position_embeddings`` positions.

        Args:
            context: The model's construction context.
            offset: Rows of the table before the row of position 0.
        """
        super().__init__()
        config = context.config
        if context.max_model_len > config.max_position_embeddings:
            config.bad("max_position_embeddings", f"at least {context.max_model_len}, the longest sequence served")
        self.offset = offset
        rows = Part.whole(config.max_position_embeddings + offset)
        self.weight = WeightParameter.empty(
            single(rows, Part.whole(config.hidden_size)), dtype=context.dtype, device=context.device
        )

    def forward(self, positions: Tensor) -> Tensor:
        """``positions`` int32 [num_tokens] -> [num_tokens, hidden_size]."""
        return ops.embedding(positions, self.weight.data[self.offset :])
