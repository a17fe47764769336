"""What every layer and model is built from."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from executor.hf_config import HFConfig
from executor.parallel import ParallelState
from executor.quantization import QuantizationConfig


@dataclass(frozen=True)
class ModelContext:
    """The one argument of a model's constructor."""

    config: HFConfig
    parallel: ParallelState
    dtype: torch.dtype
    """Type of the activations, and of weights that no quantisation stores in another."""
    device: torch.device
    quantization: QuantizationConfig
    max_model_len: int
    """Longest sequence: as configured, else what the model was made for. What is served may be less."""
