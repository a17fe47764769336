"""The quantisation seam: who creates, lays out and applies the weights of linear layers and embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from executor.base import ModelError
from executor.registry import resolve

if TYPE_CHECKING:  # the layers import this module, and the names are known without torch
    import torch
    from torch import Tensor

    from executor.layers.embedding import VocabParallelEmbedding
    from executor.layers.linear import LinearLayer


class LinearMethod(Protocol):
    """The weights of a linear layer."""

    def create_weights(
        self, layer: LinearLayer, in_features: int, out_partition_sizes: list[int], bias: bool, dtype: torch.dtype
    ) -> None:
        """Registers the layer's parameters, uninitialised.

        Args:
            layer: Its ``input_part`` and ``output_parts`` say where the checkpoint's tensors go.
            in_features: Columns of this rank's weight.
            out_partition_sizes: Rows of this rank's weight, one number per merged projection.
            bias: Whether there is a bias.
            dtype: Type of the activations.
        """

    def process_weights_after_loading(self, layer: LinearLayer) -> None:
        """Packs the loaded weights for the device and frees the unpacked copy."""

    def apply(self, layer: LinearLayer, x: Tensor) -> Tensor:
        """``x`` [rows, in_features] -> [rows, out_features]."""


class EmbeddingMethod(Protocol):
    """The table of an embedding or of an output layer; a tied table is both."""

    def create_weights(self, layer: VocabParallelEmbedding, dtype: torch.dtype) -> None:
        """Registers the layer's parameters, uninitialised; ``vocab_part`` and ``hidden_size`` give the shape."""

    def process_weights_after_loading(self, layer: VocabParallelEmbedding) -> None: ...

    def embed(self, layer: VocabParallelEmbedding, ids: Tensor) -> Tensor:
        """``ids`` [num_tokens] -> [num_tokens, hidden_size]."""

    def logits(self, layer: VocabParallelEmbedding, hidden: Tensor) -> Tensor:
        """``hidden`` [num_samples, hidden_size] -> float32 [num_samples, vocab_size]."""


class QuantizationConfig(Protocol):
    """A quantisation method as configured by one model."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        """Takes the ``quantization_config`` of config.json, empty if there is none."""

    def linear_method(self, prefix: str) -> LinearMethod:
        """The method of the linear layer of that name."""

    def embedding_method(self, prefix: str) -> EmbeddingMethod: ...


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
