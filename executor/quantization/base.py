"""The quantisation seam: methods that create, pack and apply the weights of linear layers and embeddings.

A method gets a description of a layer and returns its weights. It never sees the layer, and the layer treats the
weights as opaque.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

from executor.base import ModelError
from executor.config import NO_QUANTIZATION, QUANTIZATION_ALIASES
from executor.quantization.readers import auto_round_method, check_fields
from executor.registry import resolve

if TYPE_CHECKING:  # the names of methods are known without torch
    import torch
    from torch import Tensor

    from executor.input_batch import InputBatch
    from executor.layers.parameter import Part, ShardId, Weights

W = TypeVar("W", bound="Weights")


@dataclass(frozen=True)
class LinearShape:
    """The properties of a linear layer that its weights depend on."""

    input: Part
    """This rank's columns of the weight."""
    outputs: Mapping[ShardId, Part]
    """This rank's rows, for each projection merged into the layer, in the order of the results."""
    bias: bool
    paired: bool
    """Two projections of equal size, one gating the other."""
    dtype: torch.dtype
    """Dtype of the activations."""
    device: torch.device

    def projection(self, shard_id: ShardId) -> LinearShape:
        """One of the projections as a separate layer, for methods that treat projections differently."""
        return replace(self, outputs={shard_id: self.outputs[shard_id].alone()}, paired=False)


@dataclass(frozen=True)
class TableShape:
    """The properties of an embedding or output layer that its weights depend on."""

    vocab: Part
    """This rank's rows of the table."""
    hidden: Part
    makes_logits: bool
    """Whether the table computes logits; a tied one is also used for lookups."""
    bias: bool
    """Whether the logits have a bias."""
    dtype: torch.dtype
    """Dtype of the activations."""
    device: torch.device


class LinearMethod(Protocol[W]):
    """How the weights of a linear layer are stored and applied."""

    def create(self, shape: LinearShape) -> W:
        """Creates the layer's weights, uninitialised.

        Raises:
            ValueError: The format cannot hold a layer of that shape. The caller adds the layer's name.
        """

    def apply(self, weights: W, x: Tensor, batch: InputBatch) -> Tensor:
        """``x`` [rows, in_features] -> [rows, out_features], bias included. Called after ``weights.pack()``.

        The rows are the tokens of the batch, which holds per-token data (``batch.row_adapters``).
        """


class EmbeddingMethod(Protocol[W]):
    """How the table of an embedding or output layer is stored and read; a tied table is both."""

    def create(self, shape: TableShape) -> W:
        """Creates the table, uninitialised. Raises as ``LinearMethod.create`` does."""

    def embed(self, weights: W, ids: Tensor, batch: InputBatch) -> Tensor:
        """``ids`` [num_tokens] -> [num_tokens, hidden_size]."""

    def logits(self, weights: W, hidden: Tensor, batch: InputBatch) -> Tensor:
        """``hidden`` [num_samples, hidden_size], of ``batch.logits_rows`` -> float32 [num_samples, vocab_size]."""


@dataclass(frozen=True)
class Options:
    """How quantised weights are used, as the command line says."""

    activations: Literal["auto", "float", "int8", "fp8"] = "auto"
    """``--quantized-activations``."""
    device_type: str = "cpu"
    """As torch names it."""
    imatrix: str = ""
    """``--imatrix``: the file with the importance of columns."""
    calibration: Sequence[int] = ()
    """Tokens of a text on which a method may measure the model."""
    dequantize: bool = False
    """Quantised weights of the checkpoint are converted to the dtype of the activations while they are loaded."""


