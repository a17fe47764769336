"""Low-rank adapters of linear layers (LoRA; Hu et al., arXiv:2106.09685), and the tables in which steps find them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ops.packed import Weight


@dataclass(frozen=True, eq=False)
class Adapter:
    """What one adapter makes of a linear layer: ``(x W^T + (x A^T * factors) B^T) * magnitude + bias``.

    Projections that are merged into the layer have rows of A of their own: B is 0 where the others are.
    """

    a: Tensor
    """[rank, in_features] in the dtype of the activations; the rank may be 0."""
    b: Tensor
    """[out_features, rank] in the same dtype."""
    factors: Tensor
    """float32 [rank]."""
    magnitude: Tensor | None = None
    """float32 [out_features] (DoRA; Liu et al., arXiv:2402.09353): the factor of each result, without a bias."""
    bias: Tensor | None = None
    """float32 [out_features]: added to the layer's own."""
    weight: Weight | None = None
    """[out_features, in_features], as ``pack_linear`` returns it: takes the place of the layer's weight."""
    spans: Tensor | None = None
    """int64 [out_features, 2]: the first and the end of the ranks that each row of B has, if it is 0 elsewhere."""

    @property
    def device(self) -> torch.device:
        return self.a.device

    @property
    def rank(self) -> int:
        return len(self.a)

    @property
    def address(self) -> int:
        """For kernels: they read packed adapters alone."""
        return 0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The memory that the adapter occupies, but for a weight of its own."""
        optional = (self.magnitude, self.bias)
        return (self.a, self.b, self.factors, *(each for each in optional if each is not None))


class AdapterTable:
    """The adapters of one layer by number, from 1 on. Rows of a step name them by these numbers."""

    def __init__(self, max_adapters: int, device: torch.device | None = None) -> None:
        """``device``: where kernels look addresses up; default: the host."""
        self.adapters: list[Adapter | PackedAdapter | None] = [None] * (max_adapters + 1)
        """None: there is none, or it leaves the layer alone."""
        self.addresses = torch.zeros(max_adapters + 1, dtype=torch.int64, device=device)
        """Where the kernels find each; 0: as None. The tensor itself never moves."""
        self.max_rank = 0
        """The highest rank of an adapter so far."""

    def put(self, number: int, adapter: Adapter | PackedAdapter | None) -> None:
        """Replaces an adapter, between steps."""
        self.adapters[number] = adapter
        self.max_rank = max(self.max_rank, 0 if adapter is None else adapter.rank)
        self.addresses[number] = 0 if adapter is None else adapter.address


@dataclass(frozen=True, eq=False)
class ExpertAdapters:
    """The adapters of the experts of a layer. None has a weight of its own."""

    gate_up: tuple[AdapterTable, ...]
    """Of each expert's gate and up, which are one layer."""
    down: tuple[AdapterTable, ...]


@dataclass(frozen=True, eq=False)
class PackedAdapter:
    """An adapter that only the kernels of its device can read."""

    address: int
    tensors: tuple[Tensor, ...]
    """The memory that it occupies, but for a weight of its own."""
    keep: object
    """What must live as long as it."""
    rank: int
    """As the kernels read it: maybe padded."""


@dataclass(frozen=True, eq=False)
class TableAdapter:
    """What one adapter makes of an embedding table: ``table[id] + B (A[:, id] * factor)``."""

    a: Tensor
    """[vocab_size, rank], the columns of A as rows; the rank may be 0."""
    b: Tensor
    """[embedding_dim, rank]."""
    factor: float
    table: Tensor | None = None
    """[vocab_size, embedding_dim]: takes the place of the table."""
    rows: Tensor | None = None
    """int64 [n]: ids of tokens whose vectors are replaced by ``vectors``, ascending."""
    vectors: Tensor | None = None
    """[n, embedding_dim]."""
