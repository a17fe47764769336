"""Linear layers, split over ranks by rows (column parallel) or by columns (row parallel) of the weight.

The names are those of Megatron-LM (Shoeybi et al., arXiv:1909.08053). Ranks that do not cut sums
(``Communicator.cuts_sums``) split row parallel layers by rows as well, and gather their inputs first. The
``LinearMethod`` decides how a weight is stored and applied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

import ops
from executor.input_batch import InputBatch
from executor.layers.context import ModelContext
from executor.layers.parameter import (
    Part,
    Range,
    ShardId,
    WeightParameter,
    Weights,
    ZeroParameter,
    single,
    stored_module,
)
from executor.parallel import Share, split_columns, split_heads
from executor.quantization.base import LinearShape
from ops import AdapterTable


class LinearLayer(nn.Module):
    """``x @ weight.T + bias`` with this rank's share of the weight."""

    def __init__(
        self,
        context: ModelContext,
        input_part: Part,
        output_parts: Mapping[ShardId, Part],
        *,
        bias: bool,
        paired: bool = False,
        prefix: str,
    ) -> None:
        """Creates the layer.

        Args:
            context: The model's construction context.
            input_part: This rank's columns of the weight.
            output_parts: This rank's rows, for each projection merged into the layer.
            bias: Whether there is a bias.
            paired: Whether the layer is two projections of equal size, one gating the other.
            prefix: The layer's name in the model.
        """
        super().__init__()
        self.shape = LinearShape(input_part, output_parts, bias, paired, context.dtype, context.device)
        self.output_sizes = [each.size for part in output_parts.values() for each in part.ranges]
        """Columns of the result, for each projection."""
        names = [stored_module(prefix, shard_id) for shard_id in output_parts]
        self.method = context.quantization.linear_method([context.stored_modules.get(name, name) for name in names])
        try:
            self.weights = self.method.create(self.shape)
        except ValueError as error:
            raise ValueError(f"{prefix}: {error}") from error
        if context.max_adapters:
            self.weights.adapters = AdapterTable(context.max_adapters, context.device)

    def forward(self, x: Tensor, batch: InputBatch) -> Tensor:
        """``x`` [num_tokens, in_features] -> [num_tokens, out_features]."""
        return self.method.apply(self.weights, x, batch)


class ReplicatedLinear(LinearLayer):
    """Every rank holds the whole weight."""

    def __init__(
        self, context: ModelContext, in_features: int, out_features: int, *, bias: bool = False, prefix: str
    ) -> None:
        super().__init__(context, Part.whole(in_features), {None: Part.whole(out_features)}, bias=bias, prefix=prefix)


class ColumnParallelLinear(LinearLayer):
    """Each rank computes a share of the outputs."""

    def __init__(
        self,
        context: ModelContext,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        shares: Sequence[Share] | None = None,
        prefix: str,
    ) -> None:
        """Creates the layer.

        Args:
            context: The model's construction context.
            in_features: Size of the input.
            out_features: Size of the result over all ranks.
            bias: Whether there is a bias.
            shares: Each rank's part of the result. Default: blocks of columns.
            prefix: The layer's name in the model.
        """
        shares = shares or split_columns(out_features, context.parallel.tp_size, prefix)
        rows = Part.share(out_features, shares[context.parallel.tp_rank])
        super().__init__(context, Part.whole(in_features), {None: rows}, bias=bias, prefix=prefix)


class MergedColumnParallelLinear(LinearLayer):
    """Several column parallel projections of one input, side by side."""

    def __init__(
        self,
        context: ModelContext,
        in_features: int,
        out_features: Mapping[str, int] | Sequence[int],
        *,
        bias: bool = False,
        prefix: str,
    ) -> None:
        """Creates the layer.

        Args:
            context: The model's construction context.
            in_features: Size of the input.
            out_features: Size of each projection by its name in the checkpoint, or without names if one tensor there
                holds them all, concatenated. Two of equal size are an MLP's gate and up projections.
            bias: Whether they have biases.
            prefix: The layer's name in the model.
        """
        names = list(out_features) if isinstance(out_features, Mapping) else None
        sizes = list(out_features.values()) if isinstance(out_features, Mapping) else list(out_features)
        rows: list[Part] = []
        for size in sizes:
            rows.append(own_columns(context, size, prefix).moved(rows[-1].end if rows else 0))
        paired = len(rows) == 2 and sizes[0] == sizes[1]
        merged = merged_parts(names, rows)
        super().__init__(context, Part.whole(in_features), merged, bias=bias, paired=paired, prefix=prefix)


class QKVParallelLinear(LinearLayer):
    """The projections to q, k and v, split by heads (``split_heads``)."""

    def __init__(
        self,
        context: ModelContext,
        in_features: int,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        bias: bool = False,
        names: Sequence[str] | None = ("q_proj", "k_proj", "v_proj"),
        is_grouped: bool = False,
        prefix: str,
    ) -> None:
        """Creates the layer.

        Args:
            context: The model's construction context.
            in_features: Size of the input.
            head_dim: Size of a head.
            num_heads: Query heads over all ranks.
            num_kv_heads: KV heads over all ranks.
            bias: Whether they have biases.
            names: Names of the projections in the checkpoint; None: one tensor there holds q, k and v. Two names: k is
                v as well.
            is_grouped: Whether that one holds for each KV head its query heads, its k and its v (GPT-NeoX, Falcon,
                InternLM2). Otherwise it holds q, k and v one after the other.
            prefix: The layer's name in the model.
        """
        own = split_heads(num_heads, num_kv_heads, context.parallel.tp_size)[context.parallel.tp_rank]
        full, kv = num_kv_heads * head_dim, _times(own.kv, head_dim)
        q = Part.share(num_heads * head_dim, _times(own.q, head_dim))
        k = Part.share(full, kv, q.size)
        v = Part.share(full, kv, q.size + kv.size)
        parts = [q, k, v] if names is None else [q, k, v][: len(names)]
        rows = merged_parts(names, parts)
        if is_grouped:
            rows = {None: grouped_part(q, k, v, head_dim)}
        super().__init__(context, Part.whole(in_features), rows, bias=bias, prefix=prefix)
        self.output_sizes = [part.size for part in parts]


