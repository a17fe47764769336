"""Linear layers, split over ranks by rows (column parallel) or by columns (row parallel) of the weight.

The names are those of Megatron-LM (Shoeybi et al., arXiv:1909.08053). How a weight is stored and applied is the
business of its ``LinearMethod``.
"""

from __future__ import annotations

from torch import Tensor, nn

import ops
from executor.layers.context import ModelContext
from executor.layers.parameter import Part, ShardId, WeightedLayer


class LinearLayer(WeightedLayer):
    """``x @ weight.T + bias`` with this rank's share of the weight."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    packed: ops.Weight
    """What the ops read, once the weights are loaded."""
    is_pair = False
    """Whether the layer is two projections of one size, of which one gates the other."""

    def __init__(
        self, context: ModelContext, input_part: Part, output_parts: dict[ShardId, Part], *, bias: bool, prefix: str
    ) -> None:
        """Creates the layer.

        Args:
            context: What the model is built from.
            input_part: This rank's columns of the weight.
            output_parts: This rank's rows, for each projection merged into the layer.
            bias: Whether there is a bias.
            prefix: The layer's name in the model.
        """
        super().__init__()
        self.device = context.device
        self.input_part = input_part
        self.output_parts = output_parts
        self.output_sizes = [part.size for part in output_parts.values()]
        self.method = context.quantization.linear_method(prefix)
        self.method.create_weights(self, input_part.size, self.output_sizes, bias, context.dtype)

    def process_weights_after_loading(self) -> None:
        self.method.process_weights_after_loading(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.method.apply(self, x)


class ReplicatedLinear(LinearLayer):
    """Every rank holds the whole weight."""

    def __init__(
        self, context: ModelContext, in_features: int, out_features: int, *, bias: bool = False, prefix: str
    ) -> None:
        super().__init__(context, Part.whole(in_features), {None: Part.whole(out_features)}, bias=bias, prefix=prefix)


class ColumnParallelLinear(LinearLayer):
    """Each rank computes some of the outputs."""

    def __init__(
        self, context: ModelContext, in_features: int, out_features: int, *, bias: bool = False, prefix: str
    ) -> None:
        rows = Part.shard(out_features, context.parallel, prefix)
        super().__init__(context, Part.whole(in_features), {None: rows}, bias=bias, prefix=prefix)


class MergedColumnParallelLinear(LinearLayer):
    """Several column parallel projections of one input, side by side; the shard ids count them."""

    def __init__(
        self, context: ModelContext, in_features: int, out_features: list[int], *, bias: bool = False, prefix: str
    ) -> None:
        rows: dict[ShardId, Part] = {}
        offset = 0
        for shard_id, size in enumerate(out_features):
            rows[shard_id] = part = Part.shard(size, context.parallel, prefix, offset)
            offset += part.size
        self.is_pair = len(out_features) == 2 and out_features[0] == out_features[1]
        super().__init__(context, Part.whole(in_features), rows, bias=bias, prefix=prefix)


class QKVParallelLinear(LinearLayer):
    """The projections to q, k and v, split by heads. Ranks beyond the number of KV heads hold copies of them."""

    def __init__(
        self,
        context: ModelContext,
        in_features: int,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        bias: bool = False,
        prefix: str,
    ) -> None:
        parallel = context.parallel
        q = Part.shard(num_heads * head_dim, parallel, f"{prefix}: attention heads")
        if parallel.tp_size > num_kv_heads:
            copies = parallel.tp_size // num_kv_heads
            kv_size, kv_start = head_dim, parallel.tp_rank // copies * head_dim
        else:
            kv_size = parallel.divide(num_kv_heads, f"{prefix}: KV heads") * head_dim
            kv_start = parallel.tp_rank * kv_size
        full = num_kv_heads * head_dim
        k = Part(full, kv_start, kv_size, q.size)
        v = Part(full, kv_start, kv_size, q.size + kv_size)
        super().__init__(context, Part.whole(in_features), {"q": q, "k": k, "v": v}, bias=bias, prefix=prefix)


class RowParallelLinear(LinearLayer):
    """Each rank sees some of the inputs; the results add up."""

    def __init__(
        self, context: ModelContext, in_features: int, out_features: int, *, bias: bool = False, prefix: str
    ) -> None:
        columns = Part.shard(in_features, context.parallel, prefix)
        super().__init__(context, columns, {None: Part.whole(out_features)}, bias=bias, prefix=prefix)
        self.tp_size = context.parallel.tp_size

    def forward(self, x: Tensor) -> Tensor:
        assert self.tp_size == 1, "the ranks' results must be added up here"
        return super().forward(x)
