"""The sampling seam: samplers' results, and stages that edit logits before a token is picked."""

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
    """The error of one of a row's tokens, for one of the above reasons."""
    return RowError(row=row, message=message, is_request_fault=message == NOTHING_LEFT, position=position)


@dataclass
class SampleRows:
    """The rows of logits from which tokens are picked. Rows of a slot are adjacent."""

    slots: I32
    """int32 [rows]: the slot of each row."""
    positions: I64
    """int64 [rows]: positions of the tokens in the sequence, ascending within a slot. Code that reads the tokens before
    them, including drafts, finds these in ``RequestStates``."""
    step_rows: I32
    """int32 [rows]: rows in the step, for the results."""
    offsets: I64 | None = None
    """int64 [rows]: index of each row among its slot's rows. None: one row per slot."""
    device_positions: torch.Tensor | None = None
    """int64 [rows], on the device: the positions, of which the host has upper bounds. None: the host knows them."""

    def name(self, index: int) -> tuple[int, int]:
        """A row's index in the step, and the index of its token among that row's tokens."""
        return int(self.step_rows[index]), 0 if self.offsets is None else int(self.offsets[index])

    def __len__(self) -> int:
        return len(self.slots)


@dataclass
class SamplerOutput:
    token_ids: I64
    """int64 [rows]; 0 in rows with an error in ``row_errors``."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    row_errors: list[RowError] = field(default_factory=list)


@dataclass
class Sampled:
    """Sampled tokens, possibly not computed by the device yet."""

    token_ids: torch.Tensor
    """int64 [rows], on the device of the logits."""
    output: Deferred[SamplerOutput]
    status: torch.Tensor | None = None
    """int32 [rows], on the device: 0 where there is a token. None: only the output says it."""


@dataclass(frozen=True)
class TokenMask:
    """Tokens that a grammar allows in some rows."""

    bitmask: I32
    """int32 [any, ceil(vocab_size / 32)], a set bit allows the token."""
    rows: I32
    """int32 [rows of the logits]: row of ``bitmask``; -1: all tokens are allowed."""


class SamplingStage(Protocol):
    """Edits the logits of the rows that ask for it. State by slot is written only in ``add``."""

    def add(self, slot: int, params: ResolvedParams) -> None:
        """Registers a request that enters a slot, overwriting the state of an earlier one."""

    def active(self, slots: I32) -> Rows:
        """The rows, of these slots, that use the stage."""

    def apply(
        self, logits: torch.Tensor, rows: SampleRows, active: Rows, states: RequestStates, channel: StepChannel
    ) -> None:
        """Edits logits in place, without reading them on the host.

        Args:
            logits: float32 [rows of the step, vocab_size], on the channel's device.
            rows: The rows of the logits.
            active: The rows that use the stage.
            states: The tokens so far.
            channel: Channel to the device.
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

    def keep_tokens_in(self, buffer: torch.Tensor) -> bool:
        """Whether the tokens of each step are written to the start of this buffer from now on.

        Args:
            buffer: int64 [twice the most rows of a step], on the device of the logits; other results may follow the
                tokens.
        """

    def step_bytes(self, num_rows: int, vocab_size: int) -> int:
        """Approximate memory of a step with this many rows, in addition to its logits."""