def own_columns(context: ModelContext, size: int, prefix: str) -> Part:
    """This rank's share of a layer's results."""
    return Part.share(size, split_columns(size, context.parallel.tp_size, prefix)[context.parallel.tp_rank])


def _times(share: Share, count: int) -> Share:
    return Share(share.start * count, share.size * count)


def head_columns(num_heads: int, num_kv_heads: int, head_dim: int, num_ranks: int) -> list[Share]:
    """The columns of each rank's attention results."""
    return [_times(each.q, head_dim) for each in split_heads(num_heads, num_kv_heads, num_ranks)]


def grouped_part(q: Part, k: Part, v: Part, head_dim: int) -> Part:
    """Rows of q, k and v in a tensor that holds them by KV head: [num_kv_heads, queries of one + 2, head_dim]."""
    queries = q.full // k.full
    rows_each = (queries + 2) * head_dim

    def ranges(part: Part, heads_each: int, first: int) -> list[Range]:
        """The heads of a part, each where the tensor has it; a KV head has ``heads_each``, after ``first`` others."""
        (own,) = part.ranges
        result = []
        for index in range(own.size // head_dim):
            group, member = divmod(own.start // head_dim + index, heads_each)
            start = group * rows_each + (first + member) * head_dim
            result.append(Range(start, head_dim, own.offset + index * head_dim))
        return result

    heads = ranges(q, queries, 0) + ranges(k, 1, queries) + ranges(v, 1, queries + 1)
    return Part(k.full // head_dim * rows_each, tuple(heads))


def merged_parts(names: Sequence[str] | None, rows: Sequence[Part]) -> dict[ShardId, Part]:
    """The rows of merged projections: one checkpoint tensor per name, or one for all."""
    if names is None:
        return {None: Part.joined(rows)}
    return dict(zip(names, rows, strict=True))


class SharedBias(Weights):
    """A bias [out_features] added after the ranks' results are summed; every rank holds it."""

    bias: nn.Parameter

    def __init__(self, context: ModelContext, out_features: int) -> None:
        super().__init__()
        self.bias = WeightParameter.empty(single(Part.whole(out_features)), dtype=context.dtype, device=context.device)

    def pack(self) -> None:
        pass


class RowParallelLinear(LinearLayer):
    """Takes each rank's share of the inputs; every rank gets all results."""

    def __init__(
        self,
        context: ModelContext,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        is_summed: bool = True,
        input_shares: Sequence[Share] | None = None,
        prefix: str,
    ) -> None:
        """Creates the layer.

        Args:
            context: The model's construction context.
            in_features: Size of the input over all ranks.
            out_features: Size of the result.
            bias: Whether there is a bias.
            is_summed: Whether the layer sums the ranks' results, or gathers them; False: its user does.
            input_shares: Each rank's part of the input. Default: that of a column parallel layer's result.
            prefix: The layer's name in the model.
        """
        communicator = context.communicator
        inputs = input_shares or split_columns(in_features, communicator.size, prefix)
        self.communicator = communicator
        self.is_summed = is_summed
        self.cuts_sums = communicator.cuts_sums and communicator.size > 1
        self.input_widths = tuple(share.size for share in inputs)
        """Columns of the input that each rank has."""
        self.output_widths: tuple[int, ...] = ()
        """Columns of the result that each rank computes, unless sums are cut."""
        columns, rows = Part.share(in_features, inputs[communicator.rank]), Part.whole(out_features)
        if not self.cuts_sums:
            outputs = split_columns(out_features, communicator.size, prefix)
            self.output_widths = tuple(share.size for share in outputs)
            columns, rows = Part.whole(in_features), Part.share(out_features, outputs[communicator.rank])
        adds_to_sums = bias and self.cuts_sums and is_summed
        super().__init__(context, columns, {None: rows}, bias=bias and not adds_to_sums, prefix=prefix)
        self.shared_bias = SharedBias(context, out_features) if adds_to_sums else None
        if self.cuts_sums and communicator.rank and self.weights.bias is not None:  # which rank 0 has
            self.weights.bias = ZeroParameter(torch.zeros_like(self.weights.bias), self.weights.bias.parts)

    def forward(self, x: Tensor, batch: InputBatch) -> Tensor:
        """``x`` [num_tokens, this rank's inputs] -> [num_tokens, out_features]."""
        if not self.cuts_sums:
            whole = ops.all_gather(x, self.communicator, self.input_widths)
            own = super().forward(whole, batch)
            return ops.all_gather(own, self.communicator, self.output_widths) if self.is_summed else own
        result = super().forward(x, batch)
        if not self.is_summed:
            return result
        result = ops.all_reduce(result, self.communicator)
        return result if self.shared_bias is None else ops.add(result, self.shared_bias.bias)
