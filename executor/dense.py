"""Dense layers of sentence-transformers (``2_Dense``): they follow pooling, in float32."""

from __future__ import annotations

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


@dataclass(frozen=True)
class DenseModule:
    """``act(x @ weight.T + bias)``."""

    weight: F32
    """[out_features, in_features]."""
    bias: F32 | None
    activation: str
    """A name in ``ACTIVATIONS``."""

    @property
    def out_features(self) -> int:
        """Size of the vectors it makes."""
        return len(self.weight)

    def __call__(self, x: F32) -> F32:
        """``x`` [..., in_features] -> [..., out_features]. Each vector is multiplied alone."""
        rows = x.reshape(-1, x.shape[-1])
        out = np.stack([self.weight @ row for row in rows]).reshape(*x.shape[:-1], len(self.weight))
        return ACTIVATIONS[self.activation](out if self.bias is None else out + self.bias)


def load_dense(folder: Path, names: tuple[str, ...], size: int) -> tuple[DenseModule, ...]:
    """Reads the layers.

    Args:
        folder: The model's.
        names: Their folders in it, in order.
        size: Size of the vectors that the first one takes.

    Raises:
        ModelError: A file is missing or damaged, or sizes do not fit.
    """
    modules = []
    for name in names:
        module = _load(folder / name)
        if module.weight.shape[1] != size:
            raise ModelError(f"{folder / name}: takes vectors of {module.weight.shape[1]} numbers, not of {size}")
        size = module.out_features
        modules.append(module)
    return tuple(modules)


def _load(folder: Path) -> DenseModule:
    try:
        values = read_json(folder / CONFIG)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / CONFIG}: {why(error)}") from error
    fields = Fields(values if isinstance(values, dict) else {}, str(folder / CONFIG))
    inputs, outputs = fields.size("in_features"), fields.size("out_features")
    activation = fields.string("activation_function", "torch.nn.modules.activation.Tanh").rpartition(".")[2].lower()
    if activation not in ACTIVATIONS:
        fields.bad("activation_function", f"one of {', '.join(sorted(ACTIVATIONS))} of torch.nn")
    wanted: dict[str, tuple[int, ...]] = {"linear.weight": (outputs, inputs)}
    if fields.boolean("bias", True):
        wanted["linear.bias"] = (outputs,)
    found = {}
    for stored in SafetensorsCheckpoint(folder).tensors(wanted.keys(), WeightsMapper()):
        if stored.name in wanted:
            found[stored.name] = stored.read(torch.float32)
    for name, shape in wanted.items():
        if name not in found or tuple(found[name].shape) != shape:
            raise ModelError(f"{folder}: {name} is missing, or not of the shape {list(shape)}")
    bias = found.get("linear.bias")
    return DenseModule(found["linear.weight"].numpy(), None if bias is None else bias.numpy(), activation)
