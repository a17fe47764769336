"""Normalisation layers."""

from __future__ import annotations

from torch import Tensor, nn

import ops
from executor.layers.context import ModelContext
from executor.layers.parameter import Part, Parts, WeightParameter, single
from executor.parallel import Share, split_heads


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


def head_shares(context: ModelContext, num_heads: int) -> list[Share]:
    """The heads of q or of k that each rank has, from the number of heads over all ranks."""
    config = context.config
    shares = split_heads(config.num_heads, config.num_kv_heads, context.parallel.tp_size)
    return [each.q if num_heads == config.num_heads else each.kv for each in shares]


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
        share = head_shares(context, num_heads)[context.parallel.tp_rank]
        first, own = share.start, share.size
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
        shares = head_shares(context, num_heads)
        rank = context.parallel.tp_rank
        firsts = [share.start for share in shares]
        # Of ranks with the same head, one gives it: the sum is that of one rank.
        given = [share.size * (firsts.index(share.start) == index) for index, share in enumerate(shares)]
        own = shares[rank]
        self.eps = eps
        self.communicator = context.communicator
        self.given = [given[rank] * head_dim, (own.size - given[rank]) * head_dim]
        """Columns that this rank gives, and others that it has."""
        self.widths = tuple(count * head_dim for count in given)
        self.own = [own.start * head_dim, own.size * head_dim, (num_heads - own.end) * head_dim]
        """Columns before those of this rank, its own, and those after."""
        self.weight = WeightParameter.empty(
            single(Part.whole(num_heads * head_dim)), dtype=context.dtype, device=context.device
        )

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [num_tokens, this rank's heads * head_dim] -> the same."""
        if self.communicator.size == 1:
            return ops.rms_norm(x, self.weight, self.eps, round_first=False)
        given, _ = x.split(self.given, dim=-1)
        whole = ops.all_gather(given, self.communicator, self.widths)
        own: Tensor
        _, own, _ = ops.rms_norm(whole, self.weight, self.eps, round_first=False).split(self.own, dim=-1)
        return own


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
