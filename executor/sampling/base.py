"""The sampling seam: an ordered list of stages that change logits before a token is picked."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from executor.messages import I32, ResolvedParams
from executor.request_states import RequestStates


class SamplingStage(Protocol):
    """Changes the logits of the rows that ask for it. State by slot is written in ``add`` alone."""

    def add(self, slot: int, params: ResolvedParams) -> None:
        """A request entered a slot; what an earlier one left there is overwritten."""

    def active(self, slots: I32) -> npt.NDArray[np.intp]:
        """Which of these rows want the stage."""

    def apply(self, logits: torch.Tensor, slots: I32, rows: npt.NDArray[np.intp], states: RequestStates) -> None:
        """Changes ``logits`` (float32 [rows of the step, vocab_size]) in place at ``rows``."""
