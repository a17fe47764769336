"""The sampling seam: what a sampler returns, and stages that change logits before a token is picked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from executor.deferred import Deferred
from executor.device.steps import StepChannel
from executor.messages import I32, I64, ResolvedParams, RowError, TokenLogprobs
from executor.request_states import RequestStates

Rows = npt.NDArray[np.intp]

BAD_LOGITS = "the model produced logits that are not finite numbers"
NOTHING_LEFT = "the request's own constraints forbid every token"


def row_error(row: int, position: int, message: str) -> RowError:
    """The error of one of a row's tokens, for one of the reasons above."""
    return RowError(row=row, message=message, is_request_fault=message == NOTHING_LEFT, position=position)


@dataclass
class SampleRows:
    """The rows of logits from which tokens are picked. Those of a slot come one after another."""

    slots: I32
    """int32 [rows]: whose tokens they are."""
    positions: I64
    """int64 [rows]: their places in prompt and output, ascending for each slot. What stands before them, drafts too, is
    in the table of whoever has to read it."""
    step_rows: I32
    """int32 [rows]: their rows in the step, for the results."""
    offsets: I64 | None = None
    """int64 [rows]: which of its slot's rows each is. None: each is the only one."""

    def name(self, index: int) -> tuple[int, int]:
        """A row's number in the step, and which of that one's tokens it stands for."""
        return int(self.step_rows[index]), 0 if self.offsets is None else int(self.offsets[index])

    def __len__(self) -> int:
        return len(self.slots)


@dataclass
class SamplerOutput:
    token_ids: I64
    """int64 [rows]; 0 where ``row_errors`` says that the row is not usable."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    row_errors: list[RowError] = field(default_factory=list)


@dataclass
class Sampled:
    """Tokens that have been picked, or will have been when the device comes to it."""

    token_ids: torch.Tensor
    """int64 [rows], where the logits are."""
    output: Deferred[SamplerOutput]


@dataclass(frozen=True)
class TokenMask:
    """Tokens that a grammar allows at some rows."""

    bitmask: I32
    """int32 [any, ceil(vocab_size / 32)], bit set: allowed."""
    rows: I32
    """int32 [rows of the logits]: row of ``bitmask``, -1: all tokens are allowed."""


class SamplingStage(Protocol):
    """Changes the logits of the rows that ask for it. State by slot is written in ``add`` alone."""

    def add(self, slot: int, params: ResolvedParams) -> None:
        """A request entered a slot; what an earlier one left there is overwritten."""

    def active(self, slots: I32) -> Rows:
        """Which of these rows want the stage."""

    def apply(
        self, logits: torch.Tensor, rows: SampleRows, active: Rows, states: RequestStates, channel: StepChannel
    ) -> None:
        """Changes logits in place, without reading them.

        Args:
            logits: float32 [rows of the step, vocab_size], on the channel's device.
            rows: Whose they are.
            active: The rows that want the stage.
            states: The tokens so far.
            channel: Brings numbers to the device.
        """


class SamplerBackend(Protocol):
    """One implementation of ``executor.sampling.sampler.Sampler``."""

    def add(self, slot: int, params: ResolvedParams) -> None: ...

    def sample(
        self,
        logits: torch.Tensor,
        raw_logits: torch.Tensor,
        rows: SampleRows,
        states: RequestStates,
        mask: TokenMask | None,
    ) -> Sampled: ...

    def prompt_logprobs(
        self, logits: torch.Tensor, tokens: I32, count: int, row: int, first_position: int
    ) -> Deferred[list[TokenLogprobs]]: ...

    def step_bytes(self, num_rows: int, vocab_size: int) -> int:
        """Memory that a step of so many rows takes beside its logits, roughly."""
