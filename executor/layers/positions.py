"""Positions without rotation: learned embeddings, and biases of the scores."""

from __future__ import annotations

import math

import torch
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


class DistanceBiases(nn.Module):
    """Learned biases of the scores by distance, in buckets that grow with it (Raffel et al., arXiv:1910.10683).

    Its weight is [num_buckets, num_heads]: half of the buckets are for tokens before the query, half for those after.
    """

    def __init__(self, context: ModelContext, num_buckets: int, *, max_distance: int = 128) -> None:
        """Creates the table.

        Args:
            context: The model's construction context.
            num_buckets: Buckets of both directions together.
            max_distance: From here on, distances share a bucket.
        """
        super().__init__()
        self.num_buckets, self.max_distance = num_buckets, max_distance
        reach = -(-context.max_model_len // 32) * 32 + 32
        self._distances = torch.arange(-reach, reach)
        self.weight = WeightParameter.empty(
            single(Part.whole(num_buckets), Part.whole(context.config.num_heads)),
            dtype=torch.float32,
            device=context.device,
        )
        self._table: Tensor | None = None

    def table(self) -> Tensor:
        """The biases as ``ops.paged_attention`` takes them. Called once the weights are loaded."""
        if self._table is None:
            self._table = self.weight.data[self._buckets()].t().contiguous()
        return self._table

    def _buckets(self) -> Tensor:
        half = self.num_buckets // 2
        exact = half // 2
        distance = self._distances.abs()
        growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        far = (exact + (growth * (half - exact)).long()).clamp(max=half - 1)
        return torch.where(distance < exact, distance, far) + half * (self._distances > 0)


class TokenTypes(nn.Module):
    """A vector for each type of token, added to the token embeddings (Devlin et al., arXiv:1810.04805)."""

    def __init__(self, context: ModelContext, num_types: int) -> None:
        super().__init__()
        parts = single(Part.whole(num_types), Part.whole(context.config.hidden_size))
        self.weight = WeightParameter.empty(parts, dtype=context.dtype, device=context.device)

    def forward(self, token_types: Tensor) -> Tensor:
        """``token_types`` int32 [num_tokens] -> [num_tokens, hidden_size]."""
        return ops.embedding(token_types, self.weight.data)


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
