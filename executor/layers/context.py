"""What every layer and model is built from."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from executor.hf_config import HFConfig
from executor.parallel import ParallelState
from executor.quantization import QuantizationConfig
from ops import Communicator, SingleRank


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
    communicator: Communicator = field(default_factory=SingleRank)
    """Where the ranks that share the layers meet."""

    def __post_init__(self) -> None:
        assert (self.communicator.rank, self.communicator.size) == (self.parallel.tp_rank, self.parallel.tp_size)
