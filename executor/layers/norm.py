"""Normalisation layers."""

from __future__ import annotations

from torch import Tensor, nn

import ops
from executor.layers.context import ModelContext
from executor.layers.parameter import Part, Parts, Range, WeightParameter, single


class RMSNorm(nn.Module):
    """Root mean square norm of each group of ``size`` columns (Zhang and Sennrich, arXiv:1910.07467)."""

    def __init__(
        self,
        context: ModelContext,
        size: int,
        eps: float,
        *,
        weight: bool = True,
        num_weights: int = 1,
        offset: float = 0.0,
        round_first: bool = True,
    ) -> None:
        """Creates the norm.

        Args:
            context: The model's construction context.
            size: Columns of a group.
            eps: Added to the mean of squares.
            weight: Whether there is a weight.
            num_weights: Groups, if each has weights of its own.
            offset: Added to the weight; then ``round_first`` must be False.
            round_first: Whether the normalised values are rounded before the weight is applied; see ``ops.rms_norm``.
        """
        super().__init__()
        self.size, self.eps, self.offset, self.round_first = size, eps, offset, round_first
        parts = single(Part.whole(num_weights * size))
        self.weight = WeightParameter.empty(parts, dtype=context.dtype, device=context.device) if weight else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps, size=self.size, offset=self.offset, round_first=self.round_first)


class HeadsLayerNorm(nn.Module):
    """Layer norm of each head of q or of k, with weights of its own and no bias.

    Its weights are ``heads.weight``, [num_heads, head_dim].
    """

    def __init__(self, context: ModelContext, num_heads: int, eps: float, *, is_stacked: bool = True) -> None:
        """Creates the norm.

        Args:
            context: The model's construction context.
            num_heads: Heads over all ranks. With more ranks than heads, several ranks have the same head.
            eps: Added to the variance.
            is_stacked: Whether the checkpoint holds one tensor. Otherwise it holds a module for each head, named by
                its index: ``0.weight``.
        """
        super().__init__()
        self.size, self.eps = context.config.head_dim, eps
        ranks, rank = context.parallel.tp_size, context.parallel.tp_rank
        own = max(1, num_heads // ranks)
        first = rank // max(1, ranks // num_heads) * own
        columns = Part.whole(self.size)
        parts: Parts = single(Part.piece(num_heads, first, own), columns)
        if not is_stacked:
            places = {head: head - first for head in range(num_heads)}
            parts = {
                str(head): (Part.element(place, is_here=0 <= place < own), columns) for head, place in places.items()
            }
        self.heads = nn.Module()
        self.heads.register_parameter(
            "weight", WeightParameter.empty(parts, dtype=context.dtype, device=context.device)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [num_tokens, this rank's heads * head_dim] -> the same."""
        weight = self.heads.get_parameter("weight").data.flatten()
        return ops.layer_norm(x, weight, None, self.eps, self.size)


class AllHeadsRMSNorm(nn.Module):
    """Root mean square norm over all heads of q or of k, of which each rank holds a share. Rounds once, at the end."""

    def __init__(self, context: ModelContext, num_heads: int, head_dim: int, eps: float) -> None:
        """Creates the norm.

        Args:
            context: The model's construction context.
            num_heads: Heads over all ranks. With more ranks than heads, several ranks have the same head.
            head_dim: Size of a head.
            eps: Added to the mean of the squares.
        """
        super().__init__()
        ranks = context.parallel.tp_size
        copies = max(1, ranks // num_heads)
        width = num_heads * copies // ranks * head_dim
        shares = tuple(Range(rank // copies * width, width, rank * width) for rank in range(ranks))
        self.eps = eps
        self.communicator = context.communicator
        self.widths = [width] * ranks
        self.weight = WeightParameter.empty(
            single(Part(num_heads * head_dim, shares)), dtype=context.dtype, device=context.device
        )

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [num_tokens, this rank's heads * head_dim] -> the same."""
        if self.communicator.size == 1:
            return ops.rms_norm(x, self.weight, self.eps, round_first=False)
        whole = ops.all_gather(x, self.communicator, tuple(self.widths))
        normed = ops.rms_norm(whole, self.weight, self.eps, round_first=False)
        shares: tuple[Tensor, ...] = normed.split(self.widths, dim=-1)
        return shares[self.communicator.rank]


class LayerNorm(nn.Module):
    """Layer norm of each group of ``size`` columns (Ba et al., arXiv:1607.06450)."""

    def __init__(self, context: ModelContext, size: int, eps: float, *, weight: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.size, self.eps = size, eps
        parts = single(Part.whole(size))
        self.weight = WeightParameter.empty(parts, dtype=context.dtype, device=context.device) if weight else None
        self.bias = WeightParameter.empty(parts, dtype=context.dtype, device=context.device) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps, self.size)
