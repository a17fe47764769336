"""What an adapter makes of one layer: its tensors as this rank's ops read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import ops
from executor.adapters.peft import ModuleTensors, PeftConfig
from executor.base import ModelError
from executor.layers.embedding import VocabParallelEmbedding
from executor.layers.linear import LinearLayer
from executor.layers.moe import SmallLinear
from executor.layers.parameter import Part, ShardId, Weights
from executor.quantization.packed import PackedWeights
from ops import Adapter, PackedAdapter, TableAdapter

IDENTITY_ROWS = 512
"""Rows of a unit matrix that are multiplied at a time."""


@dataclass(frozen=True, eq=False)
class LinearTarget:
    """A projection of a linear layer."""

    name: str
    layer: LinearLayer | SmallLinear
    shard_id: ShardId


@dataclass(frozen=True, eq=False)
class TableTarget:
    """An embedding or output layer."""

    name: str
    layer: VocabParallelEmbedding


@dataclass(frozen=True, eq=False)
class Change:
    """An adapter's part of one layer."""

    weights: Weights
    linear: Adapter | PackedAdapter | None = None
    """Of products."""
    table: TableAdapter | None = None
    """Of lookups."""

    def put(self, number: int) -> None:
        """Gives it a number; without content, takes away what has it."""
        if self.weights.adapters is not None and (self.linear is not None or self.table is None):
            self.weights.adapters.put(number, self.linear)
        if self.weights.table_adapters is None:
            return
        if self.table is not None:
            self.weights.table_adapters[number] = self.table
        elif self.linear is None:
            self.weights.table_adapters.pop(number, None)

    def without_content(self) -> Change:
        return replace(self, linear=None, table=None)


def placed(tensor: Tensor, part: Part, dim: int) -> Tensor:
    """This rank's elements of a dimension, at the places that they have in the layer alone."""
    if len(part.ranges) == 1 and part.size == part.full:
        return tensor
    size = max((each.offset + each.size for each in part.ranges), default=0)
    shape = list(tensor.shape)
    shape[dim] = size
    result = tensor.new_zeros(shape)
    for each in part.ranges:
        result.narrow(dim, each.offset, each.size).copy_(tensor.narrow(dim, each.start, each.size))
    return result


def numbers_of(weight: ops.Weight) -> Tensor:
    """A packed weight as numbers, float32 [out_features, in_features]."""
    if not isinstance(weight, ops.QuantizedWeight):
        return ops.unpack_linear(weight).float()
    identity = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    return torch.cat([ops.logits(rows, weight) for rows in identity.split(IDENTITY_ROWS)]).T


