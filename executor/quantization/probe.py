"""What stands in for the weights of a layer while a model is measured (``executor/calibration.py``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import ops
from executor.layers.parameter import ShardId, WeightParameter
from ops.cpu import memory

ROWS = 64
"""Rows that are squared at a time."""


@dataclass
class Probe:
    """Stands in for the weights of a layer while the model is measured."""

    weight: WeightParameter
    """Where the rows of the tensors belong. Not filled yet."""
    dtype: torch.dtype
    """Of the activations."""
    memory: Tensor
    """uint8 of one dimension: room for one packed tensor after another."""
    tensors: list[tuple[Callable[[torch.dtype], Tensor], ShardId]] = field(default_factory=list)
    """What reads each tensor of the checkpoint for a dtype (``StoredTensor.read``)."""
    squares: Tensor | None = None
    """float64 [in_features]: the mean square of each input so far measured."""

    def linear(self, x: Tensor, num_rows: int, bias: Tensor | None) -> Tensor:
        """The layer's output, x [num_tokens, in_features] -> [num_tokens, num_rows]; ``x`` is measured."""
        # In float64, so that the order of the sum leaves no trace in the weights; few rows at a time take less memory.
        totals = torch.zeros(x.shape[1], dtype=torch.float64)
        for part in x.split(ROWS):
            totals += part.double().square_().sum(0)
        self.squares = totals / len(x)
        out = torch.empty(len(x), num_rows, dtype=x.dtype)
        for read, shard_id in self.tensors:
            for source, (rows, _) in self.weight.shares(read(self.dtype), shard_id):
                # The kernels' bits depend neither on the number of threads nor on addresses, as those of torch may.
                with memory.weights.lending(self.memory):
                    packed = ops.pack_linear(source.to(self.dtype).contiguous())
                out[:, rows.offset : rows.offset + rows.size] = ops.linear(x, packed)
        return out if bias is None else out + bias

    def embedding(self, ids: Tensor) -> Tensor:
        """Rows of a table, ids [num_tokens] -> [num_tokens, columns]."""
        ((read, shard_id),) = self.tensors
        ((table, _),) = self.weight.shares(read(self.dtype), shard_id)
        return table[ids.long()].to(self.dtype)
