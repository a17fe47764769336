"""The tokens of a step as columns: one entry per token, row by row."""

from __future__ import annotations

import numpy as np

from engine_core.in_flight import I64, Bools, InFlight
from engine_core.messages import I32, i32, u8
from executor.messages import ModelRunnerOutput, row_offsets


class StepTokens:
    """Tokens of the rows that sample: each row's accepted drafts and one more.

    Attributes:
        rows: int64 [samples]: the rows of the step.
        counts: int64 [samples]: tokens that the worker sampled for each row.
        kept: int64 [samples]: how many of these, from the first, belong to the output. 0 if the request has left its
            slot; later checks may lower others.
        num_verified: uint8 [samples]: drafts that the step verified for each row; None: none.
    """

    def __init__(self, step: InFlight, result: ModelRunnerOutput, current: Bools) -> None:
        """
        Args:
            step: The plan.
            result: Its result.
            current: bool [rows]: the request still has its slot.
        """
        self._tokens = i32(result.sampled_token_ids)
        self.rows: I64 = step.sampled.nonzero()[0]
        self.counts: I64 = np.ones(len(self.rows), np.int64)
        self._starts: I64 | None = None
        """Start of each row's tokens; None: one token per row."""
        if result.num_accepted.strip(b"\0"):
            self.counts += u8(result.num_accepted)
            self._starts = np.cumsum(self.counts) - self.counts
        self.num_verified = u8(result.num_verified) if result.num_verified else None
        self.kept: I64 = self.counts * current[self.rows]
        for error in result.row_errors:
            if step.sampled[error.row] and current[error.row]:
                self.kept[self.sample(error.row)] -= 1

    def sample(self, row: int) -> int:
        """Index of a sampling row in the columns."""
        return int(np.searchsorted(self.rows, row))

    def of(self, sample: int) -> list[int]:
        """The kept tokens of a row."""
        start = sample if self._starts is None else int(self._starts[sample])
        tokens: list[int] = self._tokens[start : start + int(self.kept[sample])].tolist()
        return tokens

    def verified(self, rows: I64) -> I64 | None:
        """Drafts that the step verified in each of these rows, which sample; None: none at all."""
        if self.num_verified is None:
            return None
        counts: I64 = self.num_verified[np.searchsorted(self.rows, rows)].astype(np.int64)
        return counts

    def columns(self) -> tuple[I32, I64, I64 | None]:
        """The kept tokens.

        Returns:
            int32 [tokens]: the tokens; int64 [tokens]: their rows; int64 [tokens]: index of each token among its row's
            tokens, None: one token per row.
        """
        if self._starts is None:
            samples = self.kept.nonzero()[0]
            if len(samples) == len(self.rows):
                return self._tokens, self.rows, None
            return self._tokens[samples], self.rows[samples], None
        samples, offsets = row_offsets(self.counts)
        kept = offsets < self.kept[samples]
        return self._tokens[kept], self.rows[samples[kept]], offsets[kept]
