"""Construction context of layers and models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from executor.base import Head, ModelError
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
    """Dtype of the activations and of unquantised weights."""
    device: torch.device
    quantization: QuantizationConfig
    max_model_len: int
    """Longest sequence: as configured, else the model's maximum. The served maximum may be shorter."""
    kv_dtype: torch.dtype | None = None
    """Dtype of cached K and V; None: that of the activations."""
    head: Head = "lm"
    """What reads the hidden states, by the architecture's name."""
    max_adapters: int = 0
    """Most low-rank adapters in memory; 0: layers compute without them."""
    communicator: Communicator = field(default_factory=SingleRank)
    """Connects the ranks that share the layers."""
    stored_modules: Mapping[str, str] = field(default_factory=dict)
    """Names of modules in the checkpoint, as a quantisation lists them, by those in the model, where they differ."""

    def alone(self) -> ModelContext:
        """The context of layers that this rank has whole."""
        return replace(self, parallel=replace(self.parallel, tp_rank=0, tp_size=1), communicator=SingleRank())

    def needs_one_rank(self, what: str) -> None:
        """Refuses ranks that do not cut sums, for what they cannot divide among themselves.

        Raises:
            ModelError: There are several.
        """
        if self.communicator.size > 1 and not self.communicator.cuts_sums:
            raise ModelError(
                f"--tensor-parallel-size {self.communicator.size}: workers cannot share {what} yet "
                f"({self.config.architecture}); use 1"
            )

    def __post_init__(self) -> None:
        assert (self.communicator.rank, self.communicator.size) == (self.parallel.tp_rank, self.parallel.tp_size)
