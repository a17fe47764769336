"""The quantisation seam: who creates, lays out and applies the weights of linear layers and embeddings.

A method is told what a layer is and returns its weights; it knows no layer, and a layer knows nothing of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from executor.base import ModelError
from executor.registry import resolve

if TYPE_CHECKING:  # the names of methods are known without torch
    import torch
    from torch import Tensor

    from executor.input_batch import InputBatch
    from executor.layers.parameter import Part, ShardId, Weights

W = TypeVar("W", bound="Weights")


@dataclass(frozen=True)
class LinearShape:
    """A linear layer, as far as its weights depend on it."""

    input: Part
    """This rank's columns of the weight."""
    outputs: Mapping[ShardId, Part]
    """This rank's rows, for each projection merged into the layer, in the order of the results."""
    bias: bool
    paired: bool
    """Two projections of one size, of which one gates the other."""
    dtype: torch.dtype
    """Type of the activations."""
    device: torch.device

    def projection(self, shard_id: ShardId) -> LinearShape:
        """One of the projections as a layer of its own, for methods that treat them differently."""
        return replace(self, outputs={shard_id: self.outputs[shard_id].alone()}, paired=False)


@dataclass(frozen=True)
class TableShape:
    """An embedding or output layer, as far as its weights depend on it."""

    vocab: Part
    """This rank's rows of the table."""
    hidden: Part
    makes_logits: bool
    """Whether logits are made of the table; a tied one is looked up as well."""
    dtype: torch.dtype
    """Type of the activations."""
    device: torch.device


class LinearMethod(Protocol[W]):
    """How the weights of a linear layer are stored and multiplied with."""

    def create(self, shape: LinearShape) -> W:
        """The layer's weights, uninitialised.

        Raises:
            ValueError: The format cannot hold a layer of that shape; the message needs no name.
        """

    def apply(self, weights: W, x: Tensor, batch: InputBatch) -> Tensor:
        """``x`` [rows, in_features] -> [rows, out_features], the bias added. Called after ``weights.pack()``.

        The rows are the tokens of the batch, which knows what belongs to each of them (``batch.row_adapters``).
        """


class EmbeddingMethod(Protocol[W]):
    """How the table of an embedding or of an output layer is stored and read; a tied table is both."""

    def create(self, shape: TableShape) -> W:
        """The table, uninitialised. Raises as ``LinearMethod.create`` does."""

    def embed(self, weights: W, ids: Tensor, batch: InputBatch) -> Tensor:
        """``ids`` [num_tokens] -> [num_tokens, hidden_size]."""

    def logits(self, weights: W, hidden: Tensor, batch: InputBatch) -> Tensor:
        """``hidden`` [num_samples, hidden_size], of ``batch.logits_rows`` -> float32 [num_samples, vocab_size]."""


class QuantizationConfig(Protocol):
    """A quantisation method as configured by one model."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        """Takes the ``quantization_config`` of config.json, empty if there is none."""

    def linear_method(self, names: Sequence[str]) -> LinearMethod[Any]:
        """The method of a linear layer.

        Args:
            names: Full names of its modules in the checkpoint, which are what lists of exceptions name; several where
                projections are merged: ``["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"]``.
        """

    def embedding_method(self, name: str) -> EmbeddingMethod[Any]:
        """The method of the embedding or output layer of that name."""


REGISTRY = {"unquantized": "executor.quantization.unquantized:Unquantized"}


def choose_quantization(name: str | None, fields: Mapping[str, Any] | None) -> QuantizationConfig:
    """The quantisation that a model's configuration or, where that says nothing, the command line names.

    Args:
        name: ``--quantization``.
        fields: ``quantization_config`` of config.json.

    Raises:
        ModelError: The method is unknown, or the two contradict each other.
    """
    factory: type[QuantizationConfig] = resolve(REGISTRY, quantization_name(name, fields), "quantization")
    return factory(fields or {})


def quantization_name(name: str | None, fields: Mapping[str, Any] | None) -> str:
    """The method that ``choose_quantization`` would choose, by name. Raises as it does."""
    saved = None if fields is None else str(fields.get("quant_method"))
    chosen = saved or name or "unquantized"
    if name is not None and name != chosen:
        raise ModelError(f"--quantization is {name}, but the model's config.json says quant_method: {saved}")
    if chosen not in REGISTRY:
        raise ModelError(
            f"weights quantised with {chosen!r} are not supported yet; serve the model without quantisation, or a GGUF "
            "file of it"
        )
    return chosen