class QuantizationConfig(Protocol):
    """A quantisation method as configured by one model."""

    renames: ClassVar[Sequence[tuple[str, str]]] = ()
    """Names of tensors in such checkpoints -> those of parameters, as of ``WeightsMapper``."""
    ignored: ClassVar[Sequence[str]] = ()
    """Names, after ``renames``, of tensors that the method does not need."""
    has_cache_scales: bool = False
    """Whether the checkpoint has scales for a KV cache in FP8: ``k_scale`` and ``v_scale`` of the attention layers."""
    calibration: Sequence[int] = ()
    """Tokens of a text on which ``executor/calibration.py`` measures the model before its weights are quantised."""

    def __init__(self, fields: Mapping[str, Any], options: Options) -> None:
        """Takes the ``quantization_config`` of config.json, empty if there is none.

        Raises:
            ModelError: A field is invalid, or asks for something that is not supported.
        """

    def linear_method(self, names: Sequence[str]) -> LinearMethod[Any]:
        """The method of a linear layer.

        Args:
            names: Full names of its modules in the checkpoint, as lists of exceptions use them; several if projections
                are merged: ``["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"]``.
        """

    def plain_linear_method(self, names: Sequence[str]) -> LinearMethod[Any]:
        """The method of a layer whose packed weights are taken apart as numbers: it keeps them in the dtype of the
        activations, and does not quantise them at load."""
        return self.linear_method(names)

    def embedding_method(self, name: str) -> EmbeddingMethod[Any]:
        """The method of the named embedding or output layer."""


REGISTRY = {
    "awq": "executor.quantization.awq:AWQ",
    "bitsandbytes": "executor.quantization.bitsandbytes:BitsAndBytes",
    "compressed-tensors": "executor.quantization.compressed_tensors:CompressedTensors",
    "fbgemm_fp8": "executor.quantization.fp8:FP8",
    "fp8": "executor.quantization.fp8:FP8",
    "gguf": "executor.quantization.gguf:GGUF",
    "gptq": "executor.quantization.gptq:GPTQ",
    "modelopt": "executor.quantization.modelopt:ModelOpt",
    "mxfp4": "executor.quantization.fp4:MXFP4",
    "unquantized": "executor.quantization.unquantized:Unquantized",
}
"""Methods of checkpoints."""
AT_LOAD = {
    "fp8": "executor.quantization.at_load:FP8",
    "int4": "executor.quantization.at_load:Int4",
    "int8": "executor.quantization.at_load:Int8",
}
"""Methods for models that are not quantised."""


def choose_quantization(
    name: str | None, fields: Mapping[str, Any] | None, options: Options = Options()
) -> QuantizationConfig:
    """The quantisation named by the model's configuration or, failing that, by the command line.

    Args:
        name: ``--quantization``.
        fields: ``quantization_config`` of config.json.
        options: How the weights are used.

    Raises:
        ModelError: The method is not supported, or the two contradict each other.
    """
    method = quantization_name(name, fields)
    if options.imatrix and method != "int4":
        raise ModelError("--imatrix is used by --quantization int4 alone; leave it out")
    registry = AT_LOAD if fields is None and method in AT_LOAD else REGISTRY
    factory: type[QuantizationConfig] = resolve(registry, method, "quantization")
    return factory(fields or {}, replace(options, dequantize=name in NO_QUANTIZATION))


def quantization_name(name: str | None, fields: Mapping[str, Any] | None) -> str:
    """The name of the method that ``choose_quantization`` would return. Raises the same errors. Needs no torch."""
    wanted = None if name is None else QUANTIZATION_ALIASES.get(name, name)
    at_load = "int8, int4 or fp8"
    if fields is None:
        if wanted is None or wanted in NO_QUANTIZATION or wanted == "gguf":  # a GGUF file of plain numbers
            return "unquantized"
        if wanted in AT_LOAD:
            return wanted
        raise ModelError(
            f"--quantization is {name}, but the model is not quantised; leave it out, or use {at_load} to quantise "
            "the model while it is loaded"
        )
    saved = fields.get("quant_method")
    if wanted == saved == "auto-round":
        wanted = None
    if saved == "auto-round":
        saved = auto_round_method(fields)
    stored = sorted(REGISTRY.keys() - {"unquantized"})
    if not isinstance(saved, str):
        raise ModelError("quantization_config: quant_method is missing; serve the unquantised model, or a GGUF version")
    if saved not in stored:
        raise ModelError(
            f"weights quantised with {saved[:100]!r} are not supported yet; serve the unquantised model (with "
            f"--quantization {at_load} it gets smaller), or one quantised with {', '.join(stored)}"
        )
    if wanted in AT_LOAD and wanted != saved:
        raise ModelError(
            f"--quantization is {name}, but the model is already quantised with {saved}; leave it out, or serve the "
            "unquantised model"
        )
    if wanted is not None and wanted not in NO_QUANTIZATION and wanted != saved:
        raise ModelError(f"--quantization is {name}, but the model's config.json says quant_method: {saved}")
    check_fields(saved, fields)
    return saved