class Merged:
    """What an adapter makes of a layer into which projections are merged."""

    def __init__(self, weights: Weights, inputs: Part, outputs: Sequence[Part], dtype: torch.dtype) -> None:
        assert isinstance(weights, PackedWeights), "every method has packed weights"
        self.weights = weights
        self.packed = weights.packed
        self.inputs = inputs
        self.out_features = self.packed.shape[0]
        self.dtype = dtype
        self.a: list[Tensor] = []
        """[rank, in_features] of each product, as stored."""
        self.b: list[tuple[Tensor, Part]] = []
        """[rows of the projection, rank] of each, and which rows of the layer these are."""
        self.factors: list[Tensor] = []
        self.magnitude: Tensor | None = None
        self.bias: Tensor | None = None
        self.weight: Tensor | None = None
        """float32 [out_features, in_features]: takes the place of the layer's."""

    def add(self, tensors: ModuleTensors, rows: Part, config: PeftConfig) -> None:
        """Adds the tensors of a projection, whose results are ``rows`` of the layer's."""
        stored = tensors.stored
        if "a" in stored or "b" in stored:
            self._add_low_rank(tensors, rows, config)
        if "weight" in stored:
            if self.weight is None:
                self.weight = self._numbers().clone()
            self._set(self.weight, placed(tensors.read("weight", rows.full, self.inputs.full), self.inputs, 1), rows)
        if "magnitude" in stored:
            self._add_magnitude(tensors, rows, config)
        if "bias" in stored:
            own = self.weights.bias
            zero = torch.zeros(self.out_features)
            before = zero if own is None else own.data.float()
            self._set(self._biases(), tensors.read("bias", rows.full), rows, minus=before)

    def _add_low_rank(self, tensors: ModuleTensors, rows: Part, config: PeftConfig) -> None:
        a = tensors.read("a", -1, self.inputs.full)
        rank = len(a)
        if rank != config.rank_of(tensors.name):
            raise ModelError(
                f"{tensors.stored['a'].origin} has rank {rank}, and {config.source} says {config.rank_of(tensors.name)}"
            )
        b = tensors.read("b", rows.full, rank)
        factor = config.factor(tensors.name, rank)
        self.a.append(placed(a, self.inputs, 1))
        self.b.append((b, rows))
        self.factors.append(torch.full((rank,), factor))
        if "b_bias" in tensors.stored:
            added = torch.zeros(self.out_features)
            self._set(added, tensors.read("b_bias", rows.full) * factor, rows)
            self.bias = self._biases() + added

    def _add_magnitude(self, tensors: ModuleTensors, rows: Part, config: PeftConfig) -> None:
        """DoRA: the length of each row of the adapted weight is given."""
        adapted = self._numbers() + (self._whole(*self.b[-1]).float() * self.factors[-1]) @ self.a[-1].float()
        lengths = tensors.read("magnitude", rows.full)
        if self.magnitude is None:
            self.magnitude = torch.ones(self.out_features)
        factors = self.magnitude.clone()
        self._set(factors, lengths, rows)
        norms = adapted.norm(dim=1)
        for each in rows.ranges:
            place = slice(each.offset, each.offset + each.size)
            self.magnitude[place] = factors[place] / norms[place]

    def add_vectors(self, ids: Tensor, vectors: Tensor) -> None:
        """Replaces rows of the weight: their difference is a product of rank one each."""
        before = ops.embedding(ids.to(self.packed.device), self.packed).cpu().float()
        chosen = torch.zeros(self.out_features, len(ids))
        chosen[ids, torch.arange(len(ids))] = 1
        self.a.append(vectors - before)
        self.b.append((chosen, Part.whole(self.out_features)))
        self.factors.append(torch.ones(len(ids)))

    def _spans(self) -> Tensor:
        """The ranks that each row of B has, int64 [out_features, 2]."""
        spans, end = torch.zeros(self.out_features, 2, dtype=torch.int64), 0
        for b, rows in self.b:
            begin, end = end, end + b.shape[1]
            for each in rows.ranges:
                own = spans[each.offset : each.offset + each.size]
                own[:, 0] = torch.where(own[:, 1] > 0, own[:, 0], begin)
                own[:, 1] = end
        return spans

    def _whole(self, b: Tensor, rows: Part) -> Tensor:
        """The B of a projection with a row for each of the layer's."""
        if len(rows.ranges) == 1 and rows.size == self.out_features:
            return b.to(self.dtype)
        whole = torch.zeros(self.out_features, b.shape[1], dtype=self.dtype)
        self._set(whole, b, rows)
        return whole

    def _numbers(self) -> Tensor:
        numbers = numbers_of(self.packed).cpu()
        if self.weights.order is not None:
            numbers = numbers[:, torch.argsort(self.weights.order.cpu())]
        return numbers

    def _biases(self) -> Tensor:
        if self.bias is None:
            self.bias = torch.zeros(self.out_features)
        return self.bias

    @staticmethod
    def _set(target: Tensor, source: Tensor, rows: Part, minus: Tensor | None = None) -> None:
        """Writes a projection's rows to their places in the layer."""
        for each in rows.ranges:
            place = slice(each.offset, each.offset + each.size)
            part = source[each.start : each.start + each.size]
            target[place] = part if minus is None else part - minus[place]

    def change(self) -> Change:
        """The part of the adapter, packed for the device's kernels."""
        order = self.weights.order
        width = self.packed.shape[1]
        a = torch.cat([part.to(self.dtype) for part in self.a]) if self.a else torch.zeros(0, width, dtype=self.dtype)
        parts = [self._whole(*part) for part in self.b]
        b = torch.cat(parts, 1) if parts else torch.zeros(self.out_features, 0, dtype=self.dtype)
        weight = None
        if self.weight is not None:
            numbers = self.weight if order is None else self.weight[:, order]
            weight = ops.pack_linear(numbers.to(self.dtype).contiguous(), is_paired(self.packed))
        adapter = Adapter(
            (a if order is None else a[:, order]).contiguous(),
            b,
            torch.cat(self.factors) if self.factors else torch.zeros(0),
            self.magnitude,
            self.bias,
            weight,
            self._spans(),
        )
        return Change(self.weights, linear=ops.pack_adapter(adapter, self.packed))


