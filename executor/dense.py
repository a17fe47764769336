"""Layers in files of their own, in float32: those of sentence-transformers (``2_Dense``) follow pooling, those of
late interaction make vectors of tokens (ColBERT, arXiv:2004.12832), and BGE-M3's weigh them (arXiv:2402.03216)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from executor.base import ModelError
from executor.checkpoint import SafetensorsCheckpoint
from executor.files import read_json, why
from executor.hf_config import Fields
from executor.layers.pooler_head import ACTIVATIONS
from executor.weights_mapper import WeightsMapper

F32 = npt.NDArray[np.float32]

CONFIG = "config.json"
NORM_EPSILON = 1e-5
"""Of torch's LayerNorm unless told otherwise."""
OWN = "."
"""Name of the layer that a model's own files hold, as ``linear.weight``."""


@dataclass(frozen=True)
class DenseModule:
    """``act(x @ weight.T + bias)``."""

    weight: F32
    """[out_features, in_features]."""
    bias: F32 | None
    activation: str
    """A name in ``ACTIVATIONS``."""

    @property
    def in_features(self) -> int:
        """Size of the vectors it takes."""
        return len(self.weight[0])

    @property
    def out_features(self) -> int:
        """Size of the vectors it makes."""
        return len(self.weight)

    def __call__(self, x: F32) -> F32:
        """``x`` [..., in_features] -> [..., out_features]. Each vector is multiplied alone."""
        rows = x.reshape(-1, x.shape[-1])
        out = np.stack([self.weight @ row for row in rows]).reshape(*x.shape[:-1], len(self.weight))
        return ACTIVATIONS[self.activation](out if self.bias is None else out + self.bias)


@dataclass(frozen=True)
class NormModule:
    """LayerNorm."""

    weight: F32
    """[size]."""
    bias: F32
    """[size]."""

    @property
    def in_features(self) -> int:
        """Size of the vectors it takes."""
        return len(self.weight)

    @property
    def out_features(self) -> int:
        """Size of the vectors it makes."""
        return len(self.weight)

    def __call__(self, x: F32) -> F32:
        """``x`` [..., size] -> the same shape. Each vector has its own mean and variance."""
        wide = x.astype(np.float64)
        wide -= wide.mean(-1, keepdims=True)
        deviation = np.sqrt(np.square(wide).mean(-1, keepdims=True) + NORM_EPSILON)
        scaled: F32 = (wide / deviation).astype(np.float32) * self.weight + self.bias
        return scaled


LayerModule = DenseModule | NormModule


@dataclass(frozen=True)
class TokenWeights:
    """A classifier of tokens: the weight that each has in a sparse vector."""

    layer: DenseModule
    pooling_type = "ALL"
    labels = ("weight",)
    activate = staticmethod(ACTIVATIONS["relu"])

    def __call__(self, vectors: F32) -> F32:
        """``vectors`` [..., hidden_size] -> [..., 1]."""
        return self.layer(vectors)


def load_dense(folder: Path, names: tuple[str, ...], size: int, weights: Path) -> tuple[LayerModule, ...]:
    """Reads the layers.

    Args:
        folder: The model's.
        names: Their folders in it, in order.
        size: Size of the vectors that the first one takes.
        weights: Folder of the model's weights.

    Raises:
        ModelError: A file is missing or damaged, or sizes do not fit.
    """
    modules = []
    for name in names:
        module = load_linear(weights, size, "linear.") if name == OWN else _load(folder / name)
        _check_size(module, size, folder / name)
        size = module.out_features
        modules.append(module)
    return tuple(modules)


def load_linear(folder: Path, size: int, prefix: str = "") -> DenseModule:
    """Reads a layer that has no configuration: its weight and its bias, if it has one.

    Args:
        folder: Holds them in safetensors files.
        size: Size of the vectors that it takes.
        prefix: Of the tensors' names.

    Raises:
        ModelError: As for ``load_dense``.
    """
    found = _read(folder, {f"{prefix}weight", f"{prefix}bias"})
    weight, bias = found.get(f"{prefix}weight"), found.get(f"{prefix}bias")
    if weight is None or weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        raise ModelError(f"{folder}: {prefix}weight and {prefix}bias are not those of a linear layer")
    module = DenseModule(weight.numpy(), None if bias is None else bias.numpy(), "identity")
    _check_size(module, size, folder)
    return module


def _check_size(module: LayerModule, size: int, path: Path) -> None:
    if module.in_features != size:
        raise ModelError(f"{path}: takes vectors of {module.in_features} numbers, not of {size}")


def _read(folder: Path, names: Collection[str]) -> dict[str, torch.Tensor]:
    """Those of the named tensors that a folder holds, float32."""
    stored = SafetensorsCheckpoint(folder).tensors(names, WeightsMapper())
    return {tensor.name: tensor.read(torch.float32) for tensor in stored if tensor.name in names}


def _load(folder: Path) -> LayerModule:
    try:
        values = read_json(folder / CONFIG)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / CONFIG}: {why(error)}") from error
    values = values if isinstance(values, dict) else {}
    fields = Fields(values, str(folder / CONFIG))
    if "dimension" in values:  # of LayerNorm, which has no other field
        size = (fields.size("dimension"),)
        scale, shift = _found(folder, {"norm.weight": size, "norm.bias": size}).values()
        return NormModule(scale.numpy(), shift.numpy())
    inputs, outputs = fields.size("in_features"), fields.size("out_features")
    activation = fields.string("activation_function", "torch.nn.modules.activation.Tanh").rpartition(".")[2].lower()
    if activation not in ACTIVATIONS:
        fields.bad("activation_function", f"one of {', '.join(sorted(ACTIVATIONS))} of torch.nn")
    wanted: dict[str, tuple[int, ...]] = {"linear.weight": (outputs, inputs)}
    if fields.boolean("bias", True):
        wanted["linear.bias"] = (outputs,)
    if fields.boolean("use_residual", False):
        fields.bad("use_residual", "false")
    found = _found(folder, wanted)
    bias = found.get("linear.bias")
    return DenseModule(found["linear.weight"].numpy(), None if bias is None else bias.numpy(), activation)


def _found(folder: Path, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The tensors of a folder with these names and shapes, in this order. Raises ModelError if one is missing."""
    found = _read(folder, wanted)
    for name, shape in wanted.items():
        if name not in found or tuple(found[name].shape) != shape:
            raise ModelError(f"{folder}: {name} is missing, or not of the shape {list(shape)}")
    return {name: found[name] for name in wanted}
