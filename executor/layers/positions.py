"""Positions without rotation: learned embeddings, and biases of the scores."""

from __future__ import annotations

import math

from torch import Tensor, nn

import ops
from executor.layers.context import ModelContext
from executor.layers.parameter import Part, WeightParameter, single


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """The slope of each head in ALiBi (Press et al., arXiv:2108.12409): ``2 ** (-8 i / n)`` of n heads, n a power of 2.

    Further heads take every other slope of twice as many heads, as in the authors' code.
    """
    count = 1 << math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (head + 1) / count) for head in range(count)]
    more = [2 ** (-4 * (head + 1) / count) for head in range(0, 2 * (num_heads - count), 2)]
    return tuple(slopes + more)


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