def is_paired(weight: ops.Weight) -> bool:
    """Whether the halves of a packed weight are interleaved."""
    return not isinstance(weight, Tensor) and weight.paired


def linear_change(parts: Sequence[tuple[LinearTarget, ModuleTensors]], config: PeftConfig) -> Change:
    """An adapter's part of a linear layer, from the tensors of its projections.

    Raises:
        ModelError: A tensor does not fit the layer.
    """
    layer = parts[0][0].layer
    shape = layer.shape
    merged = Merged(layer.weights, shape.input, list(shape.outputs.values()), shape.dtype)
    for target, tensors in parts:
        merged.add(tensors, shape.outputs[target.shard_id], config)
    return merged.change()


def logits_change(target: TableTarget, parts: Sequence[ModuleTensors], config: PeftConfig) -> Change:
    """An adapter's part of an output layer, which may be the embedding, too. Raises as ``linear_change`` does."""
    shape = target.layer.shape
    merged = Merged(target.layer.weights, shape.hidden, [shape.vocab], shape.dtype)
    for tensors in parts:
        merged.add(tensors, shape.vocab, config)
        if "vectors" in tensors.stored:
            merged.add_vectors(*token_vectors(target, tensors, config))
    return merged.change()


def token_vectors(target: TableTarget, tensors: ModuleTensors, config: PeftConfig) -> tuple[Tensor, Tensor]:
    """Ids of tokens with vectors of their own, int64 [n], ascending, and these, float32 [n, hidden]."""
    shape = target.layer.shape
    leaf = tensors.name.rpartition(".")[2]
    indices = config.token_indices.get(leaf, config.token_indices.get(""))
    if indices is None or max(indices, default=0) >= shape.vocab.full:
        raise ModelError(f"{config.source}: trainable_token_indices does not fit the table {leaf}")
    ids = torch.tensor(indices, dtype=torch.int64)
    order = ids.argsort()
    return ids[order], tensors.read("vectors", len(indices), shape.hidden.full)[order]


def table_change(target: TableTarget, tensors: ModuleTensors, config: PeftConfig) -> Change:
    """An adapter's part of lookups in a table. Raises as ``linear_change`` does."""
    shape = target.layer.shape
    vocab, hidden = shape.vocab.full, shape.hidden.full
    a, b, factor = torch.zeros(vocab, 0), torch.zeros(hidden, 0), 1.0
    if tensors.stored.keys() & {"table_a", "table_b"}:
        stored = tensors.read("table_a", -1, vocab)
        b = tensors.read("table_b", hidden, len(stored))
        a, factor = stored.T.contiguous(), config.factor(tensors.name, len(stored))
    table = tensors.read("weight", vocab, hidden).to(shape.dtype) if "weight" in tensors.stored else None
    rows = vectors = None
    if "vectors" in tensors.stored:
        rows, numbers = token_vectors(target, tensors, config)
        vectors = numbers.to(shape.dtype)
    return Change(
        target.layer.weights,
        table=TableAdapter(a.to(shape.dtype), b.to(shape.dtype), factor, table, rows, vectors),
    )
